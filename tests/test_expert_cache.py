"""Experts that stay on disk: the cache against models of it, and against experts in memory."""

from __future__ import annotations

import copy
import logging
import math
import os
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import packed_models
import pytest
import source_models
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from qmoe_quantize.pipeline import PackOptions, pack

import qmoe_format
from qmoe_format import ArgumentError, ChecksumError, FileChangedError, SizeError, UnsupportedModelError
from qmoe_format.eviction import LeastFrequentlyUsed
from qmoe_format.expert_cache import CacheStats, ExpertCache, parse_size
from qmoe_format.torch import QMoEExperts
from qmoe_format.transformers import QMoEConfig, load

LAYERS, EXPERTS = 3, 6
PREFIXES = [packed_models.layer_spec(number).prefix for number in range(LAYERS)]
SILU = torch.nn.SiLU()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    return packed_models.write_model(folder / "packed", layers=LAYERS, experts=EXPERTS)


@pytest.fixture
def spoiled(path: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    packed_models.restore(tmp_path / "spoiled", packed_models.contents(path))
    return tmp_path / "spoiled"


def cache_of(path: Path, size: str | int, **options: Any) -> ExpertCache:
    with qmoe_format.open(path) as model:
        return ExpertCache(model, size, **options)


def ask(cache: ExpertCache, layer: int, experts: Sequence[int]) -> dict[int, dict[str, bytes]]:
    """What the cache lends, by expert; the levels stand for a matrix."""
    found: dict[int, dict[str, bytes]] = {}
    with closing(cache.layer(PREFIXES[layer]).lend(experts)) as portions:
        for positions, matrices in portions:
            assert positions == sorted(positions)
            for position, by_name in zip(positions, matrices, strict=True):
                assert experts[position] not in found
                found[experts[position]] = {
                    name: matrix.decode(threads=1).tobytes() for name, matrix in by_name.items()
                }
    assert found.keys() == set(experts)
    return found


@pytest.fixture(scope="module")
def expected(path: Path) -> list[dict[int, dict[str, bytes]]]:
    with qmoe_format.open(path) as model:
        return [
            {
                expert: {
                    p.name: model.layer(prefix).matrix(expert, p.name).decode().tobytes()
                    for p in model.layers[prefix].projections
                }
                for expert in range(EXPERTS)
            }
            for prefix in PREFIXES
        ]


# ---- against models ---------------------------------------------------------------------------------------

requests = st.tuples(
    st.integers(0, LAYERS - 1), st.lists(st.integers(0, EXPERTS - 1), min_size=1, unique=True)
)


def residents(cache: ExpertCache) -> set[tuple[int, int]]:
    return {(number, expert) for number, prefix in enumerate(PREFIXES) for expert in cache.resident(prefix)}


@given(slots=st.integers(1, LAYERS * EXPERTS + 2), sequence=st.lists(requests, max_size=30))
def test_is_an_lru_cache(
    path: Path,
    expected: list[dict[int, dict[str, bytes]]],
    slots: int,
    sequence: list[tuple[int, list[int]]],
) -> None:
    cache = cache_of(path, slots)
    model: list[tuple[int, int]] = []  # least recently used first
    hits = misses = 0
    for layer, every in sequence:
        experts = every[:slots]
        found = ask(cache, layer, experts)
        assert found == {expert: expected[layer][expert] for expert in experts}
        keys = [(layer, expert) for expert in experts]
        there, missing = [key for key in keys if key in model], [key for key in keys if key not in model]
        hits, misses = hits + len(there), misses + len(missing)
        for key in there:
            model.remove(key)
        model = [*model, *there, *missing][-slots:]
        assert residents(cache) == set(model)
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.reads) == (hits, misses, misses)
    cache.close()


