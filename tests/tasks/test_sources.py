"""Sources: what is read, and one clear error for what is not."""

import contextlib
import datetime
import json
import os
import sys
import time
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lori_manager.errors import BadData, InvalidInput, LoriError, NotFound
from lori_manager.tasks.rows import Row, rows_from_jsonl, rows_to_jsonl
from lori_manager.tasks.sources import read_source

ROWS = [
    Row("Wie groß?", " 3 m", (), {"answer": "3", "refs": ["a", {"b": None}]}),
    Row("b", " yes", ("yes", "no"), {}),
]
LINES = rows_to_jsonl(ROWS)
PLAIN = [{"prompt": "p1", "completion": " yes", "choices": ["yes", "no"]},
         {"prompt": "p2", "completion": " no", "choices": ["yes", "no"]}]  # fmt: skip
CHAT = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}


def join(messages):
    return "|".join(m["content"] for m in messages[:-1]) + ">", messages[-1]["content"]


def read(tmp_path, data, name="t.jsonl", **kwargs):
    (tmp_path / name).write_bytes(data)
    return read_source(name, root=tmp_path, **kwargs)


def refusal(kind, *args, **kwargs):
    with pytest.raises(kind) as e:
        read_source(*args, **kwargs)
    message = str(e.value)
    assert message.isprintable()
    assert len(message) < 500
    return message


def refused(tmp_path, data, name="t.jsonl", kind=BadData, **kwargs):
    (tmp_path / name).write_bytes(data)
    return refusal(kind, name, root=tmp_path, **kwargs)


def test_json_lines_come_back_as_rows_with_their_lines(tmp_path):
    rows = read(tmp_path, LINES)
    assert rows == ROWS
    assert [r.where for r in rows] == ["t.jsonl, line 1", "t.jsonl, line 2"]


def test_a_path_may_be_absolute_a_path_object_or_have_another_suffix(tmp_path):
    for name in ("t.ndjson", "t.json", "T.JSONL"):
        assert read(tmp_path, LINES, name) == ROWS
    assert read_source(tmp_path / "t.json", root=tmp_path / "elsewhere") == ROWS


def test_a_byte_order_mark_crlf_and_a_missing_last_newline_are_tolerated(tmp_path):
    windows = b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n")
    assert read(tmp_path, windows) == ROWS
    assert read(tmp_path, LINES.rstrip(b"\n")) == ROWS


def test_blank_lines_are_skipped_and_still_counted(tmp_path):
    a, b = LINES.splitlines()
    assert [r.where for r in read(tmp_path, b"\n \r\n" + a + b"\n\n" + b + b"\n\n")] == [
        "t.jsonl, line 3",
        "t.jsonl, line 5",
    ]
    assert "t.jsonl, line 4: not JSON" in refused(tmp_path, b"\n" + a + b"\n\n{\n" + b)


def test_only_a_line_feed_ends_a_line(tmp_path):
    odd = "a\u2028b\u2029c\x85d\x7f"
    line = json.dumps({"prompt": odd, "completion": odd}, ensure_ascii=False)
    assert read(tmp_path, line.encode()) == [Row(odd, odd)]


@pytest.mark.parametrize("data", [b"", b"\n\n \n", b"\xef\xbb\xbf", b"\r\n"])
def test_a_file_without_rows_is_refused(tmp_path, data):
    assert refused(tmp_path, data) == "t.jsonl: holds no rows; expected at least one"


def test_bytes_that_are_not_utf8_are_named_by_line_and_place(tmp_path):
    bad = LINES + b'{"prompt": "caf\xe9", "completion": "c"}\n'
    at = bad.index(b"\xe9") + 1
    message = refused(tmp_path, bad)
    assert f"t.jsonl, line 3: not UTF-8: byte 0xe9 at byte {at} of the file" in message
    message = refused(tmp_path, b"\xef\xbb\xbf" + bad)
    assert f"t.jsonl, line 3: not UTF-8: byte 0xe9 at byte {at + 3} of the file" in message
    assert "line 1: not UTF-8" in refused(tmp_path, LINES.decode().encode("utf-16"))


def test_a_half_written_last_line_is_named_as_such(tmp_path):
    message = refused(tmp_path, LINES[:-9])
    assert message.startswith("t.jsonl, line 2: not JSON")
    assert "cut short" in message
    half = '{"prompt": "é'.encode()[:-1]
    message = refused(tmp_path, LINES + half)
    assert message.startswith("t.jsonl, line 3: not UTF-8")
    assert "cut short" in message
    assert "cut short" not in refused(tmp_path, b"{\n" + LINES)


