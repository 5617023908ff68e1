"""One default set in a `lori.toml`, with all else as it was."""

import tomllib

import pytest

from lori_manager.config import default_toml, load_settings
from lori_manager.errors import InvalidInput
from lori_manager.settings_file import with_default

NEW = ["v_proj", "up_proj"]
LINE = 'targets = ["v_proj", "up_proj"]'


def changed(text):
    return with_default(text, "targets", NEW, "lori.toml")


def test_the_template_that_init_writes_keeps_every_line(tmp_path):
    before = default_toml()
    after = changed(before)
    lines = after.splitlines()
    assert [line for line in lines if line != LINE] == before.splitlines()
    assert lines[lines.index(LINE) - 1].startswith("# targets = ")
    (tmp_path / "lori.toml").write_text(after)
    assert load_settings(tmp_path / "lori.toml").config.targets == tuple(NEW)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", f"[defaults]\n{LINE}\n"),
        ("[defaults]", f"[defaults]\n{LINE}"),
        ("# mine\n[defaults]  # all\nrank = 4\n", f"# mine\n[defaults]  # all\n{LINE}\nrank = 4\n"),
        (
            '[defaults]\nrank = 4\ntargets = ["q"]  # why # not\nseed = 1\n',
            f"[defaults]\nrank = 4\n{LINE}  # why # not\nseed = 1\n",
        ),
        (
            '[defaults]\ntargets = [\n  "a#b",  # one\n  "c",\n] # end\nseed = 1',
            f"[defaults]\n{LINE} # end\nseed = 1",
        ),
        ('[defaults]\ntargets="all-linear"\n', f"[defaults]\n{LINE}\n"),
        (
            "[gate]\nmargin = 0.1\n\n[tasks.x]\ntrain = 'a'\n",
            f"[defaults]\n{LINE}\n\n[gate]\nmargin = 0.1\n\n[tasks.x]\ntrain = 'a'\n",
        ),
        (
            "[gate]\nmargin = 0.1\n[defaults]\nseed = 1\n[tasks.x]\n# targets = 3\n",
            f"[gate]\nmargin = 0.1\n[defaults]\n{LINE}\nseed = 1\n[tasks.x]\n# targets = 3\n",
        ),
        ("[defaults]\r\nrank = 4\r\n", f"[defaults]\r\n{LINE}\r\nrank = 4\r\n"),
    ],
)
def test_comments_order_and_line_ends_stay(before, after):
    assert changed(before) == after
    assert changed(after) == after
    assert tomllib.loads(after)["defaults"]["targets"] == NEW


@pytest.mark.parametrize(
    "text",
    ['defaults.targets = ["q"]\n', "defaults = { rank = 4 }\n", '["defaults"]\ntargets = ["q"]\n',
     '[defaults]\n"targets" = ["q"]\n', "[defaults]\nx = '''\ntargets = 1\n'''\ntargets = []\n"],
)  # fmt: skip
def test_what_cannot_be_changed_line_by_line_is_left_to_people(text):
    with pytest.raises(InvalidInput, match=r"lori.toml .* set by hand: targets = \[\"v_proj\", "):
        changed(text)


def test_what_is_not_toml_is_refused():
    with pytest.raises(InvalidInput, match=r"lori\.toml is not TOML"):
        changed("[defaults\n")


def test_words_are_quoted():
    odd = 'a"b\\c'
    assert tomllib.loads(with_default("", "targets", [odd], "f"))["defaults"]["targets"] == [odd]
