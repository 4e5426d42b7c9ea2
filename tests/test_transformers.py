"""Packed models in transformers: every family computes what its unpacked checkpoint computes."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import packed_models
import pytest
import torch
import transformers
from qmoe_codec.errors import (
    ArgumentError,
    ChecksumError,
    FileChangedError,
    FormatError,
    HeaderError,
    MissingPackageError,
    OutputExistsError,
    QMoEError,
    TruncatedError,
    UnsupportedModelError,
    VersionError,
)
from qmoe_quantize.pipeline import PackOptions, pack
from safetensors.torch import load_file, save_file

import qmoe_format
from qmoe_format.cli import main_verify
from qmoe_format.torch import QMoEExperts
from qmoe_format.transformers import QMoEConfig, QMoEQuantizer, load
from qmoe_format.unpack import unpack

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import families
from families import TOKENS, content, logits

CORE = ("switch_transformers", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "gpt_oss")
"""Those that are tested with compressed dense tensors, too."""

transformers.utils.logging.disable_progress_bar()


def source(directory: Path, family: str = "olmoe", **changes: Any) -> Path:
    """A checkpoint with random weights, written by transformers itself."""
    return families.write_source(directory, family, **changes)


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


@pytest.mark.parametrize(
    ("family", "dense"), [*((f, "copy") for f in families.CONFIGS), *((f, "zstd") for f in CORE)]
)
def test_every_family(tmp_path: Path, family: str, dense: str) -> None:
    row = families.check(family, tmp_path, dense)
    expected = {"packs", "refused"} if family in families.NOT_COMPUTED else {*families.COLUMNS, "difference"}
    assert set(row) - {families.ON_A_GPU} == expected
    assert [name for name, value in row.items() if value is False] == []


def test_the_table_of_the_readme_is_that_of_the_results() -> None:
    root = Path(__file__).resolve().parent.parent
    rows = json.loads((root / "benchmarks/results/families.json").read_text())["families"]
    assert list(rows) == list(families.CONFIGS)
    assert families.table(rows) in (root / "README.md").read_text()


def test_against_matrices_decoded_one_by_one(tmp_path: Path) -> None:
    """The reference of the other tests is made by `unpack`; this one is not."""
    original = source(tmp_path / "source")
    packed_path = packed(tmp_path / "packed", original)
    model = load(packed_path, dtype=torch.float32)
    plain = type(model).from_pretrained(
        unpacked(tmp_path / "plain", original, packed_path), dtype=torch.float32
    )
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    kept = [name for name in model.state_dict() if ".qmoe_" not in name]
    assert not any("experts.gate_up_proj" in name or ".expert_0." in name for name in kept)


def test_tokens_beyond_the_capacity_of_a_switch_expert(tmp_path: Path) -> None:
    """transformers 5.17 lets all tokens pass; later ones drop those beyond the capacity in each sequence."""
    original = source(tmp_path / "source", "switch_transformers", expert_capacity=1)
    packed_path = packed(tmp_path / "packed", original)
    unpack(packed_path, tmp_path / "plain")
    model = load(packed_path, dtype=torch.float32)
    plain = type(model).from_pretrained(tmp_path / "plain", dtype=torch.float32)
    narrow = logits(model)
    torch.testing.assert_close(narrow, logits(plain), rtol=1e-4, atol=1e-4)
    for block in (m for m in model.modules() if type(m).__name__ == "SwitchTransformersTop1Router"):
        block.expert_capacity = 64
    drops = not torch.equal(logits(model), narrow)
    # The first version that drops is between the oldest and those that are known to
    oldest, known = "5.17", (5, 23)
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if transformers.__version__.startswith(oldest):
        assert not drops
    elif version >= known:
        assert drops


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


def test_is_for_inference(olmoe: Path) -> None:
    model = load(olmoe)
    assert not model.training
    assert not model(input_ids=TOKENS).logits.requires_grad  # without torch.no_grad()


# ---- saving ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", ["copy", "zstd"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_a_packed_model(tmp_path: Path, dense: str, tied: bool) -> None:
    model_path = packed(tmp_path / "packed", source(tmp_path / "s", tie_word_embeddings=tied), dense=dense)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path)
    model.save_pretrained(tmp_path / "deep" / "again")
    assert main_verify([str(tmp_path / "deep" / "again"), "--quiet"]) == 0
    assert content(tmp_path / "deep" / "again") == content(model_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "again")
    assert torch.equal(logits(again), logits(model))
    assert (tmp_path / "deep" / "again" / "generation_config.json").exists()
    recipes = [quantization_config(path)["recipe"] for path in (model_path, tmp_path / "deep" / "again")]
    assert recipes[0] == recipes[1]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["again"]
    again.save_pretrained(tmp_path / "deep" / "third")  # and so on
    assert packed_models.contents(tmp_path / "deep" / "third") == packed_models.contents(
        tmp_path / "deep" / "again"
    )


def test_saving_replaces_nothing_unasked(olmoe: Path, spoiled: Path, tmp_path: Path) -> None:
    model = load(olmoe)
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    with pytest.raises(OutputExistsError):
        model.save_pretrained(spoiled)
    with pytest.raises(OutputExistsError):
        model.save_pretrained(tmp_path, force=True)  # not a packed model
    model.save_pretrained(spoiled, force=True)
    assert content(spoiled) == content(olmoe)
    # Onto itself: what is in memory does not depend on the file
    itself = load(spoiled)
    itself.save_pretrained(spoiled, force=True)
    assert content(spoiled) == content(olmoe)


def test_several_threads_save_one_model(olmoe: Path, tmp_path: Path) -> None:
    """Into one place: one of them does, the others say why not. Into places of their own: all do."""
    model = load(olmoe)
    begin = threading.Barrier(4)
    found: list[str] = []

    def save(place: Path) -> None:
        begin.wait()
        try:
            model.save_pretrained(place)
            found.append("saved")
        except Exception as error:  # noqa: BLE001 - the test says which it may be
            found.append(f"{type(error).__name__}: {error}")

    for places in ([tmp_path / "same"] * 4, [tmp_path / f"own-{number}" for number in range(4)]):
        found.clear()
        threads = [threading.Thread(target=save, args=(place,)) for place in places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        own = places[0] != places[1]
        assert found.count("saved") == (4 if own else 1), found
        refused = r"OutputExistsError: .*same(\.partial)?: (exists already|another writer is at work)"
        assert all(text == "saved" or re.match(refused, text) for text in found), found
        for place in places:
            qmoe_format.verify(place)
            assert content(place) == content(olmoe)
    assert len(list(tmp_path.iterdir())) == 5


WRITES_LATER = """
import sys
from pathlib import Path
import packed_models
from qmoe_format import PackedModelWriter
write = PackedModelWriter.finish
def finish(*arguments):
    print("at work", flush=True)
    sys.stdin.readline()
    write(*arguments)
