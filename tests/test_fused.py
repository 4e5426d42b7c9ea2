"""Experts that lie in one tensor for a whole layer, with biases and a gating of their own (spec 6.3)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import c_library
import numpy as np
import packed_models
import pytest
import torch
import transformers
from qmoe_codec.errors import (
    ArgumentError,
    CheckpointError,
    HeaderError,
    QMoEError,
    UnsupportedModelError,
    VersionError,
)
from qmoe_quantize import CalibrationOptions, PackOptions, TextOptions, pack, ternarize
from qmoe_quantize.plan import predict
from qmoe_quantize.recipes import RecipeSettings
from safetensors.torch import load_file, save_file
from source_models import random_model

import qmoe_format
from qmoe_format import LayerSpec, Projection
from qmoe_format.container import Gating, QuantizationConfig
from qmoe_format.torch import QMoEExperts
from qmoe_format.unpack import unpack

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import families

PREFIX = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("gpt_oss") / "source", "gpt_oss")


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    pack(source, source.parent / "packed", PackOptions(levels="lsq"))
    return source.parent / "packed"


def original(source: Path) -> dict[str, torch.Tensor]:
    return load_file(source / "model.safetensors")


def matrices(tensors: dict[str, torch.Tensor], expert: int, prefix: str = PREFIX) -> dict[str, torch.Tensor]:
    """The matrices [out, in] of an expert, as the code of GPT-OSS takes them from its tensors."""
    gate_up = tensors[f"{prefix}.gate_up_proj"][expert].T
    down = tensors[f"{prefix}.down_proj"][expert].T
    return {"gate_proj": gate_up[0::2], "up_proj": gate_up[1::2], "down_proj": down}


def test_every_expert_is_packed_from_its_place(source: Path, packed: Path) -> None:
    tensors = original(source)
    with qmoe_format.open(packed) as model:
        assert model.config["quantization_config"]["version"] == "1.1"
        assert model.config["quantization_config"]["requires"] == ["bias", "fused", "gating"]
        assert [p.interleaved for p in model.layers[PREFIX].projections] == [True, True, False]
        assert model.layers[PREFIX].gating == Gating("clamped_swiglu", 1.702, 7.0)
        layer = model.layer(PREFIX)
        for expert in range(layer.experts):
            for name, weight in matrices(tensors, expert).items():
                trits, levels = ternarize(weight.float().numpy(), "lsq")
                matrix = layer.matrix(expert, name)
                assert np.array_equal(matrix.decode(), trits)
                assert np.array_equal(matrix.levels, levels)


def test_the_c_library_says_what_the_layer_computes(packed: Path) -> None:
    with c_library.Model(packed) as model, qmoe_format.open(packed) as opened:
        for number in range(model.layer_count()):
            entry = json.loads(model.layer_json(number))
            prefix = model.layer(number).prefix.decode()
            assert LayerSpec.from_json(prefix, entry) == opened.layers[prefix]
            with c_library.Expert(model, number, 0) as expert:
                for projection, matrix in zip(
                    opened.layers[prefix].projections, expert.matrices, strict=True
                ):
                    wanted = opened.layer(prefix).matrix(0, projection.name).decode()
                    assert np.array_equal(matrix.decode(), wanted)


def test_unpacking_puts_every_expert_back(source: Path, packed: Path, tmp_path: Path) -> None:
    unpack(packed, tmp_path / "plain")
    before, after = original(source), load_file(tmp_path / "plain" / "model.safetensors")
    assert before.keys() == after.keys()
    experts = 0
    with qmoe_format.open(packed) as model:
        for name, tensor in before.items():
            if not name.endswith(("gate_up_proj", "down_proj")):
                assert torch.equal(after[name], tensor), name
                continue
            prefix = name.rpartition(".")[0]
            assert after[name].shape == tensor.shape
            for expert in range(tensor.shape[0]):
                for projection, weight in matrices(after, expert, prefix).items():
                    wanted = model.layer(prefix).matrix(expert, projection).dequantize("float32")
                    assert np.array_equal(weight.float().numpy(), wanted)
                    experts += 1
    assert experts == 2 * 2 * 3 * 3  # either of two tensors, layers, experts, projections


def test_concatenated_and_upright(tmp_path: Path) -> None:
    """As in Granite: [experts, 2·rows, columns], gate first."""
    from qmoe_quantize.checkpoint import SourceCheckpoint
    from qmoe_quantize.families import find_layers

    checkpoint = SourceCheckpoint(families.write_source(tmp_path / "source", "granitemoe"))
    (layer, _) = find_layers(checkpoint.config, checkpoint.tensors)
    tensor = original(tmp_path / "source")[f"{layer.prefix}.input_linear.weight"].float().numpy()
    gate, up, _ = layer.projections
    for expert in range(layer.experts):
        assert np.array_equal(checkpoint.matrix(layer, gate, expert), tensor[expert, : gate.rows])
        assert np.array_equal(checkpoint.matrix(layer, up, expert), tensor[expert, gate.rows :])
        assert np.array_equal(
            checkpoint.matrix_rows(layer, up, expert, 3, 7), tensor[expert, gate.rows :][3:7]
        )


def test_the_prediction(source: Path, packed: Path, tmp_path: Path) -> None:
    plan = predict(source, PackOptions(levels="lsq"))
    with qmoe_format.open(packed) as model:
        stored = sum(len(model.layer(prefix).store) for prefix in model.layers)
    assert plan.expert_packed_bytes == pytest.approx(stored, rel=0.25)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    assert predict(tmp_path).expert_source_bytes == plan.expert_source_bytes


def test_mxfp4_is_refused(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}})
    )
    with pytest.raises(UnsupportedModelError, match=r"mxfp4.*Mxfp4Config\(dequantize=True\)"):
        predict(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gate_up_proj", lambda t: t[:2]),
        ("gate_up_proj", lambda t: t[:, :, :-1]),
        ("gate_up_proj", lambda t: t[0]),
        ("gate_up_proj", lambda t: t.to(torch.float8_e4m3fn)),
        ("down_proj", lambda t: t[:, 1:]),
        ("down_proj", None),
        ("gate_up_proj_bias", None),
        ("gate_up_proj_bias", lambda t: t[:, 1:]),
        ("down_proj_bias", lambda t: t[0]),
    ],
)
def test_broken_checkpoints_are_refused(source: Path, tmp_path: Path, name: str, change: Any) -> None:
    tensors = original(source)
    name = f"{PREFIX}.{name}"
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    broken = tmp_path / "broken"
    broken.mkdir()
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    (broken / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises((CheckpointError, UnsupportedModelError), match=name.replace(".", r"\.")):
        pack(broken, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


# ---- what readers check ------------------------------------------------------------------------------------


def projections(**changes: Any) -> tuple[Projection, ...]:
    """Gate, up and down of a fused layer; keys such as gate_rows change one of them."""
    made = []
    for role, tensor, rows, columns in (("gate", "a", 3, 5), ("up", "a", 3, 5), ("down", "b", 5, 3)):
        values: dict[str, Any] = {"tensor": tensor, "rows": rows, "columns": columns}
        values |= {k.partition("_")[2]: v for k, v in changes.items() if k.startswith(f"{role}_")}
        made.append(Projection(name=role, role=role, **values))
    return tuple(made)


@pytest.mark.parametrize(
    "changes",
    [
        {"gate_columns": 6},
        {"gate_transposed": True},
        {"gate_interleaved": True},
        {"gate_interleaved": True, "up_interleaved": True, "gate_rows": 4},
        {"gate_bias": "c"},
        {"gate_bias": "c", "up_bias": "d"},
        {"gate_bias": "c", "up_bias": "c", "down_bias": "c"},
        {"gate_tensor": "a.{expert}", "up_tensor": "a.{expert}"},
    ],
)
def test_projections_that_collide_are_refused(changes: dict[str, Any]) -> None:
    LayerSpec("l", 2, projections(), "BF16")
    LayerSpec("l", 2, projections(gate_bias="c", up_bias="c", down_bias="d"), "BF16")
    with pytest.raises(ArgumentError, match="one tensor that does not hold both"):
        LayerSpec("l", 2, projections(**changes), "BF16")


def config_with(packed: Path, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((packed / "config.json").read_text())
    config["quantization_config"].update(changes)
    return config


def edited(packed: Path, tmp_path: Path, edit: Any) -> Path:
    packed_models.restore(tmp_path / "edited", packed_models.contents(packed))
    packed_models.edit_json(
        tmp_path / "edited" / "config.json", lambda config: edit(config["quantization_config"])
    )
    packed_models.sign(tmp_path / "edited")
    return tmp_path / "edited"


def layer_of(config: Any) -> Any:
    return config["layers"][PREFIX]


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (lambda c: c.update(requires=["bias", "fused", "gating", "more"]), VersionError),
        (lambda c: c.pop("requires"), HeaderError),  # a tensor without {expert}
        (lambda c: c.update(requires=["bias", "gating"]), HeaderError),
        (lambda c: layer_of(c)["projections"][0].update(transposed=1), HeaderError),
        (lambda c: layer_of(c)["projections"][0].update(interleaved=False), HeaderError),
        (lambda c: layer_of(c)["projections"][0].update(bias=7), HeaderError),
        (lambda c: layer_of(c)["projections"][2].update(bias=f"{PREFIX}.{{expert}}.b"), HeaderError),
    ],
)
def test_both_readers_refuse_alike(packed: Path, tmp_path: Path, edit: Any, error: type[QMoEError]) -> None:
    path = edited(packed, tmp_path, edit)
    with pytest.raises(error):
        qmoe_format.open(path)
    with pytest.raises(c_library.RefusalError) as refusal:
        c_library.Model(path)
    assert refusal.value.kind == ("version" if error is VersionError else "header")


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: layer_of(c)["gating"].update(kind="other"),
        lambda c: layer_of(c)["gating"].update(alpha="1"),
        lambda c: layer_of(c)["gating"].update(limit=-1),
        lambda c: layer_of(c)["gating"].update(limit=float("nan")),
        lambda c: layer_of(c)["gating"].pop("alpha"),
        lambda c: layer_of(c).update(gating=[]),
        lambda c: layer_of(c)["projections"][2].update(bias=f"{PREFIX}.nothing"),
        lambda c: layer_of(c)["projections"][2].update(bias="model.norm.weight"),
    ],
)
def test_the_python_reader_refuses(packed: Path, tmp_path: Path, edit: Any) -> None:
    with pytest.raises(HeaderError):
        qmoe_format.open(edited(packed, tmp_path, edit))


def test_keys_without_their_entry_are_left_aside(tmp_path: Path) -> None:
    """They mean nothing in a container of version 1.0, whatever they hold."""
    layer = packed_models.layer_spec(0, 2)
    entry = {**layer.to_json(), "store_bytes": 0, "dictionaries_bytes": 0, "gating": "nonsense"}
    entry["projections"][0].update(bias=7, transposed="yes")  # type: ignore[index]
    config = {"quant_method": "qmoe", "version": "1.0", "layers": {layer.prefix: entry}}
    parsed = QuantizationConfig.parse({"quantization_config": config}, "config.json")
    assert parsed.layers[layer.prefix] == layer


# ---- computing ---------------------------------------------------------------------------------------------


def test_without_transformers(source: Path, packed: Path) -> None:
    tensors = original(source)
    biases = {name: tensors[f"{PREFIX}.{name}"] for name in ("gate_up_proj_bias", "down_proj_bias")}
    biases = {name: torch.randn_like(bias, dtype=torch.float32) for name, bias in biases.items()}
    x = 20 * torch.randn(6, 24)  # so that both limits are met
    index = torch.tensor([[0, 1], [2, 3], [1, 1], [0, 2], [3, 3], [2, 0]])  # 3 is nobody
    weights = torch.rand(6, 2)
    with qmoe_format.open(packed) as model:
        layer = model.layer(PREFIX)
        module = QMoEExperts.from_packed(layer, None, biases=biases)
        dense = [
            {
                p.role: torch.from_numpy(layer.matrix(e, p.name).dequantize("float32"))
                for p in layer.spec.projections
            }
            for e in range(layer.experts)
        ]
        with pytest.raises(ArgumentError, match="biases"):
            QMoEExperts.from_packed(layer, None)
        with pytest.raises(ArgumentError, match="gating of its own"):
            QMoEExperts.from_packed(layer, torch.nn.SiLU(), biases=biases)
    expected = torch.zeros(6, 24)
    for token in range(6):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            if expert < 3:
                bias = biases["gate_up_proj_bias"][expert]
                gate = (dense[expert]["gate"] @ x[token] + bias[0::2]).clamp(max=7.0)
                up = (dense[expert]["up"] @ x[token] + bias[1::2]).clamp(-7.0, 7.0)
                inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
                out = dense[expert]["down"] @ inner + biases["down_proj_bias"][expert]
                expected[token] += weight * out
    torch.testing.assert_close(module(x, index, weights), expected, rtol=1e-4, atol=1e-3)


def calibration(folder: Path) -> CalibrationOptions:
    text = folder / "text.txt"
    text.write_bytes(bytes(number * number % 251 + 1 for number in range(5000)))
    return CalibrationOptions(text=TextOptions(str(text), 16, 32))


@pytest.mark.parametrize(("method", "rounding"), [("qmoe", "minmax"), ("rd", "lsq")])
def test_packing_with_calibration(method: str, rounding: str, tmp_path: Path) -> None:
    source = families.write_source(tmp_path / "source", "gpt_oss", vocab_size=256)
    recipe = RecipeSettings(method, lam=1e-3)
    summary = pack(
        source, tmp_path / "packed", PackOptions(method, calibration=calibration(tmp_path), recipe=recipe)
    )
    assert len(summary.matrices) == 2 * 4 * 3
    assert {line["recipe"] for line in summary.matrices} == {method}
    assert all("fallback" not in line for line in summary.matrices)
    pack(source, tmp_path / "nearest", PackOptions(levels=rounding))
    losses = {}
    for name in ("packed", "nearest"):
        unpack(tmp_path / name, tmp_path / f"plain {name}")
        losses[name] = logits_of(tmp_path / f"plain {name}") - logits_of(source)
    assert losses["packed"].square().mean() < losses["nearest"].square().mean()
    loaded = families.logits(families.load(tmp_path / "packed", dtype=torch.float32))
    torch.testing.assert_close(loaded, logits_of(tmp_path / "plain packed"), rtol=1e-4, atol=1e-4)


def logits_of(directory: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return families.logits(model)


def test_a_family_that_transformers_does_not_compute_is_not_calibrated(tmp_path: Path) -> None:
    source = families.write_source(tmp_path / "source", "nllb-moe", vocab_size=256)
    with pytest.raises(
        UnsupportedModelError,
        match=r"encoder\.layers\.1\.ffn\.experts: cannot be calibrated: .* only experts 0 and 1 .*"
        r"NllbMoeExperts, expected --method nearest",
    ):
        pack(source, tmp_path / "packed", PackOptions("qmoe", calibration=calibration(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "text.txt"]
