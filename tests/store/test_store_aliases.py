from __future__ import annotations

import getpass
import os

import pytest
import store_builders as build

from lori_manager.errors import InvalidInput, NotFound
from lori_manager.records import Alias
from lori_manager.store.store import Store


@pytest.fixture
def two(store: Store) -> Store:
    for _ in range(2):
        store.add_adapter(build.new_adapter("main"), b"x")
    return store


def test_an_alias_moves_and_every_move_is_kept(two: Store) -> None:
    first = two.set_alias("main", "production", 1)
    assert (first.ref, first.version) == ("main@production", 1)
    second = two.set_alias("main", "production", 2)
    assert second.moved_at > first.moved_at
    assert two.aliases("main") == [second]
    two.remove_alias("main", "production")
    assert two.aliases() == []
    moves = two.journal()
    assert [(m.from_version, m.to_version) for m in moves] == [(None, 1), (1, 2), (2, None)]
    assert [m.action for m in moves] == ["set", "set", "removed"]
    assert {(m.ref, m.user) for m in moves} == {("main@production", getpass.getuser())}
    assert {(m.forced, m.reason, m.verdict) for m in moves} == {(False, "", None)}
    assert moves[0].at == first.moved_at
    assert [m.id for m in moves] == [1, 2, 3]


def test_setting_an_alias_where_it_is_moves_nothing(two: Store) -> None:
    alias = two.set_alias("main", "production", 1)
    assert two.set_alias("main", "production", 1) == alias
    assert len(two.journal()) == 1


def test_aliases_belong_to_their_line(two: Store) -> None:
    two.add_adapter(build.new_adapter("other"), b"x")
    two.set_alias("main", "production", 2)
    two.set_alias("other", "production", 1)
    two.set_alias("main", "best", 1)
    assert [alias.ref for alias in two.aliases()] == [
        "main@best",
        "main@production",
        "other@production",
    ]
    assert [alias.ref for alias in two.aliases("other")] == ["other@production"]
    assert [move.line for move in two.journal("other")] == ["other"]
    assert isinstance(two.aliases()[0], Alias)


def test_an_alias_needs_a_version_that_is_there(two: Store) -> None:
    with pytest.raises(NotFound, match="no version 3: it has 1 to 2"):
        two.set_alias("main", "production", 3)
    with pytest.raises(NotFound, match="did you mean 'main'"):
        two.set_alias("mian", "production", 1)
    with pytest.raises(NotFound, match="no alias of line 'main' is called 'production'"):
        two.remove_alias("main", "production")
    with pytest.raises(NotFound, match="no line"):
        two.remove_alias("mian", "production")
    assert two.journal() == []


@pytest.mark.parametrize("name", ["latest", "base", "3", "a@b", "", "x'y"])
def test_names_that_would_mean_something_else_are_refused(two: Store, name: str) -> None:
    with pytest.raises(InvalidInput):
        two.set_alias("main", name, 1)


def test_a_user_without_an_account_is_noted_by_number(
    two: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(getpass, "getuser", nobody)
    two.set_alias("main", "production", 1)
    assert two.journal()[0].user == f"uid {os.getuid()}"


def test_the_journal_keeps_what_was_said_of_a_move(two: Store) -> None:
    verdict = {"verdict": "regressed", "tasks": [{"task": "nlu", "lost": 12}]}
    two.set_alias("main", "production", 1, action="promoted")
    two.set_alias(
        "main", "production", 2, action="promoted", reason="the fix can't wait", forced=True,
        verdict=verdict,
    )  # fmt: skip
    two.set_alias("main", "production", 1, action="rolled back", reason="it could")
    two.remove_alias("main", "production", reason="moved elsewhere")
    told = [(m.action, m.forced, m.reason, m.verdict) for m in two.journal()]
    assert told == [
        ("promoted", False, "", None),
        ("promoted", True, "the fix can't wait", verdict),
        ("rolled back", False, "it could", None),
        ("removed", False, "moved elsewhere", None),
    ]


def test_the_journal_is_read_by_line_alias_and_time(two: Store) -> None:
    two.add_adapter(build.new_adapter("other"), b"x")
    for line, name in (("main", "best"), ("other", "best"), ("main", "production")):
        two.set_alias(line, name, 1)
    best, other, production = two.journal()
    assert two.journal("main") == [best, production]
    assert two.journal(alias="best") == [best, other]
    assert two.journal("main", "best") == [best]
    assert two.journal(since=other.at) == [other, production]
    assert two.journal("other", since=production.at) == []
    assert two.journal(alias="never") == []


@pytest.mark.parametrize(
    "statement", ["UPDATE journal SET \"user\" = 'nobody'", "DELETE FROM journal WHERE id = 1"]
)
def test_the_database_itself_refuses_to_change_the_journal(two: Store, statement: str) -> None:
    two.set_alias("main", "production", 1)
    before = two.journal()
    with pytest.raises(Exception, match="the journal only grows"):
        build.sql(two, statement, rules=True)
    assert two.journal() == before
