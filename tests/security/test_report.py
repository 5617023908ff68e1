"""Every text that a report can hold, one field at a time, by somebody who wants out of it."""

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "reporting"))

from report_workspaces import two_tasks_and_a_merge
from test_kinds_section import compared, result, undone
from test_page import HOSTILE, Reader

from lori_manager.reporting.page import page

ENUMERATIONS = (KeyError, ValueError)  # a word that the page looks up, and so not free text


def texts(value, path=()):
    """The way to every text of a report, the first of each field."""
    if isinstance(value, str):
        yield path
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from texts(getattr(value, field.name), (*path, field.name))
    elif isinstance(value, tuple | list):
        for i, one in enumerate(value[:2]):
            yield from texts(one, (*path, i))


def replaced(value, path, text):
    if not path:
        return text
    first, rest = path[0], path[1:]
    if isinstance(first, str):
        return dataclasses.replace(value, **{first: replaced(getattr(value, first), rest, text)})
    changed = list(value)
    changed[first] = replaced(value[first], rest, text)
    return type(value)(changed)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    found = two_tasks_and_a_merge(tmp_path_factory.mktemp("report") / "w").opened().report()
    kinds = compared(result("lori", 0.9), result("lora", 0.91, verdict="beats"), undone("dora"))
    return dataclasses.replace(found, comparisons=(kinds,))


def test_no_text_of_a_report_becomes_markup(report):
    plain = [tag for tag, _ in Reader(page(report)).elements]
    shown = set()
    for path in texts(report):
        for text in HOSTILE[:4]:
            try:
                written = page(replaced(report, path, text))
            except ENUMERATIONS:
                continue
            read = Reader(written)
            tags = [tag for tag, _ in read.elements]
            assert tags.count("script") == plain.count("script") == 2, path
            assert not {"img", "iframe", "object", "embed"} & set(tags), path
            assert not [a for _, attrs in read.elements for a in attrs if a.startswith("on")], path
            shown.add(path)
    assert len(shown) > 40
