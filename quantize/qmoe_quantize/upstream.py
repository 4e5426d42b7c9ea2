"""What transformers says of a model, asked without its weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from qmoe_codec.errors import MissingPackageError, QMoEError, UnsupportedModelError

from .config import ModelConfig


def shapes_of(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors in a checkpoint of this model, as transformers would write it.

    Raises
    ------
    MissingPackageError
        transformers is not installed.
    UnsupportedModelError
        It does not know the model, or refuses the configuration.
    """
    try:
        import torch
        import transformers
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict
    except ModuleNotFoundError:
        raise MissingPackageError(
            "this family needs transformers: pip install 'qmoe-format[transformers]'", file=config.file
        ) from None
    architecture: Any = _architecture(transformers, config)
    logger = transformers.utils.logging.get_logger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        pretrained = transformers.AutoConfig.for_model(**dict(config.values))
        with torch.device("meta"):
            model = architecture._from_config(pretrained)
        tensors = remove_tied_weights_from_state_dict(model.state_dict(), model)
        for name, tensor in revert_weight_conversion(model, tensors).items():
            yield name, tuple(tensor.shape)
    except QMoEError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} cannot build this model: {reason}", file=config.file
        ) from error
    finally:
        logger.setLevel(level)


def _architecture(transformers: Any, config: ModelConfig) -> Any:
    """The class that `config` names, or the usual one of its kind."""
    architectures = config.values.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if name is None:
        mappings = transformers.models.auto.modeling_auto
        kind = config.text("model_type")
        for mapping in (
            mappings.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            mappings.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        ):
            name = name or mapping.get(kind)
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if found is None:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} has no such model class",
            file=config.file,
            field="architectures",
            value=architectures,
        )
    return found