PackedModelWriter.finish = finish
packed_models.write_model(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("force", [False, True])
def test_another_process_saves_to_the_same_place(olmoe: Path, tmp_path: Path, force: bool) -> None:
    model, out = load(olmoe), tmp_path / "out"
    other = subprocess.Popen(
        [sys.executable, "-c", WRITES_LATER, out],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert other.stdin is not None and other.stdout is not None
    assert other.stdout.readline() == "at work\n"
    with pytest.raises(OutputExistsError, match=r"out\.partial: another writer is at work"):
        model.save_pretrained(out, force=force)
    other.communicate("\n", timeout=60)
    assert other.returncode == 0
    packed_models.write_model(tmp_path / "alone")
    assert packed_models.contents(out) == packed_models.contents(tmp_path / "alone")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "alone", "tokenizer.json"}


def test_saving_what_cannot_be_saved(olmoe: Path, tmp_path: Path) -> None:
    model = load(olmoe)
    for option in ({"push_to_hub": True}, {"variant": "fp16"}, {"state_dict": {"a": torch.zeros(1)}}):
        with pytest.raises(ArgumentError, match=next(iter(option))):
            model.save_pretrained(tmp_path / "again", **option)
    with pytest.raises(UnsupportedModelError, match="copy the directory"):
        load(olmoe, expert_cache=4).save_pretrained(tmp_path / "again")
    # Around the stand-in, transformers would leave the experts out
    with pytest.raises(ValueError, match="not serializable"):
        type(model).save_pretrained(model, tmp_path / "again")
    model.save_pretrained(tmp_path / "again", is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_a_bare_model_is_saved_and_loaded(olmoe: Path, tmp_path: Path) -> None:
    bare = transformers.AutoModel.from_pretrained(olmoe)
    bare.save_pretrained(tmp_path / "bare")
    again = transformers.AutoModel.from_pretrained(tmp_path / "bare")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).last_hidden_state, bare(TOKENS).last_hidden_state)


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies_of_a_whole_model(olmoe: Path, tmp_path: Path, how: str) -> None:
    model = load(olmoe)
    expected = logits(model)
    if how == "torch.save":
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))  # noqa: S301
    del model
    assert torch.equal(logits(other), expected)
    other.save_pretrained(tmp_path / "again")
    assert content(tmp_path / "again") == content(olmoe)


