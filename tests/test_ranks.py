"""Several processes pack one model: the same bytes, whoever dies, and one line where something is wrong."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("h5py")
pytest.importorskip("transformers")

from hypothesis import given
from hypothesis import strategies as st
from qmoe_quantize.ranks import Ranks
from rank_runs import KILLED_AT_COLLECTIVE, KILLED_AT_FLUSH, Outcome, RankRunner, free_port
from test_calibration import lively_model, make_store, options, text_file

import qmoe_format

EXPERTS = 5
COLLECTIVES = (1, 8, 17, 27, 41, 55)  # of 61
FLUSHES = (2, 5, 11, 20)  # of 28 by rank 0, 7 by the others


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def runner() -> Iterator[RankRunner]:
    with RankRunner() as started:
        yield started


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model(tmp_path_factory.mktemp("models") / "source", num_experts=EXPERTS)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


def pack_arguments(source: Path, out: Path, text: Path | None = None, *more: object) -> list[object]:
    arguments: list[object] = ["pack", source, out, "--json"]
    if text is not None:
        arguments += ["--calib", text, "--nsamples", 21, "--seqlen", 16, "--batch-size", 2]
        arguments += ["--experts-per-batch", 2]
    return [*arguments, *more]


def assert_alike(outcomes: list[Outcome], out: Path, expected: Path) -> None:
    assert [(outcome.code, outcome.stderr) for outcome in outcomes] == [(0, "")] * len(outcomes)
    assert [bool(outcome.stdout) for outcome in outcomes] == [True] + [False] * (len(outcomes) - 1)
    assert digests(out) == digests(expected)
    assert not out.with_name(out.name + ".partial").exists()


def summary(text: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(text)
    del values["seconds"]
    return values


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("target", "store", "switch")]


@pytest.mark.parametrize("method", ["nearest", "qmoe", "rd", *SLOW])
def test_the_same_bytes(method: str, source: Path, text: Path, runner: RankRunner, tmp_path: Path) -> None:
    """And the same summary, to the last bit of its sums."""
    more: list[object] = {
        "qmoe": ["--method", "qmoe", "--dense", "zstd"],
        "rd": ["--lam", "1e-3"],
        "target": ["--target-bpw", "1.6"],
        "store": ["--method", "qmoe"],
        "switch": ["--method", "qmoe"],
    }.get(method, [])
    model, calibration = source, None if method == "nearest" else text
    if method == "switch":
        model = lively_model(tmp_path / "switch", "switch_transformers")
    if method == "target":
        model = lively_model(
            tmp_path / "wide", num_experts=4, hidden_size=64, intermediate_size=64, num_hidden_layers=1
        )
    if method == "store":
        chosen = options(text, 21, 16).weighted(False)
        calibration = make_store(source, tmp_path / "store.h5", chosen)
    one = runner.run(1, pack_arguments(model, tmp_path / "one", calibration, *more))
    assert_alike(one, tmp_path / "one", tmp_path / "one")
    for size in (2, 4) if method == "qmoe" else (3,):
        out = tmp_path / f"out{size}"
        several = runner.run(size, pack_arguments(model, out, calibration, *more))
        assert_alike(several, out, tmp_path / "one")
        assert summary(several[0].stdout) == summary(one[0].stdout)
    qmoe_format.verify(tmp_path / "one")


def test_a_rank_without_text(source: Path, text: Path, runner: RankRunner, tmp_path: Path) -> None:
    """Two windows make one batch: the others have experts only."""
    few: list[object] = ["--method", "qmoe", "--nsamples", 2]
    for size in (1, 3):
        outcomes = runner.run(size, pack_arguments(source, tmp_path / f"out{size}", text, *few))
        assert_alike(outcomes, tmp_path / f"out{size}", tmp_path / "out1")


# ---- ranks that die ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(source: Path, text: Path, runner: RankRunner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("expected") / "out"
    assert runner.run(1, pack_arguments(source, out, text, "--method", "qmoe"))[0].code == 0
    return out


def killed(
    code: str,
    at: int,
    rank: int,
    source: Path,
    text: Path,
    out: Path,
    runner: RankRunner,
    size: int = 2,
    every: str = "",
) -> bool:
    """Kill a rank at a point; whether it came to it. There is one line, from the first rank that lives."""
    arguments = pack_arguments(source, out, text, "--method", "qmoe")
    codes = dict.fromkeys(range(size), every) | {rank: every + code.format(at=at)}
    outcomes = runner.run(size, arguments, code=codes)
    if all(outcome.code == 0 for outcome in outcomes):
        return False
    assert not out.exists()
    assert outcomes[rank].code == -9
    speaker = min(set(range(size)) - {rank})
    for number, outcome in enumerate(outcomes):
        if number != rank:
            assert outcome.code == 1
            lines = outcome.stderr.splitlines()
            assert len(lines) == (number == speaker), outcome.stderr
            if lines:
                assert lines[0].startswith(f"qmoe pack: error: rank {rank} on ")
                assert " died" in lines[0]
    return True


@pytest.mark.parametrize(
    ("code", "at", "rank", "after"),
    [
        pytest.param(KILLED_AT_COLLECTIVE, 3, 1, 3, marks=pytest.mark.slow),
        (KILLED_AT_COLLECTIVE, 30, 1, 1),
        pytest.param(KILLED_AT_FLUSH, 11, 0, 4, marks=pytest.mark.slow),
    ],
)
def test_a_rank_dies(
    code: str,
    at: int,
    rank: int,
    after: int,
    source: Path,
    text: Path,
    expected: Path,
    runner: RankRunner,
    tmp_path: Path,
) -> None:
    """The run ends with the rank's name, and goes on to the same bytes with another number of ranks."""
    out = tmp_path / "out"
    assert killed(code, at, rank, source, text, out, runner)
    outcomes = runner.run(after, pack_arguments(source, out, text, "--method", "qmoe", "--resume"))
    assert_alike(outcomes, out, expected)


