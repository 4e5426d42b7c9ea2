"""Packing and unpacking whole checkpoints: exact, deterministic, and nothing lost when something fails."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qmoe_codec import decode
from qmoe_codec.errors import (
    ArgumentError,
    CheckpointError,
    FormatError,
    HeaderError,
    MissingPackageError,
    OutputExistsError,
    QMoEError,
    SizeError,
    TruncatedError,
    UnsupportedModelError,
)
from qmoe_quantize import PackOptions, SourceCheckpoint, pack, ternarize
from safetensors.torch import load_file
from source_models import CONFIGS, FUSED, TORCH_DTYPES, config_of, random_model, random_tensors, write_model

import qmoe_format
from qmoe_format.unpack import unpack

FAMILIES = sorted(CONFIGS.keys() - FUSED)


def files_of(directory: Path) -> dict[str, str]:
    """Digests, since pytest takes minutes to say how long bytes differ."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors.update(load_file(file))
    return tensors


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_pack_then_unpack_gives_levels_times_trits(model_type: str, tmp_path: Path) -> None:
    dense = "zstd" if FAMILIES.index(model_type) % 2 else "copy"
    shards = 1 + FAMILIES.index(model_type) % 3
    source = random_model(tmp_path / "source", model_type, shards=shards)
    original = load_all(source)
    summary = pack(source, tmp_path / "packed", PackOptions(dense=dense))
    qmoe_format.verify(tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    unpacked = load_all(tmp_path / "unpacked")
    assert unpacked.keys() == original.keys()
    expected: dict[str, torch.Tensor] = {}
    with qmoe_format.open(tmp_path / "packed") as model:
        for prefix, spec in model.layers.items():
            layer = model.layer(prefix)
            assert layer.index[:, 2].tolist() == [-1] * spec.experts
            for expert in range(spec.experts):
                for projection, frame in zip(spec.projections, layer.frames(expert), strict=True):
                    name = projection.tensor_name(expert)
                    trits, levels = decode(frame, layer.dictionaries)
                    wanted_trits, wanted_levels = ternarize(original[name].float().numpy())
                    assert np.array_equal(trits, wanted_trits)
                    assert np.array_equal(levels, wanted_levels)
                    value = np.where(
                        trits < 0, levels[:, :1], np.where(trits > 0, levels[:, 1:], np.float32(0))
                    )
                    expected[name] = torch.from_numpy(value).to(TORCH_DTYPES[spec.dtype])
    assert len(expected) == sum(".experts." in name for name in original)
    for name, tensor in unpacked.items():
        assert same_bits(tensor, expected.get(name, original[name])), name
    config = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "unpacked/config.json").read_text()) == config
    tokenizer = "tokenizer_config.json"
    assert (tmp_path / "unpacked" / tokenizer).read_bytes() == (source / tokenizer).read_bytes()
    weights = sum(original[name].numel() for name in expected)
    zeros = sum(np.count_nonzero(ternarize(original[name].float().numpy())[0] == 0) for name in expected)
    assert (summary.weights, summary.zeros) == (weights, zeros)
    assert summary.source_bytes == sum(tensor.nbytes for tensor in original.values())
    assert summary.expert_source_bytes + summary.dense_source_bytes == summary.source_bytes
    assert summary.packed_bytes > summary.expert_packed_bytes + summary.dense_packed_bytes


@pytest.mark.parametrize("level_format", ["float32", "float16", "e4m4"])
@pytest.mark.parametrize("levels", ["minmax", "lsq"])
def test_level_formats_and_rules(level_format: str, levels: str, tmp_path: Path) -> None:
    source = random_model(tmp_path / "source")
    pack(source, tmp_path / "packed", PackOptions(levels=levels, level_format=level_format))
    unpack(tmp_path / "packed", tmp_path / "unpacked", dtype="F32")
    original, unpacked = load_all(source), load_all(tmp_path / "unpacked")
    for name, tensor in original.items():
        if ".experts." in name:
            trits, pairs = ternarize(tensor.float().numpy(), levels, level_format)
            expected = np.where(trits < 0, pairs[:, :1], np.where(trits > 0, pairs[:, 1:], np.float32(0)))
            assert np.array_equal(unpacked[name].numpy(), expected)
        else:
            assert same_bits(unpacked[name], tensor)


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source", shards=3)
    pack(source, tmp_path / "one", PackOptions(dense="zstd", threads=1))
    time.sleep(0.01)
    pack(os.path.relpath(source), tmp_path / "two", PackOptions(dense="zstd", threads=2))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    unpack(tmp_path / "one", tmp_path / "three")
    unpack(tmp_path / "two", tmp_path / "four")
    assert files_of(tmp_path / "three") == files_of(tmp_path / "four")