def test_state_dict_both_ways(olmoe: Path) -> None:
    model, other = load(olmoe), load(olmoe)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for module in other.modules():
        if isinstance(module, QMoEExperts):
            module.qmoe_store.zero_()
    with pytest.raises(FormatError):
        logits(other)
    assert not any(other.load_state_dict(state))
    assert torch.equal(logits(other), logits(model))


# ---- compiling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_compiles_without_a_break(tmp_path: Path, family: str) -> None:
    model = load(packed(tmp_path / "packed", source(tmp_path / "source", family)), dtype=torch.float32)
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


# ---- devices -----------------------------------------------------------------------------------------------


DEVICE_MAPS: dict[str, Any] = {
    "cpu": "cpu",
    "auto": "auto",
    "explicit": {"": "cpu"},
    "disk": {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "lm_head": "disk",
    },
}


@pytest.mark.parametrize("name", DEVICE_MAPS)
@pytest.mark.parametrize("dense", ["copy", "zstd"])
def test_device_maps(olmoe: Path, tmp_path: Path, name: str, dense: str) -> None:
    pytest.importorskip("accelerate")
    path = olmoe if dense == "copy" else packed(tmp_path / "zstd", source(tmp_path / "source"), dense="zstd")
    options = {"offload_folder": tmp_path / "offload"} if name == "disk" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, device_map=DEVICE_MAPS[name], **options)
    assert torch.equal(logits(model), logits(load(path)))
    if name == "disk":
        assert model.lm_head.weight.is_meta
    model.save_pretrained(tmp_path / "again")
    assert content(tmp_path / "again") == content(path)


def test_load_takes_a_device_map(olmoe: Path) -> None:
    pytest.importorskip("accelerate")
    model = load(olmoe, device_map={"": "cpu"})
    assert torch.equal(logits(model), logits(load(olmoe)))


def quantization_config(model: Path) -> dict[str, Any]:
    with qmoe_format.open(model) as opened:
        config = opened.config["quantization_config"]
    assert isinstance(config, dict)
    return config


@pytest.mark.parametrize("place", ["mps", "xpu:0", "nonsense"])
def test_a_device_of_another_kind_is_refused(olmoe: Path, place: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"device.*cpu or cuda"):
        load(olmoe, device=place)
    with pytest.raises(UnsupportedModelError, match="device_map"):
        QMoEQuantizer(QMoEConfig(**quantization_config(olmoe))).validate_environment(device_map={"": place})


@pytest.mark.parametrize("place", ["cuda", "cuda:1", 0])
def test_a_gpu_that_is_not_there_is_refused(
    olmoe: Path, place: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedModelError, match="no such device"):
        load(olmoe, device_map={"": place})
    if isinstance(place, str):
        with pytest.raises(UnsupportedModelError, match="no such device"):
            load(olmoe, device=place)


@pytest.mark.parametrize("place", ["cuda", "auto"])
def test_a_gpu_without_cupy_is_refused(olmoe: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"CuPy: pip install 'qmoe-format\[gpu\]'"):
        load(olmoe, **({"device": place} if place == "cuda" else {"device_map": place}))


