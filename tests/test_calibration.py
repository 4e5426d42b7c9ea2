"""Calibration: which text is read, what reaches the experts, and what is kept of it."""

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("h5py")
pytest.importorskip("transformers")

import h5py
import torch
import transformers
from qmoe_codec.errors import (
    ArgumentError,
    CheckpointError,
    HeaderError,
    MissingPackageError,
    OutputExistsError,
    QMoEError,
    UnsupportedModelError,
)
from qmoe_quantize import (
    CalibrationOptions,
    HessianOptions,
    PackOptions,
    SourceCheckpoint,
    StreamOptions,
    TextOptions,
    expert_layers,
    pack,
)
from qmoe_quantize.calibrated import StreamedExperts, TernarizingVisitor, calibrate
from qmoe_quantize.config import ModelConfig
from qmoe_quantize.mixture import LayerRun
from qmoe_quantize.problem import MatrixGroup
from qmoe_quantize.recipes import RecipeSettings
from qmoe_quantize.store import Store, merge
from qmoe_quantize.text import TokenWindows, read_windows
from source_models import CONFIGS, config_of, random_tensors, write_model

import qmoe_format
from qmoe_format.cli import main
from qmoe_format.unpack import unpack

SMALL: dict[str, Any] = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "eos_token_id": None}


def lively_model(directory: Path, model_type: str = "olmoe", **changes: Any) -> Path:
    """A checkpoint whose experts change what comes after them by much."""
    if model_type == "switch_transformers":
        sizes = {"vocab_size": 256, "d_model": 16, "d_ff": 24, "expert_capacity": 4, "pad_token_id": 0}
        sizes |= {"decoder_start_token_id": 0, "num_decoder_layers": 4, "num_sparse_decoder_layers": 2}
    else:
        sizes = {**SMALL, "num_hidden_layers": 3}
    config = config_of(model_type, **{"dtype": "float32", **sizes, **changes})
    tensors = random_tensors(config)
    return write_model(
        directory, config, {name: t * (10 if t.ndim > 1 else 30) for name, t in tensors.items()}
    )


def text_file(path: Path, size: int = 20_000, seed: int = 0) -> Path:
    path.write_bytes(np.random.default_rng(seed).integers(1, 256, size, np.uint8).tobytes())
    return path


def options(text: Path, samples: int = 16, length: int = 32, **changes: Any) -> CalibrationOptions:
    return CalibrationOptions(text=TextOptions(str(text), samples, length), **changes)


def make_store(source: Path, out: Path, chosen: CalibrationOptions, **arguments: Any) -> Path:
    checkpoint = SourceCheckpoint(source)
    calibrate(checkpoint, expert_layers(checkpoint.config, checkpoint.tensors), chosen, out, **arguments)
    return out


