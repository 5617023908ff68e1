"""Outcomes measured elsewhere: by index or key, and refused by line."""

import json

import numpy as np
import pytest

from lori_manager.errors import BadData, NotFound
from lori_manager.tasks.outcomes import read_outcomes
from lori_manager.tasks.rows import Row

KEYS = [Row(f"p{i}", "c").key for i in range(4)]


def written(tmp_path, *lines, encoding="utf-8"):
    path = tmp_path / "outcomes.jsonl"
    text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
    path.write_text(text, encoding=encoding)
    return path


def test_rows_are_found_by_index_and_by_key_whatever_their_order(tmp_path):
    path = written(
        tmp_path,
        {"row": 2, "value": 0.25},
        {"row": KEYS[0].hex().upper(), "value": True, "note": "other fields do not matter"},
        "",
        {"row": KEYS[3].hex(), "value": 0},
    )
    out = read_outcomes(path, KEYS)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, np.float32([1, np.nan, 0.25, 0]))


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "o.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"row": 0, "value": 1}\r\n{"row": 1, "value": 0}\r\n')
    assert read_outcomes(path, KEYS)[:2].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected {"),
        ("[0, 1]", "expected {"),
        ('"row value"', "expected {"),
        ("3", "expected {"),
        ("[" * 100_000, "expected {"),
        ({"row": 0}, "expected {"),
        ({"value": 0}, "expected {"),
        ({"row": 4, "value": 1}, "row 4 is not among the task's 4 eval rows"),
        ({"row": -1, "value": 1}, "row -1 is not among"),
        ({"row": True, "value": 1}, "row True is not among"),
        ({"row": 1.0, "value": 1}, "row 1.0 is not among"),
        ({"row": None, "value": 1}, "row None is not among"),
        ({"row": "ab", "value": 1}, "row 'ab' is not among"),
        ({"row": 0, "value": "1"}, "got the value '1'"),
        ({"row": 0, "value": None}, "got the value None"),
        ('{"row": 0, "value": NaN}', "got the value nan"),
        ('{"row": 0, "value": -Infinity}', "got the value -inf"),
        ({"row": 0, "value": 1e39}, "got the value 1e"),
        ({"row": 0, "value": 10**400}, "got the value 1000"),
        ({"row": 3, "value": 1}, "row 3 is there twice"),
        ({"row": KEYS[3].hex(), "value": 1}, "is there twice"),
    ],
)
def test_a_line_that_cannot_be_used_is_refused_by_its_number(tmp_path, line, message):
    path = written(tmp_path, {"row": 3, "value": 0}, line)
    with pytest.raises(BadData, match=rf"outcomes.jsonl, line 2: .*{message}"):
        read_outcomes(path, KEYS)


@pytest.mark.parametrize("lines", [[], ["", " "]])
def test_a_file_without_outcomes_is_refused(tmp_path, lines):
    with pytest.raises(BadData, match="holds no outcomes"):
        read_outcomes(written(tmp_path, *lines), KEYS)


def test_a_file_that_is_missing_or_no_text_is_refused_by_name(tmp_path):
    with pytest.raises(NotFound, match=r"no file .*none\.jsonl"):
        read_outcomes(tmp_path / "none.jsonl", KEYS)
    with pytest.raises(BadData, match="cannot read"):
        read_outcomes(tmp_path, KEYS)
    with pytest.raises(BadData, match="cannot read"):
        read_outcomes(written(tmp_path, "a", encoding="utf-16"), KEYS)
