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
    moves = two.alias_moves()
    assert [(m.from_version, m.to_version) for m in moves] == [(None, 1), (1, 2), (2, None)]
    assert {(m.line, m.name, m.user) for m in moves} == {("main", "production", getpass.getuser())}
    assert moves[0].moved_at == first.moved_at


def test_setting_an_alias_where_it_is_moves_nothing(two: Store) -> None:
    alias = two.set_alias("main", "production", 1)
    assert two.set_alias("main", "production", 1) == alias
    assert len(two.alias_moves()) == 1


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
    assert [move.line for move in two.alias_moves("other")] == ["other"]
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
    assert two.alias_moves() == []


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
    assert two.alias_moves()[0].user == f"uid {os.getuid()}"