@given(slots=st.integers(1, 8), half_life=st.floats(1, 50), sequence=st.lists(requests, max_size=30))
def test_the_least_frequently_used_leave_first(
    slots: int, half_life: float, sequence: list[tuple[int, list[int]]]
) -> None:
    policy = LeastFrequentlyUsed(half_life)
    uses: dict[tuple[int, int], list[int]] = {}
    inside: set[tuple[int, int]] = set()
    time = 0
    for layer, experts in sequence:
        for expert in experts:
            key = (layer, expert)
            time += 1
            policy.used(key)
            uses.setdefault(key, []).append(time)
            if key in inside:
                continue
            if len(inside) == slots:
                kept = min(inside)  # somebody holds it
                victim = policy.victim(lambda other, kept=kept: other != kept)  # type: ignore[misc]
                weights = {
                    other: sum(2 ** ((use - time) / half_life) for use in uses[other])
                    for other in inside - {kept}
                }
                if not weights:
                    assert victim is None
                    victim = policy.victim(lambda other: True)
                    assert victim == kept
                else:
                    assert victim in weights
                    assert weights[victim] == pytest.approx(min(weights.values()), rel=1e-6)
                policy.left(victim)
                inside.discard(victim)
            policy.entered(key)
            inside.add(key)


@given(
    slots=st.integers(2, LAYERS * EXPERTS),
    sequence=st.lists(
        st.tuples(st.integers(0, LAYERS - 1), st.integers(0, 9), st.integers(0, 99)), max_size=8
    ),
    policy=st.sampled_from(["lru", "lfu"]),
    prefetch=st.booleans(),
)
def test_computes_what_experts_in_memory_compute(
    path: Path, slots: int, sequence: list[tuple[int, int, int]], policy: str, prefetch: bool
) -> None:
    """To the bit, also where a layer's experts do not fit at once and come in portions."""
    relu = torch.nn.ReLU()  # which is the same wherever in a tensor a number stands; torch's SiLU is not
    with qmoe_format.open(path) as model:
        whole = [QMoEExperts.from_packed(model.layer(prefix), relu) for prefix in PREFIXES]
        cache = ExpertCache(model, slots, policy=policy, prefetch=prefetch)
    cached = [QMoEExperts(module.layer, relu, cached=cache.layer(module.layer.prefix)) for module in whole]
    for layer, tokens, seed in sequence:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, 24, generator=generator)
        index = torch.randint(EXPERTS + 1, (tokens, 2), generator=generator)
        weights = torch.rand(tokens, 2, generator=generator)
        with torch.no_grad():
            assert torch.equal(cached[layer](hidden, index, weights), whole[layer](hidden, index, weights))
    assert len(residents(cache)) <= slots
    cache.close()


@pytest.mark.parametrize(("policy", "prefetch"), [("lru", False), ("lfu", True)])
def test_threads_share_it(
    path: Path, expected: list[dict[int, dict[str, bytes]]], policy: str, prefetch: bool
) -> None:
    """More threads than slots for what they ask, so that they wait for each other."""
    cache = cache_of(path, 4, policy=policy, prefetch=prefetch)
    faults: list[object] = []

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        try:
            for _ in range(60):
                layer = int(generator.integers(LAYERS))
                experts = generator.permutation(EXPERTS)[: int(generator.integers(1, EXPERTS + 1))].tolist()
                if ask(cache, layer, experts) != {expert: expected[layer][expert] for expert in experts}:
                    faults.append((layer, experts))
        except BaseException as error:
            faults.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not faults
    stats = cache.stats
    assert stats.hits + stats.misses + stats.prefetched >= stats.reads > 4
    assert len(residents(cache)) <= 4


# ---- counts -----------------------------------------------------------------------------------------------


