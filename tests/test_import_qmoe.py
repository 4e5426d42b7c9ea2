"""Checkpoints as the authors of QMoE published them: in, out, and what is refused."""

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import published_models
import pytest
import torch
from published_models import read_checkpoint, write_checkpoint
from qmoe_codec import Dictionary, DictionarySet, build_dictionary, encode, read_frame_header
from qmoe_codec.codewords import join_codewords, split_codewords
from qmoe_codec.errors import ArgumentError, CheckpointError, QMoEError, UnsupportedModelError
from qmoe_quantize import PackOptions, pack
from qmoe_quantize.published import dictionary as published
from qmoe_quantize.published.codewords import published_codewords
from qmoe_quantize.published.exporter import export_published
from qmoe_quantize.published.importer import import_published
from source_models import random_model
from torch import Tensor

import qmoe_format
from qmoe_format import cli

DICTIONARY = published.published_dictionary()
WI = "encoder.block.1.layer.1.mlp.experts.expert_0.wi"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("published") / "source"
    write_checkpoint(directory)
    return directory


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def assert_weights(model: Path, weights: dict[str, Tensor]) -> None:
    """Every expert's weight is what it was, to the bit."""
    seen = set()
    with qmoe_format.open(model) as opened:
        for layer in opened.layers.values():
            for expert in range(layer.experts):
                for p in layer.projections:
                    found = opened.layer(layer.prefix).matrix(expert, p.name).dequantize("bfloat16")
                    name = p.tensor_name(expert)
                    np.testing.assert_array_equal(found, weights[name].view(torch.int16).numpy().view("u2"))
                    seen.add(name)
    assert seen == set(weights)


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Two checkpoints hold the same tensors, to the bit, in files of the same names."""
    first, second = read_checkpoint(one), read_checkpoint(other)
    assert first.keys() == second.keys()
    for file, values in first.items():
        assert values.keys() == second[file].keys()
        for name, value in values.items():
            found = second[file][name]
            if isinstance(value, int):
                assert found == value
            else:
                assert (found.dtype, found.shape) == (value.dtype, value.shape), name
                bits = [t.reshape(-1).view(torch.uint8) for t in (found, value)]
                assert torch.equal(*bits), name
    assert json.loads((one / "config.json").read_text()) == json.loads((other / "config.json").read_text())


# ---- the dictionary ----------------------------------------------------------------------------------------


def test_dictionary() -> None:
    assert hashlib.sha256(DICTIONARY.frame).hexdigest() == published.SHA256
    assert Dictionary.from_frame(DICTIONARY.frame) == DICTIONARY
    words = DICTIONARY.words[0].astype(np.int64)
    assert (DICTIONARY.bits, DICTIONARY.tables, len(words)) == (16, 1, 65536)
    assert (words & 127).max() == 28
    assert not ((words & 127) % 2).any()
    # The authors' own table, by its layout: two words of seven pairs each, 4 bits a pair, above the length.
    table = np.zeros((65536, 2), np.uint32)
    for number, phrase in enumerate(published_models.phrases()):
        for half in range(2):
            pairs = zip(phrase[14 * half :: 2], phrase[14 * half + 1 :: 2], strict=True)
            for place, (first, second) in zip(range(7), pairs, strict=False):
                table[number, half] |= (first | second << 2) << (4 + 4 * place)
            table[number, half] |= len(phrase) // 2
    digest = hashlib.sha256(table.astype("<u4").tobytes()).hexdigest()
    assert digest == "c09862c453fe122634070a475357ff81a679aff65829d84a56f806c02a54ed45"


def test_dictionary_phrase_by_phrase() -> None:
    trits = {0: 0, 1: -1, 2: 1}
    words = DICTIONARY.words[0].tolist()
    for word, symbols in zip(words, published_models.phrases(), strict=True):
        phrase = [0] * (word & 127)
        for place in range(3):
            position = word >> (7 + 7 * place) & 127
            if position != 127:
                phrase[position] = -1 if word >> (28 + place) & 1 else 1
        assert phrase == [trits[symbol] for symbol in symbols]


def test_a_wrong_dictionary_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "SHA256", "0" * 64)
    with pytest.raises(QMoEError, match="SHA-256: this machine's floating point"):
        published.published_dictionary.__wrapped__()


@pytest.mark.parametrize("columns", [1, 2, 27, 28, 29, 56, 131])
@pytest.mark.parametrize("p_zero", [0.3, 0.885, 0.99, 1.0])
def test_rows_are_cut_as_the_authors_do(columns: int, p_zero: float) -> None:
    random = np.random.default_rng(columns)
    symbols = random.choice(3, (9, columns), p=[p_zero, (1 - p_zero) / 2, (1 - p_zero) / 2])
    counts, codewords = published_codewords(np.array([0, -1, 1], np.int8)[symbols])
    rows = [published_models.encode_row(row) for row in symbols.tolist()]
    assert counts.tolist() == [len(row) for row in rows]
    assert codewords.tolist() == [codeword for row in rows for codeword in row]


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_codewords_out_of_a_frame_and_in_again(bits: int) -> None:
    dictionary = DICTIONARY if bits == 16 else build_dictionary(0.9, bits)
    trits = np.random.default_rng(bits).choice([-1, 0, 1], (70, 300), p=[0.05, 0.9, 0.05]).astype(np.int8)
    levels = np.float32([-0.5, 0.75]) * np.ones((70, 1), np.float32)
    for rows in (0, 1, 70):
        frame = encode(trits[:rows], levels[:rows], dictionary)
        counts, codewords = split_codewords(frame)
        assert join_codewords(counts, codewords, 300, levels[:rows], dictionary) == frame


@pytest.mark.parametrize(
    ("counts", "codewords"),
    [([2], [1]), ([-1, 2], [1]), ([1], [65536]), ([1], [-1]), ([5], [1] * 5), ([[1]], [1])],
)
def test_codewords_that_fit_no_frame(counts: Any, codewords: Any) -> None:
    with pytest.raises(ArgumentError):
        join_codewords(counts, codewords, 4, np.zeros((len(counts), 2), np.float32), DICTIONARY)


# ---- there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_codes", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"d_model": 27, "d_ff": 35, "num_experts": 2},  # odd columns, rows that no 32 divides
        {"tie_word_embeddings": False, "is_full_sparse": True, "num_layers": 2, "num_experts": 2},
    ],
    ids=["usual", "odd", "all-sparse"],
)
def test_round_trip(tmp_path: Path, changes: dict[str, Any], keep_codes: bool) -> None:
    original, packed, again = tmp_path / "original", tmp_path / "packed", tmp_path / "again"
    weights = write_checkpoint(original, **changes)
    summary = import_published(original, packed, keep_codes=keep_codes, dense="zstd")
    qmoe_format.verify(packed)
    assert_weights(packed, weights)
    assert (packed / "README.md").read_text() == "A model."
    assert summary.weights == sum(weight.numel() for weight in weights.values())
    assert summary.zeros == sum(int((weight == 0).sum()) for weight in weights.values())
    exported = export_published(packed, again)
    if "is_full_sparse" in changes:  # the step of 1 is new, and says what is_full_sparse said
        config = json.loads((original / "config.json").read_text())
        config |= {"encoder_sparse_step": 1, "decoder_sparse_step": 1}
        (original / "config.json").write_text(json.dumps(config))
    assert_same_checkpoint(original, again)
    assert exported.matrices == len(weights)
    assert exported.kept == (len(weights) if keep_codes else 0)
    noexp = torch.load(again / "noexp.pt", weights_only=True)
    tied = noexp["shared.weight"].data_ptr() == noexp["encoder.embed_tokens.weight"].data_ptr()
    assert tied == (not changes.get("is_full_sparse"))


def test_codewords_are_kept(source: Path, tmp_path: Path) -> None:
    import_published(source, tmp_path / "packed", keep_codes=True)
    files = read_checkpoint(source)
    with qmoe_format.open(tmp_path / "packed") as model:
        for number, prefix in enumerate(published_models.sparse_prefixes(published_models.CONFIG)):
            layer = model.layer(prefix)
            assert list(layer.dictionaries) == [DICTIONARY.dictionary_id]
            for expert in range(layer.experts):
                for frame, name in zip(layer.frames(expert), ("wi", "wo"), strict=True):
                    theirs = files[f"exp{number:02d}.pt"][f"{prefix}.expert_{expert}.{name}.w_comp"].numpy()
                    header = read_frame_header(frame)
                    start = header.codewords_start
                    assert bytes(frame[start : start + 2 * len(theirs)]) == theirs.astype("<i2").tobytes()


def test_encoded_anew_it_is_smaller(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes in the authors' layout, kept, and encoded anew, of a layer of some size."""
    source = tmp_path / "source"
    weights = write_checkpoint(source, odd_rows=False, d_model=128, d_ff=384, num_experts=6, num_layers=2)
    anew = import_published(source, tmp_path / "anew")
    kept = import_published(source, tmp_path / "kept", keep_codes=True)
    theirs = sum(
        sum(tensor.nbytes for tensor in torch.load(file, weights_only=True).values())
        for file in source.glob("exp*.pt")
    )
    assert anew.expert_source_bytes == kept.expert_source_bytes == theirs
    assert_weights(tmp_path / "anew", weights)
    with capsys.disabled():
        print(
            f"\n  {anew.weights:,} weights, {anew.zeros / anew.weights:.1%} zero: in the authors' layout "
            f"{theirs:,} bytes ({anew.source_bits_per_weight:.3f} bits/weight), encoded anew "
            f"{anew.expert_packed_bytes:,} ({anew.bits_per_weight:.3f}); codewords kept "
            f"{kept.expert_packed_bytes:,}, of these {2 * len(DICTIONARY.frame):,} dictionaries"
        )
    assert anew.expert_packed_bytes < 0.9 * theirs
    # Kept, only the dictionaries make it larger: the row index is smaller.
    assert kept.expert_packed_bytes - 2 * len(DICTIONARY.frame) < theirs