def edit_config(model: Path, **changes: Any) -> None:
    packed_models.edit_json(model / "config.json", lambda config: config.update(changes))
    packed_models.sign(model)


@pytest.mark.parametrize("cached", [{}, {"expert_cache": 4}])
def test_the_class_decides_where_the_family_is_unknown(spoiled: Path, cached: dict[str, Any]) -> None:
    edit_config(spoiled, model_type="nosuch")
    assert type(load(spoiled, **cached)) is transformers.OlmoeForCausalLM


@pytest.mark.parametrize("architectures", [None, [], ["NoSuchModel"], ["AutoConfig"], "OlmoeForCausalLM"])
def test_an_unknown_architecture_is_refused(spoiled: Path, architectures: object) -> None:
    edit_config(spoiled, architectures=architectures)
    with pytest.raises(UnsupportedModelError, match="architectures"):
        load(spoiled)


def both(model: Path) -> Iterator[Callable[[], object]]:
    """The two ways to load: neither may leave an expert to chance."""
    yield lambda: load(model)
    yield lambda: transformers.AutoModelForCausalLM.from_pretrained(model)


def test_a_layer_that_is_not_packed_is_refused(spoiled: Path) -> None:
    edit_config(spoiled, num_hidden_layers=3)
    for way in both(spoiled):
        with pytest.raises(HeaderError, match=r"model\.layers\.2\.mlp\.experts: no packed layer"):
            way()


def test_a_missing_tensor_is_refused(spoiled: Path) -> None:
    edit_config(spoiled, attention_bias=True)
    with pytest.raises(UnsupportedModelError, match=r"missing_keys.*bias"):
        load(spoiled)


@pytest.mark.parametrize("experts", [4, 6])
def test_another_number_of_experts_is_refused(spoiled: Path, experts: int) -> None:
    edit_config(spoiled, num_experts=experts)
    for way in both(spoiled):
        with pytest.raises(HeaderError, match=rf"number of experts .*found 5, expected {experts}"):
            way()


@pytest.mark.parametrize("suffix", ["qmoe_store", "qmoe_index", "qmoe_dictionaries"])
def test_missing_packed_tensors_are_refused(spoiled: Path, suffix: str) -> None:
    name = f"model.layers.1.mlp.experts.{suffix}"
    index = json.loads((spoiled / "model.safetensors.index.json").read_text())
    shard = spoiled / index["weight_map"][name]
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, {"format": "pt"})
    del index["weight_map"][name]
    (spoiled / "model.safetensors.index.json").write_text(json.dumps(index))
    packed_models.sign(spoiled)
    for way in both(spoiled):
        with pytest.raises(HeaderError, match=rf"model\.layers\.1\.mlp\.experts\.{suffix}"):
            way()


def test_sizes_unlike_the_file_are_refused(spoiled: Path) -> None:
    def edit(config: Any) -> None:
        config["quantization_config"]["layers"]["model.layers.1.mlp.experts"]["store_bytes"] += 256

    packed_models.edit_json(spoiled / "config.json", edit)
    packed_models.sign(spoiled)
    for way in both(spoiled):
        with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.experts\.qmoe_store"):
            way()


@pytest.mark.parametrize("change", ["written", "replaced", "removed"])
def test_a_file_that_changes_while_it_is_loaded(
    spoiled: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = sorted(spoiled.glob("*.safetensors"))[-1]
    ordinary = transformers.OlmoeForCausalLM.from_pretrained

    def meanwhile(*args: Any, **kwargs: Any) -> Any:
        loaded = ordinary(*args, **kwargs)
        data = shard.read_bytes()
        if change == "written":
            with open(shard, "r+b") as stream:
                stream.write(data)
            os.utime(shard, ns=(1, 1))
        else:
            shard.rename(spoiled.parent / "old")
            if change == "replaced":
                shard.write_bytes(data)
        return loaded

    monkeypatch.setattr(transformers.OlmoeForCausalLM, "from_pretrained", meanwhile)
    with pytest.raises(FileChangedError, match=re.escape(shard.name)):
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
    """The experts of gpt-oss have biases and a gate of their own, which these have not."""
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
