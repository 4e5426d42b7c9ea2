"""Predictions, held against what packing then gives."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from qmoe_codec.errors import CheckpointError, QMoEError, TruncatedError, UnsupportedModelError
from qmoe_quantize import PackOptions, pack, predict
from source_models import CONFIGS, config_of, random_model

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
        ({"num_hidden_layers": 10**30}, CheckpointError),
        ({"num_experts": 10**30, "num_experts_per_tok": 1}, CheckpointError),
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


# ---- calibrated runs ---------------------------------------------------------------------------------------

torch = pytest.importorskip("torch")


def calibrated(method: str = "", target: float | None = None, **changes: Any) -> PackOptions:
    pytest.importorskip("h5py")
    from qmoe_quantize import CalibrationOptions, HessianOptions, TextOptions
    from qmoe_quantize.recipes import RecipeSettings

    text = TextOptions("text.txt", changes.pop("samples", 32), 64)
    calibration = CalibrationOptions(text=text, hessian=HessianOptions(**changes))
    return PackOptions(method, calibration=calibration, target_bits=target, recipe=RecipeSettings(lam=1e-6))


def test_calibrated_sizes(tmp_path: Path) -> None:
    """Exact for wanted bits; a bound for a lambda; that of rounding for the paper's recipe."""
    source = random_model(tmp_path / "source", **SIZES)
    wanted = predict(source / "config.json", calibrated(target=0.8))
    assert wanted.bits_per_weight == pytest.approx(0.8)
    assert wanted.sparsity is None
    bound = predict(source, calibrated("rd"))
    assert bound.bits_per_weight > 1.6
    paper = predict(source, calibrated("qmoe"))
    assert paper.expert_packed_bytes == predict(source, PackOptions(level_format="e4m4")).expert_packed_bytes
    for plan, word in ((wanted, "asked for"), (bound, "bound"), (paper, "1.25")):
        assert any(word in note for note in plan.assumptions)
        assert any("2048 tokens" in note or "32 windows of 64 tokens" in note for note in plan.assumptions)


def test_cost_follows_from_the_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qmoe_quantize import cost as cost_module
    from qmoe_quantize.config import ModelConfig
    from qmoe_quantize.cost import Rates, predict_cost
    from qmoe_quantize.pipeline import dense_tensors, expert_layers
    from qmoe_quantize.shapes import tensors_of

    rates = Rates((1e-10, 1e-10, 1e-8, 1e-4), 1e-11, 1e-9, "made up")
    monkeypatch.setattr(cost_module, "held_bytes", lambda shape, _: 40 * math.prod(shape))

    def cost(config: dict[str, Any], options: PackOptions) -> Any:
        values = ModelConfig(tmp_path / "config.json", config)
        tensors = tensors_of(values)
        layers = expert_layers(values, tensors)
        assert options.calibration is not None and options.recipe is not None
        return predict_cost(
            values, tensors, layers, dense_tensors(tensors, layers), options.calibration, options.recipe,
            search=options.target_bits is not None, rates=rates, rough=rates,
        )  # fmt: skip

    big = {"hidden_size": 512, "intermediate_size": 1024, "num_experts": 32}
    base = cost(config_of("olmoe", **big), calibrated("rd", experts_per_batch=4))
    # The same number at once: all that is kept of another expert is its names
    more = cost(config_of("olmoe", **{**big, "num_experts": 256}), calibrated("rd", experts_per_batch=4))
    assert more.peak_memory_bytes < 1.1 * base.peak_memory_bytes
    assert more.seconds > 5 * base.seconds
    layers = cost(config_of("olmoe", **big, num_hidden_layers=4), calibrated("rd", experts_per_batch=4))
    assert layers.peak_memory_bytes < 1.01 * base.peak_memory_bytes
    start = cost_module.START_SECONDS
    assert layers.seconds - start == pytest.approx(2 * (base.seconds - start), rel=0.01)
    wide = cost(config_of("olmoe", **big), calibrated("rd", experts_per_batch=16))
    assert wide.peak_memory_bytes > 1.5 * base.peak_memory_bytes
    longer = cost(config_of("olmoe", **big), calibrated("rd", experts_per_batch=4, samples=3200))
    assert longer.seconds > base.seconds
    capped = calibrated("rd", experts_per_batch=4, samples=3200, max_tokens_per_expert=8)
    assert base.seconds < cost(config_of("olmoe", **big), capped).seconds < longer.seconds
    searching = cost(config_of("olmoe", **big), calibrated("rd", 0.8, experts_per_batch=4))
    assert searching.seconds == pytest.approx(base.seconds + searching.search_seconds)