def test_the_counts(path: Path) -> None:
    cache = cache_of(path, 4)
    assert math.isnan(cache.stats.hit_rate)
    ask(cache, 0, [0, 1])
    ask(cache, 0, [1, 2])
    ask(cache, 1, [0, 3])  # two leave
    stats = cache.stats
    with qmoe_format.open(path) as model:
        sizes = [model.layer(PREFIXES[layer]).index[:, 1] for layer in (0, 1)]
    assert (stats.hits, stats.misses, stats.reads) == (1, 5, 5)
    assert stats.read_bytes == sizes[0][:3].sum() + sizes[1][[0, 3]].sum()
    assert stats.hit_rate == pytest.approx(1 / 6)
    assert stats.stalls in (2, 3)  # expert 2 may come while expert 1 is at work
    assert stats.read_seconds > 0 and stats.stall_seconds > 0
    assert stats.as_dict()["hits"] == 1
    assert "16.7% hits; 5 reads" in repr(stats)
    assert cache.resident(PREFIXES[0]) == [1, 2]
    cache.reset_stats()
    assert cache.stats == CacheStats(4, cache.slot_bytes)
    ask(cache, 1, [0, 3])
    assert cache.stats.misses == 0


def test_the_likely_experts_of_the_next_layer_are_read_ahead(path: Path) -> None:
    """Tokens that always take the same way, in a cache that holds less than all of it."""
    cache = cache_of(path, 4, prefetch=True)
    way = [[0, 1], [2, 3], [4, 5]]

    def token() -> None:
        for layer, experts in enumerate(way):
            ask(cache, layer, experts)

    token()  # nothing is known of the way yet
    token()
    cache.reset_stats()
    for _ in range(5):
        token()
    stats = cache.stats
    assert (stats.hits, stats.misses) == (30, 0)
    assert stats.prefetch_hits == stats.prefetched > 0
    assert f"{stats.prefetched} of {stats.prefetched} prefetched were used" in repr(stats)
    without = cache_of(path, 4)
    for _ in range(5):
        for layer, experts in enumerate(way):
            ask(without, layer, experts)
    assert without.stats.misses == 30


# ---- arguments --------------------------------------------------------------------------------------------


@given(
    st.integers(0, 10**6), st.sampled_from(["B", "kB", "KB", "KiB", "MB", "MiB", "GB", "GiB", "TB", "TiB"])
)
def test_sizes(number: int, unit: str) -> None:
    power = "BKMGT".index(unit[0].upper())
    base = 1024 if "i" in unit else 1000
    assert parse_size(f" {number} {unit} ") == number * base ** (power if unit != "B" else 0)
    assert parse_size(f"{number}.5{unit}") == int((number + 0.5) * base**power)


@pytest.mark.parametrize(
    "text",
    ["", "4", "GiB", "-4GiB", "4 gigs", "4GiBs", "1e3MB", "٤GiB", "4iB", "inf GB", "4,5GB", "9" * 400 + "B"],
)
def test_nonsense_sizes_are_refused(path: Path, text: str) -> None:
    with pytest.raises(ArgumentError, match="not a size"):
        parse_size(text)
    with pytest.raises(ArgumentError, match="expert_cache: not a size"):
        cache_of(path, text)


@pytest.mark.parametrize("size", [True, 1.5, None, b"4GiB"])
def test_other_types_are_refused(path: Path, size: Any) -> None:
    with pytest.raises(ArgumentError, match="expert_cache: not a size"):
        cache_of(path, size)


@pytest.mark.parametrize("size", [0, -1, "0GiB", "100B"])
def test_a_cache_without_a_slot_is_refused(path: Path, size: str | int) -> None:
    with pytest.raises(ArgumentError, match="too small for a single expert"):
        cache_of(path, size)


def test_slots_by_size(path: Path) -> None:
    slot = cache_of(path, 1).slot_bytes
    with qmoe_format.open(path) as model:
        largest = max(int(model.layer(prefix).index[:, 1].max()) for prefix in PREFIXES)
    assert slot % 256 == 0 and largest <= slot < largest + 256
    assert cache_of(path, f"{3 * slot}B").slots == 3
    assert cache_of(path, f"{4 * slot - 1}B").slots == 3
    assert cache_of(path, "4TiB").slots == LAYERS * EXPERTS  # never more than there are experts