# The others notice at once
QUICK = "from qmoe_quantize import ranks\nranks.PULSE_SECONDS = 0.4\n"


@pytest.mark.slow
def test_a_rank_dies_at_ten_moments(
    source: Path, text: Path, expected: Path, runner: RankRunner, tmp_path: Path
) -> None:
    """From the first words between the ranks to the last file; each time another number of them goes on."""
    moments = [(KILLED_AT_COLLECTIVE, at) for at in COLLECTIVES] + [(KILLED_AT_FLUSH, at) for at in FLUSHES]
    assert len(moments) == 10
    for number, (code, at) in enumerate(moments):
        out, size = tmp_path / f"out{number}", 2 + number % 2
        assert killed(code, at, number % size, source, text, out, runner, size, every=QUICK)
        arguments = pack_arguments(source, out, text, "--method", "qmoe", "--resume", "--force")
        outcomes = runner.run(1 + (size + number // 2) % 3, arguments)
        if "discarding what an interrupted run left" in outcomes[0].stderr:  # killed before a layer was kept
            outcomes[0] = replace(outcomes[0], stderr="")
        assert_alike(outcomes, out, expected)


def test_an_interrupt(source: Path, text: Path, expected: Path, runner: RankRunner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = pack_arguments(source, out, text, "--method", "qmoe")
    partial = out.with_name("out.partial")
    outcomes = runner.run(2, arguments, interrupt=str(partial / "resume-00001.json"))
    assert [outcome.code for outcome in outcomes] == [130, 130]
    assert outcomes[0].stderr.startswith("qmoe pack: interrupted: ")
    assert "layers are kept: --resume goes on from them" in outcomes[0].stderr
    assert len(outcomes[0].stderr.splitlines()) == 1
    assert outcomes[1].stderr == ""
    assert_alike(runner.run(3, [*arguments, "--resume"]), out, expected)


# ---- what is refused ---------------------------------------------------------------------------------------


def refusal(outcomes: list[Outcome], *codes: int) -> str:
    """The one line that rank 0 says."""
    assert [outcome.code for outcome in outcomes] == list(codes), [o.stderr for o in outcomes]
    assert [len(outcome.stderr.splitlines()) for outcome in outcomes] == [1] + [0] * (len(codes) - 1)
    return outcomes[0].stderr


def test_ranks_that_differ(source: Path, text: Path, runner: RankRunner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other_version = 'import importlib.metadata as m\nm.version = lambda name: "0.0.9"'
    line = refusal(runner.run(2, pack_arguments(source, out), code={1: other_version}), 2, 2)
    assert "rank 1 differs from rank 0" in line and "0.0.9" in line
    arguments = pack_arguments(source, out, text, "--method", "qmoe")
    others = [str(argument) for argument in [*arguments, "--damp", "0.3"]]
    line = refusal(runner.run(2, arguments, own_arguments={1: others}), 2, 2)
    assert "settings: damp: rank 1 differs from rank 0 (found 0.3, expected 0.1)" in line
    assert not list(tmp_path.iterdir())


def test_a_rank_without_the_source(source: Path, runner: RankRunner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    others = [str(argument) for argument in pack_arguments(tmp_path / "nowhere", out)]
    line = refusal(runner.run(2, pack_arguments(source, out), own_arguments={1: others}), 1, 1)
    assert line.startswith("qmoe pack: error: rank 1: ") and "nowhere" in line
    assert not list(tmp_path.iterdir())


def test_a_rank_without_the_output(source: Path, runner: RankRunner, tmp_path: Path) -> None:
    """As if rank 1 had another directory of that name."""
    code = "from qmoe_quantize import shards\nshards.MARKER = '.another'"
    line = refusal(runner.run(2, pack_arguments(source, tmp_path / "out"), code={1: code}), 1, 1)
    assert line.startswith("qmoe pack: error: rank 1: ") and "all ranks share" in line
    assert not list(tmp_path.iterdir())


def test_more_ranks_than_experts(source: Path, runner: RankRunner, tmp_path: Path) -> None:
    size = EXPERTS + 1
    line = refusal(runner.run(size, pack_arguments(source, tmp_path / "out")), *[2] * size)
    assert "more ranks than experts" in line and "at most 5" in line


def test_what_one_process_does(source: Path, text: Path, runner: RankRunner, tmp_path: Path) -> None:
    line = refusal(runner.run(2, ["calibrate", source, tmp_path / "store.h5", "--calib", text]), 2, 2)
    assert line.startswith("qmoe calibrate: error: ") and "done by one process" in line
    assert not list(tmp_path.iterdir())


def test_a_rank_that_never_joins(source: Path, runner: RankRunner, tmp_path: Path) -> None:
    arguments = pack_arguments(source, tmp_path / "out", None, "--join-timeout", 1)
    outcomes = runner.run(3, arguments, absent=[1])
    assert [outcomes[rank].code for rank in (0, 2)] == [1, 1]
    assert "rank 1 of 3 did not join within 1 s" in outcomes[0].stderr
    assert len(outcomes[0].stderr.splitlines()) == 1
    assert outcomes[2].stderr == ""


def test_an_interrupt_while_a_rank_is_missing(source: Path, runner: RankRunner, tmp_path: Path) -> None:
    """As by the launcher, where one has ended before it joined."""
    code = "import threading\nthreading.Timer(2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()"
    outcomes = runner.run(3, pack_arguments(source, tmp_path / "out"), absent=[1], code={0: code, 2: code})
    assert [outcomes[rank].code for rank in (0, 2)] == [130, 130]
    assert outcomes[0].stderr == "qmoe pack: interrupted: rank 1 of 3 had not joined\n"
    assert outcomes[2].stderr == ""


def test_an_error_of_all_is_said_once(source: Path, runner: RankRunner, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    line = refusal(runner.run(2, pack_arguments(source, tmp_path / "out")), 2, 2)
    assert "exists already" in line


TWO_NAMESPACES = """
unshare --net sleep 600 & other=$!
trap 'kill $other' EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
set -e
ip link add west type veth peer name east netns $other
there="nsenter --target $other --net"
ip address add 10.77.0.1/24 dev west
$there ip address add 10.77.0.2/24 dev east
for link in lo west; do ip link set $link up; done
for link in lo east; do $there ip link set $link up; done
GLOO_SOCKET_IFNAME=east $there "$@" --node-rank 1 --master-addr 10.77.0.1 $COMMAND & second=$!
GLOO_SOCKET_IFNAME=west "$@" --node-rank 0 --master-addr 10.77.0.1 $COMMAND
wait $second
ip -json -statistics link show west > link.json
"""
ONE_HOST = """
set -e
"$@" --node-rank 1 --master-addr 127.0.0.1 $COMMAND & second=$!
"$@" --node-rank 0 --master-addr 127.0.0.1 $COMMAND
wait $second
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["one host", "two network namespaces"])
def test_torchrun(place: str, source: Path, text: Path, expected: Path, tmp_path: Path) -> None:
    """The plain command of the README, by one agent for each of two machines."""
    namespaces = place != "one host"
    alone = ["unshare", "--map-root-user", "--net"] if namespaces else []
    if namespaces:
        tried = ["unshare", "--map-root-user", "--net", "ip", "link", "add", "west", "type", "veth"]
        if not shutil.which("unshare") or not shutil.which("ip") or subprocess.run(tried).returncode:
            pytest.skip("network namespaces are not permitted here")
    out = tmp_path / "out"
    run = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    run += ["--master-port", str(free_port())]
    arguments = ["-m", "qmoe_format.cli", *pack_arguments(source, out, text, "--method", "qmoe")]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["COMMAND"] = " ".join(map(str, arguments))
    done = subprocess.run(
        [*alone, "bash", "-c", TWO_NAMESPACES if namespaces else ONE_HOST, "bash", *run],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert digests(out) == digests(expected)
    if namespaces:
        link = json.loads((tmp_path / "link.json").read_text())[0]
        # Activations went this way, not only what the agents say to each other
        assert min(link["stats64"][way]["bytes"] for way in ("rx", "tx")) > 50_000


# ---- bookkeeping -------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e9), max_size=60), st.integers(1, 9))
def test_everything_is_assigned_once(costs: list[float], size: int) -> None:
    ranks = Ranks()
    ranks.size = size
    parts = ranks.assign(costs)
    assert sorted(index for part in parts for index in part) == list(range(len(costs)))
    loads = [sum(costs[index] for index in part) for part in parts]
    # Graham's bound for the longest first
    assert max(loads) <= 1.0001 * (sum(costs) / size + max(costs, default=0.0)) + 1e-6
    shares = [ranks.share(len(costs), rank) for rank in range(size)]
    assert [index for share in shares for index in share] == list(range(len(costs)))
