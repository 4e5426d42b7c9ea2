"""Packed models in transformers: every family computes what its unpacked checkpoint computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import packed_models
import pytest
import torch
import transformers
from qmoe_codec.errors import (
    ChecksumError,
    FormatError,
    HeaderError,
    QMoEError,
    TruncatedError,
    UnsupportedModelError,
    VersionError,
)
from qmoe_quantize.pipeline import PackOptions, pack
from safetensors.torch import load_file, save_file

import qmoe_format
from qmoe_format.torch import QMoEExperts
from qmoe_format.transformers import QMoEConfig, QMoEQuantizer, load

DECODER = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
DEEPSEEK = {
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
SHARED = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {**DECODER, "num_experts": 5},
    "qwen2_moe": {**DECODER, **SHARED, "decoder_sparse_step": 1},
    "qwen3_moe": {
        **DECODER,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "head_dim": 8,
        "mlp_only_layers": [0],
    },
    "mixtral": {**DECODER, "num_local_experts": 3},
    "deepseek_v2": {**DECODER, **DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": {**DECODER, **DEEPSEEK},
    "switch_transformers": {
        "vocab_size": 40,
        "d_model": 24,
        "d_kv": 6,
        "d_ff": 36,
        "num_heads": 4,
        "num_layers": 4,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 1,
        "num_experts": 3,
        "expert_capacity": 4,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    },
}
CAUSAL = [name for name in FAMILIES if name != "switch_transformers"]


transformers.utils.logging.disable_progress_bar()


def source(directory: Path, family: str = "olmoe", **changes: Any) -> Path:
    """A checkpoint with random weights, written by transformers itself."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    auto = (
        transformers.AutoModelForSeq2SeqLM
        if family == "switch_transformers"
        else transformers.AutoModelForCausalLM
    )
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def packed(directory: Path, original: Path, **options: Any) -> Path:
    pack(original, directory, PackOptions(levels="lsq", **options))
    return directory


