"""The codes: bytes worked out by hand, round trips, sizes, and bytes that lie."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lori_manager.engine import bits
from lori_manager.errors import DamagedObject

NO_BYTES = np.empty(0, np.uint8)


@pytest.fixture
def small_chunks(monkeypatch):
    """Blocks and chunks so short that a few values cross their borders."""
    monkeypatch.setattr(bits, "BLOCK", 4)
    monkeypatch.setattr(bits, "CHUNK", 8)


def entropy(p):
    return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))


@pytest.mark.parametrize(
    ("values", "stream"),
    [
        ([], ""),
        # Shift 0: 1, 0001, 01 and a zero bit.
        ([0, 3, 1], "02000000 00 8a"),
        # Shift 2: low bits 01 00 10 11, then 01 four times.
        ([5, 4, 6, 7], "03000000 02 4b 55"),
    ],
)
def test_rice_stream_is_the_one_worked_out_by_hand(values, stream):
    coded = bits.rice_encode(np.array(values, np.int64))
    assert coded.tobytes() == bytes.fromhex(stream)
    assert bits.rice_decode(coded, len(values), 8).tolist() == values


@pytest.mark.usefixtures("small_chunks")
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**12) | st.integers(0, 3) | st.just(2**31), max_size=40))
def test_rice_code_returns_the_values(values):
    array = np.array(values, np.int64)
    assert bits.rice_decode(bits.rice_encode(array), len(values), 2**31 + 1).tolist() == values


def test_rice_code_does_not_depend_on_the_integer_type():
    values = np.arange(256).repeat(5)
    assert bits.rice_encode(values.astype(np.uint8)).tobytes() == bits.rice_encode(values).tobytes()


def test_each_block_gets_its_own_shift():
    rng = np.random.default_rng(0)
    small, large = rng.geometric(0.3, 50 * bits.BLOCK), rng.geometric(0.003, 50 * bits.BLOCK)
    together = len(bits.rice_encode(np.concatenate([small, large])))
    assert together < len(bits.rice_encode(small)) + len(bits.rice_encode(large)) + 8


@pytest.mark.usefixtures("small_chunks")
@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), max_size=70))
def test_mask_code_returns_the_mask(entries):
    mask = np.array(entries, bool)
    coded = bits.mask_encode(mask)
    assert bits.mask_decode(coded, len(mask), sum(entries)).tolist() == entries


@pytest.mark.parametrize("kept", [0, 1, 499_999, 500_000])
def test_empty_full_and_nearly_so_masks_take_no_room(kept):
    mask = np.zeros(500_000, bool)
    mask[:kept] = True
    coded = bits.mask_encode(mask)
    assert len(coded) < 16
    assert np.array_equal(bits.mask_decode(coded, len(mask), kept), mask)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.27, 0.5, 0.73, 0.9])
def test_mask_code_comes_within_two_percent_of_the_entropy(density):
    mask = np.random.default_rng(0).random(2_000_000) < density
    size = 8 * len(bits.mask_encode(mask)) / len(mask)
    assert size < 1.02 * entropy(mask.mean())
    if density == 0.1:
        assert size < 0.4775


def test_mask_of_modules_with_unlike_density_costs_what_each_would_cost_alone():
    rng = np.random.default_rng(0)
    densities = np.array([0.01, 0.03, 0.08, 0.27])
    mask = np.concatenate([rng.random(300_000) < p for p in densities])
    size = 8 * len(bits.mask_encode(mask)) / len(mask)
    assert size < 1.03 * entropy(densities).mean()


def test_floats_split_as_worked_out_by_hand():
    # bfloat16: 1.0 is 0 01111111 0000000, -1.5 the same exponent and fraction .5, 0.25 two less.
    common, codes, rest = bits.floats_encode(np.array([0x3F80, 0xBFC0, 0x3E80], np.uint16))
    assert common == [127, 125]
    assert codes.tobytes() == bytes.fromhex("02000000 00 d0")  # 1, 1, 01
    assert rest.tobytes() == bytes([0b0_0000000, 0b1_1000000, 0b0_0000000])


def test_every_16_bit_pattern_returns():
    words = np.random.default_rng(0).permutation(2**16).astype(np.uint16)
    common, codes, rest = bits.floats_encode(words)
    assert np.array_equal(bits.floats_decode(common, codes, rest, len(words), 2), words)


def test_equally_common_groups_are_listed_in_order():
    groups = np.array([*range(255, -1, -1), *range(0, 256, 2)], np.uint16)
    common, _, _ = bits.floats_encode(groups << 7)
    assert common == [*range(0, 256, 2), *range(1, 256, 2)]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("n", [0, 1, 5000])
def test_random_words_return_and_cost_hardly_more_than_they_are(dtype, n):
    words = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, n, dtype)
    common, codes, rest = bits.floats_encode(words)
    again = bits.floats_decode(common, codes, rest, n, words.itemsize)
    assert again.dtype == dtype
    assert np.array_equal(again, words)
    assert len(codes) + len(rest) < 1.04 * words.nbytes + 8


def test_normal_values_take_eleven_bits_and_a_truncated_tail_ten():
    normal = np.random.default_rng(0).standard_normal(400_000, np.float32)
    tail = normal[np.abs(normal) > 1.645]
    for values, most in ((normal, 10.7), (tail, 10.0)):
        words = (values.view(np.uint32) >> 16).astype(np.uint16)
        _, codes, rest = bits.floats_encode(words)
        assert 8 * (len(codes) + len(rest)) / len(words) < most


@pytest.mark.usefixtures("small_chunks")
def test_a_stream_cut_anywhere_or_extended_is_refused():
    coded = bits.rice_encode(np.array([0, 9, 2, 40, 0, 0, 1, 7, 3, 3, 100]))
    for end in range(len(coded)):
        with pytest.raises(DamagedObject):
            bits.rice_decode(coded[:end], 11, 101)
    with pytest.raises(DamagedObject, match="follow"):
        bits.rice_decode(np.append(coded, np.uint8(0)), 11, 101)


@pytest.mark.parametrize(
    ("stream", "n", "limit", "message"),
    [
        ("02000000 00 8a", 10**15, 4, "cannot fit"),
        ("02000000 00 8a", 3, 3, "not below 3"),
        ("02000000 00 8a", 2, 4, "expected 2 coded values, found 3"),
        ("02000000 00 8a", 4, 4, "expected 4 coded values, found 3"),
        ("02000000 00 8b", 3, 4, "expected 3 coded values, found 4"),
        ("03000000 00 8a00", 3, 4, "expected 3"),
        ("02000000 19 8a", 3, 4, "impossible shifts"),
        ("00000000 00 8a", 3, 4, "impossible shifts"),
        ("ffffffff 00 8a", 3, 4, "end after"),
        ("03000000 02 4b 55", 3, 8, "after the last"),
        ("03000000 02 4b 55", 4, 7, "not below 7"),
        ("02000000 18 55", 4, 8, "cut short"),
        # One quotient of 7 at shift 24.
        ("05000000 18 000000 01", 1, 7 * 2**24, "not below"),
        ("02000000 00 8a", 3, 0, "not below 0"),
    ],
)
def test_impossible_streams_are_refused(stream, n, limit, message):
    with pytest.raises(DamagedObject, match=message):
        bits.rice_decode(np.frombuffer(bytes.fromhex(stream), np.uint8), n, limit)


@pytest.mark.parametrize(("n", "kept"), [(8, -1), (8, 9), (8, 3), (3, 2), (10**18, 10**17)])
def test_a_mask_that_its_count_contradicts_is_refused(n, kept):
    coded = bits.mask_encode(np.array([0, 1, 0, 0, 0, 0, 0, 1], bool))
    with pytest.raises(DamagedObject):
        bits.mask_decode(coded, n, kept)


def test_gaps_that_add_up_to_more_than_the_mask_are_refused():
    coded = bits.rice_encode(np.array([5, 5]))
    with pytest.raises(DamagedObject):
        bits.mask_decode(coded, 10, 2)


def test_floats_with_missing_bytes_are_refused():
    common, codes, rest = bits.floats_encode(np.array([1, 2, 3], np.uint16))
    with pytest.raises(DamagedObject, match="3 values need 3 bytes, found 2"):
        bits.floats_decode(common, codes, rest[:-1], 3, 2)
    with pytest.raises(DamagedObject, match="not below 0"):
        bits.floats_decode([], codes, rest, 3, 2)


@pytest.mark.usefixtures("small_chunks")
@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=30), st.integers(0, 40), st.integers(0, 40))
def test_any_bytes_decode_or_are_refused(data, n, kept):
    stream = np.frombuffer(data, np.uint8)
    for decode in (
        lambda: bits.rice_decode(stream, n, kept),
        lambda: bits.mask_decode(stream, n, kept),
        lambda: bits.floats_decode([1, 2], stream, stream[:n], n, 2),
    ):
        try:
            out = decode()
        except DamagedObject:
            continue
        assert len(out) == n