def test_every_cut_of_a_file_is_read_or_refused_but_never_changes_a_row(tmp_path):
    for cut in range(len(LINES)):
        with contextlib.suppress(BadData):
            assert read(tmp_path, LINES[:cut]) in ([ROWS[0]], ROWS)


def test_a_json_array_is_refused_with_the_remedy(tmp_path):
    objs = [{"prompt": "p", "completion": "c"}]
    for data in (json.dumps(objs), json.dumps(objs, indent=1)):
        message = refused(tmp_path, data.encode(), "t.json")
        assert message.startswith("t.json, line 1")
        assert "one object a line" in message


def test_a_key_that_comes_twice_is_refused(tmp_path):
    data = LINES + b'{"prompt": "p", "completion": "a", "completion": "b"}\n'
    assert "t.jsonl, line 3: the field 'completion' comes twice" in refused(tmp_path, data)


def test_mixed_kinds_are_refused_with_both_lines(tmp_path):
    chat = json.dumps(CHAT).encode() + b"\n"
    message = refused(tmp_path, LINES + chat)
    assert "line 3: a messages row after prompt/completion rows (t.jsonl, line 1)" in message
    message = refused(tmp_path, chat + LINES, render_chat=join)
    assert "line 2: a prompt/completion row after messages rows (t.jsonl, line 1)" in message


def test_messages_are_rendered_where_there_is_a_template(tmp_path):
    data = json.dumps(CHAT).encode()
    assert read(tmp_path, data, render_chat=join) == [Row("u>", "a")]
    assert "t.jsonl, line 1: `messages` need" in refused(tmp_path, data)


def test_a_huge_line_is_read(tmp_path):
    text = "é" * 3_000_000
    line = json.dumps({"prompt": text, "completion": "c"}, ensure_ascii=False)
    assert read(tmp_path, line.encode() + b"\n" + LINES)[0].prompt == text


def test_fifteen_thousand_rows_are_read_in_well_under_a_second(tmp_path):
    choices = [f"choice number {i}" for i in range(10)]
    objs = ({"prompt": f"{i} ö " * 8, "completion": f" {choices[i % 10]}",
             "answer": choices[i % 10], "choices": choices} for i in range(15_000))  # fmt: skip
    data = "\n".join(json.dumps(o, ensure_ascii=False) for o in objs).encode()
    start = time.process_time()
    assert len(read(tmp_path, data)) == 15_000
    assert time.process_time() - start < 1.5  # 0.35 s on an idle core; slack for a busy one


@pytest.mark.parametrize("name", ["no.jsonl", "no/such.jsonl", "t.jsonl/inside", "owner/name"])
def test_what_does_not_exist_is_not_found(tmp_path, name):
    (tmp_path / "t.jsonl").write_bytes(LINES)
    message = refusal(NotFound, name, root=tmp_path)
    assert message.startswith(f"{name}: no such file or folder")
    assert ("hf:owner/name" in message) == (name == "owner/name")


@pytest.mark.parametrize(
    "name", ["x\0.jsonl", "x" * 300 + ".jsonl", "~nobody-of-that-name/x.jsonl", "t.csv", "t"]
)
def test_a_path_that_cannot_be_used_is_invalid(tmp_path, name):
    for file in ("t.csv", "t"):
        (tmp_path / file).write_bytes(LINES)
    refusal(InvalidInput, name, root=tmp_path)


