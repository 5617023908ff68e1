"""`lori place`, and `lori train --targets plop`."""

import re
import tomllib
from xml.etree import ElementTree as ET

import pytest

TYPES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_table_has_a_line_a_type_the_lowest_first_and_the_choice_below(lori):
    told = lori("place", "colour", "--top", 2).stdout.splitlines()
    head = ["type", "score", "std over layers", "layers", "B at rank 4", "A and B", "chosen"]
    assert [word.strip() for word in re.split("  +", told[0])] == head
    rows = [line.split() for line in told[1:8]]
    assert {row[0] for row in rows} == TYPES
    scores = [float(row[1]) for row in rows]
    assert scores == sorted(scores)
    assert [row[-1] == "yes" for row in rows] == [True, True, *[False] * 5]
    up = next(row for row in rows if row[0] == "up_proj")
    assert up[3:6] == ["2", "512", "768"]  # layers; 2 x 4 x 64; 2 x 4 x (64 + 32)
    assert told[8] == ""
    assert told[9].startswith(f"{rows[0][0]} and {rows[1][0]} answer this task's prompts least")
    assert len(told) == 10


def test_layers_are_shown_where_asked_for(lori):
    told = lori("place", "colour", "--layers").stdout
    head, *rows = told.partition("scores by layer\n")[2].splitlines()[:3]
    assert head.split()[0] == "layer"
    assert set(head.split()[1:]) == TYPES
    assert [row.split()[0] for row in rows] == ["0", "1"]
    document = lori.json("place", "colour")
    for number, row in enumerate(rows):
        numbers = [cell for cell in row.split()[1:] if "." in cell]
        for name, shown in zip(head.split()[1:], numbers, strict=True):
            part = "self_attn" if name[0] in "qkvo" else "mlp"
            score = document["scores"][f"model.layers.{number}.{part}.{name}"]
            assert shown == f"{score:.2f}"
    assert any(shade in told for shade in "░▒▓█")


def test_the_document_holds_everything(lori):
    found = lori.json("place", "colour", "--top", 2, "--prompts", 5, "--seed", 3, "--rank", 2)
    assert (found["task"], found["prompts"], found["seed"]) == ("colour#1", 5, 3)
    assert found["targets"] == [one["type"] for one in found["types"][:2]]
    assert [one["chosen"] for one in found["types"]] == [True, True, *[False] * 5]
    assert found["types"][0].keys() == {
        "type", "score", "spread", "layers", "parameters", "lora_parameters", "chosen",
    }  # fmt: skip
    assert len(found["scores"]) == 14
    assert found["applied"] is found["plot"] is None
    up = next(one for one in found["types"] if one["type"] == "up_proj")
    assert (up["parameters"], up["lora_parameters"]) == (2 * 2 * 64, 2 * 2 * 96)


def test_apply_writes_the_choice_into_lori_toml_and_training_follows_it(lori):
    file = lori.folder / "lori.toml"
    file.write_text(file.read_text().replace("rank = 4", "rank = 4  # small"))
    before = tomllib.loads(file.read_text())["defaults"]
    found = lori.json("place", "colour", "--apply")
    assert found["applied"] == str(file)
    text = file.read_text()
    assert "rank = 4  # small\n" in text
    assert tomllib.loads(text)["defaults"] == before | {"targets": found["targets"]}
    assert f"targets = {', '.join(found['targets'])}" in lori("place", "colour", "--apply").stdout
    assert file.read_text() == text
    (trained,) = lori.json("train", "colour")
    assert trained["adapter"]["config"]["targets"] == found["targets"]


@pytest.mark.parametrize(("word", "count"), [("plop", 3), ("plop:1", 1)])
def test_training_places_by_itself(lori, word, count):
    (trained,) = lori.json("train", "colour", "--targets", word)
    adapter = trained["adapter"]
    found = lori.json("place", "colour", "--top", count)
    assert adapter["config"]["targets"] == found["targets"]
    assert adapter["facts"]["placement"]["task"] == "colour#1"


def test_lori_toml_may_leave_the_choice_to_plop(lori):
    file = lori.folder / "lori.toml"
    file.write_text(file.read_text() + 'targets = ["plop:2"]\n')
    (trained,) = lori.json("train", "colour")
    assert (
        trained["adapter"]["config"]["targets"]
        == lori.json("place", "colour", "--top", 2)["targets"]
    )
    assert "layers for shape#1: " in lori("train", "shape").stderr


def test_the_plot_is_one_svg_with_a_bar_a_type_and_a_cell_a_layer(lori, tmp_path):
    path = tmp_path / "placed.svg"
    assert f"drawn in {path}" in lori("place", "colour", "--top", 2, "--plot", path).stdout
    found = lori.json("place", "colour", "--top", 2)
    root = ET.fromstring(path.read_bytes())
    space = {"s": "http://www.w3.org/2000/svg"}
    titles = [t.text for t in root.findall(".//s:rect/s:title", space)]
    assert len(titles) == 7 + 14
    for one in found["types"]:
        shown = f"{one['type']}: {one['score']:.3f}, std over layers {one['spread']:.3f}"
        assert shown in titles
    texts = [t.text for t in root.findall("s:text", space)]
    assert "Layers for colour#1" in texts
    bold = {t.text for t in root.findall("s:text", space) if t.get("font-weight") == "650"}
    assert set(found["targets"]) <= bold
    assert not (TYPES - set(found["targets"])) & bold
    width, height = (float(root.get(side)) for side in ("width", "height"))
    for rect in root.findall("s:rect", space):
        left, top = float(rect.get("x", 0)), float(rect.get("y", 0))
        assert left + float(rect.get("width")) <= width
        assert top + float(rect.get("height")) <= height


def test_what_cannot_be_done_is_told_in_one_line(lori, tmp_path):
    assert "ends in .svg, got 'a.pdf'" in lori.refuses("place", "colour", "--plot", "a.pdf", code=2)
    away = tmp_path / "none" / "a.svg"
    assert "there is no folder" in lori.refuses("place", "colour", "--plot", away, code=2)
    assert "`top` must be from 1 to 7" in lori.refuses("place", "colour", "--top", 8, code=2)
    assert "`prompts` must be at least 1" in lori.refuses("place", "colour", "--prompts", 0, code=2)
    assert "'colours'" in lori.refuses("place", "colours", code=4)
    told = lori.refuses("train", "colour", "--targets", "plop,q_proj", code=2)
    assert "`targets` must be names of layers, or " in told


def test_a_choice_that_is_refused_is_not_applied(lori):
    file = lori.folder / "lori.toml"
    before = file.read_text()
    lori("place", "colour", "--top", 8, "--apply", code=2)
    assert file.read_text() == before
