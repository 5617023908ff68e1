"""Where rows come from: JSONL, Parquet, and what the `datasets` library reads."""

from __future__ import annotations

import datetime
import decimal
import json
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from lori_manager.errors import BadData, InvalidInput, NotFound
from lori_manager.tasks.labelled import parse_labelled
from lori_manager.tasks.rows import (
    RenderChat,
    Row,
    bad_row,
    decode_object,
    one_line,
    parse_row,
    row_kind,
)

HUB = "hf:"
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet", ".pq")
_BOM = b"\xef\xbb\xbf"


def read_source(
    spec: str | Path,
    *,
    root: Path,
    render_chat: RenderChat | None = None,
    labelled: bool = False,
) -> list[Row]:
    """Read and check every row of a source.

    Args:
        spec: a JSONL or Parquet file, a folder that `datasets` reads, or
            `hf:owner/name[:config][:split]`: one part after the name is the split, two
            are config and split. `hf:` also takes a folder, to name its split.
        root: where relative paths start.
        render_chat: what makes prompt and completion of `messages`; see `parse_row`.
        labelled: whether rows have `text` and `label`; see `parse_labelled`.
    Returns:
        At least one row, in the order of the source; `where` names file and line.
    Raises:
        NotFound: no such file, folder or data set.
        BadData: a file that cannot be read or a row that cannot be used.
        InvalidInput: a kind of file that is not read, a split to be chosen, or a
            library to be installed.
    """
    name = one_line(str(spec))
    if isinstance(spec, str) and spec.startswith(HUB):
        source, config, split = _parts(spec[len(HUB) :], name)
        objects = _data_set(source, config, split, root / source, name)
    else:
        path = _locate(spec, name, root)
        suffix = path.suffix.lower()
        if path.is_dir():
            objects = _data_set(str(spec), None, None, path, name)
        elif suffix in PARQUET:
            objects = _parquet(path, name)
        elif suffix in JSON_LINES:
            objects = _json_lines(path, name)
        else:
            raise InvalidInput(
                f"{name}: expected a file that ends in {', '.join(JSON_LINES + PARQUET)}, or a "
                "folder; convert or rename it"
            )
    if labelled:
        rows = [parse_labelled(obj, where) for where, obj in objects]
    else:
        rows = _to_rows(objects, render_chat)
    if not rows:
        raise BadData(f"{name}: holds no rows; expected at least one")
    return rows


def _to_rows(
    objects: Iterable[tuple[str, Mapping[str, Any]]], render_chat: RenderChat | None
) -> list[Row]:
    rows: list[Row] = []
    first: tuple[str, str] | None = None
    for where, obj in objects:
        kind = row_kind(obj)
        if kind and first is None:
            first = kind, where
        if kind and first and kind != first[0]:
            advice = "keep one kind in a file"
            raise bad_row(where, f"a {kind} row after {first[0]} rows ({first[1]})", advice)
        rows.append(parse_row(obj, where, render_chat))
    return rows