def arrays_of(store: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    with h5py.File(store) as file:
        file.visititems(
            lambda name, item: found.update({name: item[()].tobytes()}) if hasattr(item, "dtype") else None
        )
    return found


# ---- what is held out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["txt", "jsonl", "split"])
def test_held_out_text_never_enters_a_hessian(kind: str, tmp_path: Path) -> None:
    """Every byte of the store stays when the held-out text is replaced; and not when the other text is."""
    source = lively_model(tmp_path / "source", num_hidden_layers=1)
    size, cut = 2000, 1900

    def write(name: str, used: int, held_out: int) -> Path:
        first = np.random.default_rng(used).integers(97, 123, cut, np.uint8).tobytes()
        second = np.random.default_rng(held_out).integers(97, 123, size - cut, np.uint8).tobytes()
        folder = tmp_path / name
        folder.mkdir()
        if kind == "txt":
            (folder / "a.txt").write_bytes(first + second)
            return folder / "a.txt"
        documents = [first[start : start + 40].decode() for start in range(0, cut, 40)]
        rest = [second[start : start + 40].decode() for start in range(0, size - cut, 40)]
        lines = [{"text": text} for text in documents]
        # All windows of one text that are not held out are used, so a slip would show.
        lines += [{"text": text, **({"split": "validation"} if kind == "split" else {})} for text in rest]
        (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder / "a.jsonl"

    stores = []
    for number, (used, held_out) in enumerate(((0, 1), (0, 2), (3, 1))):
        file = write(f"text{number}", used, held_out)
        part = "0:1" if kind == "split" else "0:0.95"
        chosen = CalibrationOptions(text=TextOptions(str(file), 10**6, 20, part=part))
        stores.append(arrays_of(make_store(source, tmp_path / f"{number}.h5", chosen)))
    assert stores[0] == stores[1]
    changed = [name for name in stores[0] if stores[0][name] != stores[2][name]]
    assert any(name.endswith("hessian") for name in changed)


def test_all_windows_lie_in_their_part(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(bytes(97 + number * 26 // 4000 for number in range(4000)))  # rising letters
    config = ModelConfig(tmp_path / "config.json", {"vocab_size": 256})
    letters = set()
    for part in ("0:0.5", "0.5:1"):
        windows = read_windows(TextOptions(str(file), 1000, 10, part=part), config)
        assert windows.tokens.shape == (200, 10)
        letters.update(np.unique(windows.tokens).tolist())
        middle = 97 + 13
        assert (windows.tokens < middle).all() if part == "0:0.5" else (windows.tokens >= middle).all()
    assert len(letters) == 26


# ---- text --------------------------------------------------------------------------------------------------


def test_seed_and_number_of_windows(tmp_path: Path) -> None:
    file = text_file(tmp_path / "text.txt")
    config = ModelConfig(tmp_path / "config.json", {"vocab_size": 256})

    def digest(**changes: Any) -> str:
        return read_windows(TextOptions(str(file), **{"samples": 8, "length": 16, **changes}), config).digest

    assert digest() == digest()
    assert len({digest(), digest(seed=1), digest(samples=9), digest(length=17), digest(part="0:0.5")}) == 5


def test_masks_and_special_tokens_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    # é is two bytes; characters 2 and 3 do not count, and 0 is the padding token
    file.write_text(json.dumps({"text": "aébcd\0", "mask": [[1, 3]]}) + "\n\n")
    config = ModelConfig(tmp_path / "config.json", {"vocab_size": 256, "pad_token_id": 0})
    windows = read_windows(TextOptions(str(file), 1, 7, part="0:1"), config)
    assert bytes(windows.tokens[0].tolist()) == "aébcd\0".encode()
    assert windows.counted[0].tolist() == [True, False, False, False, True, True, False]


def test_masked_tokens_enter_no_hessian(tmp_path: Path) -> None:
    """Another last token changes nothing when it does not count: nothing comes after it."""
    source = lively_model(tmp_path / "source", num_hidden_layers=2)
    stores = []
    for number, (last, mask) in enumerate((("y", [[19, 20]]), ("z", [[19, 20]]), ("z", []))):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("".join(json.dumps({"text": c * 19 + last, "mask": mask}) + "\n" for c in "abcd"))
        chosen = CalibrationOptions(text=TextOptions(str(file), 4, 20, part="0:1"))
        stores.append(arrays_of(make_store(source, tmp_path / f"{number}.h5", chosen)))
    assert stores[0] == stores[1]
    assert stores[0] != stores[2]


def test_a_tokenizer_is_used(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "one": 3, "two": 4, "three": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    source = lively_model(tmp_path / "source", vocab_size=10)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(source)
    file = tmp_path / "text.jsonl"
    lines = [{"text": "one two three", "mask": [[4, 7]]}, {"text": "three two"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = ModelConfig.read(source / "config.json")
    windows = read_windows(TextOptions(str(file), 1, 7, part="0:1"), config)
    assert windows.tokens[0].tolist() == [3, 4, 5, 1, 5, 4, 1]  # each document ends with the end token
    assert windows.counted[0].tolist() == [True, False, True, False, True, True, False]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "no calibration text"), (b"abc", "shorter than one sample"), (None, "not found")],
)
def test_too_little_text(content: bytes | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    config = ModelConfig(tmp_path / "config.json", {"vocab_size": 256})
    with pytest.raises(CheckpointError, match=words) as caught:
        read_windows(TextOptions(str(file), 4, 16), config)
    assert "text.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    source = lively_model(tmp_path / "source", vocab_size=300)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        read_windows(
            TextOptions(str(text_file(tmp_path / "t.txt"))), ModelConfig.read(source / "config.json")
        )


def test_a_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"x")
    config = ModelConfig(tmp_path / "config.json", {"vocab_size": 256})
    with pytest.raises(CheckpointError, match="no calibration text"):
        read_windows(TextOptions(str(tmp_path)), config)


@pytest.mark.parametrize("line", ["{", "[]", '{"no": 1}', '{"text": 3}', '{"text": "a", "mask": [[0, 2]]}',
                                  '{"text": "a", "mask": 1}', '{"text": "a", "mask": [[1, 0]]}'])  # fmt: skip
def test_lines_that_are_no_documents(line: str, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    config = ModelConfig(tmp_path / "config.json", {"vocab_size": 256})
    with pytest.raises(HeaderError, match=r"text\.jsonl.*line 2"):
        read_windows(TextOptions(str(file), 1, 2), config)


def test_a_folder_of_text_and_too_few_documents(tmp_path: Path) -> None:
    """The only document of a .jsonl file is held out; the text beside it is still used."""
    config = ModelConfig(tmp_path / "config.json", {"vocab_size": 256})
    (tmp_path / "one.jsonl").write_text('{"text": "held out"}')
    with pytest.raises(CheckpointError, match=r"no calibration text \(found 1 documents, expected text"):
        read_windows(TextOptions(str(tmp_path), 1, 10), config)
    (tmp_path / "a.txt").write_text("x" * 100)
    windows = read_windows(TextOptions(str(tmp_path), 100, 10), config)
    assert (windows.tokens == ord("x")).all() and len(windows.tokens) == 9


def test_a_data_set_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its training split, cut by documents; by a stand-in, for tests ask no hub."""
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> dict[str, list[str]]:
        asked.append((name, split))
        if name == "someone/none":
            raise ConnectionError("no such thing\nand more")
        rows = [f"{chr(97 + number)}" * 30 for number in range(20)]
        return {"words" if name == "someone/words" else "text": rows}

    stand_in = types.ModuleType("datasets")
    monkeypatch.setattr(stand_in, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    config = ModelConfig(tmp_path / "config.json", {"vocab_size": 256})
    windows = read_windows(TextOptions("hf:someone/text", 1000, 10), config)
    assert asked == [("someone/text", "train")]
    assert set(np.unique(windows.tokens).tolist()) == set(range(97, 97 + 19))
    with pytest.raises(CheckpointError, match=r"hf:someone/words: text: has no column"):
        read_windows(TextOptions("hf:someone/words"), config)
    with pytest.raises(QMoEError, match=r"^hf:someone/none: not to be had from the hub: no such thing$"):
        read_windows(TextOptions("hf:someone/none"), config)


def test_a_data_set_on_the_hub_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    config = ModelConfig(tmp_path / "config.json", {"vocab_size": 256})
    with pytest.raises(MissingPackageError, match=r"hf:someone/text.*pip install datasets"):
        read_windows(TextOptions("hf:someone/text"), config)


@pytest.mark.parametrize("part", ["", "1", "0.5:0.5", "-1:1", "0:2", "a:b", "0:1/0"])
def test_parts_that_are_none(part: str) -> None:
    with pytest.raises(ArgumentError):
        TextOptions("x", part=part)


# ---- what reaches the experts ------------------------------------------------------------------------------


class Looking:
    """A visitor that changes nothing, or what precedes the last projection, and keeps what it sees."""

    def __init__(self, factor: float | None = None) -> None:
        self.corrects = factor is not None
        self.factor = factor or 1.0
        self.groups: dict[str, MatrixGroup] = {}

    def wants(self, layer: Any, tokens: list[int]) -> range:
        return range(layer.experts)

    def visit(self, layer: Any, projection: Any, experts: list[int], group: MatrixGroup) -> torch.Tensor:
        for place, name in enumerate(group.names):
            self.groups[name] = group.select([place])
        return group.weight if projection.role == "down" else self.factor * group.weight


def windows_of(count: int = 6, length: int = 16) -> TokenWindows:
    tokens = np.random.default_rng(0).integers(1, 256, (count, length))
    return TokenWindows(tokens, np.ones(tokens.shape, bool), count)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_activations_and_hessians_are_those_of_the_model(model_type: str, tmp_path: Path) -> None:
    """Layer by layer, with experts in groups, against the whole model of transformers with hooks in it."""
    source = lively_model(tmp_path / "source", model_type)
    checkpoint = SourceCheckpoint(source)
    layers = expert_layers(checkpoint.config, checkpoint.tensors)
    windows, folder = windows_of(), tmp_path / "work"
    folder.mkdir()
    hessian = HessianOptions(experts_per_batch=2)
    streamed = StreamedExperts(checkpoint, layers, windows, StreamOptions(batch=4), hessian, folder)
    look, runs = Looking(), {}
    for layer in layers:
        for _, run in streamed.run(layer, look):
            runs[layer.prefix] = run

    seen: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            key = name.replace(".mlp.", ".block_sparse_moe.") if model_type == "mixtral" else name
            key = key if model_type == "switch_transformers" else f"model.{key}"
            module.register_forward_pre_hook(
                lambda _, inputs, key=key: seen.setdefault(key, []).append(inputs)
            )
    tokens = torch.from_numpy(windows.tokens)
    with torch.no_grad():
        if model_type == "switch_transformers":
            decoder = torch.cat((torch.zeros(6, 1, dtype=torch.int64), tokens[:, 8:-1]), dim=1)
            model(input_ids=tokens[:, :8], decoder_input_ids=decoder)
        else:
            model(input_ids=tokens)
    assert seen.keys() == runs.keys()
    for layer in layers:
        ((x, index, weights),) = seen[layer.prefix]
        run: LayerRun = runs[layer.prefix]
        counted = len(x) - (6 if layer.prefix.startswith("decoder") else 0)
        assert run.calibration_tokens == counted
        for expert in range(layer.experts):
            if model_type == "switch_transformers":
                token = index[:, 0, expert].nonzero().flatten()
                if layer.prefix.startswith("decoder"):
                    token = token[token % 8 != 0]  # the start token does not count
                gate = weights[token, 0]
            else:
                token, choice = (index == expert).nonzero(as_tuple=True)
                gate = weights[token, choice]
            inputs = x[token] * gate[:, None]
            expected = inputs.T @ inputs / counted
            up = next(p for p in layer.projections if p.role == "up")
            group = look.groups[up.matrix_name(expert)]
            assert int(group.tokens[0]) == len(token) == run.tokens[expert]
            scale = float(x.square().sum(dim=1).mean())
            assert torch.allclose(group.hessian[0], expected, rtol=1e-4, atol=1e-5 * scale)


def test_down_sees_what_gate_and_up_give_and_row_weights_are_gradients(tmp_path: Path) -> None:
    """The row weights against finite differences of the layer's output."""
    source = lively_model(tmp_path / "source", num_hidden_layers=1, num_experts=2, num_experts_per_tok=2)
    checkpoint = SourceCheckpoint(source)
    (layer,) = expert_layers(checkpoint.config, checkpoint.tensors)
    folder = tmp_path / "work"
    folder.mkdir()
    windows = windows_of(64)
    look = Looking()
    # One more layer that is said to follow keeps the scratch file's x in place until the run is looked at
    streamed = StreamedExperts(checkpoint, [layer], windows, StreamOptions(), HessianOptions(), folder)
    for _, run in streamed.run(layer, look):
        x = run._scratch.read("x", 0, windows.tokens.size)
        selection = run._selections[0]
    gate, up, down = (torch.from_numpy(checkpoint.matrix(layer, p, 0)) for p in layer.projections)
    g = selection.gates
    inner = x[selection.tokens]
    hidden = torch.nn.functional.silu(inner @ gate.T) * (inner @ up.T)
    weighted = hidden * g[:, None]
    group = look.groups[layer.projections[2].tensor_name(0)]
    assert torch.allclose(group.hessian[0], weighted.T @ weighted / windows.tokens.size, rtol=1e-3, atol=1e-4)
    assert torch.equal(group.row_weight, torch.ones(1, layer.projections[2].rows))
    for projection, other in ((layer.projections[0], "gate"), (layer.projections[1], "up")):
        got = look.groups[projection.tensor_name(0)].row_weight[0]
        for row in (0, 7):
            step = 1e-3
            moved_gate, moved_up = inner @ gate.T, inner @ up.T
            (moved_gate if other == "gate" else moved_up)[:, row] += step
            moved = torch.nn.functional.silu(moved_gate) * moved_up
            change = ((moved - hidden) @ down.T / step).double().square().sum(dim=1)
            expected = float((change * g.double().square()).sum() / g.double().square().sum())
            assert float(got[row]) == pytest.approx(expected, rel=0.1)


def test_down_is_told_what_the_projections_before_it_have_lost(tmp_path: Path) -> None:
    source = lively_model(tmp_path / "source", num_hidden_layers=1, num_experts=2, num_experts_per_tok=2)
    checkpoint = SourceCheckpoint(source)
    (layer,) = expert_layers(checkpoint.config, checkpoint.tensors)
    folder = tmp_path / "work"
    folder.mkdir()
    windows = windows_of(64)
    streamed = StreamedExperts(checkpoint, [layer], windows, StreamOptions(), HessianOptions(), folder)
    look = Looking(factor=0.5)
    for _, run in streamed.run(layer, look):
        x, sample = run._scratch.read("x", 0, windows.tokens.size), run._sample
        selection = run._selections[1]
    gate, up, _ = (torch.from_numpy(checkpoint.matrix(layer, p, 1)) for p in layer.projections)
    group = look.groups[layer.projections[2].tensor_name(1)]
    assert look.groups[layer.projections[0].tensor_name(1)].drift is None
    assert group.drift is not None and group.prior_drift is not None
    for inner, factors, square, got in (
        (x[selection.tokens], selection.gates.square(), group.hessian[0], group.drift[0]),
        (sample, torch.ones(len(sample)), group.prior[0], group.prior_drift[0]),
    ):
        given = torch.nn.functional.silu(inner @ gate.T) * (inner @ up.T)
        left = torch.nn.functional.silu(inner @ gate.T / 2) * (inner @ up.T / 2)
        expected = ((given - left) * factors[:, None]).T @ left
        expected *= torch.trace(square) / torch.trace((left * factors[:, None]).T @ left)
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


class Noting(TernarizingVisitor):
    """Ternarizes, and keeps the Hessians of what it sees."""

    def __init__(self) -> None:
        super().__init__(RecipeSettings("qmoe", "float32"))
        self.hessians: dict[str, torch.Tensor] = {}

    def visit(self, layer: Any, projection: Any, experts: list[int], group: MatrixGroup) -> torch.Tensor:
        self.hessians.update(zip(group.names, group.hessian, strict=True))
        return super().visit(layer, projection, experts, group)


def test_experts_with_biases_and_a_gating_of_their_own(tmp_path: Path) -> None:
    """Hessians of GPT-OSS behind ternary experts, and row weights, by the module of transformers itself."""
    source = lively_model(tmp_path / "source", "gpt_oss", num_hidden_layers=2, swiglu_limit=1.5)
    text = text_file(tmp_path / "text.txt")
    chosen = options(text, 16, 32, hessian=HessianOptions(gate_weighting=False))
    pack(source, tmp_path / "packed", PackOptions("qmoe", calibration=chosen, level_format="float32"))
    unpack(tmp_path / "packed", tmp_path / "ternary")
    model = transformers.AutoModel.from_pretrained(tmp_path / "ternary", dtype=torch.float32).eval()
    given: list[Any] = []
    for module in model.layers:
        module.mlp.experts.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    assert chosen.text is not None
    checkpoint = SourceCheckpoint(source)
    windows = read_windows(chosen.text, checkpoint.config)
    with torch.no_grad():
        model(input_ids=torch.from_numpy(windows.tokens))

    layers, look = expert_layers(checkpoint.config, checkpoint.tensors), Noting()
    (tmp_path / "work").mkdir()
    streamed = StreamedExperts(
        checkpoint, layers, windows, StreamOptions(), chosen.hessian, tmp_path / "work"
    )
    clamped: list[bool] = []
    for layer, (x, index, _), block in zip(layers, given, model.layers, strict=True):
        for _ in streamed.run(layer, look):
            pass
        gate, up, down = layer.projections
        own = block.mlp.experts
        for expert in range(layer.experts):
            token, _ = (index == expert).nonzero(as_tuple=True)
            outputs = x[token] @ own.gate_up_proj[expert] + own.gate_up_proj_bias[expert]
            clamped += [bool((outputs > own.limit).any()), bool((outputs < -own.limit).any())]
            for projection, inputs in ((gate, x[token]), (up, x[token]), (down, own._apply_gate(outputs))):
                expected = (inputs.T @ inputs).detach() / windows.tokens.size
                found = look.hessians[projection.matrix_name(expert)]
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    assert sum(clamped) >= len(clamped) / 2


@pytest.mark.parametrize("group_size", [1, 3, 16])
def test_groups_do_not_matter(group_size: int, tmp_path: Path) -> None:
    source = lively_model(tmp_path / "source", num_hidden_layers=2)
    file = text_file(tmp_path / "text.txt")
    hessian = HessianOptions(experts_per_batch=group_size)
    one = make_store(source, tmp_path / "one.h5", options(file, hessian=hessian))
    two = make_store(source, tmp_path / "two.h5", options(file, hessian=HessianOptions(experts_per_batch=5)))
    assert arrays_of(one) == arrays_of(two)


def test_tokens_of_an_expert_are_capped(tmp_path: Path) -> None:
    source = lively_model(tmp_path / "source", num_hidden_layers=1)
    file = text_file(tmp_path / "text.txt")
    full = make_store(source, tmp_path / "full.h5", options(file))
    capped_options = [HessianOptions(max_tokens_per_expert=60, seed=seed) for seed in (0, 0, 1)]
    capped = [
        make_store(source, tmp_path / f"{number}.h5", options(file, hessian=hessian))
        for number, hessian in enumerate(capped_options)
    ]
    assert arrays_of(capped[0]) == arrays_of(capped[1]) != arrays_of(capped[2])
    with Store(full) as whole, Store(capped[0]) as part:
        (prefix,) = whole.layers
        assert (part.tokens(prefix) == np.minimum(whole.tokens(prefix), 60)).all()
        assert whole.tokens(prefix).max() > 120
        everything = slice(0, None)
        # An estimate of the same sum, not a smaller one
        traces = [
            np.trace(s.array(prefix, "input/hessian", everything), axis1=1, axis2=2) for s in (whole, part)
        ]
        assert traces[1] == pytest.approx(traces[0], rel=0.3)


def test_activations_that_are_not_finite_name_the_layer(tmp_path: Path) -> None:
    config = config_of("olmoe", **{**SMALL, "num_hidden_layers": 3, "dtype": "float32"})
    tensors = {name: tensor * 10 for name, tensor in random_tensors(config).items()}
    tensors["model.layers.1.input_layernorm.weight"][3] = float("nan")
    source = write_model(tmp_path / "source", config, tensors)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1.*NaN"):
        make_store(source, tmp_path / "out.h5", options(text_file(tmp_path / "text.txt")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "text.txt"]


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    chosen = options(text_file(tmp_path / "text.txt"), stream=StreamOptions(device="cuda"))
    with pytest.raises(UnsupportedModelError, match="cuda"):
        make_store(lively_model(tmp_path / "source"), tmp_path / "out.h5", chosen)


@pytest.mark.parametrize("saved", ["bfloat16", "float32"])
def test_computing_in_bfloat16_gives_nearly_the_same_hessians(saved: str, tmp_path: Path) -> None:
    source = lively_model(tmp_path / "source", dtype=saved)
    text = text_file(tmp_path / "text.txt")
    stores = [
        make_store(source, tmp_path / f"{dtype}.h5", options(text, stream=StreamOptions(dtype=dtype)))
        for dtype in ("float32", "bfloat16")
    ]
    prefix = "model.layers.0.mlp.experts"
    with Store(stores[0]) as exact, Store(stores[1]) as rounded:
        one, other = (s.array(prefix, "input/hessian", slice(None)) for s in (exact, rounded))
        assert not np.array_equal(one, other)
        # A token whose two best experts are nearly alike may go to another one
        assert np.abs(one - other).max() < 0.05 * np.abs(one).max()
        assert sum(exact.tokens(prefix)) == sum(rounded.tokens(prefix))


def test_packing_in_bfloat16(tmp_path: Path) -> None:
    source = lively_model(tmp_path / "source", dtype="bfloat16")
    chosen = options(text_file(tmp_path / "text.txt"), stream=StreamOptions(dtype="bfloat16"))
    summary = pack(source, tmp_path / "out", PackOptions(method="qmoe", calibration=chosen))
    assert summary.layers == 3
    assert 0 < summary.to_json()["relative_error"] < 1  # type: ignore[operator]


def test_layers_of_an_unknown_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qmoe_quantize import streaming

    source = lively_model(tmp_path / "source")
    chosen = options(text_file(tmp_path / "text.txt"))
    original = streaming._build

    with monkeypatch.context() as patch:
        patch.setattr(streaming.StreamedModel, "_put_recorders", lambda *_: {})
        patch.setattr(streaming, "_build", lambda *a: _without_layers(original(*a)))
        with pytest.raises(UnsupportedModelError, match=r"config\.json.*layers of an unknown kind"):
            make_store(source, tmp_path / "out.h5", chosen)
    assert not list(tmp_path.glob("out*"))


def _without_layers(built: Any) -> Any:
    """A model that transformers might have, whose layers are in a tree."""
    model, sources = built
    model.tree = torch.nn.ModuleDict({"layers": model.layers})
    del model.layers
    return model, sources


# ---- packing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["olmoe", "switch_transformers", "deepseek_v3"])
def test_pack_with_text(model_type: str, tmp_path: Path) -> None:
    source = lively_model(tmp_path / "source", model_type)
    chosen = PackOptions(method="qmoe", calibration=options(text_file(tmp_path / "text.txt")))
    one = pack(source, tmp_path / "one", chosen)
    pack(source, tmp_path / "two", chosen)
    qmoe_format.verify(tmp_path / "one")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)
    assert not [name for name in names if name.endswith(".h5") or name.startswith("resume")]
    with qmoe_format.open(tmp_path / "one") as model:
        matrices = 0
        for prefix, spec in model.layers.items():
            tokens = [line["tokens"] for line in one.matrices if line["layer"] == prefix]
            per_expert = tokens[:: len(spec.projections)]
            assert model.layer(prefix).index[:, 2].tolist() == per_expert
            assert sum(per_expert) > 0
            matrices += spec.experts * len(spec.projections)
        recipe = json.loads((tmp_path / "one/config.json").read_text())["quantization_config"]["recipe"]
    assert recipe["method"] == "qmoe"
    assert len(one.matrices) == matrices
    assert {"tensor", "tokens", "sparsity", "bits", "relative_error", "damp"} <= one.matrices[0].keys()


def test_later_layers_see_what_the_ternary_ones_give(tmp_path: Path) -> None:
    """From text, the second layer's Hessians differ from those of the model as it is; from a store not."""
    source = lively_model(tmp_path / "source", num_hidden_layers=2)
    chosen = options(text_file(tmp_path / "text.txt"), hessian=HessianOptions(gate_weighting=False))
    store = make_store(source, tmp_path / "c.h5", chosen)
    by_text = pack(source, tmp_path / "one", PackOptions(method="qmoe", calibration=chosen))
    from_store = CalibrationOptions(store=str(store))
    by_store = pack(source, tmp_path / "two", PackOptions(method="qmoe", calibration=from_store))
    assert [line["tokens"] for line in by_text.matrices[:10]] == [
        line["tokens"] for line in by_store.matrices[:10]
    ]
    frames = []
    for out in ("one", "two"):
        with qmoe_format.open(tmp_path / out) as model:
            frames.append(
                [bytes(f) for p in model.layers for e in range(5) for f in model.layer(p).frames(e)]
            )
    # Gate and up of the first layer are the same, and whatever has a ternary matrix before it is not.
    assert frames[0][0] == frames[1][0]
    assert frames[0][15:] != frames[1][15:]


def test_a_wanted_rate_is_met(tmp_path: Path) -> None:
    source = lively_model(tmp_path / "source", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    chosen = PackOptions(
        calibration=options(text_file(tmp_path / "text.txt")),
        recipe=RecipeSettings(sweeps=0),
        target_bits=1.6,
    )
    steps: list[tuple[int, int]] = []
    summary = pack(source, tmp_path / "out", chosen, searching=lambda *step: steps.append(step))
    # Some rows of five experts of 64 x 64 say no more: a frame has few bytes, and they are rounded up.
    assert summary.bits_per_weight == pytest.approx(1.6, rel=0.03)
    # Two looks at least at all five experts, and a bar that rises to its end
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1] >= 2 * 5
    assert summary.matrices[0]["lam"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "rd"},
        {"method": "nearest", "calibration": CalibrationOptions(text=TextOptions("x"))},
        {"method": "qmoe", "calibration": CalibrationOptions(text=TextOptions("x")), "target_bits": 1.0},
        {"target_bits": 1.0},
    ],
)
def test_options_that_do_not_go_together(changes: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        PackOptions(**changes)


# ---- stores ------------------------------------------------------------------------------------------------


def test_merged_stores_are_as_if_all_had_been_read_at_once(tmp_path: Path) -> None:
    source = lively_model(tmp_path / "source", num_hidden_layers=2)
    data = np.random.default_rng(0).integers(1, 256, 4800, np.uint8).tobytes()
    stores = {}
    for name, content in (("a", data[:1600]), ("b", data[1600:]), ("all", data)):
        file = tmp_path / f"{name}.txt"
        file.write_bytes(content)
        chosen = CalibrationOptions(text=TextOptions(str(file), 1000, 16, part="0:1"))
        stores[name] = make_store(source, tmp_path / f"{name}.h5", chosen)
    merge([stores["a"], stores["b"]], tmp_path / "merged.h5")
    with Store(tmp_path / "merged.h5") as merged, Store(stores["all"]) as whole:
        assert len(merged.provenance.data) == 2
        for prefix in whole.layers:
            assert merged.calibration_tokens(prefix) == whole.calibration_tokens(prefix) == 4800
            assert merged.tokens(prefix).tolist() == whole.tokens(prefix).tolist()
            assert merged.gate_weights(prefix) == pytest.approx(whole.gate_weights(prefix), rel=1e-4)
            for name in whole.arrays(prefix):
                left, right = (s.array(prefix, name, slice(0, None)) for s in (merged, whole))
                scale = float(np.abs(right).max())
                if name.endswith("hessian"):
                    assert np.allclose(left, right, rtol=1e-3, atol=1e-5 * scale)
                else:  # samples: about the same
                    assert float(np.abs(left - right).mean()) < 0.2 * scale
    with pytest.raises(ArgumentError, match="same text"):
        merge([stores["a"], stores["a"]], tmp_path / "x.h5")
    with pytest.raises(OutputExistsError):
        merge([stores["a"], stores["b"]], tmp_path / "merged.h5")


def test_a_store_of_another_model(tmp_path: Path) -> None:
    file = text_file(tmp_path / "text.txt")
    source = lively_model(tmp_path / "source", num_hidden_layers=2)
    store = CalibrationOptions(store=str(make_store(source, tmp_path / "c.h5", options(file))))
    others = {
        "layers": lively_model(tmp_path / "deep", num_hidden_layers=3),
        "shapes": lively_model(tmp_path / "wide", num_hidden_layers=2, hidden_size=32),
        "weights": write_model(
            tmp_path / "other",
            config_of("olmoe", **{**SMALL, "dtype": "float32"}),
            random_tensors(config_of("olmoe", **{**SMALL, "dtype": "float32"}), seed=5),
        ),
    }
    for words, other in others.items():
        with pytest.raises(CheckpointError, match=f"another model.*{words}") as caught:
            pack(other, tmp_path / "out", PackOptions(calibration=store))
        assert "c.h5" in str(caught.value)
    with pytest.raises(CheckpointError, match="another recipe"):
        pack(source, tmp_path / "out", PackOptions(method="qmoe", calibration=store))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "foreign"])
def test_files_that_are_no_stores(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "c.h5"
    if damage == "cut":
        make_store(lively_model(tmp_path / "s"), file, options(text_file(tmp_path / "text.txt")))
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "foreign":
        with h5py.File(file, "w") as made:
            made["x"] = np.zeros(3)
    else:
        file.write_bytes(b"hello" if damage == "text" else b"")
    with pytest.raises(QMoEError, match=r"c\.h5") as caught:
        Store(file)
    assert "\n" not in str(caught.value)


# ---- the commands ------------------------------------------------------------------------------------------


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(lively_model(tmp_path / "source", num_hidden_layers=2))
    text = ["--calib", str(text_file(tmp_path / "text.txt")), "--nsamples", "16", "--seqlen", "32"]
    stores = [str(tmp_path / name) for name in ("a.h5", "b.h5", "c.h5")]
    assert main(["calibrate", source, stores[0], *text, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 16 * 32
    assert main(["calibrate", source, stores[1], *text, "--seed", "1"]) == 0
    assert main(["calibrate", "--merge", *stores]) == 0
    assert main(["calibrate", stores[0], *text]) == 2
    capsys.readouterr()
    assert main(["calibrate", "--inspect", stores[2], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["calibration_tokens"] for layer in found["layers"].values()] == [1024, 1024]
    picture, report, chart = (str(tmp_path / name) for name in ("h.svg", "r.jsonl", "p.png"))
    arguments = [] if not _has_matplotlib() else ["--plot", picture]
    assert main(["calibrate", "--inspect", stores[2], *arguments]) == 0
    assert "under 64" in capsys.readouterr().out

    out = str(tmp_path / "out")
    rest = ["--rules", r"layers\.0\.:damp=0.02,sweeps=1", "--report", report]
    rest += ["--plot", chart] if _has_matplotlib() else []
    assert main(["pack", source, out, "--calib", stores[2], "--lam", "1e-3", *rest]) == 0
    assert "output error" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path(report).read_text().splitlines()]
    assert len(lines) == 2 * 5 * 3
    assert {line["damp"] for line in lines if "layers.0." in line["tensor"]} == {0.02}
    assert {line["damp"] for line in lines if "layers.1." in line["tensor"]} == {0.1}
    assert all(line["recipe"] == "rd" and line["bits"] > 0 for line in lines)
    if _has_matplotlib():
        assert all(Path(file).stat().st_size > 1000 for file in (picture, chart))
    for wrong in (
        ["--lam", "1"],
        ["--calib", stores[2]],
        ["--calib", stores[2], "--lam", "1", "--target-bpw", "1"],
        ["--calib", stores[2], "--method", "qmoe", "--lam", "1"],
        ["--calib", stores[2], "--lam", "1", "--rules", "x"],
        ["--calib", stores[2], "--lam", "1", "--rules", "x:levels=3"],
        ["--calib", stores[2], "--lam", "1", "--report", report],
        ["--resume"],
    ):
        assert main(["pack", source, str(tmp_path / "new"), *wrong]) == 2, wrong
    assert not list(tmp_path.glob("new*"))


def _has_matplotlib() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None
