from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lori_manager.store import outcomes, pages, varints
from lori_manager.store.pages import Entry, Page

BITS = st.integers(0, 300).flatmap(
    lambda rows: st.tuples(
        st.just(rows),
        st.lists(st.sampled_from([0.0, 1.0, np.nan]), min_size=rows, max_size=rows),
        st.integers(0, 2**32 - 1),
        st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    )
)
FLOATS = st.lists(st.floats(width=32), min_size=0, max_size=50)


@settings(max_examples=300, deadline=None)
@given(st.lists(BITS, min_size=1, max_size=1), st.data())
def test_right_wrong_and_gaps_come_back_exactly_with_and_without_a_reference(
    drawn: list[tuple[int, list[float], int, float]], data: st.DataObject
) -> None:
    ((rows, values, seed, share),) = drawn
    random = np.random.default_rng(seed)
    references = random.random((3, rows)) < 0.5
    given = [np.array(values, np.float32)]
    for _ in range(4):  # near a reference, with gaps
        near = (references[random.integers(3)] ^ (random.random(rows) < share)).astype(np.float32)
        near[random.random(rows) < 0.1 * share] = np.nan
        given.append(near)
    which = [int(random.integers(3)) for _ in given]
    alone = [outcomes.encode(one) for one in given]
    against = [outcomes.encode(one, references[i]) for one, i in zip(given, which, strict=True)]
    np.testing.assert_array_equal(outcomes.decode(alone, rows), np.array(given))
    np.testing.assert_array_equal(
        outcomes.decode(against, rows, references, which), np.array(given)
    )
    for (_, a), (_, b) in zip(alone, against, strict=True):
        assert len(b) <= len(a)


@settings(max_examples=200, deadline=None)
@given(FLOATS)
def test_numbers_come_back_bit_for_bit(values: list[float]) -> None:
    given = np.array([*values, 0.5], np.float32)  # one at least is neither right nor wrong
    (told,) = outcomes.decode([outcomes.encode(given)], len(given))
    assert told.tobytes() == given.tobytes()
    again = outcomes.decode_floats(outcomes.encode_floats(given), len(given))
    assert again.tobytes() == given.tobytes()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, varints.MOST)))
def test_whole_numbers_come_back(values: list[int]) -> None:
    content = varints.encode(values)
    assert varints.decode(content).tolist() == values
    if values:
        first, used = varints.first(content)
        assert (first, varints.encode([first])) == (values[0], content[:used])


@given(st.integers(-(2**62), 2**62 - 1))
def test_signs_fold_and_unfold(value: int) -> None:
    assert varints.unzigzag(varints.zigzag(value)) == value


@pytest.mark.parametrize("content", [b"\x80", b"\x01\xff", b"\x80" * 9 + b"\x01"])
def test_a_number_cut_short_or_too_large_is_told(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"cut short|63 bits"):
        varints.decode(content)
    with pytest.raises(ValueError, match="from 0 to"):
        varints.encode([2**63])


@pytest.mark.parametrize(
    ("form", "content"),
    [
        (0, b""),
        (7, b"\0"),
        (outcomes.RAW, b"\0"),
        (outcomes.RAW, b"\0\0\0"),
        (outcomes.ONES, b""),
        (outcomes.ONES, b"\x0b"),  # 11 of 10 rows
        (outcomes.ONES, b"\x02\x80"),  # says two rows, has one
        (outcomes.ONES, b"\x01\0\0"),
        (outcomes.ONES, b"\x01\x02\0\0\x01"),  # a row beyond the last
        (outcomes.FLIPS, b"\0"),  # no reference is given
        (outcomes.FLOATS, b"\0" * 39),
        (outcomes.PLANES, b"not deflated"),
        (outcomes.PLANES | outcomes.GAPS, b"\x02\x01\0"),
        (outcomes.RAW | outcomes.GAPS, b"\x02\x7f"),
    ],
)
def test_bytes_that_mean_nothing_are_told(form: int, content: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        outcomes.decode([(form, content)], 10)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.2, 0.3])
def test_few_wrong_rows_cost_little_more_than_their_entropy(share: float) -> None:
    random = np.random.default_rng(0)
    sizes = [
        len(outcomes.encode((random.random(1000) < share).astype(np.float32))[1])
        for _ in range(200)
    ]
    entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) * 1000 / 8
    assert np.mean(sizes) < 1.08 * entropy + 2


def test_a_reference_that_says_the_same_costs_a_byte() -> None:
    random = np.random.default_rng(0)
    values = random.random(1000) < 0.5
    assert outcomes.encode(values.astype(np.float32), values) == (outcomes.FLIPS, b"\0")


def test_pages_keep_what_was_added_and_their_reference_is_a_whole_row() -> None:
    random = np.random.default_rng(0)
    common = random.random(200) < 0.6
    given = [(common ^ (random.random(200) < 0.05)).astype(np.float32) for _ in range(30)]
    given[7] = random.normal(size=200).astype(np.float32)
    given[9][3] = np.nan
    page = Page.begin(0, 200, None, given[0])
    times = [10**15 + (-1) ** i * i * 10**9 for i in range(30)]  # clocks are set back, too
    for i, (values, at) in enumerate(zip(given, times, strict=True)):
        figures = None if i % 3 else (float(i), np.inf, i)
        assert page.add(Entry(i * 77, at, 1, i // 10, None if figures else i, figures), values) == i
    assert page.reference is not None
    found = pages.read_directories([page.directory, page.directory])
    assert found.at.tolist() == times * 2
    assert found.subject.tolist() == [77 * i for i in range(30)] * 2
    assert found.weights.tolist() == [i // 10 for i in range(30)] * 2
    assert found.right.tolist() == [-1 if i % 3 == 0 else i for i in range(30)] * 2
    assert found.figures.tolist() == [(float(i), np.inf, i) for i in range(0, 30, 3)] * 2
    told = pages.decode_bodies(found, range(60), [page.bodies] * 2, [page.reference] * 2, page.rows)
    for values, one in zip(told, given * 2, strict=True):
        np.testing.assert_array_equal(values, one)
    np.testing.assert_array_equal(page.consensus(), common)