def test_an_unknown_policy_is_refused(path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"policy: no such policy.*fifo.*lru"):
        cache_of(path, 4, policy="fifo")


def test_an_unknown_layer_is_refused(path: Path) -> None:
    with pytest.raises(ArgumentError, match="no such layer"):
        cache_of(path, 4).layer("model.layers.9.mlp.experts")


def module_of(path: Path, size: int, **options: Any) -> QMoEExperts:
    layer = cache_of(path, size, **options).layer(PREFIXES[0])
    return QMoEExperts(layer.spec, SILU, cached=layer)


def forward(module: QMoEExperts, *experts: int) -> torch.Tensor:
    """One token, through these experts."""
    index = torch.tensor([experts])
    with torch.no_grad():
        output: torch.Tensor = module(torch.ones(1, 24), index, torch.ones(index.shape))
    return output


def test_fewer_slots_than_experts_of_a_token_are_refused(path: Path) -> None:
    module = module_of(path, 2)
    forward(module, 0, 1)
    with pytest.raises(
        ArgumentError, match=r"layers\.0.*too small for the experts of one token.*2 slots.*at least 3 slots"
    ):
        forward(module, 0, 1, 2)


def test_other_devices_are_refused(path: Path) -> None:
    module = module_of(path, 2)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"expert cache.*found meta"):
        module(torch.ones(1, 24, device="meta"), torch.tensor([[0]]), torch.ones(1, 1))


def test_copies_share_the_cache_and_pickles_are_refused(path: Path) -> None:
    module = module_of(path, 4)
    twin = copy.deepcopy(module)
    assert torch.equal(forward(twin, 3), forward(module, 3))
    assert twin.cached is not None and module.cached is not None
    assert twin.cached.cache is module.cached.cache
    assert module.cached.cache.stats.reads == 1
    assert not module.state_dict()
    assert "bits_per_weight" in repr(module)
    with pytest.raises(ArgumentError, match="cannot be pickled"):
        pickle.dumps(module)


def test_a_closed_cache_is_refused(path: Path) -> None:
    module = module_of(path, 4)
    forward(module, 0)
    assert module.cached is not None
    module.cached.cache.close()
    with pytest.raises(ArgumentError, match="closed"):
        forward(module, 0)


def test_who_waits_for_a_slot_learns_that_the_cache_was_closed(path: Path) -> None:
    cache = cache_of(path, 1)
    holder = cache.lend(0, [0])
    next(holder)
    errors: list[ArgumentError] = []

    def wait(expert: int) -> None:
        try:
            ask(cache, 0, [expert])
        except ArgumentError as error:
            errors.append(error)

    waiting = [threading.Thread(target=wait, args=(expert,), daemon=True) for expert in (1, 2, 3)]
    for thread in waiting:
        thread.start()
    while len(cache._released._waiters) < len(waiting):  # type: ignore[attr-defined]
        time.sleep(0.001)
    cache.close()
    holder.close()
    for thread in waiting:
        thread.join(10)
    assert not any(thread.is_alive() for thread in waiting)
    assert [str(error) for error in errors] == [str(errors[0])] * 3
    assert "closed" in str(errors[0])


def test_experts_come_when_there_are_no_threads_any_more(path: Path) -> None:
    """As when the interpreter ends, which stops all pools before it asks for the last things."""
    cache = cache_of(path, 1)
    cache._readers.shutdown()
    assert ask(cache, 0, range(EXPERTS)) == ask(cache_of(path, EXPERTS), 0, range(EXPERTS))


# ---- in transformers --------------------------------------------------------------------------------------

TOKENS = torch.arange(12).reshape(1, 12) % 40
GREEDY = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}


ARCHITECTURES = {
    "olmoe": "OlmoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
}