def unpacked(directory: Path, original: Path, model: Path) -> Path:
    """The original with its experts replaced by what the packed model decodes to."""
    directory.mkdir()
    tensors = load_file(original / "model.safetensors")
    with qmoe_format.open(model) as opened:
        for layer in opened.layers.values():
            for expert in range(layer.experts):
                for p in layer.projections:
                    matrix = opened.layer(layer.prefix).matrix(expert, p.name).dequantize("float32")
                    assert p.tensor_name(expert) in tensors
                    tensors[p.tensor_name(expert)] = torch.from_numpy(np.array(matrix)).to(torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    for file in original.glob("*.json"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("olmoe")
    return packed(folder / "packed", source(folder / "source"))


@pytest.fixture
def spoiled(olmoe: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    packed_models.restore(tmp_path / "spoiled", packed_models.contents(olmoe))
    return tmp_path / "spoiled"


TOKENS = torch.arange(22).reshape(2, 11) % 40


def logits(model: transformers.PreTrainedModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    arguments = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=tokens, **arguments).logits
    return output


@pytest.mark.parametrize("dense", ["copy", "zstd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_computes_what_the_unpacked_model_computes(tmp_path: Path, family: str, dense: str) -> None:
    original = source(tmp_path / "source", family)
    packed_path = packed(tmp_path / "packed", original, dense=dense)
    plain_path = unpacked(tmp_path / "plain", original, packed_path)

    model = load(packed_path, dtype=torch.float32)
    plain = type(model).from_pretrained(plain_path, dtype=torch.float32)
    experts = [module for module in model.modules() if isinstance(module, QMoEExperts)]
    with qmoe_format.open(packed_path) as opened:
        assert len(experts) == len(opened.layers)
        dense_tensors = len(opened.dense_names())
    kept = [name for name in model.state_dict() if ".qmoe_" not in name]
    assert not any("experts.gate_up_proj" in name or ".expert_0." in name for name in kept)
    assert len(kept) >= dense_tensors
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    whole = type(model).from_pretrained(original, dtype=torch.float32)
    assert not torch.allclose(logits(model), logits(whole), rtol=1e-2, atol=1e-2)  # so the experts matter

    greedy = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    assert torch.equal(model.generate(TOKENS, **greedy), plain.generate(TOKENS, **greedy))


def test_keeps_the_dtype_of_the_checkpoint(olmoe: Path) -> None:
    model = load(olmoe)
    assert model.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16
    torch.testing.assert_close(
        logits(model).float(), logits(load(olmoe, dtype=torch.float32)), rtol=0.05, atol=0.5
    )


def test_from_pretrained_loads_the_same(olmoe: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(olmoe)
    assert sum(isinstance(module, QMoEExperts) for module in model.modules()) == 2
    assert torch.equal(logits(model), logits(load(olmoe)))


def test_tied_embeddings(tmp_path: Path) -> None:
    original = source(tmp_path / "source", tie_word_embeddings=True)
    packed_path = packed(tmp_path / "packed", original, dense="zstd")
    model = load(packed_path)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    plain = type(model).from_pretrained(unpacked(tmp_path / "plain", original, packed_path))
    torch.testing.assert_close(logits(model), logits(plain), rtol=0.02, atol=0.1)


def test_dense_tensors_get_the_dtype_that_transformers_would_give_them(tmp_path: Path) -> None:
    """DeepSeek keeps one tensor in float32 whatever the dtype of the model."""
    original = source(tmp_path / "source", "deepseek_v3")
    plain = load(packed(tmp_path / "copy", original))
    zstd = load(packed(tmp_path / "zstd", original, dense="zstd"))
    assert plain.state_dict().keys() == zstd.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert zstd.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(zstd.state_dict()[name], tensor), name


def test_a_packed_layer_that_the_model_ignores(tmp_path: Path) -> None:
    """DeepSeek-V3 has a layer 61 for multi-token prediction, which transformers does not load."""
    original = source(tmp_path / "source", "deepseek_v3")
    file = original / "model.safetensors"
    tensors = load_file(file)
    extra = {n.replace("layers.1.", "layers.61."): t.clone() for n, t in tensors.items() if "layers.1." in n}
    save_file({**tensors, **extra}, file, {"format": "pt"})
    packed_path = packed(tmp_path / "packed", original, dense="zstd")
    with qmoe_format.open(packed_path) as opened:
        assert "model.layers.61.mlp.experts" in opened.layers
    model = load(packed_path)
    assert sum(isinstance(module, QMoEExperts) for module in model.modules()) == 1


def test_is_for_inference(olmoe: Path, tmp_path: Path) -> None:
    model = load(olmoe)
    assert not model.training
    assert not model(input_ids=TOKENS).logits.requires_grad  # without torch.no_grad()
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")


def quantization_config(model: Path) -> dict[str, Any]:
    with qmoe_format.open(model) as opened:
        config = opened.config["quantization_config"]
    assert isinstance(config, dict)
    return config


def test_another_device_is_refused(olmoe: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="CPU"):
        load(olmoe, device="cuda")
    with pytest.raises(UnsupportedModelError, match="CPU"):
        QMoEQuantizer(QMoEConfig(**quantization_config(olmoe))).validate_environment(
            device_map={"": "cuda:0"}
        )


def edit_config(model: Path, **changes: Any) -> None:
    packed_models.edit_json(model / "config.json", lambda config: config.update(changes))
    packed_models.sign(model)


@pytest.mark.parametrize("architectures", [None, [], ["NoSuchModel"], ["AutoConfig"], "OlmoeForCausalLM"])
def test_an_unknown_architecture_is_refused(spoiled: Path, architectures: object) -> None:
    edit_config(spoiled, architectures=architectures)
    with pytest.raises(UnsupportedModelError, match="architectures"):
        load(spoiled)


def test_a_missing_tensor_is_refused(spoiled: Path) -> None:
    edit_config(spoiled, num_hidden_layers=3)
    with pytest.raises(UnsupportedModelError, match=r"missing_keys.*model\.layers\.2"):
        load(spoiled)


def test_a_layer_without_a_module_is_refused(spoiled: Path) -> None:
    edit_config(spoiled, num_hidden_layers=1)
    with pytest.raises(
        UnsupportedModelError, match=r"no module.*model\.layers\.1|model\.layers\.1.*no module"
    ):
        load(spoiled)


def test_experts_of_another_shape_are_refused(spoiled: Path) -> None:
    edit_config(spoiled, intermediate_size=41)
    with pytest.raises(HeaderError, match="down_proj"):
        load(spoiled)


def test_dense_tensors_of_another_shape_are_refused(spoiled: Path) -> None:
    edit_config(spoiled, vocab_size=41)
    with pytest.raises(UnsupportedModelError) as caught:
        load(spoiled)
    assert "\n" not in str(caught.value)


def test_experts_of_another_kind_are_refused(spoiled: Path) -> None:
    """The experts of gpt-oss have biases and a gate of their own."""
    edit_config(spoiled, architectures=["GptOssForCausalLM"], model_type="gpt_oss", num_local_experts=5)
    with pytest.raises(UnsupportedModelError, match="GptOssExperts"):
        load(spoiled)


def test_a_directory_that_is_no_packed_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TruncatedError, match=r"manifest\.json"):
        load(source(tmp_path / "source"))
    with pytest.raises(QMoEError, match="no such directory"):
        load(tmp_path / "nothing")


def test_another_version_is_refused(spoiled: Path) -> None:
    packed_models.edit_json(
        spoiled / "config.json", lambda config: config["quantization_config"].update(version="2.0")
    )
    packed_models.sign(spoiled)
    with pytest.raises(VersionError):
        load(spoiled)
    with pytest.raises(VersionError):
        transformers.AutoModelForCausalLM.from_pretrained(spoiled)


def alter(model: Path, tensor: str, position: int) -> None:
    """Flip a bit of a tensor."""
    with qmoe_format.open(model) as opened:
        shard = next(file for file in opened.shards.values() if tensor in file.tensors)
        path, place = shard.path, shard.tensors[tensor].start + position
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_altered_experts_are_refused_when_used(spoiled: Path) -> None:
    alter(spoiled, "model.layers.1.mlp.experts.qmoe_store", 70)
    with pytest.raises(ChecksumError, match="expert 0"):
        logits(load(spoiled), torch.arange(40)[None])
    logits(load(spoiled, verify=False), torch.arange(40)[None])


def test_an_altered_dense_frame_is_refused(tmp_path: Path) -> None:
    model = packed(tmp_path / "packed", source(tmp_path / "source"), dense="zstd")
    alter(model, "model.embed_tokens.weight.qmoe_zstd", 200)
    with pytest.raises(FormatError, match=r"model\.embed_tokens\.weight\.qmoe_zstd"):
        load(model)


@pytest.mark.parametrize(
    ("package", "module"),
    [("torch", "torch"), ("torch", "transformers"), ("transformers", "transformers")],
)
def test_a_package_that_is_not_installed(package: str, module: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import qmoe_format.{module}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert "MissingPackageError" in message
    assert f"{package} is not installed: pip install 'qmoe-format[{package}]'" in message
