"""The codec as a whole: what goes in comes out, both backends agree, and no bytes do harm."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qmoe_codec import (
    BACKENDS,
    ArgumentError,
    ChecksumError,
    Dictionary,
    DictionarySet,
    FormatError,
    Matrix,
    MissingDictionaryError,
    build_dictionary,
    crc32c,
    decode,
    dequantize,
    encode,
    experts_matmul,
    join_dictionaries,
    kernels_name,
    matmul,
    parse_dictionaries,
    read_frame_header,
    reference,
    round_levels,
)
from strategies import TernaryMatrix, reseal, some_dictionaries, ternary_matrices
from valid_streams import random_frame

DICTIONARIES = {dictionary.dictionary_id: dictionary for dictionary in some_dictionaries()}


def sets_of_dictionaries() -> st.SearchStrategy[list[Dictionary]]:
    """None (raw), one dictionary, or several of equal width."""
    widths = sorted({dictionary.bits for dictionary in DICTIONARIES.values()})

    def of_width(bits: int) -> st.SearchStrategy[list[Dictionary]]:
        same = [dictionary for dictionary in DICTIONARIES.values() if dictionary.bits == bits]
        return st.lists(st.sampled_from(same), min_size=0, max_size=4, unique=True)

    return st.sampled_from(widths).flatmap(of_width)


@given(ternary_matrices(), sets_of_dictionaries(), st.integers(0, 2**32 - 1))
def test_decoding_gives_back_what_was_encoded(
    matrix: TernaryMatrix, dictionaries: list[Dictionary], seed: int
) -> None:
    selectors = np.random.default_rng(seed).integers(0, max(1, len(dictionaries)), len(matrix.trits))
    options = {"level_format": matrix.level_format, "selectors": selectors}
    frame = encode(matrix.trits, matrix.levels, dictionaries or None, **options)
    assert len(frame) == read_frame_header(frame).frame_size
    for backend in BACKENDS:
        trits, levels = decode(frame, DICTIONARIES, backend=backend)
        assert trits.dtype == np.int8
        assert np.array_equal(trits, matrix.trits)
        assert np.array_equal(levels, matrix.levels)


@given(ternary_matrices(max_rows=40, max_columns=200), sets_of_dictionaries())
def test_both_backends_encode_alike(matrix: TernaryMatrix, dictionaries: list[Dictionary]) -> None:
    selectors = np.arange(len(matrix.trits)) % max(1, len(dictionaries))
    frames = [
        encode(
            matrix.trits,
            matrix.levels,
            dictionaries,
            level_format=matrix.level_format,
            selectors=selectors,
            backend=backend,
        )
        for backend in BACKENDS
    ]
    assert frames[0] == frames[1]


@given(
    st.sampled_from(list(DICTIONARIES.values())),
    st.integers(0, 40),
    st.integers(0, 400),
    st.integers(0, 2**32 - 1),
)
def test_streams_that_no_encoder_makes(dictionary: Dictionary, rows: int, columns: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    frame = random_frame(generator, dictionary.reference, rows=rows, columns=columns)
    expected = decode(frame, DICTIONARIES, backend="reference")
    found = decode(frame, DICTIONARIES, backend="c")
    assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])
    x = generator.normal(size=(2, columns)).astype(np.float32)
    for some in (x, x[:1]):
        assert np.allclose(matmul(some, frame, DICTIONARIES), reference.matmul(some, *expected), atol=1e-4)


def outcome(frame: bytes, backend: str, *, verify: bool = True) -> object:
    """What decoding comes to: the kind of the error, or the content."""
    try:
        trits, levels = decode(frame, DICTIONARIES, backend=backend, verify=verify)
    except FormatError as error:
        return error.kind
    header = read_frame_header(frame)
    assert trits.shape == (header.rows, header.columns)
    assert trits.size == 0 or (trits.min() >= -1 and trits.max() <= 1)
    assert np.isfinite(levels).all()
    return trits.tobytes(), levels.tobytes()


@given(st.binary(max_size=300))
def test_any_bytes_give_an_error(data: bytes) -> None:
    for prefix in (b"", b"QMXM\1\0\1\1", b"QMXM\1\0\0\0"):
        assert outcome(prefix + data, "c") == outcome(prefix + data, "reference")
    for prefix in (b"", b"QMXD\1\0\1\10", b"QMXD\1\0\0\10"):
        with pytest.raises(FormatError):
            Dictionary.from_frame(prefix + data)


@given(
    ternary_matrices(max_rows=12, max_columns=60),
    sets_of_dictionaries(),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3),
    st.booleans(),
)
def test_altered_frames(
    matrix: TernaryMatrix, dictionaries: list[Dictionary], changes: list[tuple[float, int]], fit: bool
) -> None:
    frame = bytearray(
        encode(matrix.trits, matrix.levels, dictionaries or None, level_format=matrix.level_format)
    )
    for place, change in changes:
        frame[int(place * len(frame))] ^= change
    altered = reseal(frame) if fit else bytes(frame)
    assert outcome(altered, "c") == outcome(altered, "reference")
    # With the checksum of the body left out, it must still end in an error or in bounds.
    outcome(altered, "c", verify=False)
    try:
        matrix_ = Matrix(altered, DICTIONARIES, verify=False)
        for tokens in (1, 3):
            matrix_.matmul(np.ones((tokens, matrix_.columns), np.float32))
        matrix_.dequantize("bfloat16")
    except FormatError:
        pass


@given(ternary_matrices(max_rows=8, max_columns=40), sets_of_dictionaries())
def test_truncated_frames(matrix: TernaryMatrix, dictionaries: list[Dictionary]) -> None:
    frame = encode(matrix.trits, matrix.levels, dictionaries or None)
    for size in range(0, len(frame), 7):
        for backend in BACKENDS:
            assert outcome(frame[:size], backend) == "truncated"
    assert outcome(frame + b"\0", "c") == outcome(frame + b"\0", "reference") == "size"


@given(ternary_matrices(), st.integers(0, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_matmul_is_within_its_bound(matrix: TernaryMatrix, tokens: int, threads: int, seed: int) -> None:
    encoder = DictionarySet()
    frame = encoder.encode(matrix.trits, matrix.levels, matrix.level_format)
    x = np.random.default_rng(seed).normal(size=(tokens, matrix.trits.shape[1])).astype(np.float32)
    y = Matrix(frame, encoder.dictionaries).matmul(x, threads)
    assert y.shape == (tokens, len(matrix.trits)) and y.dtype == np.float32
    exact = reference.matmul(x, matrix.trits, matrix.levels)
    weights = np.abs(reference.dequantize(matrix.trits, matrix.levels)).astype(np.float64)
    # n additions and two multiplications, each of relative error 2^-24 at most, and 1 % for their products.
    bound = 1.01 * 2.0**-24 * (x.shape[1] + 3) * (np.abs(x).astype(np.float64) @ weights.T)
    assert (np.abs(y - exact) <= bound + 1e-30).all()


@given(ternary_matrices(), st.sampled_from(["float32", "bfloat16", "float16"]), st.data())
def test_dequantize(matrix: TernaryMatrix, dtype: str, data: st.DataObject) -> None:
    encoder = DictionarySet()
    frame = encoder.encode(matrix.trits, matrix.levels, matrix.level_format)
    expected = dequantize(frame, encoder.dictionaries, dtype, backend="reference")
    found = dequantize(frame, encoder.dictionaries, dtype)
    assert found.dtype == expected.dtype and np.array_equal(found, expected)
    rows = data.draw(st.slices(len(matrix.trits)).filter(lambda rows: rows.step in (None, 1)))
    parsed = Matrix(frame, encoder.dictionaries)
    assert np.array_equal(parsed.dequantize(dtype, rows), expected[rows])
    assert np.array_equal(parsed.decode(rows), matrix.trits[rows])


@given(ternary_matrices())
def test_a_set_of_dictionaries_never_exceeds_raw(matrix: TernaryMatrix) -> None:
    encoder = DictionarySet(matrix.trits.size)
    frame = encoder.encode(matrix.trits, matrix.levels, matrix.level_format)
    raw = encode(matrix.trits, matrix.levels, None, level_format=matrix.level_format)
    assert len(frame) <= len(raw)
    kept = parse_dictionaries(encoder.to_bytes())
    assert kept == encoder.dictionaries
    assert set(read_frame_header(frame).dictionary_ids) == set(kept)
    trits, levels = decode(frame, kept)
    assert np.array_equal(trits, matrix.trits) and np.array_equal(levels, matrix.levels)


def test_a_set_of_dictionaries_does_not_depend_on_the_order() -> None:
    """So the matrices of a layer can be encoded by several processes."""
    matrices = [random_trits((30, 400), p, seed) for seed, p in enumerate((0.6, 0.7, 0.72, 0.9, 0.91, 0.97))]
    weights = sum(trits.size for trits in matrices)
    forward, backward = DictionarySet(weights), DictionarySet(weights)
    frames = [forward.encode(trits, np.ones((30, 2))) for trits in matrices]
    others = [backward.encode(trits, np.ones((30, 2))) for trits in reversed(matrices)]
    alone = [DictionarySet(weights).encode(trits, np.ones((30, 2))) for trits in matrices]
    assert frames == others[::-1] == alone
    assert forward.to_bytes() == backward.to_bytes()
    assert len(forward.dictionaries) > 1


def random_trits(shape: tuple[int, int], p_zero: float, seed: int = 0) -> np.ndarray:
    p = [(1 - p_zero) / 2, p_zero, (1 - p_zero) / 2]
    return np.random.default_rng(seed).choice(np.array([-1, 0, 1], np.int8), shape, p=p)


@pytest.mark.parametrize("p_zero", [0.05, 1 / 3, 0.5])
def test_dense_matrices_fall_to_raw(p_zero: float) -> None:
    trits = random_trits((64, 250), p_zero)
    frame = DictionarySet().encode(trits, np.zeros((64, 2)))
    header = read_frame_header(frame)
    assert header.section_bytes["codewords"] * 8 <= 1.6 * trits.size + 8
    if p_zero < 0.4:
        assert header.bits == 0


def test_rows_of_different_density_share_a_frame() -> None:
    trits = np.concatenate([random_trits((60, 2048), p) for p in (0.7, 0.85, 0.97)])
    several = DictionarySet()
    frame = several.encode(trits, np.zeros((180, 2)))
    header = read_frame_header(frame)
    assert header.dictionary_count > 1
    single = min(
        len(encode(trits, np.zeros((180, 2)), build_dictionary(p, header.bits)))
        for p in (0.7, 0.8, 0.85, 0.9, 0.95)
    )
    assert len(frame) < 0.97 * single
    assert np.array_equal(decode(frame, several.dictionaries)[0], trits)


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("p_zero", [0.05, 0.3, 0.5, 0.7, 0.885, 0.95, 0.99, 0.999])
def test_built_dictionaries_are_complete(p_zero: float, bits: int) -> None:
    dictionary = build_dictionary(p_zero, bits)
    tables = dictionary.reference.phrases
    # Nearly all codewords are used in both tables, no phrase twice, and T1 starts with a non-zero.
    for table in tables:
        used = [phrase for phrase in table if phrase is not None]
        assert len(used) >= (1 << bits) - 1 or p_zero > 0.99
        assert len(set(used)) == len(used)
    assert all(phrase[0] for phrase in tables[1] if phrase)
    # One phrase and no other goes with what comes next: the probabilities of each table sum to one.
    for table, first in zip(tables, (1.0, 1 - p_zero), strict=True):
        total = 0.0
        for codeword, phrase in enumerate(table):
            if phrase is not None:
                nonzeros = np.count_nonzero(phrase)
                share = p_zero ** (len(phrase) - nonzeros) * ((1 - p_zero) / 2) ** nonzeros
                total += share * ((1 - p_zero) if codeword >= dictionary.threshold else 1)
        assert total == pytest.approx(first, abs=1e-9)


def test_rates_of_built_dictionaries() -> None:
    """The bits per weight over the entropy that the design promises, measured on a long random row."""
    for p_zero, bits, most in [(0.8, 8, 1.025), (0.8, 12, 1.02), (0.885, 10, 1.03), (0.95, 12, 1.05)]:
        trits = random_trits((4, 1 << 19), p_zero)
        header = read_frame_header(encode(trits, np.zeros((4, 2)), build_dictionary(p_zero, bits)))
        entropy = -p_zero * np.log2(p_zero) - (1 - p_zero) * np.log2((1 - p_zero) / 2)
        assert header.codeword_count * bits / trits.size < most * entropy


def test_build_dictionary_refuses() -> None:
    for p_zero, bits in [(0.5, 16), (0.5, 9), (0.0, 8), (1.0, 8), (float("nan"), 8)]:
        with pytest.raises(ArgumentError):
            build_dictionary(p_zero, bits)


def test_crc32c() -> None:
    data = bytes(range(256)) * 3
    assert crc32c(b"123456789") == reference.crc32c(b"123456789") == 0xE3069283
    for start in range(9):
        assert crc32c(data[start:]) == reference.crc32c(data[start:])
    assert crc32c(data[100:], crc32c(data[:100])) == crc32c(data)


@pytest.mark.parametrize("size", [3 * 1024, 3 * 16384, 2 * 3 * 16384 + 3 * 1024 + 13])
def test_crc32c_in_parts(size: int) -> None:
    """Long inputs are taken in three parts at a time; pieces of less than a part are not."""
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    value = 0
    for start in range(0, size, 1000):
        value = crc32c(data[start : start + 1000], value)
    assert crc32c(data) == value


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20), st.data())
def test_round_levels_agrees_with_the_reference(values: list[float], data: st.DataObject) -> None:
    magnitudes = np.abs(np.float32(values)).reshape(-1, 1)
    levels = np.concatenate([-magnitudes, magnitudes], axis=1)
    level_format = data.draw(st.sampled_from(["float32", "bfloat16", "float16", "e4m4"]))
    limit = {"float16": 65504.0, "bfloat16": 3.3e38}.get(level_format, 3.4e38)
    levels = np.clip(levels, -limit, limit)
    trits = np.zeros((len(levels), 3), np.int8)
    frames = [encode(trits, levels, None, level_format=level_format, backend=b) for b in BACKENDS]
    assert frames[0] == frames[1]
    rounded = round_levels(levels, level_format)
    assert np.array_equal(decode(frames[0], {}, backend="reference")[1], rounded)
    assert np.array_equal(round_levels(rounded, level_format), rounded)


@pytest.mark.parametrize(
    ("trits", "levels", "options"),
    [
        (np.full((1, 1), 2, np.int8), np.zeros((1, 2)), {}),
        (np.full((1, 1), 258, np.int16), np.zeros((1, 2)), {}),
        (np.zeros((1, 1)), np.zeros((1, 2)), {}),
        (np.zeros(3, np.int8), np.zeros((1, 2)), {}),
        (np.zeros((2, 3), np.int8), np.zeros((1, 2)), {}),
        (np.zeros((1, 3), np.int8), np.array([[np.nan, 1]]), {}),
        (np.zeros((1, 3), np.int8), np.array([[-1e6, 1]]), {"level_format": "float16"}),
        (np.zeros((1, 3), np.int8), np.array([[1.0, 1]]), {"level_format": "e4m4"}),
        (np.zeros((1, 3), np.int8), np.zeros((1, 2)), {"level_format": "int4"}),
        (np.zeros((1, 3), np.int8), np.zeros((1, 2)), {"selectors": [0, 0]}),
        (np.zeros((1, 3), np.int8), np.zeros((1, 2)), {"backend": "gpu"}),
    ],
)
def test_encode_refuses(trits: np.ndarray, levels: np.ndarray, options: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        encode(trits, levels, None, **options)


def test_encode_refuses_dictionaries_that_do_not_go_together() -> None:
    eight, ten = build_dictionary(0.9, 8), build_dictionary(0.9, 10)
    trits, levels = np.zeros((2, 3), np.int8), np.zeros((2, 2))
    for dictionaries, selectors in [([eight, ten], [0, 1]), ([eight, eight], [0, 1]), ([eight] * 5, None)]:
        with pytest.raises(ArgumentError):
            encode(trits, levels, dictionaries, selectors=selectors)
    with pytest.raises(ArgumentError):
        encode(trits, levels, [eight, build_dictionary(0.5, 8)], selectors=[0, 2])


def test_matmul_refuses_wrong_shapes() -> None:
    frame = encode(np.zeros((2, 3), np.int8), np.zeros((2, 2)), None)
    for x in (np.zeros(()), np.zeros(4), np.zeros((2, 4)), np.zeros((3, 2))):
        with pytest.raises(ArgumentError):
            matmul(x, frame, {})
    assert matmul(np.zeros((2, 5, 3)), frame, {}).shape == (2, 5, 2)
    with pytest.raises(ArgumentError):
        matmul(np.zeros(3), frame, {}, threads=0)


def test_a_matrix_keeps_its_buffer_and_dictionaries() -> None:
    dictionary = Dictionary.from_frame(build_dictionary(0.9, 10).frame)
    trits = random_trits((20, 500), 0.9)
    frame = bytearray(encode(trits, np.ones((20, 2)), dictionary))
    matrix = Matrix(memoryview(frame), {dictionary.dictionary_id: dictionary})
    del dictionary
    with pytest.raises(BufferError):
        frame.append(0)
    assert np.array_equal(matrix.decode(), trits)


def test_a_body_that_changes_after_it_was_checked_stays_in_bounds() -> None:
    """As when a mapped file is written to: the row index and the codewords say anything at all."""
    encoder = DictionarySet()
    trits = random_trits((70, 333), 0.9)
    clean = encoder.encode(trits, np.ones((70, 2)))
    header = read_frame_header(clean)
    generator = np.random.default_rng(0)
    for _ in range(300):
        frame = bytearray(clean)
        matrix = Matrix(frame, encoder.dictionaries)
        first, last = sorted(generator.integers(header.row_index_start, len(frame), 2))
        frame[first:last] = generator.integers(0, 256, last - first, np.uint8).tobytes()
        for action in (
            matrix.decode,
            matrix.dequantize,
            lambda matrix=matrix: matrix.matmul(np.ones(333)),
            lambda matrix=matrix: matrix.matmul(np.ones((9, 333))),
        ):
            try:
                action()
            except FormatError as error:
                assert error.kind == "payload"


def test_verify_looks_at_the_body_only_when_asked() -> None:
    frame = bytearray(encode(random_trits((4, 50), 0.5), np.ones((4, 2)), None, level_format="float32"))
    frame[66] ^= 1  # a level's mantissa
    with pytest.raises(ChecksumError):
        Matrix(bytes(frame), {})
    assert Matrix(bytes(frame), {}, verify=False).rows == 4
    dictionary = build_dictionary(0.9, 8)
    with pytest.raises(MissingDictionaryError, match="dictionary_ids"):
        Matrix(encode(random_trits((4, 50), 0.9), np.ones((4, 2)), dictionary), {}, verify=False)


def test_dictionaries_can_be_compared_joined_and_pickled() -> None:
    a, b = build_dictionary(0.8, 8), build_dictionary(0.9, 8)
    assert a != b and a == Dictionary.from_frame(a.frame) and hash(a) == hash(Dictionary(a.frame))
    assert parse_dictionaries(join_dictionaries([b, a])) == {a.dictionary_id: a, b.dictionary_id: b}
    assert pickle.loads(pickle.dumps(a)) == a  # noqa: S301 - our own object
    assert f"{a.dictionary_id:#010x}" in repr(a)
    with pytest.raises(ValueError, match="read-only"):
        a.words[0, 0] = 1


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_experts_are_multiplied_in_one_call(sizes: list[int], columns: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    encoder = DictionarySet()
    levels = generator.normal(size=(33, 2)).astype(np.float32)
    frames = [encoder.encode(random_trits((33, columns), p, seed % 97), levels) for p in (0.3, 0.9)]
    matrices = [Matrix(frames[g % 2], encoder.dictionaries) for g in range(len(sizes))]
    ends = np.cumsum(sizes)
    x = generator.normal(size=(ends[-1], columns)).astype(np.float32)
    y = experts_matmul(matrices, x, ends, threads=1)
    assert y.shape == (ends[-1], 33)
    assert np.array_equal(y, experts_matmul(matrices, x, ends, threads=2))
    for matrix, start, end in zip(matrices, ends - sizes, ends, strict=True):
        assert np.allclose(y[start:end], x[start:end] @ matrix.dequantize().T, atol=1e-4)


@pytest.mark.parametrize("p_zero", [0.3, 0.9])
@pytest.mark.parametrize("tokens", [1, 16, 17, 300])
def test_threads_change_no_bit(tokens: int, p_zero: float) -> None:
    """Many tokens: one thread takes 64 of 290 rows at a time, two take 32. A p_zero of 0.3 is stored raw."""
    generator = np.random.default_rng(tokens)
    encoder = DictionarySet()
    trits = random_trits((290, 75), p_zero, 5)
    matrix = Matrix(encoder.encode(trits, generator.normal(size=(290, 2))), encoder.dictionaries)
    x = generator.normal(size=(tokens, 75)).astype(np.float32)
    y = matrix.matmul(x, threads=1)
    assert np.allclose(y, x @ matrix.dequantize().T, atol=1e-4)
    for threads in (2, 3, 8):
        assert np.array_equal(y, matrix.matmul(x, threads=threads))


@pytest.mark.parametrize("groups", [(17, 1), (1, 17), (3, 1, 3), (1, 0, 2)])
def test_threads_change_no_bit_of_groups(groups: tuple[int, ...]) -> None:
    """A thread may come back to a group of one token after it has had rows of a group of many."""
    generator = np.random.default_rng(0)
    encoder = DictionarySet()
    matrix = Matrix(encoder.encode(random_trits((290, 211), 0.9), np.ones((290, 2))), encoder.dictionaries)
    ends = np.cumsum(groups)
    x = generator.normal(size=(ends[-1], 211)).astype(np.float32)
    y = experts_matmul([matrix] * len(groups), x, ends, threads=1)
    for threads in (2, 3, 4, 8):
        for _ in range(20):
            assert np.array_equal(y, experts_matmul([matrix] * len(groups), x, ends, threads=threads))


@pytest.mark.parametrize("tokens", [1, 3, 8, 17, 300])
def test_inputs_of_16_bits_are_taken_as_they_are(tokens: int) -> None:
    encoder = DictionarySet()
    matrix = Matrix(encoder.encode(random_trits((40, 130), 0.9), np.ones((40, 2))), encoder.dictionaries)
    x = np.random.default_rng(0).normal(size=(tokens, 130)).astype(np.float32)
    half = x.astype(np.float16)
    assert np.array_equal(matrix.matmul(half, dtype="float16"), matrix.matmul(half.astype(np.float32)))
    brain = (x.view(np.uint32) >> 16).astype(np.uint16)
    widened = (brain.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(matrix.matmul(brain, dtype="bfloat16"), matrix.matmul(widened))


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("columns", [1, 150, 767, 2500, 14_000, 14_001])
def test_one_token(bits: int, columns: int) -> None:
    """Whatever path a row's width, its codewords' and its non-zeros lead to, at very different densities."""
    generator = np.random.default_rng(columns)
    trits = np.concatenate([random_trits((9, columns), p, bits) for p in (0.5, 0.88, 0.99, 1.0)])
    levels = generator.normal(size=(36, 2)).astype(np.float32)
    x = generator.normal(size=(1, columns)).astype(np.float32)
    choices = [dictionary for dictionary in DICTIONARIES.values() if dictionary.bits == bits][:4]
    for dictionaries in (choices[:1], choices[-1:], choices):
        selectors = np.arange(len(trits)) % len(dictionaries)
        matrix = Matrix(encode(trits, levels, dictionaries, selectors=selectors), DICTIONARIES)
        assert np.allclose(matrix.matmul(x), reference.matmul(x, trits, matrix.levels), atol=1e-3)


@pytest.mark.parametrize("columns", [3000, 14_000])
def test_wide_rows_that_change_after_they_were_checked_stay_in_bounds(columns: int) -> None:
    """Whatever the dictionary: its longest phrases pass every limit of 16 bits."""
    generator = np.random.default_rng(columns)
    x = generator.normal(size=(1, columns)).astype(np.float32)
    trits = random_trits((12, columns), 0.9)
    for dictionary in DICTIONARIES.values():
        frame = bytearray(encode(trits, np.ones((12, 2)), dictionary))
        matrix = Matrix(frame, DICTIONARIES)
        for _ in range(4):
            frame[200:] = generator.bytes(len(frame) - 200)
            assert matrix.matmul(x).shape == (1, 12)


def test_rows_too_long_for_short_lists() -> None:
    """More columns than 16 bits can number."""
    encoder = DictionarySet()
    trits = random_trits((3, 70_000), 0.95)
    matrix = Matrix(encoder.encode(trits, np.array([[-1.0, 2.0]] * 3)), encoder.dictionaries)
    x = np.random.default_rng(0).normal(size=(5, 70_000)).astype(np.float32)
    for tokens in (1, 5):
        exact = reference.matmul(x[:tokens], trits, matrix.levels)
        assert np.allclose(matrix.matmul(x[:tokens]), exact, atol=2e-3)


def test_experts_matmul_refuses() -> None:
    small, large = (Matrix(encode(np.zeros((n, 3), np.int8), np.zeros((n, 2)), None), {}) for n in (2, 4))
    x = np.zeros((6, 3), np.float32)
    for matrices, ends, options in [
        ([], [], {}),
        ([small, large], [3, 6], {}),
        ([small, small], [6], {}),
        ([small, small], [3, 5], {}),
        ([small, small], [7, 6], {}),
        ([small, small], [3, 6], {"threads": 0}),
        ([small, small], [3, 6], {"threads": 257}),
        ([small, small], [3, 6], {"dtype": "int8"}),
        ([small, small], [3, 6], {"dtype": "bfloat16"}),
    ]:
        with pytest.raises(ArgumentError):
            experts_matmul(matrices, x, ends, **options)


def test_the_chosen_kernels_have_a_name() -> None:
    assert kernels_name() in ("portable", "avx2", "avx512", "avx512vbmi")