def packed_family(folder: Path, name: str, **changes: Any) -> Path:
    original = source_models.random_model(
        folder / "source",
        name,
        architectures=[ARCHITECTURES[name]],
        pad_token_id=0,
        eos_token_id=None,
        **changes,
    )
    pack(original, folder / "packed", PackOptions(levels="lsq"))
    return folder / "packed"


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model of a family, all of whose experts come to be used."""
    return packed_family(tmp_path_factory.mktemp(request.param), request.param)


def text_of(model: Any) -> list[int]:
    start = {"decoder_start_token_id": 0} if model.config.is_encoder_decoder else {}
    tokens: list[int] = model.generate(TOKENS, **GREEDY, **start)[0].tolist()
    return tokens


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_a_model_in_a_quarter_of_the_memory_says_the_same(
    family: Path, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = load(family)
    with qmoe_format.open(family) as opened:
        experts = sum(layer.experts for layer in opened.layers.values())
    with caplog.at_level(logging.WARNING):
        model: Any = load(family, expert_cache=max(2, experts // 4), policy=policy)
    assert not caplog.records  # nothing of missing, unexpected or newly initialized tensors
    assert model.expert_cache.stats.reads == 0
    assert not any(".qmoe_" in name for name in model.state_dict())
    assert {type(module) for module in model.modules()} == {type(module) for module in whole.modules()}
    assert text_of(model) == text_of(whole)
    stats = model.expert_cache.stats
    assert experts // 4 < stats.misses == stats.reads
    with pytest.raises(UnsupportedModelError, match="copy the directory"):
        model.save_pretrained(family.parent / "again")
    assert not list(family.parent.glob("*again*"))


def test_from_pretrained_takes_a_cache(family: Path) -> None:
    auto: Any = transformers.AutoModelForCausalLM
    if "switch" in str(family):
        auto = transformers.AutoModelForSeq2SeqLM
    config = QMoEConfig(expert_cache=3, policy="lfu", page_cache=False, prefetch=True)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = auto.from_pretrained(family, quantization_config=config)
    assert model.expert_cache.stats.slots == 3
    assert text_of(model) == text_of(load(family))
    assert model.expert_cache.stats.reads > 3
    assert not any(".qmoe_" in name for name in model.state_dict())
    # What a config.json has is as it was
    assert model.config.quantization_config.to_dict() == load(family).config.quantization_config.to_dict()
    assert not hasattr(auto.from_pretrained(family), "expert_cache")


def test_a_file_does_not_say_how_it_is_loaded(tmp_path: Path) -> None:
    model = packed_family(tmp_path, "olmoe")
    packed_models.edit_json(
        model / "config.json",
        lambda config: config["quantization_config"].update(expert_cache=3, verify=False),
    )
    packed_models.sign(model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert not hasattr(loaded, "expert_cache")
    assert all(module.verify for module in loaded.modules() if isinstance(module, QMoEExperts))


def test_what_from_pretrained_refuses_of_a_cache(tmp_path: Path) -> None:
    model = packed_family(tmp_path, "olmoe")
    auto = transformers.AutoModelForCausalLM
    refused: list[tuple[dict[str, Any], Any, type[Exception], str]] = [
        ({"expert_cache": 1}, None, ArgumentError, "too small for the experts of one token"),
        ({"expert_cache": 3, "policy": "fifo"}, None, ArgumentError, "no such policy"),
        ({"expert_cache": 3, "host_cache": 3}, None, ArgumentError, "host_cache: is what a GPU's"),
        ({"expert_cache": 3}, "auto", UnsupportedModelError, "an expert cache is on one device"),
        ({"expert_cache": 3}, {"model": "cpu", "lm_head": "disk"}, UnsupportedModelError, "one device"),
    ]
    for options, device_map, error, message in refused:
        with pytest.warns(UserWarning), pytest.raises(error, match=message):
            auto.from_pretrained(
                model,
                quantization_config=QMoEConfig(**options),
                device_map=device_map,
                offload_folder=tmp_path,
            )
        if device_map is not None:
            with pytest.raises(error, match=message):
                load(model, device_map=device_map, **options)


def test_what_is_of_a_cache_is_refused_without_one(tmp_path: Path) -> None:
    refused: list[dict[str, Any]] = [
        {"policy": "lfu"},
        {"host_cache": "1GiB"},
        {"prefetch": True},
        {"page_cache": False},
    ]
    for options in refused:
        with pytest.raises(ArgumentError, match=f"{next(iter(options))}: is of an expert cache"):
            load(tmp_path, **options)
        with pytest.raises(ArgumentError, match=f"{next(iter(options))}: is of an expert cache"):
            QMoEConfig(**options)


def test_a_checkpoint_that_is_not_packed_is_refused(tmp_path: Path) -> None:
    packed_family(tmp_path, "olmoe")
    with pytest.raises(UnsupportedModelError, match="the checkpoint is not packed"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "source", quantization_config=QMoEConfig(expert_cache=3)
        )


def test_a_transformers_that_would_not_heed_a_config_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmoe_format.transformers._LOADING_TYPES", ())
    with pytest.raises(UnsupportedModelError, match=r"quantization_config: .*would not heed it: call load"):
        QMoEConfig(expert_cache=3)


def test_threads_share_a_model(family: Path) -> None:
    model = load(family, expert_cache=3, prefetch=True)
    expected_text = text_of(load(family))
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(text_of(model)), daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == [expected_text] * 3


def test_too_small_for_a_token_is_refused_when_loading(tmp_path: Path) -> None:
    packed_family(tmp_path, "olmoe", num_experts_per_tok=3)
    with pytest.raises(ArgumentError, match=r"too small for the experts of one token.*at least 3 slots"):
        load(tmp_path / "packed", expert_cache=2)
    load(tmp_path / "packed", expert_cache=3)
    with pytest.raises(UnsupportedModelError, match=r"device: torch finds no such device \(found cuda:1"):
        load(tmp_path / "packed", device="cuda:1", expert_cache=3)

    def shrink(config: Any) -> None:
        config["quantization_config"]["layers"]["model.layers.1.mlp.experts"]["store_bytes"] -= 256

    packed_models.edit_json(tmp_path / "packed" / "config.json", shrink)
    packed_models.sign(tmp_path / "packed")
    with pytest.raises(SizeError, match=r"model\.layers\.1\.mlp\.experts\.qmoe_store.*contradicts"):
        load(tmp_path / "packed", expert_cache=3)


# ---- damage -----------------------------------------------------------------------------------------------


def shard_of(model: Path) -> tuple[Path, int]:
    """The shard of the first layer, and where its store starts."""
    with qmoe_format.open(model) as opened:
        shard = opened.shards[opened.layer(PREFIXES[0]).shard]
        return shard.path, shard.tensors[f"{PREFIXES[0]}.qmoe_store"].start


def flip(model: Path, expert: int, position: int) -> None:
    """Flip a bit of a record where it lies, and hide it from who looks at the time."""
    path, start = shard_of(model)
    with qmoe_format.open(model) as opened:
        place = start + int(opened.layer(PREFIXES[0]).index[expert, 0]) + position
    status = os.stat(path)
    with path.open("r+b") as stream:
        stream.seek(place)
        (byte,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("seen_before", [False, True])
@pytest.mark.parametrize(
    ("position", "verify", "found"),
    [(70, True, "body_crc32c"), (70, False, None), (12, True, "header_crc32c"), (12, False, "header_crc32c")],
)
def test_an_altered_record_is_refused_by_name(
    spoiled: Path, position: int, verify: bool, found: str | None, seen_before: bool
) -> None:
    module = module_of(spoiled, 1, verify=verify)
    if seen_before:
        forward(module, 2)
        forward(module, 1)  # there is one slot
    flip(spoiled, 2, position)
    if found is None:
        assert forward(module, 2).shape == (1, 24)
        return
    for _ in range(3):  # more often than there are slots
        with pytest.raises(ChecksumError) as caught:
            forward(module, 2)
        text = str(caught.value)
        assert all(
            part in text for part in (shard_of(spoiled)[0].name, PREFIXES[0], "expert 2: gate_proj", found)
        )
        forward(module, 1)  # the others are sound
    flip(spoiled, 2, position)
    forward(module, 2)


@given(data=st.data(), seen_before=st.booleans(), value=st.integers(1, 255))
def test_an_altered_byte_of_a_record_is_refused_and_others_mean_nothing(
    path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    expected: list[dict[int, dict[str, bytes]]],
    data: st.DataObject,
    seen_before: bool,
    value: int,
) -> None:
    """Anywhere in the first layer's shard behind its header, with the time of change put back."""
    model = tmp_path_factory.mktemp("altered") / "packed"
    packed_models.restore(model, packed_models.contents(path))
    shard, start = shard_of(model)
    with qmoe_format.open(model) as opened:
        records = opened.layer(PREFIXES[0]).index[:, :2].tolist()
    cache = cache_of(model, 1)
    if seen_before:
        for expert in range(EXPERTS):
            ask(cache, 0, [expert])
        ask(cache, 1, [0])  # so that none of them is in the slot
    status = os.stat(shard)
    altered = bytearray(shard.read_bytes())
    place = data.draw(st.integers(start, len(altered) - 1))
    altered[place] ^= value
    with shard.open("r+b") as stream:
        stream.write(altered)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    for expert, (offset, size) in reversed(list(enumerate(records))):
        if offset <= place - start < offset + size:
            with pytest.raises(qmoe_format.FormatError, match=f"expert {expert}"):
                ask(cache, 0, [expert])
        else:
            assert ask(cache, 0, [expert]) == {expert: expected[0][expert]}


