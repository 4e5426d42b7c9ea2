"""The GPU kernels on the host (gpu_decode/shim), against NumPy: all of them, odd shapes, damaged frames."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import qmoe_codec
import sanitizers
from qmoe_codec import ArgumentError, Dictionary, build_dictionary, encode, round_levels
from strategies import table_dictionary

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "gpu_decode" / "shim"))

import qmoe_gpu_decode  # noqa: E402
from host import HostDevice  # noqa: E402
from qmoe_gpu_decode.encoding import launch_encode  # noqa: E402
from qmoe_gpu_decode.experts import (  # noqa: E402
    CLAMPED_SWIGLU,
    ExpertProjection,
    Gating,
    PackedExperts,
    launch_experts,
)
from qmoe_gpu_decode.matrices import PackedMatrices  # noqa: E402
from qmoe_gpu_decode.products import (  # noqa: E402
    ARRAY_DTYPES,
    launch_decode,
    launch_matmul,
    launch_tiles,
    make_plan,
)
from qmoe_gpu_decode.sources import kernel_source  # noqa: E402

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="GPU KERNELS NOT TESTED: there is no g++")

RED = 512  # bytes of red zone on both sides of what a kernel writes


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> HostDevice:
    folder = tmp_path_factory.getbasetemp() / "kernels"  # shared by test files
    folder.mkdir(exist_ok=True)
    return HostDevice(folder)


@dataclass
class Packed:
    trits: np.ndarray
    levels: np.ndarray
    frame: bytes
    dictionaries: dict[int, Dictionary]

    @property
    def weights(self) -> np.ndarray:
        return qmoe_codec.dequantize(self.frame, self.dictionaries, backend="reference").astype(np.float64)


def dictionaries_of(bits: int, count: int) -> list[Dictionary]:
    if bits == 0:
        return []
    if bits == 16:
        return [table_dictionary(16)]
    return [build_dictionary(p, bits) for p in (0.885, 0.7, 0.5, 0.97)[:count]]


def pack(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    bits: int,
    *,
    count: int = 1,
    level_format: str = "bfloat16",
) -> Packed:
    """A matrix whose rows are of all densities, some of them empty, full or with zeros at the end."""
    density = rng.choice([0.0, 0.03, 0.12, 0.12, 0.12, 0.4, 1.0], (rows, 1))
    trits = np.where(rng.random((rows, columns)) < density, rng.choice([-1, 1], (rows, columns)), 0)
    trits[::5, columns // 2 :] = 0
    levels = rng.uniform(0.5, 2, (rows, 2)) * (-1, 1)
    levels = round_levels(levels.astype(np.float32), level_format)
    dictionaries = dictionaries_of(bits, count)
    selectors = rng.integers(0, max(1, len(dictionaries)), rows).astype(np.uint8)
    frame = encode(trits, levels, dictionaries or None, level_format=level_format, selectors=selectors)
    return Packed(trits.astype(np.int8), levels, frame, {d.dictionary_id: d for d in dictionaries})


def guarded(device: HostDevice, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """An array full of a pattern, and all of the memory that it lies in."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = device.empty((size + 2 * RED,), "uint8")
    return memory[RED : RED + size].view(dtype).reshape(shape), memory


