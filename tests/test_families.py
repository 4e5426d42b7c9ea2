"""Finding experts in checkpoints of every family, and refusing what is incomplete."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from qmoe_codec.errors import CheckpointError, QMoEError, UnsupportedModelError
from qmoe_quantize.config import ModelConfig
from qmoe_quantize.families import FAMILIES, find_layers
from qmoe_quantize.pipeline import dense_tensors, expert_layers
from qmoe_quantize.shapes import tensors_of
from source_models import CONFIGS, FUSED, config_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import families

EXPECTED = {
    "olmoe": {"model.layers.0.mlp.experts": 5, "model.layers.1.mlp.experts": 5},
    "qwen2_moe": {"model.layers.0.mlp.experts": 4, "model.layers.1.mlp.experts": 4},
    "qwen3_moe": {"model.layers.1.mlp.experts": 4},
    "mixtral": {"model.layers.0.block_sparse_moe.experts": 3, "model.layers.1.block_sparse_moe.experts": 3},
    "deepseek_v2": {"model.layers.1.mlp.experts": 4},
    "deepseek_v3": {"model.layers.1.mlp.experts": 4},
    "switch_transformers": {
        "encoder.block.1.layer.1.mlp.experts": 3,
        "encoder.block.3.layer.1.mlp.experts": 3,
        "decoder.block.1.layer.2.mlp.experts": 3,
    },
}


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


def model(family: str, **changes: Any) -> ModelConfig:
    return ModelConfig(Path("somewhere/config.json"), {**config_of(family), **changes})


def table(config: ModelConfig) -> dict[str, Any]:
    return dict(tensors_of(config))


def test_every_family_is_tested() -> None:
    """Those that are not here have their shapes from transformers: see test_transformers.py."""
    assert set(CONFIGS) == {*EXPECTED, *FUSED}
    assert {family for family in FAMILIES if family not in families.CONFIGS} == set()


@pytest.mark.parametrize("model_type", EXPECTED)
def test_layers_of(model_type: str) -> None:
    config = model(model_type)
    tensors = table(config)
    layers = expert_layers(config, tensors)
    assert {layer.prefix: layer.experts for layer in layers} == EXPECTED[model_type]
    assert [layer.prefix for layer in layers] == list(EXPECTED[model_type])  # in the order of the model
    gated = model_type != "switch_transformers"
    named = set()
    for layer in layers:
        assert [p.role for p in layer.projections] == (["gate", "up", "down"] if gated else ["up", "down"])
        assert layer.dtype == config.dtype
        for projection in layer.projections:
            assert projection.tensor.startswith(layer.prefix)
            for expert in range(layer.experts):
                name = projection.tensor_name(expert)
                assert tensors[name].shape == (projection.rows, projection.columns)
                named.add(name)
        down = layer.projections[-1]
        assert all((p.rows, p.columns) == (down.columns, down.rows) for p in layer.projections[:-1])
    assert named.isdisjoint(dense_tensors(tensors, layers))
    assert named | set(dense_tensors(tensors, layers)) == set(tensors)
    assert all(".experts." in name for name in named)
    assert not any(".experts." in name for name in dense_tensors(tensors, layers))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("variant", [0, 1])
def test_shapes_are_those_that_transformers_saves(model_type: str, variant: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from safetensors import safe_open

    changes: list[dict[str, dict[str, Any]]] = [
        {},
        {
            "olmoe": {"attention_bias": True, "tie_word_embeddings": True},
            "qwen2_moe": {"decoder_sparse_step": 2, "qkv_bias": False},
            "qwen3_moe": {"attention_bias": True, "head_dim": 4, "mlp_only_layers": []},
            "mixtral": {"head_dim": 10},
            "gpt_oss": {"attention_bias": False, "tie_word_embeddings": True},
            "deepseek_v2": {"q_lora_rank": 16, "first_k_dense_replace": 0},
            "deepseek_v3": {"q_lora_rank": None, "attention_bias": True},
            "switch_transformers": {
                "tie_word_embeddings": False,
                "router_bias": True,
                "encoder_sparse_step": 1,
            },
        },
    ]
    values = config_of(model_type, **changes[variant].get(model_type, {}))
    values.pop("model_type")
    pretrained = transformers.AutoConfig.for_model(model_type, pad_token_id=0, eos_token_id=1, **values)
    kind = transformers.AutoModelForCausalLM
    if model_type == "switch_transformers":
        kind = transformers.AutoModelForSeq2SeqLM
    kind.from_config(pretrained).to(getattr(torch, values["dtype"])).save_pretrained(tmp_path)
    config = ModelConfig.read(tmp_path / "config.json")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {name: tensor.shape for name, tensor in tensors_of(config).items()} == saved
    assert find_layers(config, table(config))


def test_unknown_architecture() -> None:
    config = ModelConfig(Path("somewhere/config.json"), {"model_type": "gpt_neo"})
    with pytest.raises(UnsupportedModelError) as caught:
        find_layers(config, {})
    text = str(caught.value)
    assert "gpt_neo" in text
    assert "olmoe" in text
    assert "switch_transformers" in text
    assert "config.json" in text


def spoiled(spoil: Any, model_type: str = "olmoe", **changes: Any) -> QMoEError:
    config = model(model_type, **changes)
    tensors = table(model(model_type))
    spoil(tensors)
    with pytest.raises(QMoEError) as caught:
        expert_layers(config, tensors)
    assert "\n" not in str(caught.value)
    return caught.value


UP = "model.layers.1.mlp.experts.3.up_proj.weight"


def test_a_missing_tensor_is_named() -> None:
    error = spoiled(lambda tensors: tensors.pop(UP))
    assert isinstance(error, CheckpointError)
    assert error.field == UP


def test_a_missing_expert_is_named() -> None:
    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".experts.2." in name]:
            del tensors[name]

    error = spoiled(drop)
    assert isinstance(error, CheckpointError)
    assert error.field == "model.layers.0.mlp.experts.2.gate_proj.weight"


def test_a_missing_layer_is_named() -> None:
    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "layers.1.mlp.experts." in name]:
            del tensors[name]

    error = spoiled(drop)
    assert isinstance(error, CheckpointError)
    assert error.field == "model.layers.1.mlp.experts.0.gate_proj.weight"


def test_an_expert_too_many_is_named() -> None:
    error = spoiled(lambda tensors: None, num_experts=4)
    assert isinstance(error, CheckpointError)
    assert error.field == "model.layers.0.mlp.experts.4.down_proj.weight"
    assert "expected 4 experts" in str(error)


@pytest.mark.parametrize(
    "tensor",
    [Tensor("BF16", (36, 25)), Tensor("BF16", (36,)), Tensor("F32", (36, 24)), Tensor("BF16", (24, 36))],
)
def test_a_different_tensor_is_named(tensor: Tensor) -> None:
    error = spoiled(lambda tensors: tensors.update({UP: tensor}))
    assert isinstance(error, CheckpointError)
    assert error.field == UP


def test_shapes_unlike_the_configuration() -> None:
    error = spoiled(lambda tensors: None, intermediate_size=40)
    assert isinstance(error, CheckpointError)
    assert error.value == [36, 24]
    assert error.expected == [40, 24]


def test_float8_experts() -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if ".experts." in name:
                tensors[name] = Tensor("F8_E4M3", tensor.shape)

    error = spoiled(spoil)
    assert isinstance(error, UnsupportedModelError)
    assert error.value == "F8_E4M3"


@pytest.mark.parametrize("end", ["weight_scale_inv", "bias", "weight.extra"])
def test_tensors_beside_the_weights_of_experts(end: str) -> None:
    name = f"model.layers.0.mlp.experts.0.up_proj.{end}"
    error = spoiled(lambda tensors: tensors.update({name: Tensor("F32", (1, 1))}))
    assert isinstance(error, UnsupportedModelError)
    assert error.field == name


def test_no_experts_at_all() -> None:
    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]

    error = spoiled(drop)
    assert isinstance(error, CheckpointError)
    assert "no expert tensors" in str(error)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_experts": None}, "num_experts or num_local_experts or n_routed_experts or moe_num_experts"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": "5"}, "num_experts"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"dtype": "int4"}, "dtype"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"model_type": 3}, "model_type"),
    ],
)
def test_illegal_configurations(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        expert_layers(model("olmoe", **changes), table(model("olmoe")))
    assert caught.value.field == field
    assert "config.json" in str(caught.value)


def test_other_names_of_the_number_of_experts() -> None:
    values = config_of("qwen3_moe")
    values["num_local_experts"] = values.pop("num_experts")
    config = ModelConfig(Path("config.json"), values)
    assert config.experts == 4
    assert find_layers(config, table(config))
