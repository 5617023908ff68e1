"""The registry: names in order, one item a name, and errors that list what there is."""

import pytest

from lori_manager.errors import NotFound
from lori_manager.registry import Registry


def make():
    registry = Registry("merge method")
    registry.register("sum", source="a paper", identity=True)(sum)
    registry.register("max")(max)
    return registry


def test_names_keep_the_order_of_registration():
    assert make().names() == [e.name for e in make()] == ["sum", "max"]


def test_an_entry_holds_the_item_its_source_and_its_facts():
    entry = make().entry("sum")
    assert (entry.item, entry.source, entry.facts) == (sum, "a paper", {"identity": True})
    assert make().get("max") is max


def test_a_decorated_item_is_returned_unchanged():
    def item():
        pass

    assert Registry("x").register("item")(item) is item


def test_a_name_that_is_not_there_is_not_found_and_the_message_lists_what_is():
    with pytest.raises(NotFound, match="no merge method is called 'mean'; there are: sum, max"):
        make().get("mean")
    with pytest.raises(NotFound, match="there are: none"):
        Registry("scorer").entry("x")


def test_a_second_use_of_a_name_is_a_bug_and_changes_nothing():
    registry = make()
    with pytest.raises(ValueError, match="merge method 'sum' is registered twice"):
        registry.register("sum")(min)
    assert registry.get("sum") is sum
