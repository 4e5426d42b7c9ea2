"""A model's ``config.json``, read with names and types checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qmoe_codec.errors import CheckpointError, UnsupportedModelError

from qmoe_format.files import read_json_object

# Newer releases of transformers renamed some of these.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ModelConfig:
    """The values of a ``config.json``.

    Attributes
    ----------
    file : Path
        Where it was read, for messages.
    values : Mapping
        Its content.
    """

    file: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a ``config.json``.

        Raises
        ------
        CheckpointError
            It is missing.
        HeaderError
            It is not a JSON object.
        UnsupportedModelError
            The weights are quantized already.
        """
        if not file.exists():
            raise CheckpointError("not found", file=file, expected="a Hugging Face checkpoint")
        values = read_json_object(file)
        if quantization := values.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise UnsupportedModelError(
                "the checkpoint is packed already"
                if method == "qmoe"
                else "the checkpoint is quantized already",
                file=file,
                field="quantization_config",
                value=method,
                expected="an unquantized checkpoint"
                + ("; transformers makes one with Mxfp4Config(dequantize=True)" if method == "mxfp4" else ""),
            )
        return cls(file, values)

    @property
    def directory(self) -> Path:
        """The checkpoint's directory."""
        return self.file.parent

    def number(self, name: str, default: int | None = None) -> int:
        """A non-negative integer; `default` where it is absent or null."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._illegal(name, "a non-negative integer")
        return value

    def decimal(self, name: str, default: float) -> float:
        """A finite number; `default` where it is absent or null."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < float("inf"):
            raise self._illegal(name, "a number")
        return float(value)

    def truth(self, name: str, default: bool) -> bool:
        """A boolean; `default` where it is absent or null."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._illegal(name, "true or false")
        return value

    def text(self, name: str) -> str:
        """A string."""
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self._illegal(name, "a string")
        return value

    def numbers(self, name: str) -> list[int]:
        """A list of integers; empty where it is absent or null."""
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise self._illegal(name, "a list of integers")
        return value

    @property
    def experts(self) -> int:
        """Number of routed experts in a layer."""
        for name in EXPERT_COUNTS:
            if self.values.get(name) is not None:
                if count := self.number(name):
                    return count
                raise self._illegal(name, "at least one expert")
        raise CheckpointError(
            "missing", file=self.file, field=" or ".join(EXPERT_COUNTS), expected="a number of experts"
        )

    @property
    def dtype(self) -> str:
        """Safetensors name of the dtype that the model was saved in, ``BF16`` where it is not said."""
        name = self.values.get("dtype") or self.values.get("torch_dtype") or "bfloat16"
        names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
        if not isinstance(name, str) or name not in names:
            raise CheckpointError(
                "unknown", file=self.file, field="dtype", value=name, expected=" or ".join(names)
            )
        return names[name]

    def _illegal(self, name: str, expected: str) -> CheckpointError:
        value = self.values.get(name, "nothing")
        return CheckpointError("illegal", file=self.file, field=name, value=value, expected=expected)