def test_a_name_that_no_terminal_shows_is_escaped(tmp_path):
    assert "a\\nb.jsonl, line 1" in refused(tmp_path, b"{", "a\nb.jsonl")
    name = os.fsdecode(b"\xff.jsonl")
    assert "\\udcff.jsonl" in refusal(NotFound, name, root=tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.jsonl")
    assert "neither a file nor a folder" in refusal(InvalidInput, "p.jsonl", root=tmp_path)


# Parquet


@pytest.fixture(scope="module")
def arrow():
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    return pyarrow


def table(arrow, path, objs, **kwargs):
    arrow.parquet.write_table(arrow.Table.from_pylist(objs, **kwargs), path)


def test_parquet_gives_the_same_rows_as_json_lines(arrow, tmp_path):
    objs = [{**o, "n": i, "score": 0.5, "refs": [["a"], []]} for i, o in enumerate(PLAIN)]
    table(arrow, tmp_path / "t.parquet", objs)
    rows = read_source("t.parquet", root=tmp_path)
    assert rows == read(tmp_path, "\n".join(map(json.dumps, objs)).encode())
    assert [r.key for r in rows] == [r.key for r in read_source("t.jsonl", root=tmp_path)]
    assert rows[1].where == "t.parquet, row 2"


def test_columns_that_are_null_in_a_row_are_absent_from_it(arrow, tmp_path):
    objs = [{"prompt": "p", "completion": "c", "note": n} for n in ("n", None)]
    table(arrow, tmp_path / "t.parquet", objs)
    rows = read_source("t.parquet", root=tmp_path)
    assert [r.extra for r in rows] == [{"note": "n"}, {}]


def test_messages_in_parquet_are_rendered(arrow, tmp_path):
    table(arrow, tmp_path / "t.parquet", [CHAT, CHAT])
    assert read_source("t.parquet", root=tmp_path, render_chat=join) == [Row("u>", "a")] * 2


def test_folder_names_add_no_columns(arrow, tmp_path):
    folder = tmp_path / "lang=en"
    folder.mkdir()
    table(arrow, folder / "t.parquet", [{"prompt": "p", "completion": "c"}])
    assert read_source("lang=en/t.parquet", root=tmp_path) == [Row("p", "c")]


def test_dates_become_text_and_raw_bytes_are_refused_by_name(arrow, tmp_path):
    row = {"prompt": "p", "completion": "c", "day": datetime.date(2024, 4, 7)}
    table(arrow, tmp_path / "t.parquet", [row])
    assert read_source("t.parquet", root=tmp_path)[0].extra == {"day": "2024-04-07"}
    table(arrow, tmp_path / "t.parquet", [{**row, "image": b"\x89PNG"}])
    message = refusal(BadData, "t.parquet", root=tmp_path)
    assert "t.parquet, row 1: `image` is a bytes" in message


def test_a_parquet_column_that_comes_twice_is_refused(arrow, tmp_path):
    column = arrow.array(["x"])
    twice = arrow.table([column] * 3, names=["prompt", "completion", "completion"])
    arrow.parquet.write_table(twice, tmp_path / "t.parquet")
    message = refusal(BadData, "t.parquet", root=tmp_path)
    assert "the column 'completion' comes twice" in message


def test_broken_and_empty_parquet_is_one_line(arrow, tmp_path):
    table(arrow, tmp_path / "t.parquet", PLAIN)
    whole = (tmp_path / "t.parquet").read_bytes()
    for data in (b"", b"PAR1", whole[:-20], LINES):
        message = refused(tmp_path, data, "t.parquet")
        assert message.startswith("t.parquet: not readable as Parquet")
    empty = arrow.schema([("prompt", arrow.string()), ("completion", arrow.string())])
    table(arrow, tmp_path / "t.parquet", [], schema=empty)
    assert "holds no rows" in refusal(BadData, "t.parquet", root=tmp_path)


def test_text_in_parquet_that_is_not_utf8_is_one_line(arrow, tmp_path):
    raw = arrow.array([b"caf\xe9"], arrow.binary())
    text = arrow.StringArray.from_buffers(1, *raw.buffers()[1:])
    bad = arrow.table([text, text], names=["prompt", "completion"])
    arrow.parquet.write_table(bad, tmp_path / "t.parquet")
    assert "t.parquet" in refusal(BadData, "t.parquet", root=tmp_path)


@pytest.mark.parametrize(("module", "name"), [("pyarrow", "t.parquet"), ("datasets", "hf:a/b")])
def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, module, name):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)
    message = refusal(InvalidInput, name, root=tmp_path)
    assert f"needs {module}" in message
    assert "lori-manager[data]" in message


# What `datasets` reads


class Rows(list):
    def to_list(self):
        return list(self)


@pytest.fixture
def asked(monkeypatch):
    """A stand-in for `datasets` that notes what it is asked and says what it is told to."""
    calls = []
    splits = {"train": Rows(PLAIN), "test": Rows(PLAIN[1:])}

    def load_dataset(path, name=None, split=None):
        calls.append((path, name, split))
        if path == "owner/none":
            raise FileNotFoundError("Dataset 'owner/none' doesn't exist\non the Hub")
        if path == "owner/odd":
            raise RuntimeError("its reader failed")
        if path == "owner/one":
            return {"train": splits["train"]}
        return splits if split is None else splits[split.partition("[")[0]]

    stand_in = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    return calls


@pytest.mark.parametrize(
    ("spec", "call"),
    [
        ("hf:owner/name:test", ("owner/name", None, "test")),
        ("hf:owner/name:main:test", ("owner/name", "main", "test")),
        ("hf:owner/name:train[1:2]", ("owner/name", None, "train[1:2]")),
        ("hf:owner/name:main:train[:10%]", ("owner/name", "main", "train[:10%]")),
        ("hf:owner/one", ("owner/one", None, None)),
        ("hf:owner/one:main:", ("owner/one", "main", None)),
    ],
)
def test_a_hub_id_names_config_and_split(tmp_path, asked, spec, call):
    rows = read_source(spec, root=tmp_path)
    assert asked == [call]
    assert rows[-1].prompt == "p2"
    assert rows[0].where == f"{spec}, row 1"