def test_export_of_another_model(tmp_path: Path) -> None:
    """A model that never was in the authors' layout goes there and comes back the same."""
    plain = random_model(tmp_path / "plain", "switch_transformers")
    pack(plain, tmp_path / "packed")
    assert export_published(tmp_path / "packed", tmp_path / "out").kept == 0
    import_published(tmp_path / "out", tmp_path / "again")
    with qmoe_format.open(tmp_path / "packed") as one, qmoe_format.open(tmp_path / "again") as other:
        for prefix, layer in one.layers.items():
            for expert in range(layer.experts):
                for p in layer.projections:
                    found = [
                        model.layer(prefix).matrix(expert, p.name).dequantize() for model in (one, other)
                    ]
                    np.testing.assert_array_equal(*found)
        assert set(one.dense_names()) == set(other.dense_names())
    export_published(tmp_path / "again", tmp_path / "out", force=True)
    with pytest.raises(QMoEError, match="exists already"):
        export_published(tmp_path / "again", tmp_path / "out")
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(QMoEError, match="will not be replaced"):
        export_published(tmp_path / "again", tmp_path / "out", force=True)


def test_export_refuses(tmp_path: Path) -> None:
    pack(random_model(tmp_path / "olmoe"), tmp_path / "packed")
    with pytest.raises(UnsupportedModelError, match="SwitchTransformers models only"):
        export_published(tmp_path / "packed", tmp_path / "out")
    switch = random_model(tmp_path / "switch", "switch_transformers")
    pack(switch, tmp_path / "float32", PackOptions(level_format="float32"))
    with pytest.raises(UnsupportedModelError, match="bfloat16 does not hold"):
        export_published(tmp_path / "float32", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_are_mapped_and_no_code_is_allowed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is read by torch's restricted unpickler, and tensors stay in their file until used."""
    honest, calls = torch.load, []

    def spy(file: Path, **options: Any) -> Any:
        calls.append((Path(file).name, options))
        return honest(file, **options)

    monkeypatch.setattr(torch, "load", spy)
    import_published(source, tmp_path / "packed")
    assert {name for name, _ in calls} == {"sizes.pt", "noexp.pt", "exp00.pt", "exp01.pt", "exp02.pt"}
    assert all(options["weights_only"] for _, options in calls)
    assert all(options["mmap"] for name, options in calls if name != "sizes.pt")


def test_minus_zero_stays(copy: Path, tmp_path: Path) -> None:
    """A level of minus zero is another number than zero, to the bit."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[f"{WI}.ter_minmax"][0] = -0.0

    edit_file(copy / "exp00.pt", edit)
    import_published(copy, tmp_path / "packed")
    with qmoe_format.open(tmp_path / "packed") as model:
        weight = model.layer(WI.rpartition(".expert_0")[0]).matrix(0, "wi").dequantize("bfloat16")
        assert (weight[0] == 0x8000).any()
    export_published(tmp_path / "packed", tmp_path / "again")
    assert_same_checkpoint(copy, tmp_path / "again")


def test_transformers_runs_it(source: Path, tmp_path: Path) -> None:
    from qmoe_format.transformers import load

    import_published(source, tmp_path / "packed", dense="zstd")
    model = load(tmp_path / "packed")
    noexp = torch.load(source / "noexp.pt", weights_only=True)
    assert torch.equal(model.state_dict()["lm_head.weight"], noexp["lm_head.weight"])
    ids = torch.tensor([[3, 4, 5, 1]])
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=ids).logits
    assert torch.isfinite(logits).all()


# ---- what is refused ---------------------------------------------------------------------------------------


def edit_file(file: Path, edit: Callable[[Any], Any]) -> None:
    value = torch.load(file, weights_only=True)
    changed = edit(value)
    torch.save(value if changed is None else changed, file)


def edit_part(part: str, edit: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """Change one tensor of the first matrix."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{WI}.{part}"] = edit(tensors[f"{WI}.{part}"])

    return lambda directory: edit_file(directory / "exp00.pt", change)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def drop(file: str, name: str) -> Callable[[Path], None]:
    return lambda directory: edit_file(
        directory / file, lambda values: {n: v for n, v in values.items() if n != name}
    )