def test_one_file_as_source(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source")
    pack(source, tmp_path / "one")
    pack(source / "model.safetensors", tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_unpack_into_shards(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source")
    pack(source, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "whole")
    summary = unpack(tmp_path / "packed", tmp_path / "parts", shard_bytes=20_000)
    whole, parts = load_all(tmp_path / "whole"), load_all(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(same_bits(whole[name], parts[name]) for name in whole)
    names = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(names) == summary.shards > 2
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == summary.bytes == sum(tensor.nbytes for tensor in whole.values())
    for file in names:
        held = load_file(file)
        assert sum(tensor.nbytes for tensor in held.values()) <= 20_000
        assert {name for name, shard in index["weight_map"].items() if shard == file.name} == held.keys()
    # What was unpacked is a source again.
    pack(tmp_path / "parts", tmp_path / "again")
    unpack(tmp_path / "again", tmp_path / "again-unpacked")
    again = load_all(tmp_path / "again-unpacked")
    assert all(same_bits(whole[name], again[name]) for name in whole)


@pytest.mark.slow
def test_transformers_loads_what_was_unpacked(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
    }  # rows of a multiple of 16 bytes, as torch wants them
    config = config_of("olmoe", architectures=["OlmoeForCausalLM"], pad_token_id=0, eos_token_id=1, **sizes)
    source = write_model(tmp_path / "source", config, random_tensors(config))
    pack(source, tmp_path / "packed", PackOptions(dense="zstd"))
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "unpacked", dtype="auto", output_loading_info=True
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


# ---- bad input ---------------------------------------------------------------------------------------------


def refused(kind: type[QMoEError], source: Path, out: Path, *parts: str) -> QMoEError:
    """Packing must fail with one line that has these parts, and leave nothing."""
    before = files_of(source) if source.is_dir() else {}
    with pytest.raises(kind) as caught:
        pack(source, out)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()
    assert not source.is_dir() or files_of(source) == before
    return caught.value


def rewrite(source: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint of one file."""
    from safetensors.torch import save_file

    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


NAME = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(("value", "count"), [(float("nan"), 1), (float("inf"), 3), (float("-inf"), 2)])
def test_weights_that_are_not_finite(value: float, count: int, tmp_path: Path) -> None:
    source = random_model(tmp_path / "source")
    rewrite(source, lambda tensors: tensors[NAME].view(-1)[:count].fill_(value))
    error = refused(CheckpointError, source, tmp_path / "out", NAME, f"{count} of 864", "model.safetensors")
    assert error.exit_code == 1


def test_unknown_architecture(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source")
    (source / "config.json").write_text(json.dumps({**config_of("olmoe"), "model_type": "gpt2"}))
    refused(UnsupportedModelError, source, tmp_path / "out", "config.json", "model_type", "gpt2", "olmoe")


def test_a_missing_tensor(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source")
    rewrite(source, lambda tensors: tensors.pop(NAME))
    refused(CheckpointError, source, tmp_path / "out", NAME)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file(keep: int, tmp_path: Path) -> None:
    source = random_model(tmp_path / "source")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    error = refused(TruncatedError, source, tmp_path / "out", "model.safetensors")
    assert error.exit_code == 3


def test_a_file_cut_short_while_it_is_read(tmp_path: Path) -> None:
    checkpoint = SourceCheckpoint(random_model(tmp_path / "source"))
    os.truncate(tmp_path / "source/model.safetensors", 50_000)
    last = list(checkpoint.tensors)[-1]
    with pytest.raises(TruncatedError, match=r"model\.safetensors"):
        checkpoint.data(last)


def test_a_longer_file(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source")
    with open(source / "model.safetensors", "ab") as file:
        file.write(b"\0")
    refused(SizeError, source, tmp_path / "out", "model.safetensors")


def test_a_missing_shard(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source", shards=2)
    (source / "model-00002-of-00002.safetensors").unlink()
    refused(CheckpointError, source, tmp_path / "out", "model-00002-of-00002.safetensors")


def change_index(source: Path, change: Callable[[dict[str, str]], Any]) -> None:
    file = source / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_an_index_that_does_not_fit(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source", shards=2)
    change_index(source, lambda m: m.update({"lm_head.weight": "model-00002-of-00002.safetensors"}))
    refused(CheckpointError, source, tmp_path / "out", "lm_head.weight")


@pytest.mark.parametrize("shard", ["../source/model-00002-of-00002.safetensors", "/etc/passwd", "", ".."])
def test_an_index_that_leads_out_of_the_directory(shard: str, tmp_path: Path) -> None:
    source = random_model(tmp_path / "source", shards=2)
    change_index(source, lambda m: m.update({"lm_head.weight": shard}))
    refused(HeaderError, source, tmp_path / "out", "index.json", "shard name")


@pytest.mark.parametrize("weight_map", [None, [], {}, 3])
def test_an_index_without_a_map(weight_map: object, tmp_path: Path) -> None:
    source = random_model(tmp_path / "source", shards=2)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(HeaderError, source, tmp_path / "out", "weight_map")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source", shards=2)
    one = source / "model-00001-of-00002.safetensors"
    (source / "model-00002-of-00002.safetensors").write_bytes(one.read_bytes())
    refused(CheckpointError, source, tmp_path / "out", "in two shards")


def test_a_tensor_with_a_name_of_the_format(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source")
    rewrite(source, lambda tensors: tensors.update({"x.qmoe_store": torch.zeros(3)}))
    refused(CheckpointError, source, tmp_path / "out", "x.qmoe_store")


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_configuration_that_is_not_json(text: str, tmp_path: Path) -> None:
    source = random_model(tmp_path / "source")
    (source / "config.json").write_bytes(text.encode("latin-1"))
    refused(HeaderError, source, tmp_path / "out", "config.json")


def test_a_checkpoint_without_configuration(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source")
    (source / "config.json").unlink()
    refused(CheckpointError, source, tmp_path / "out", "config.json", "not found")


def test_a_pickled_checkpoint(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(CheckpointError, source, tmp_path / "out", "pickled", "model.safetensors")


@pytest.mark.parametrize(("method", "words"), [("qmoe", "packed already"), ("fp8", "quantized already")])
def test_a_quantized_source(method: str, words: str, tmp_path: Path) -> None:
    source = random_model(tmp_path / "source", quantization_config={"quant_method": method})
    refused(UnsupportedModelError, source, tmp_path / "out", words, method)


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    refused(CheckpointError, tmp_path / "nothing", tmp_path / "out", "nothing", "not found")


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    refused(CheckpointError, tmp_path / "notes.txt", tmp_path / "out", "notes.txt")


def test_a_hub_name_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match=r"someone/some-model.*pip install 'qmoe-format\[hub\]'"):
        pack("someone/some-model", tmp_path / "out")


def test_a_hub_name_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(QMoEError, match=r"someone/some-model.*hub") as caught:
        pack("someone/some-model", tmp_path / "out")
    assert "\n" not in str(caught.value)


# ---- where the output goes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["same", "link", "relative", "inside", "around", "file"])
@pytest.mark.parametrize("force", [False, True])
def test_source_and_output_overlap(
    way: str, force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = random_model(tmp_path / "models/source")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(source)
    out = {
        "same": source,
        "link": tmp_path / "link",
        "relative": Path("models/../models/source/"),
        "inside": source / "packed",
        "around": tmp_path / "models",
        "file": source,
    }[way]
    before = files_of(source)
    with pytest.raises(ArgumentError, match="OUT"):
        pack(source / "model.safetensors" if way == "file" else source, out, PackOptions(force=force))
    assert files_of(source) == before
    assert not list(tmp_path.rglob("*.partial"))


def test_unpacking_onto_the_source(tmp_path: Path) -> None:
    pack(random_model(tmp_path / "source"), tmp_path / "packed")
    before = files_of(tmp_path / "packed")
    for out in (tmp_path / "packed", tmp_path / "packed/x", tmp_path):
        with pytest.raises(ArgumentError, match="OUT"):
            unpack(tmp_path / "packed", out, force=True)
    assert files_of(tmp_path / "packed") == before


def test_an_existing_output(tmp_path: Path) -> None:
    source, other = random_model(tmp_path / "source"), random_model(tmp_path / "other", seed=1)
    pack(source, tmp_path / "out")
    unpack(tmp_path / "out", tmp_path / "plain")
    packed, plain = files_of(tmp_path / "out"), files_of(tmp_path / "plain")
    with pytest.raises(OutputExistsError, match="--force"):
        pack(other, tmp_path / "out")
    with pytest.raises(OutputExistsError, match="--force"):
        unpack(tmp_path / "out", tmp_path / "plain")
    assert files_of(tmp_path / "out") == packed
    assert files_of(tmp_path / "plain") == plain
    pack(other, tmp_path / "out", PackOptions(force=True))
    assert files_of(tmp_path / "out") != packed
    qmoe_format.verify(tmp_path / "out")
    unpack(tmp_path / "out", tmp_path / "plain", force=True)
    assert files_of(tmp_path / "plain") != plain


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json", "other.safetensors", "directory/x"])
def test_force_does_not_unpack_over_anything_else(name: str, tmp_path: Path) -> None:
    pack(random_model(tmp_path / "source"), tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "plain")
    foreign = tmp_path / "plain" / name
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("mine")
    with pytest.raises(OutputExistsError):
        unpack(tmp_path / "packed", tmp_path / "plain", force=True)
    assert foreign.read_text() == "mine"


def test_force_does_not_unpack_over_a_packed_model(tmp_path: Path) -> None:
    pack(random_model(tmp_path / "source"), tmp_path / "one")
    pack(random_model(tmp_path / "source2"), tmp_path / "two")
    before = files_of(tmp_path / "two")
    with pytest.raises(OutputExistsError):
        unpack(tmp_path / "one", tmp_path / "two", force=True)
    assert files_of(tmp_path / "two") == before


def test_a_failure_keeps_what_was_there(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source")
    pack(source, tmp_path / "out")
    before = files_of(tmp_path / "out")
    rewrite(source, lambda tensors: tensors[NAME].fill_(float("nan")))
    with pytest.raises(CheckpointError):
        pack(source, tmp_path / "out", PackOptions(force=True))
    assert files_of(tmp_path / "out") == before
    assert not (tmp_path / "out.partial").exists()


def test_unpacking_a_damaged_model_leaves_nothing(tmp_path: Path) -> None:
    pack(random_model(tmp_path / "source"), tmp_path / "packed")
    shard = tmp_path / "packed/model-00001-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 0x10
    shard.write_bytes(data)
    with pytest.raises(FormatError, match="model-00001"):
        unpack(tmp_path / "packed", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


# ---- a full disk, and the end in the middle ----------------------------------------------------------------

PACK = [sys.executable, "-m", "qmoe_format.cli", "pack"]
LIMITED = """
import resource, sys
from qmoe_format.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_a_full_disk(command: str, tmp_path: Path) -> None:
    source = random_model(tmp_path / "source")
    pack(source, tmp_path / "packed")
    origin = source if command == "pack" else tmp_path / "packed"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "9000", command, origin, tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"qmoe {command}: error: ")
    assert "File too large" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.fixture(scope="module")
def large_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes a while to pack."""
    size = {"hidden_size": 256, "intermediate_size": 512, "num_experts": 48}
    return random_model(tmp_path_factory.mktemp("large") / "source", "olmoe", **size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name
)
def test_the_end_in_the_middle(number: signal.Signals, large_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(random_model(tmp_path / "small"), out)
    before = files_of(out)
    process = subprocess.Popen([*PACK, large_source, out, "--force"], stderr=subprocess.PIPE, text=True)
    partial, deadline = tmp_path / "out.partial", time.monotonic() + 60
    while not any(file.stat().st_size > 100_000 for file in partial.glob("shard-*")):
        assert process.poll() is None, "finished before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    assert files_of(out) == before
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        with pytest.raises(FormatError, match="manifest"):
            qmoe_format.verify(partial)
        # The next run takes over.
        pack(tmp_path / "small", out, PackOptions(force=True))
        assert files_of(out) == before
    else:
        assert process.returncode == 130
        assert text == "qmoe pack: interrupted\n"
    assert not partial.exists()


@pytest.mark.parametrize(
    "changes",
    [{"method": "gptq"}, {"levels": "mean"}, {"level_format": "int8"}, {"dense": "gzip"}, {"threads": 0}],
)
def test_wrong_options(changes: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError) as caught:
        PackOptions(**changes)
    assert caught.value.field in changes


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source")
    packing: list[tuple[int, int]] = []
    unpacking: list[tuple[int, int]] = []
    pack(source, tmp_path / "packed", progress=lambda *step: packing.append(step))
    unpack(tmp_path / "packed", tmp_path / "plain", progress=lambda *step: unpacking.append(step))
    for steps in (packing, unpacking):
        assert [part for part, _ in steps] == sorted(part for part, _ in steps)
        assert len({whole for _, whole in steps}) == 1
        assert steps[-1][0] == steps[-1][1]