def check_guard(memory: np.ndarray) -> None:
    assert (memory[:RED] == 0xA5).all() and (memory[-RED:] == 0xA5).all()


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as the kernels take it: bfloat16 as uint16."""
    return qmoe_codec.reference.convert(values.astype(np.float32), dtype)


def from_bits(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


SHAPES = [(1, 1), (37, 123), (40, 301), (9, 2080), (3, 5000), (64, 256)]


@pytest.mark.parametrize("bits", [0, 8, 10, 12, 16])
@pytest.mark.parametrize("dtype", ["int8", "float32", "bfloat16", "float16"])
def test_decode(device: HostDevice, bits: int, dtype: str) -> None:
    rng = np.random.default_rng()
    for number, (rows, columns) in enumerate(SHAPES):
        level_format = qmoe_codec.LEVEL_FORMATS[number % 4]
        packed = pack(rng, rows, columns, bits, count=1 + number % 4, level_format=level_format)
        matrices = PackedMatrices([packed.frame], packed.dictionaries, device)
        out, memory = guarded(device, (1, rows, columns), ARRAY_DTYPES[dtype])
        launch_decode(matrices, out, dtype)
        expected = (
            packed.trits
            if dtype == "int8"
            else qmoe_codec.dequantize(packed.frame, packed.dictionaries, dtype)
        )
        np.testing.assert_array_equal(out[0], expected)
        check_guard(memory)


def test_decode_of_several_matrices(device: HostDevice) -> None:
    rng = np.random.default_rng()
    several = [pack(rng, 9, 333, 10) for _ in range(3)]
    matrices = PackedMatrices([p.frame for p in several], several[0].dictionaries, device)
    out = device.empty((2, 9, 333), "int8")
    launch_decode(matrices, out, "int8", first=1, count=2)
    np.testing.assert_array_equal(out, [p.trits for p in several[1:]])


def product_bound(x: np.ndarray, weights: np.ndarray, columns: int) -> np.ndarray:
    return (columns + 8) * 2.0**-24 * (np.abs(x) @ np.abs(weights).T) + 1e-30


ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def check_product(
    device: HostDevice, packed: Packed, tokens: int, dtypes: tuple[str, str], rng: np.random.Generator
) -> None:
    rows, columns = packed.trits.shape
    matrices = PackedMatrices([packed.frame], packed.dictionaries, device)
    bits = to_bits(rng.normal(size=(tokens, columns)) / 8, dtypes[0])
    x, weights = from_bits(bits, dtypes[0]), packed.weights
    y, memory = guarded(device, (tokens, rows), ARRAY_DTYPES[dtypes[1]])
    launch_matmul(matrices, device.upload(bits), y, tokens, dtypes)
    expected = x @ weights.T
    bound = product_bound(x, weights, columns) + ROUNDING[dtypes[1]] * np.abs(expected) * 1.01 + 1e-7
    assert (np.abs(from_bits(y, dtypes[1]) - expected) <= bound).all()
    check_guard(memory)


# One token, a tile, several tiles with a rest; each a specialisation of its own.
PRODUCTS = [
    (1, "bfloat16", "bfloat16"),
    (1, "float32", "float32"),
    (2, "float16", "float16"),
    (3, "bfloat16", "float32"),
    (11, "bfloat16", "bfloat16"),
    (8, "float32", "float32"),
    (32, "bfloat16", "bfloat16"),
]


@pytest.mark.parametrize(("tokens", "x_dtype", "y_dtype"), PRODUCTS)
def test_matmul(device: HostDevice, tokens: int, x_dtype: str, y_dtype: str) -> None:
    rng = np.random.default_rng()
    for number, bits in enumerate([0, 8, 10, 12, 16]):
        for rows, columns in [SHAPES[number], SHAPES[(number + tokens) % len(SHAPES)]]:
            packed = pack(rng, rows, columns, bits, count=1 + number % 4)
            check_product(device, packed, tokens, (x_dtype, y_dtype), rng)


@pytest.mark.parametrize(("tokens", "dtype"), [(32, "bfloat16"), (45, "bfloat16"), (5, "float16")])
def test_tiles(device: HostDevice, tokens: int, dtype: str) -> None:
    """By tensor cores: what the weights give that are rounded to the dtype of x."""
    rng = np.random.default_rng()
    for number, bits in enumerate([0, 8, 10, 12, 16]):
        for rows, columns in [SHAPES[number], (16, 96)]:
            packed = pack(rng, rows, columns, bits, count=1 + number % 4, level_format="float32")
            matrices = PackedMatrices([packed.frame], packed.dictionaries, device)
            x_bits = to_bits(rng.normal(size=(tokens, columns)) / 8, dtype)
            x, weights = from_bits(x_bits, dtype), from_bits(to_bits(packed.weights, dtype), dtype)
            y, memory = guarded(device, (tokens, rows), ARRAY_DTYPES[dtype])
            assert launch_tiles(matrices, device.upload(x_bits), y, tokens, dtype)
            expected = x @ weights.T
            bound = product_bound(x, weights, columns) + ROUNDING[dtype] * np.abs(expected) * 1.01 + 1e-7
            assert (np.abs(from_bits(y, dtype) - expected) <= bound).all()
            check_guard(memory)
    packed = pack(rng, 3, 20000, 10)
    matrices = PackedMatrices([packed.frame], packed.dictionaries, device)
    assert not launch_tiles(matrices, device.upload(x_bits), y, tokens, dtype)


@pytest.mark.parametrize("tokens", [1, 8])
def test_matmul_without_room_in_shared_memory(device: HostDevice, tokens: int) -> None:
    rng = np.random.default_rng()
    small = HostDevice(device.folder, shared_limit=28 << 10 if tokens > 1 else 2048)
    packed = pack(rng, 21, 14000, 12, count=4)
    check_product(small, packed, tokens, ("float32", "float32"), rng)
    assert all("#define X_SHARED 0" in unit.read_text("utf-8") for unit in small.units)


def test_plans_stay_within_shared_memory() -> None:
    from qmoe_gpu_decode.matrices import Needs

    for limit in (99 << 10, 163 << 10, 227 << 10):
        for columns in (1, 768, 6144, 50000, 1 << 24):
            for tokens in (1, 8, 32):
                for table_bytes in (0, 8 << 10, 128 << 10, 256 << 10):
                    plan = make_plan(Needs(31, table_bytes), columns, tokens, 0, limit)
                    assert plan.shared_bytes <= limit - 256
                    assert plan.tokens <= tokens


# ---- experts ----


@dataclass
class Layer:
    experts: PackedExperts
    weights: list[dict[str, np.ndarray]]
    biases: dict[str, np.ndarray]

    def expert(self, number: int, role: str, x: np.ndarray) -> np.ndarray:
        """A matrix of one expert times a vector, with its bias, in float64."""
        bias = self.biases[role][number].astype(np.float64) if self.biases else 0.0
        return self.weights[number][role] @ x + bias


def make_layer(
    device: HostDevice,
    rng: np.random.Generator,
    experts: int,
    hidden: int,
    intermediate: int,
    *,
    gated: bool,
    biased: bool = False,
) -> Layer:
    """Experts of all codecs and several dictionaries, in a store as the spec has it."""
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    roles = [role for role in shapes if gated or role != "gate"]
    store, index, weights = bytearray(), [], []
    dictionaries: dict[int, Dictionary] = {}
    for expert in range(experts):
        matrices = {
            role: pack(rng, *shapes[role], (10, 8, 12, 0)[expert % 4], count=1 + expert % 2) for role in roles
        }
        offset = len(store)
        for packed in matrices.values():
            store += packed.frame
            dictionaries |= packed.dictionaries
        index.append((offset, len(store) - offset, -1))
        store += b"\0" * (-len(store) % 256)
        weights.append({role: packed.weights for role, packed in matrices.items()})
    projections = [ExpertProjection(role, *shapes[role]) for role in roles]
    biases = {
        role: rng.normal(size=(experts, shapes[role][0])).astype(np.float32) for role in roles if biased
    }
    packed_experts = PackedExperts(
        store,
        np.array(index),
        dictionaries,
        projections,
        device,
        biases={role: device.upload(bias) for role, bias in biases.items()},
    )
    return Layer(packed_experts, weights, biases)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return silu(gate) * up


GPT_OSS = Gating(alpha=1.702, limit=7.0)


def clamped_swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Spec 6.3, as GPT-OSS has it."""
    gate, up = np.minimum(gate, GPT_OSS.limit), np.clip(up, -GPT_OSS.limit, GPT_OSS.limit)
    return (up + 1) * gate / (1 + np.exp(-GPT_OSS.alpha * gate))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


