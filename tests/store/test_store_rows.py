"""Rows of orthogonal A's: no two labels share one, whoever asks and whatever is lost."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from lori_manager.errors import DamagedObject
from lori_manager.store.rows import FILE, give_rows, rows_key


def test_rows_are_given_in_order_whatever_the_rank(tmp_path):
    asked = [("a", 4), ("b", 8), ("a", 4), ("a", 2), ("c", 1), ("b", 8)]
    assert [give_rows(tmp_path, *one, {}) for one in asked] == [0, 4, 0, 12, 14, 4]


def test_labels_that_ask_at_once_share_no_row(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda i: give_rows(tmp_path, f"line{i % 20}", 4, {}), range(60)))
    assert sorted(set(rows)) == [4 * i for i in range(20)]
    assert rows[:20] == rows[20:40] == rows[40:]


def test_rows_of_stored_adapters_stay_theirs_when_the_file_is_lost(tmp_path):
    used = {rows_key("a", 4): 0, rows_key("b/1", 8): 4}
    assert give_rows(tmp_path, "b/1", 8, used) == 4
    assert give_rows(tmp_path, "c", 4, used) == 12
    (tmp_path / FILE).unlink()
    assert give_rows(tmp_path, "d", 4, used) == 12


@pytest.mark.parametrize("content", ["", "[1]", '{"a 4": "0"}', '{"a": 3}', "\0"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(DamagedObject, match=FILE):
        give_rows(tmp_path, "a", 4, {})


def test_the_file_says_what_was_given(tmp_path):
    give_rows(tmp_path, "a", 4, {})
    give_rows(tmp_path, "both/shape/1", 4, {})
    assert json.loads((tmp_path / FILE).read_text()) == {"a 4": 0, "both/shape/1 4": 4}