def _locate(spec: str | Path, name: str, root: Path) -> Path:
    try:
        path = root / Path(spec).expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as e:
        advice = "check the path"
        if isinstance(spec, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
            advice += f", or write {HUB}{name} for a data set of the hub"
        raise NotFound(f"{name}: no such file or folder; {advice}") from e
    except (OSError, ValueError, RuntimeError) as e:
        # a name too long, a NUL in it, no permission, a `~user` that is not known
        raise InvalidInput(f"{name[:200]}: cannot be opened: {_reason(e)}; check the path") from e
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InvalidInput(f"{name}: neither a file nor a folder; copy it to a file first")
    return path


def _json_lines(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        data = path.read_bytes()
    except OSError as e:
        raise BadData(f"{name}: cannot be read: {_reason(e)}; check the file") from e
    skipped = len(_BOM) if data.startswith(_BOM) else 0
    try:
        text = data[skipped:].decode()
    except UnicodeDecodeError as e:
        at = skipped + e.start
        line = data.count(b"\n", 0, at) + 1
        problem = f"not UTF-8: byte 0x{data[at]:02x} at byte {at + 1} of the file"
        cut = e.reason == "unexpected end of data"
        advice = "the file may be cut short" if cut else "save the file as UTF-8"
        raise bad_row(f"{name}, line {line}", problem, advice) from e
    # Only LF ends a line: str.splitlines would cut rows at U+2028 and the like.
    lines = text.split("\n")
    fresh = True
    for number, text in enumerate(lines, 1):
        if not text or text.isspace():
            continue
        where = f"{name}, line {number}"
        try:
            obj = decode_object(text, where)
        except BadData as e:
            if fresh and text.lstrip().startswith("["):
                raise BadData(f"{e} (a JSON array is not read: write one object a line)") from e
            if number == len(lines) and isinstance(e.__cause__, json.JSONDecodeError):
                raise BadData(f"{e} (it is the last and has no newline: cut short?)") from e
            raise
        fresh = False
        yield where, obj


def _parquet(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    arrow = _need("pyarrow", name)
    parquet = _need("pyarrow.parquet", name)
    try:
        # ParquetFile, as read_table adds a column for every `key=value` folder on the path.
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            objects = file.read().to_pylist()
    except (arrow.ArrowException, OSError, ValueError, OverflowError, LookupError) as e:
        # broken footers and pages, text that is not UTF-8, dates out of range, unknown zones
        raise BadData(f"{name}: not readable as Parquet: {_reason(e)}; write it again") from e
    if len(set(names)) != len(names):
        twice = next(column for column in names if names.count(column) > 1)
        raise BadData(one_line(f"{name}: the column {twice!r} comes twice; keep one"))
    return _numbered(objects, name)


def _parts(spec: str, name: str) -> tuple[str, str | None, str | None]:
    """(name, config, split) of `owner/name[:config][:split]`."""
    # A colon inside brackets belongs to a slice: train[:100].
    source, *rest = re.split(r":(?![^\[\]]*\])", spec)
    if not source or len(rest) > 2 or "\0" in spec:
        raise InvalidInput(f"{name}: expected {HUB}owner/name[:config][:split]")
    config = rest[0] if len(rest) == 2 else None
    split = rest[-1] if rest else None
    return source, config or None, split or None


def _data_set(
    source: str, config: str | None, split: str | None, folder: Path, name: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    datasets = _need("datasets", name)
    try:
        local = folder.is_dir()
        saved = local and any((folder / f).is_file() for f in ("state.json", "dataset_dict.json"))
        if saved:
            data = datasets.load_from_disk(str(folder))
        else:
            data = datasets.load_dataset(str(folder) if local else source, config, split=split)
        if isinstance(data, Mapping):
            names = list(data)
            if split not in data and (split or len(names) != 1):
                have = ", ".join(map(str, names)) or "none"
                which = f"{HUB}{source}:{config}:SPLIT" if config else f"{HUB}{source}:SPLIT"
                raise InvalidInput(one_line(f"{name}: choose a split as {which}; it has: {have}"))
            data = data[split or names[0]]
        objects = data.to_list()
    except InvalidInput:
        raise
    except (FileNotFoundError, ConnectionError) as e:
        raise NotFound(f"{name}: {_reason(e)}; check the name and the network") from e
    except Exception as e:
        # Its readers and the hub's client fail in types of many libraries; no list is complete.
        raise BadData(f"{name}: `datasets` could not read it: {_reason(e)}; check it") from e
    return _numbered(objects, name)


def _numbered(objects: list[dict[str, Any]], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a table: without the columns that are null, values as JSON would have them."""
    for number, obj in enumerate(objects, 1):
        plain = {key: _plain(value) for key, value in obj.items() if value is not None}
        yield f"{name}, row {number}", plain


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    return value  # parse_row names it


def _need(module: str, name: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as e:
        library = module.partition(".")[0]
        raise InvalidInput(
            f"{name}: reading it needs {library}; install it with `pip install "
            '"lori-manager[data]"`, or give JSONL'
        ) from e


def _reason(e: BaseException) -> str:
    """The first line of what another library says, shortened."""
    text = getattr(e, "strerror", None) or str(e) or type(e).__name__
    line = one_line(text.strip().partition("\n")[0])
    return (line if len(line) <= 160 else line[:157] + "...").rstrip(".")
