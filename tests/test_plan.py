"""Predictions, held against what packing then gives."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from qmoe_codec.errors import CheckpointError, QMoEError, TruncatedError, UnsupportedModelError
from qmoe_quantize import PackOptions, pack, predict
from source_models import CONFIGS, config_of, random_model

from qmoe_format.cli import main

# Wide enough for rates to settle; the frames of tiny matrices are headers for the most part.
SIZES = {"hidden_size": 96, "intermediate_size": 128, "vocab_size": 300}


@pytest.mark.parametrize("levels", ["minmax", "lsq"])
@pytest.mark.parametrize("dense", ["copy", "zstd"])
def test_size_from_weights(levels: str, dense: str, tmp_path: Path) -> None:
    source = random_model(tmp_path / "source", **SIZES)
    options = PackOptions(levels=levels, dense=dense)
    plan = predict(source, options)
    summary = pack(source, tmp_path / "out", options)
    assert plan.basis == "weights"
    assert (plan.layers, plan.experts, plan.weights) == (summary.layers, summary.experts, summary.weights)
    assert plan.source_bytes == summary.source_bytes
    assert plan.expert_source_bytes == summary.expert_source_bytes
    assert plan.dense_source_bytes == summary.dense_source_bytes
    assert plan.expert_packed_bytes == pytest.approx(summary.expert_packed_bytes, rel=0.03)
    assert plan.dense_packed_bytes == pytest.approx(
        summary.dense_packed_bytes, rel=0.0 if dense == "copy" else 0.1
    )
    assert plan.sparsity == pytest.approx(summary.zeros / summary.weights, abs=0.01)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_exact_counts_from_the_configuration_alone(model_type: str, tmp_path: Path) -> None:
    source = random_model(tmp_path / "source", model_type, shards=2)
    full = predict(source)
    for file in source.glob("*.safetensors"):
        file.unlink()
    by_directory, by_file = predict(source), predict(source / "config.json")
    assert by_directory == by_file
    assert by_directory.basis == "config"
    for name in ("layers", "experts", "weights", "source_bytes", "expert_source_bytes", "dense_source_bytes"):
        assert getattr(by_directory, name) == getattr(full, name), name


def test_normal_weights_are_as_assumed(tmp_path: Path) -> None:
    """A prediction without weights is right when the assumption is."""
    import torch
    from source_models import random_tensors, write_model

    config = config_of("olmoe", **SIZES)
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: (0.02 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in random_tensors(config).items()
    }
    source = write_model(tmp_path / "source", config, tensors)
    plan = predict(source / "config.json")
    summary = pack(source, tmp_path / "out")
    assert plan.expert_packed_bytes == pytest.approx(summary.expert_packed_bytes, rel=0.03)
    assert plan.sparsity == pytest.approx(summary.zeros / summary.weights, abs=0.01)
    assert any("normal distribution" in assumption for assumption in plan.assumptions)
    assert any(f"{plan.sparsity:.1%}" in assumption for assumption in plan.assumptions)


def test_a_plan_is_the_same_every_time(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source")
    assert predict(source) == predict(source)


def test_published_models(tmp_path: Path) -> None:
    """Parameters of Mixtral 8x7B, from its configuration."""
    config = {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "num_local_experts": 8,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = predict(tmp_path)
    assert plan.source_bytes == 2 * 46_702_792_704
    assert plan.weights == 32 * 8 * 3 * 4096 * 14336
    assert 0.3 < plan.bits_per_weight < 0.8


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"model_type": "llama"}, UnsupportedModelError),
        ({"quantization_config": {"quant_method": "qmoe"}}, UnsupportedModelError),
        ({"hidden_size": None}, CheckpointError),
    ],
)
def test_bad_configurations(change: dict[str, Any], kind: type[QMoEError], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**config_of("olmoe"), **change}))
    with pytest.raises(kind, match=r"config\.json"):
        predict(tmp_path)


def test_bad_weights(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source")
    os.truncate(source / "model.safetensors", 1000)
    with pytest.raises(TruncatedError):
        predict(source)


def peak_of(*arguments: str | Path) -> tuple[dict[str, Any], int]:
    """Result of ``qmoe pack --json``, and the peak memory that the command itself reports."""
    script = (
        "import sys\nfrom qmoe_format.cli import main\ncode = main(sys.argv[1:])\n"
        "status = open('/proc/self/status').readlines()\n"
        "print(*(line for line in status if line.startswith('VmHWM')), file=sys.stderr)\n"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", script, "pack", "--json", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), 1024 * int(done.stderr.split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_flat_and_within_the_plan(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 1, "vocab_size": 64}
    expert_bytes = 2 * 3 * sizes["hidden_size"] * sizes["intermediate_size"]
    peaks = []
    for experts in (4, 32):
        source = random_model(tmp_path / f"source-{experts}", num_experts=experts, **sizes)
        plan, _ = peak_of(source, "--dry-run", "--threads", "2")
        _, peak = peak_of(source, tmp_path / f"out-{experts}", "--threads", "2")
        assert 0.6 * plan["peak_memory_bytes"] < peak < 1.25 * plan["peak_memory_bytes"]
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 2 * expert_bytes
    assert peaks[1] < 32 * expert_bytes  # it did not hold them all


def test_a_calibrated_run_is_not_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["pack", str(tmp_path), "--dry-run", "--calib", "text.txt", "--target-bpw", "0.8"]
    assert main(arguments) == 2
    assert "cannot be predicted yet" in capsys.readouterr().err