def append(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"more")


def touch(path: Path) -> None:
    status = os.stat(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize(
    "change", [append, touch, lambda path: os.truncate(path, 4096), lambda path: os.truncate(path, 0)]
)
def test_a_file_that_changes_in_use_is_refused(spoiled: Path, change: Callable[[Path], None]) -> None:
    module = module_of(spoiled, 1)
    forward(module, 0)
    shard = shard_of(spoiled)[0]
    change(shard)
    forward(module, 0)  # it is in its slot
    for expert in (1, EXPERTS - 1):
        with pytest.raises(FileChangedError) as caught:
            forward(module, expert)
        assert f"{shard}: {PREFIXES[0]}: expert {expert}" in str(caught.value)


def test_a_file_that_is_replaced_stays_as_it_was_opened(spoiled: Path) -> None:
    """As a new version of the model is put in its place: the old one lives as long as it is open."""
    module = module_of(spoiled, 1)
    before = forward(module, 1)
    forward(module, 0)
    shard = shard_of(spoiled)[0]
    other = shard.with_name("other")
    other.write_bytes(bytes(shard.stat().st_size))
    other.replace(shard)
    assert torch.equal(forward(module, 1), before)


def test_a_file_that_is_replaced_before_it_is_opened_is_refused(spoiled: Path) -> None:
    with qmoe_format.open(spoiled) as model:
        shard = shard_of(spoiled)[0]
        other = shard.with_name("other")
        other.write_bytes(shard.read_bytes())
        other.replace(shard)
        with pytest.raises(FileChangedError, match="changed since it was opened"):
            ExpertCache(model, 4)


def test_without_the_page_cache(path: Path, expected: list[dict[int, dict[str, bytes]]]) -> None:
    cache = cache_of(path, 2, page_cache=False)
    for layer in (0, 1, 0):
        assert ask(cache, layer, [0, 5, 3]) == {expert: expected[layer][expert] for expert in (0, 5, 3)}