def test_rates_are_fitted_and_never_negative() -> None:
    from qmoe_quantize.cost import REHEARSED, Work, fit

    parts = [Work.of(*shape).parts for shape in REHEARSED]
    true = (2e-10, 0.0, 3e-8, 1e-4)
    found = fit(parts, [sum(a * b for a, b in zip(true, part, strict=True)) for part in parts])
    assert found == pytest.approx(true, rel=1e-6, abs=1e-15)
    erratic = [(1.0, 0.1, 3.0, 0.2, 5.0)[number % 5] for number in range(len(parts))]
    assert min(fit(parts, erratic)) >= 0


def test_bytes_that_operators_hold_are_counted() -> None:
    from qmoe_quantize.cost import bytes_held

    x = torch.ones(1000)
    with bytes_held() as held:
        y = x + 1  # 4000 bytes
        z = (y * 2)[10:20]  # 4000 more, of which a view is kept
        del y
        x[:5].add_(1)
        w = torch.zeros(500)
    assert held.most == 8000
    assert held.now == 6000
    del z, w
    assert held.now == 0


def test_what_a_small_problem_holds_stands_for_a_large_one() -> None:
    from qmoe_quantize.cost import bytes_held, held_bytes, problem
    from qmoe_quantize.recipes import RecipeSettings, ternarize_group

    settings = RecipeSettings("qmoe")
    group = problem((2, 768, 512))
    with bytes_held() as held:
        ternarize_group(group, settings)
    assert held_bytes((2, 768, 512), settings) == pytest.approx(held.most, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_calibrated_memory_is_flat_and_as_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory with 4 experts at once, of 8 and of 64, in layers where experts are most of the model."""
    pytest.importorskip("h5py")
    pytest.importorskip("transformers")
    from qmoe_quantize import CalibrationOptions, HessianOptions, TextOptions
    from qmoe_quantize import cost as cost_module
    from qmoe_quantize.cost import Rates
    from qmoe_quantize.recipes import RecipeSettings

    # Times do not matter here
    monkeypatch.setattr(cost_module, "measure_rates", lambda *_: Rates((0, 0, 0, 0), 0, 0, "made up"))
    sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(97, 123)) * 200)
    settings = ("--calib", text, "--nsamples", "8", "--seqlen", "64", "--experts-per-batch", "4")
    calibration = CalibrationOptions(
        TextOptions(str(text), 8, 64), hessian=HessianOptions(experts_per_batch=4)
    )
    peaks = []
    for method, experts in (("qmoe", 8), ("qmoe", 64), ("rd", 8)):
        options = PackOptions(method, calibration=calibration, recipe=RecipeSettings(method, lam=1e-6))
        own = ("--lam", "1e-6") if method == "rd" else ()
        source = tmp_path / f"source-{experts}"
        if not source.exists():
            random_model(source, num_experts=experts, dtype="float32", **sizes)
        out = tmp_path / f"out-{method}-{experts}"
        _, peak = peak_of(source, out, "--method", method, *own, *settings)
        assert peak == pytest.approx(predict(source, options).peak_memory_bytes, rel=0.25)
        peaks.append(peak)
    assert peaks[1] < 1.1 * peaks[0]