def test_a_split_must_be_chosen_where_there_are_several(tmp_path, asked):
    message = refusal(InvalidInput, "hf:owner/name:main:", root=tmp_path)
    assert "hf:owner/name:main:SPLIT; it has: train, test" in message


def test_what_datasets_says_becomes_one_line(tmp_path, asked):
    message = refusal(NotFound, "hf:owner/none", root=tmp_path)
    assert message.startswith("hf:owner/none: Dataset 'owner/none' doesn't exist;")
    message = refusal(BadData, "hf:owner/odd", root=tmp_path)
    assert "its reader failed" in message


@pytest.mark.parametrize("spec", ["hf:", "hf::a", "hf:a/b:c:d:e", "hf:a\0b"])
def test_a_hub_id_of_another_form_is_invalid(tmp_path, asked, spec):
    assert "hf:owner/name[:config][:split]" in refusal(InvalidInput, spec, root=tmp_path)
    assert asked == []


def test_folders_are_read_by_the_real_library(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    for split, objs in (("train", PLAIN), ("test", PLAIN[:1])):
        lines = "\n".join(map(json.dumps, objs))
        (tmp_path / "mine" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    expected = [Row(o["prompt"], o["completion"], ("yes", "no")) for o in PLAIN]
    assert read_source("hf:mine:train", root=tmp_path) == expected
    message = refusal(InvalidInput, "mine", root=tmp_path)
    assert "hf:mine:SPLIT" in message
    datasets.Dataset.from_list(PLAIN).save_to_disk(tmp_path / "saved")
    assert read_source("saved", root=tmp_path) == expected
    (tmp_path / "none").mkdir()
    assert refusal(LoriError, "none", root=tmp_path).startswith("none: ")


# Fuzz: whatever the bytes, rows or one LoriError

mutations = st.lists(
    st.tuples(
        st.integers(0, 400),
        st.sampled_from(["set", "insert", "delete", "cut", "repeat"]),
        st.binary(min_size=1, max_size=4)
        | st.sampled_from(
            [b'"', b"{", b"}", b"[", b"\\", b"\\u0000", b"\\ud800", b"\n", b"\0", b"\xff",
             b"NaN", b"1e999", b"null", b",", b":", b"\xef\xbb\xbf", b'"messages":[],']
        ),
    ),
    max_size=5,
)  # fmt: skip


@contextlib.contextmanager
def one_lori_error_at_most():
    """Anything but a LoriError passes through, and so does one that takes several lines."""
    try:
        yield
    except LoriError as e:
        if not str(e).isprintable():
            raise


def mutate(data, changes):
    for at, what, new in changes:
        at %= len(data) + 1
        if what == "set":
            data = data[:at] + new + data[at + len(new) :]
        elif what == "insert":
            data = data[:at] + new + data[at:]
        elif what == "delete":
            data = data[:at] + data[at + len(new) :]
        elif what == "cut":
            data = data[:at]
        else:
            data = data[:at] + data[max(0, at - 30) :]
    return data


fuzz = settings(
    max_examples=80,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
chat_line = json.dumps(CHAT).encode() + b"\n"


@fuzz
@given(st.sampled_from([LINES, chat_line, LINES + chat_line]), mutations, st.booleans())
def test_no_bytes_of_a_json_file_cause_anything_but_a_lori_error(tmp_path, data, changes, chat):
    with one_lori_error_at_most():
        rows = read(tmp_path, mutate(data, changes), render_chat=join if chat else None)
        assert rows_from_jsonl(rows_to_jsonl(rows)) == rows != []


@fuzz
@given(st.binary(max_size=60))
def test_no_noise_causes_anything_but_a_lori_error(tmp_path, data):
    with pytest.raises(BadData):
        read(tmp_path, data)


@fuzz
@given(changes=mutations, where=st.integers(0, 2000))
def test_no_bytes_of_a_parquet_file_cause_anything_but_a_lori_error(
    arrow, tmp_path, changes, where
):
    path = tmp_path / "whole.parquet"
    if not path.exists():
        table(arrow, path, PLAIN)
    moved = [(at + where, what, new) for at, what, new in changes]
    (tmp_path / "t.parquet").write_bytes(mutate(path.read_bytes(), moved))
    with one_lori_error_at_most():
        rows = read_source("t.parquet", root=tmp_path)
        assert rows_from_jsonl(rows_to_jsonl(rows)) == rows != []


@fuzz
@given(st.text(max_size=30))
def test_no_name_causes_anything_but_a_lori_error(tmp_path, asked, spec):
    for name in (spec, f"hf:{spec}"):
        with one_lori_error_at_most():
            read_source(name, root=tmp_path / "empty")