def put(file: str, name: str, value: Any) -> Callable[[Path], None]:
    return lambda directory: edit_file(directory / file, lambda values: {**values, name: value})


def put_at(position: int, value: int) -> Callable[[Tensor], Tensor]:
    def edit(tensor: Tensor) -> Tensor:
        tensor[position] = value
        return tensor

    return edit


def swap_codewords(tensor: Tensor) -> Tensor:
    """Exchange codewords of two lengths between two rows."""
    flat = tensor.numpy()
    flat[0], flat[-1] = flat[-1], flat[0]
    return tensor


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no-sizes": (lambda d: (d / "sizes.pt").unlink(), "sizes.pt: missing"),
    "no-dense": (lambda d: (d / "noexp.pt").unlink(), "noexp.pt: missing"),
    "no-config": (lambda d: (d / "config.json").unlink(), "config.json: not found"),
    "no-layer": (lambda d: (d / "exp01.pt").unlink(), "no file holds the experts of this layer"),
    "layer-twice": (lambda d: shutil.copy(d / "exp01.pt", d / "exp07.pt"), "one layer in two files"),
    "two-layers-in-a-file": (
        lambda d: edit_file(d / "exp00.pt", lambda v: v | torch.load(d / "exp01.pt", weights_only=True)),
        "two layers in one file",
    ),
    "stranger": (put("exp00.pt", f"{WI}.bias", torch.zeros(1)), "belongs to no expert"),
    "expert-too-many": (
        put("exp00.pt", WI.replace("expert_0", "expert_3") + ".w_comp", torch.zeros(1, dtype=torch.int16)),
        "belongs to no expert",
    ),
    "matrix-missing": (drop("exp00.pt", f"{WI}.row_off"), "row_off: missing"),
    "size-missing": (drop("sizes.pt", WI), "contradicts sizes.pt"),
    "size-wrong": (put("sizes.pt", WI, 7), "contradicts sizes.pt"),
    "size-negative": (put("sizes.pt", WI, -1), "not a number of codewords"),
    "size-text": (put("sizes.pt", WI, "7"), "not a number of codewords"),
    "size-stranger": (put("sizes.pt", "nobody", 7), "belongs to no expert"),
    "sizes-a-list": (lambda d: torch.save([1, 2], d / "sizes.pt"), "not tensors by name"),
    "codewords-dtype": (edit_part("w_comp", lambda t: t.int()), "w_comp: wrong dtype or shape"),
    "codewords-shape": (edit_part("w_comp", lambda t: t[None]), "w_comp: wrong dtype or shape"),
    "offsets-dtype": (edit_part("row_off", lambda t: t.long()), "row_off: wrong dtype or shape"),
    "offsets-length": (edit_part("row_off", lambda t: t[1:].clone()), "row_off: wrong dtype or shape"),
    "offsets-start": (edit_part("row_off", put_at(0, 1)), "not rising from 0"),
    "offsets-end": (edit_part("row_off", put_at(-1, 9)), "not rising from 0"),
    "offsets-fall": (edit_part("row_off", put_at(2, 2**31 - 1)), "not rising from 0"),
    "offsets-negative": (edit_part("row_off", put_at(2, -(2**31))), "not rising from 0"),
    "row-too-short": (edit_part("w_comp", swap_codewords), "do not make up the row"),
    "levels-dtype": (edit_part("ter_minmax", lambda t: t.half()), "ter_minmax: wrong dtype or shape"),
    "levels-length": (edit_part("ter_minmax", lambda t: t[2:].clone()), "ter_minmax: wrong dtype or shape"),
    "levels-nan": (edit_part("ter_minmax", put_at(5, float("nan"))), "expected finite"),
    "levels-infinite": (edit_part("ter_minmax", put_at(5, float("inf"))), "expected finite"),
    "weights-beside": (edit_part("weight", lambda t: torch.ones(3).bfloat16()), "wrong dtype or shape"),
    "repeated-view": (
        edit_part("w_comp", lambda t: t[:1].expand(1 << 40)),
        "w_comp: not a plain tensor",
    ),
    "every-other": (edit_part("row_off", lambda t: torch.cat([t, t])[::2]), "not a plain tensor"),
    "sparse": (put("noexp.pt", "extra", torch.eye(3).to_sparse()), "extra: not a plain tensor"),
    "dense-missing": (
        drop("noexp.pt", "decoder.final_layer_norm.weight"),
        "final_layer_norm.weight: missing",
    ),
    "dense-shape": (put("noexp.pt", "shared.weight", torch.zeros(3, 3)), "not the shape that config.json"),
    "dense-expert": (put("noexp.pt", f"{WI}.weight", torch.zeros(64, 32)), "an expert's weights, unpacked"),
    "dense-not-a-tensor": (put("noexp.pt", "extra", [1]), "extra: not a plain tensor"),
    "dense-reserved": (put("noexp.pt", "a.qmoe_store", torch.zeros(1)), "cannot be packed"),
    "other-architecture": (edit_config(model_type="olmoe"), "no published QMoE checkpoint"),
    "other-width": (edit_config(d_model=48), "expected"),
    "more-experts": (edit_config(num_experts=4), r"classifier\.weight: not the shape that config.json"),
    "endless-layers": (edit_config(num_layers=10**12), "more experts than any model has"),
    "no-file": (lambda d: (d / "exp00.pt").write_bytes(b""), "not a file of tensors"),
    "text": (lambda d: (d / "exp00.pt").write_bytes(b"nothing" * 99), "not a file of tensors"),
    "a-directory": (
        lambda d: ((d / "exp00.pt").unlink(), (d / "exp00.pt").mkdir()),
        "not a regular file",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(copy: Path, tmp_path: Path, fault: str) -> None:
    spoil, message = FAULTS[fault]
    spoil(copy)
    with pytest.raises(QMoEError) as caught:
        import_published(copy, tmp_path / "out", keep_codes=True)
    text = str(caught.value)
    assert "\n" not in text
    assert re.search(message, text), text
    assert not list(tmp_path.glob("out*"))


def test_a_non_zero_past_an_odd_row(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", d_model=27, d_ff=35, num_experts=1)
    numbers = {phrase: number for number, phrase in enumerate(published_models.phrases())}

    def edit(tensors: dict[str, Tensor]) -> None:
        flat = tensors[f"{WI}.w_comp"].numpy().view(np.uint16)
        end = int(tensors[f"{WI}.row_off"][1])
        phrase = published_models.phrases()[flat[end - 1]]
        flat[end - 1] = numbers[(*phrase[:-2], 0, 1)]

    edit_file(tmp_path / "source/exp00.pt", edit)
    with pytest.raises(qmoe_format.PayloadError, match=r"expert_0\.wi: codewords"):
        import_published(tmp_path / "source", tmp_path / "out")


def test_rows_that_the_authors_packer_lost(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", d_model=32, d_ff=35, num_experts=1)
    sizes = {}

    def edit(tensors: dict[str, Tensor]) -> None:
        offsets = tensors[f"{WI}.row_off"]
        offsets[33:] = offsets[32]
        tensors[f"{WI}.w_comp"] = tensors[f"{WI}.w_comp"][: offsets[32]].clone()
        sizes[WI] = int(offsets[32])

    edit_file(tmp_path / "source/exp00.pt", edit)
    edit_file(tmp_path / "source/sizes.pt", lambda values: values | sizes)
    with pytest.raises(CheckpointError, match="drops rows beyond a multiple of 32"):
        import_published(tmp_path / "source", tmp_path / "out")


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path("harm"), "done")


@pytest.mark.parametrize("file", ["exp00.pt", "noexp.pt", "sizes.pt", "exp99.pt", "stray.pt", "stray.bin"])
def test_no_code_is_run(copy: Path, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harm()}, copy / file)
    if file.startswith("stray"):
        import_published(copy, tmp_path / "out")
    else:
        with pytest.raises(CheckpointError, match="not a file of tensors"):
            import_published(copy, tmp_path / "out")
        (copy / file).write_bytes(pickle.dumps(Harm()))
        with pytest.raises(CheckpointError, match="not a file of tensors"):
            import_published(copy, tmp_path / "out")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("file", ["exp00.pt", "noexp.pt", "sizes.pt"])
def test_files_cut_short_or_changed(copy: Path, tmp_path: Path, file: str) -> None:
    """Never anything but an error in one line, or a model whose checks all passed."""
    original = (copy / file).read_bytes()
    for size in range(0, len(original), len(original) // 7):
        (copy / file).write_bytes(original[:size])
        with pytest.raises(QMoEError):
            import_published(copy, tmp_path / "out")
    random = np.random.default_rng(1)
    for _ in range(10):
        spoiled = bytearray(original)
        spoiled[random.integers(len(spoiled))] ^= 1 << random.integers(8)
        (copy / file).write_bytes(spoiled)
        try:
            import_published(copy, tmp_path / "out", force=True)
        except QMoEError as error:
            assert "\n" not in str(error)


# ---- commands ----------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_commands(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed, out = tmp_path / "packed", tmp_path / "out"
    code, text, error = run(capsys, "pack", source, packed, "--keep-codes", "--dense", "zstd")
    assert (code, error) == (0, "")
    assert "published QMoE checkpoint, 3 layers, 9 experts" in text
    assert "codewords kept" in text
    assert "to the bit" in text
    assert run(capsys, "verify", packed)[0] == 0
    code, text, error = run(capsys, "unpack", packed, out, "--format", "qmoe")
    assert (code, error) == (0, "")
    assert "18 matrices, 18 with the codewords that they had" in text
    assert_same_checkpoint(source, out)
    assert (
        json.loads(run(capsys, "unpack", packed, out, "--format", "qmoe", "--force", "--json")[1])["kept"]
        == 18
    )
    numbers = json.loads(run(capsys, "pack", source, packed, "--force", "--json")[1])
    assert numbers["codewords"] == "re-encoded"
    assert numbers["gain"] == 1 - numbers["expert_packed_bytes"] / numbers["expert_source_bytes"]
    assert numbers["bits_per_weight"] == 8 * numbers["expert_packed_bytes"] / numbers["weights"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--levels", "lsq"], "--levels: does not apply to a published QMoE checkpoint"),
        (["--level-format", "e4m4"], "--level-format: does not apply"),
        (["--dry-run"], "--dry-run: does not apply"),
        (["--threads", "2"], "--threads: does not apply"),
    ],
)
def test_options_that_do_not_apply(
    source: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(capsys, "pack", source, tmp_path / "out", *arguments)
    assert code == 2
    assert message in error


def test_keep_codes_of_an_ordinary_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = random_model(tmp_path / "plain")
    code, _, error = run(capsys, "pack", plain, tmp_path / "out", "--keep-codes")
    assert code == 2
    assert "--keep-codes: not a published QMoE checkpoint" in error


def test_a_frame_is_checked_against_what_was_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the encoder to change a weight, nothing would be written."""
    honest = DictionarySet.encode

    def faulty(self: DictionarySet, trits: Any, levels: Any, level_format: str) -> bytes:
        changed = trits.copy()
        changed[0, 0] = 1 - abs(changed[0, 0])
        return honest(self, changed, levels, level_format)

    monkeypatch.setattr(DictionarySet, "encode", faulty)
    with pytest.raises(QMoEError, match="does not decode to what it was"):
        import_published(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