@pytest.mark.parametrize(
    ("tokens", "choices", "name", "dtype"),
    [
        (1, 3, "silu", "bfloat16"),
        (9, 2, "silu", "bfloat16"),
        (40, 3, "silu", "bfloat16"),
        (7, 1, "relu", "float32"),
        (9, 2, CLAMPED_SWIGLU, "bfloat16"),
        (1, 3, CLAMPED_SWIGLU, "float32"),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_experts(device: HostDevice, tokens: int, choices: int, name: str, dtype: str, biased: bool) -> None:
    rng = np.random.default_rng()
    gated, function = name != "relu", {"silu": swiglu, CLAMPED_SWIGLU: clamped_swiglu}.get(name)
    layer = make_layer(device, rng, 6, 100, 75, gated=gated, biased=biased)
    # For the clamped one, large enough that both limits are met.
    bits = to_bits(rng.normal(size=(tokens, 100)) * (2 if name == CLAMPED_SWIGLU else 0.1), dtype)
    x = from_bits(bits, dtype)
    # Experts 2 and 4 get nothing; an index equal to the number of experts, and a negative one, are skipped.
    index = rng.choice([0, 1, 3, 5, 5, 6, -1], (tokens, choices)).astype(np.int64)
    shares = rng.random((tokens, choices)).astype(np.float32)
    y, memory = guarded(device, (tokens, 100), ARRAY_DTYPES[dtype])
    launch_experts(
        layer.experts,
        device.upload(bits),
        device.upload(index),
        device.upload(shares),
        y,
        tokens,
        choices,
        name,
        (dtype, "int64", "float32"),
        allocate=device.empty,
        gating=GPT_OSS,
    )
    expected, scale = np.zeros((tokens, 100)), np.zeros((tokens, 100))
    for token in range(tokens):
        for expert, share in zip(index[token], shares[token], strict=True):
            if 0 <= expert < 6:
                up = layer.expert(expert, "up", x[token])
                entered = function(layer.expert(expert, "gate", x[token]), up) if gated else relu(up)
                expected[token] += share * layer.expert(expert, "down", entered)
                scale[token] += share * (np.abs(layer.weights[expert]["down"]) @ np.abs(entered) + 1)
    bound = 2e-5 * scale + ROUNDING[dtype] * np.abs(expected) * 1.01 + 1e-7
    assert (np.abs(from_bits(y, dtype) - expected) <= bound).all()
    check_guard(memory)


# ---- encoding ----


def encode_on(
    device: HostDevice, trits: np.ndarray, levels: np.ndarray, *args: object, **kwargs: object
) -> bytes:
    frame = launch_encode(device, device.upload(trits), device.upload(levels), trits.shape, *args, **kwargs)
    return bytes(frame)


@pytest.mark.parametrize("bits", [0, 8, 10, 12, 16])
def test_encode_gives_the_bytes_of_the_cpu(device: HostDevice, bits: int) -> None:
    rng = np.random.default_rng()
    shapes = [*SHAPES, (0, 5), (5, 0), (33, 64)]
    for number, (rows, columns) in enumerate(shapes):
        level_format = qmoe_codec.LEVEL_FORMATS[number % 4]
        dictionaries = dictionaries_of(bits, 1 + number % 4)
        packed = pack(rng, rows, columns, bits)
        levels = packed.levels * rng.choice([1e-40, 1e-3, 1.0, 0.0], (rows, 1)).astype(np.float32)
        selectors = rng.integers(0, max(1, len(dictionaries)), rows).astype(np.uint8)
        frame = encode_on(
            device, packed.trits, levels, dictionaries, number % 4, selectors=device.upload(selectors)
        )
        expected = encode(
            packed.trits, levels, dictionaries or None, level_format=level_format, selectors=selectors
        )
        assert frame == expected


def test_encode_refuses_what_a_frame_cannot_hold(device: HostDevice) -> None:
    trits, levels = np.zeros((3, 40), np.int8), np.tile(np.float32([-1, 1]), (3, 1))
    dictionary = build_dictionary(0.885, 10)
    for place, value in [((1, 3), 2), ((2, 39), -2)]:
        bad = trits.copy()
        bad[place] = value
        for dictionaries in ([], [dictionary], dictionaries_of(16, 1)):
            with pytest.raises(ArgumentError, match="trits"):
                encode_on(device, bad, levels, dictionaries, 1)
    for level_format, value in [(0, np.inf), (1, 3.4e38), (2, 65520.0), (3, -1.0)]:
        bad_levels = levels.copy()
        bad_levels[2, 1] = value
        with pytest.raises(ArgumentError, match="levels"):
            encode_on(device, trits, bad_levels, [dictionary], level_format)
    with pytest.raises(ArgumentError, match="selectors"):
        chosen = device.upload(np.uint8([0, 1, 2]))
        encode_on(device, trits, levels, dictionaries_of(10, 2), 0, selectors=chosen)
    with pytest.raises(ArgumentError, match="dictionaries"):
        encode_on(
            device, trits, levels, [dictionary, dictionary], 0, selectors=device.upload(np.uint8([0, 0, 0]))
        )


def test_the_verbs(device: HostDevice) -> None:
    rng = np.random.default_rng()
    packed = pack(rng, 37, 123, 10)
    (dictionary,) = packed.dictionaries.values()
    matrix = qmoe_gpu_decode.Matrix(packed.frame, packed.dictionaries, device=device)
    np.testing.assert_array_equal(matrix.decode(), packed.trits)
    np.testing.assert_array_equal(matrix.dequantize(), packed.weights.astype(np.float32))
    for shape in ((123,), (2, 1, 123), (256, 123)):
        x = rng.normal(size=shape).astype(np.float32)
        np.testing.assert_allclose(matrix.matmul(x), x @ packed.weights.T, rtol=1e-4, atol=1e-4)
    with pytest.raises(ArgumentError, match="x"):
        matrix.matmul(np.zeros(122, np.float32))
    with pytest.raises(ArgumentError, match="dtype"):
        matrix.dequantize("float64")
    frame = qmoe_gpu_decode.encode(
        device.upload(packed.trits), device.upload(packed.levels), dictionary, device=device
    )
    assert bytes(frame) == packed.frame
    with pytest.raises(ArgumentError, match="levels"):
        qmoe_gpu_decode.encode(packed.trits, packed.levels[:5], dictionary, device=device)
    with pytest.raises(qmoe_codec.ChecksumError):
        qmoe_gpu_decode.Matrix(
            packed.frame[:-17] + b"x" + packed.frame[-16:], packed.dictionaries, device=device
        )


# ---- damaged frames that slip past the checks ----


def damage(matrices: PackedMatrices, rng: np.random.Generator) -> None:
    """Change bytes of a checked frame on the device: of a section, or of all behind the header."""
    header = matrices.headers[0]
    sections = [(64, header.frame_size), (header.codewords_start, header.frame_size)]
    if header.codec:
        sections.append((header.row_index_start, header.codewords_start))
    first, last = sections[rng.integers(len(sections))]
    count = int(rng.choice([1, 8, last - first]))
    matrices.store[rng.integers(first, last, count)] = rng.choice(
        [rng.integers(0, 256, count), np.full(count, 255), np.zeros(count)]
    )


def run_kernels(
    device: HostDevice, rng: np.random.Generator, matrices: PackedMatrices, rows: int, columns: int
) -> None:
    """No kernel may write outside of its output, or run for ever; the shim watches shared memory."""
    out, memory = guarded(device, (1, rows, columns), "int8")
    launch_decode(matrices, out, "int8")
    check_guard(memory)
    assert np.isin(out, (-1, 0, 1)).all()  # every byte was written
    for tokens in (1, 8):
        x = device.upload(rng.normal(size=(tokens, columns)).astype(np.float32))
        y, memory = guarded(device, (tokens, rows), "float32")
        launch_matmul(matrices, x, y, tokens, ("float32", "float32"))
        check_guard(memory)


def run_damaged(device: HostDevice, rng: np.random.Generator, bits: int, rounds: int) -> None:
    for number in range(rounds):
        rows, columns = SHAPES[1 + number % 3]
        packed = pack(rng, rows, columns, bits, count=1 + number % 4, level_format="e4m4")
        matrices = PackedMatrices([packed.frame], packed.dictionaries, device)
        damage(matrices, rng)
        run_kernels(device, rng, matrices, rows, columns)


@pytest.mark.parametrize("bits", [0, 8, 10, 12, 16])
def test_damaged_frames_stay_within_bounds(device: HostDevice, bits: int) -> None:
    run_damaged(device, np.random.default_rng(), bits, 3)


def spoiled(fault: str, frame: bytes) -> np.ndarray:
    """Bytes of a frame with this fault, from the first of its section on."""
    header = qmoe_codec.read_frame_header(frame)
    bases, counts, selectors = header.row_index_parts
    index = header.row_index_start
    start, size = {
        "bases that do not rise": (index, bases),
        "bases past the codewords": (index, bases),
        "counts past the codewords": (index + bases, counts),
        "no counts": (index + bases, counts),
        "selectors of no dictionary": (index + bases + counts, selectors),
    }.get(fault, (header.codewords_start, header.codewords_size))
    whole = np.frombuffer(frame, np.uint8).copy()
    section = whole[start : start + size]
    assert size
    if fault == "bases that do not rise":
        section[:] = section.view("<u4")[::-1].copy().view(np.uint8)
    else:
        section[:] = 0 if fault == "no counts" else 255
    assert bytes(whole) != frame
    return whole


@pytest.mark.parametrize(
    ("fault", "bits"),
    [
        ("bases that do not rise", 10),
        ("bases past the codewords", 10),
        ("counts past the codewords", 10),
        ("no counts", 10),
        ("selectors of no dictionary", 10),
        ("codewords of no phrase, of length 0", 8),
        ("codewords of no phrase, of length 0", 12),
        ("trits of no digit", 0),
    ],
)
def test_payload_faults(device: HostDevice, fault: str, bits: int) -> None:
    """Faults of test_faults.py that lie in a body: the CPU refuses them, the kernels stay within bounds."""
    rng = np.random.default_rng(1)
    rows, columns = 200, 301
    packed = pack(rng, rows, columns, bits, count=3)
    whole = spoiled(fault, packed.frame)
    whole[56:60] = np.frombuffer(qmoe_codec.crc32c(whole[64:]).to_bytes(4, "little"), np.uint8)
    whole[60:64] = np.frombuffer(qmoe_codec.crc32c(whole[:60]).to_bytes(4, "little"), np.uint8)
    with pytest.raises((qmoe_codec.RowIndexError, qmoe_codec.PayloadError)):
        qmoe_codec.Matrix(whole, packed.dictionaries)
    matrices = PackedMatrices([packed.frame], packed.dictionaries, device)
    matrices.store[: len(whole)] = whole
    run_kernels(device, rng, matrices, rows, columns)


SANITIZED = """
import sys
from pathlib import Path
import numpy as np
import test_gpu_host as tests
device = tests.HostDevice(Path(sys.argv[1]), sanitize=True)
rng = np.random.default_rng()
for bits in (0, 10, 16):
    tests.run_damaged(device, rng, bits, 3)
tests.test_encode_gives_the_bytes_of_the_cpu(device, 10)
tests.test_experts(device, 9, 2, "silu", "bfloat16", True)
tests.test_tiles(device, 5, "float16")
print("sanitized")
"""


@pytest.mark.slow
def test_kernels_under_sanitizers(tmp_path: Path) -> None:
    """Every read and write is watched; a frame lies in a buffer of just its size."""
    runtime = sanitizers.runtime("libasan.so")
    environment = {
        **os.environ,
        "LD_PRELOAD": str(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, tmp_path], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "sanitized" in done.stdout, (done.stdout + done.stderr)[-6000:]


BROKEN = {
    "some threads of a block left": "if (threadIdx.x < 32) { __syncthreads(); }",
    "lanes of a warp are at different": "if (threadIdx.x % 2) { __syncwarp(); } else { warp_sum(1u); }",
    "a write behind the shared": "DYNAMIC_SHARED(shared); shared[64] = 1;",
    "not aligned": "DYNAMIC_SHARED(shared); store<u32>(shared + 2, 1);",
}


@pytest.mark.parametrize("message", BROKEN)
def test_the_shim_finds_faults(device: HostDevice, message: str, tmp_path: Path) -> None:
    text = kernel_source("encode.cu", {}).split("// ---- kernels ----")[0]
    kernel = f'extern "C" __global__ void broken(u32) {{ {BROKEN[message]} }}\n'
    unit = (
        '#include "shim.h"\n'
        + text
        + kernel
        + "int main() { u32 zero = 0; void *arguments[] = {&zero}; u32 size = 4;"
        " return shim::call(broken, {1, 1, 1}, {64, 1, 1}, 64, arguments, &size, 1); }\n"
    )
    (tmp_path / "unit.cpp").write_text(unit, "utf-8")
    program = tmp_path / "unit"
    command = ["g++", "-std=c++17", f"-I{ROOT / 'gpu_decode' / 'shim'}", tmp_path / "unit.cpp", "-o", program]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr
