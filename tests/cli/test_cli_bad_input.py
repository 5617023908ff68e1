"""Input that no command can use: one line, a documented exit code, nothing stored."""

import json
import os
import shutil
import sqlite3

import pytest

from lori_manager.store.database import HEAD

GOOD = '{"prompt": "a", "completion": "b"}\n'
COMMANDS_IN_A_WORKSPACE = [
    ("base",),
    ("add-task", "x"),
    ("tasks",),
    ("calibrate", "x"),
    ("train", "x"),
    ("score", "base"),
    ("score", "add", "base", "--task", "x", "--outcomes", "f"),
    ("merge", "--tasks", "x"),
    ("audit",),
    ("lines",),
    ("show", "base"),
    ("log",),
    ("alias",),
    ("export", "x@1", "out"),
    ("import", "x"),
    ("verify",),
    ("db", "upgrade"),
]


@pytest.mark.parametrize("command", COMMANDS_IN_A_WORKSPACE, ids=" ".join)
def test_no_workspace_ends_with_4(empty, command):
    assert "lori init" in empty.refuses(*command, code=4)


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("train nothing", "nothing"),
        ("calibrate nothing", "nothing"),
        ("score base --tasks nothing", "nothing"),
        ("score colour@7", "no version 7"),
        ("score nothing@1", "nothing"),
        ("score add base --task nothing --outcomes f", "nothing"),
        ("merge --tasks nothing", "nothing"),
        ("merge --tasks colour", "lori train colour"),
        ("merge --adapters colour@1,shape@1", "no version 1"),
        ("audit nothing@1", "nothing"),
        ("audit --task nothing", "nothing"),
        ("show nothing@latest", "nothing"),
        ("show colour@production", "production"),
        ("show colour%1", "no mask 1"),
        ("show colour#7", "no revision 7"),
        ("log nothing", "nothing"),
        ("alias nothing@1 x", "nothing"),
        ("train colour --from shape@1", "no version 1"),
        ("train colour --mask colour%1", "no mask 1"),
        ("export colour@1 out", "no version 1"),
        ("base --move /no/such/folder", "/no/such/folder"),
    ],
)
def test_unknown_names_end_with_4(lori, command, named):
    assert named in lori.refuses(*command.split(), code=4)


def test_an_unknown_scorer_ends_with_4_and_the_known_ones(lori):
    assert "exact_match" in lori.refuses("add-task", "colour", "--scorer", "meteor", code=4)


def test_an_unknown_merge_method_ends_with_4_and_the_known_ones(trained):
    told = trained.refuses("merge", "--tasks", "colour,shape", "--method", "magic", code=4)
    assert "there are: auto, concat, " in told
    assert "layerwise" in told


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "..",
        "a..b",
        "a@1",
        "a#1",
        "a%1",
        "a'b",
        'a"b',
        "a b",
        "",
        "base",
        "7",
        "x" * 300,
        "é",
    ],
)
def test_names_that_cannot_be_used_end_with_2(lori, name):
    assert len(lori.refuses("add-task", name, code=2)) < 300
    lori.refuses("train", "colour", "--line", name, code=2)
    lori.refuses("train", "colour", "shape", "--sequence", name, code=2)


def test_a_name_with_a_leading_dash_ends_with_2(lori):
    lori("add-task", "-name", code=2)
    lori.refuses("add-task", "--", "-name", code=2)


@pytest.mark.parametrize("name", ["a/b", "..", "a@1", "a'b", "-x", "latest"])
def test_aliases_that_cannot_be_used_end_with_2(trained, name):
    trained.refuses("alias", "colour@1", "--", name, code=2)


@pytest.mark.parametrize("ref", ["@", "@1", "colour@", "a@b@c", "colour@0", "../x@1", "a'b@1"])
def test_references_that_cannot_be_read_end_with_2(lori, ref):
    lori.refuses("score", ref, code=2)
    lori.refuses("show", ref, code=2)
    lori.refuses("audit", ref, code=2)


@pytest.mark.parametrize("ref", ["colour%", "colour%0", "colour%x", "%1", "colour#", "colour#0"])
def test_masks_and_revisions_that_cannot_be_read_end_with_2(lori, ref):
    lori.refuses("show", ref, code=2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--sparsity 1", "[0, 1)"),
        ("--sparsity -0.1", "[0, 1)"),
        ("--sparsity nan", "[0, 1)"),
        ("--rank 0", "at least 1"),
        ("--rank -3", "at least 1"),
        ("--rank 33", "at most 16"),
        ("--alpha 0", "above 0"),
        ("--lr -1", "above 0"),
        ("--lr inf", "finite"),
        ("--batch 0", "at least 1"),
        ("--steps -1", "0"),
        ("--epochs nan", "above 0"),
        ("--scope column", "matrix"),
        ("--precision fp7", "bf16"),
        ("--base-bits 8", "16, 4"),
        ("--projection none", "shared"),
        ("--targets nothing", "q_proj"),
        ("--targets q_proj,nothing", "nothing"),
        ("--targets proj", "matches no linear layer"),
        ("--targets lm_head", "lm_head"),
        ("--targets ,", "targets"),
        ("--dense --mask colour%1", "--mask"),
        ("--protect", "--from"),
        ("--from base", "base"),
        ("--line shape", "shape"),
    ],
)
def test_settings_that_no_run_can_use_end_with_2(lori, options, told):
    code = 10 if options == "--line shape" else 2
    assert told in lori.refuses("train", "colour", *options.split(), code=code)
    assert lori.json("log") == []


PACKED_OR_NOT = [
    ("--kind qlora --base-bits 16", "`qlora` trains on a base of 4 bits: leave --base-bits 16 out"),
    ("--kind qlora --precision fp8", "`qlora` trains on a base of 4 bits: leave --precision fp8"),
    ("--kind svfit --base-bits 4", "`svfit` needs the base's plain weights: leave --base-bits 4"),
    ("--kind full --precision fp8", "`full` needs the base's plain weights: leave --precision fp8"),
]


@pytest.mark.parametrize(("options", "told"), PACKED_OR_NOT)
def test_a_kind_and_another_base_than_it_needs_are_refused_by_what_is_at_fault(lori, options, told):
    assert lori.refuses("train", "colour", *options.split(), code=2) == f"lori: kind {told}" + (
        "" if told.endswith("out") else " out"
    )
    assert lori.json("log") == []


def test_bits_of_the_base_are_checked_whoever_named_the_kind(lori):
    from lori_manager.cli.settings import configured
    from lori_manager.config import Config
    from lori_manager.kinds import resolved

    (lori.folder / "lori.toml").write_text('[defaults]\nkind = "qlora"\n')
    told = lori.refuses("train", "colour", "--base-bits", 16, code=2)
    assert "leave --base-bits 16 out" in told
    own = Config(kind="qlora")
    for changes in ({}, {"base_bits": 4}):
        assert resolved(configured(own, changes, trains=True)).base_bits == 4
    assert configured(own, {"base_bits": 16}).base_bits == 16  # to score on


def test_settings_of_lori_toml_are_checked_like_flags(lori):
    (lori.folder / "lori.toml").write_text("[defaults]\nsparsity = 1.0\n")
    told = lori.refuses("train", "colour", code=2)
    assert "lori.toml" in told
    assert "[0, 1)" in told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no rows"),
        (b"\n\n", "no rows"),
        (GOOD.encode() + b'{"prompt": "\xff", "completion": "b"}\n', "UTF-8"),
        ((GOOD + '{"prompt": "x", "comple').encode(), "line 2:"),
        ((GOOD + '{"messages": [{"role": "user", "content": "x"}]}\n').encode(), "line 2:"),
        ((GOOD + '{"prompt": "x"}\n').encode(), "line 2:"),
        ((GOOD + '{"prompt": "x", "completion": ""}\n').encode(), "line 2:"),
        ((GOOD + "[1]\n").encode(), "line 2:"),
        ((GOOD + json.dumps({"prompt": "x", "completion": "y" * 200})).encode(), "line 2:"),
    ],
    ids=["empty", "blank", "not UTF-8", "half", "mixed", "no completion", "empty completion",
         "a list", "longer than the context"],
)  # fmt: skip
def test_data_that_cannot_be_used_ends_with_5_and_the_line(lori, tmp_path, content, told):
    (tmp_path / "rows.jsonl").write_bytes(content)
    line = lori.refuses("add-task", "new", "--eval", tmp_path / "rows.jsonl", code=5)
    assert "rows.jsonl" in line
    assert told in line
    assert [task["name"] for task in lori.json("tasks")] == ["colour", "shape"]


def test_rows_common_to_train_and_eval_end_with_5(lori, tmp_path):
    (tmp_path / "rows.jsonl").write_text(GOOD)
    rows = ("--train", tmp_path / "rows.jsonl", "--eval", tmp_path / "rows.jsonl")
    assert "--allow-overlap" in lori.refuses("add-task", "new", *rows, code=5)


def test_files_of_a_task_that_are_missing_end_with_4(lori, tmp_path):
    assert "tasks/new/eval.jsonl" in lori.refuses("add-task", "new", code=4)
    lori.refuses("add-task", "new", "--eval", tmp_path / "none.jsonl", code=4)


def test_paths_start_at_the_current_folder_not_at_the_workspace(lori, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "rows.jsonl").write_text(GOOD)
    monkeypatch.chdir(tmp_path / "here")
    lori("add-task", "new", "--eval", "rows.jsonl")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"row": 99, "value": 1}', "99"),
        ('{"row": 0, "value": 1}\n{"row": 0, "value": 1}', "twice"),
        ('{"row": 0, "value": "good"}', "good"),
        ("", "no outcomes"),
    ],
)
def test_outcomes_that_cannot_be_used_end_with_5(lori, tmp_path, content, told):
    (tmp_path / "outcomes.jsonl").write_text(content)
    file = ("--outcomes", tmp_path / "outcomes.jsonl")
    assert told in lori.refuses("score", "add", "base", "--task", "colour", *file, code=5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("", "nothing to merge"),
        ("--tasks colour,shape --weights 1", "2 members"),
        ("--tasks colour,shape --weights 1,x", "numbers"),
        ("--tasks colour,shape --weights 1,nan", "finite"),
        ("--adapters colour@1,colour@latest", "twice"),
        ("--adapters base", "base"),
        ("--tasks colour,shape --method linear", "--method concat"),
        ("--tasks colour,shape --method regmean --weights -1,1", "must not be negative"),
        ("--tasks colour,shape --method ties --density 0", "`density`"),
        ("--tasks colour,shape --method ties --space dense", "one of core, full"),
        ("--tasks colour,shape --method concat --max-rank 0", "`max_rank` must be at least 1"),
        ("--tasks colour,shape --into a/b", "a/b"),
        ("--tasks colour,shape --probe-rows 0", "`probe_rows` must be at least 1"),
        ("--tasks colour,shape --method layerwise --span all", "one of free, members"),
        ("--tasks colour,shape --method layerwise --answers 1", "`answers` must be a share"),
        ("--tasks colour,shape --method layerwise --general -1", "`general` must be 0 or more"),
        ("--tasks colour,shape --method layerwise --weights 0,0", "must not all be 0"),
        ("--tasks colour,shape --general 0 --general-text x", "--general above 0"),
        ("--tasks colour,shape --method iteris --iterations 0", "`iterations`"),
        ("--tasks colour,shape --method repair --steps 0", "`steps`"),
        ("--tasks colour,shape --method soups --rate 0", "`rate`"),
        ("--tasks colour,shape --method soups --labels 2", "`labels`"),
        ("--tasks colour,shape --method regmean --weights search", "reads probe rows itself"),
        ("--tasks colour,shape --method auto", "3 probe rows, and `--method auto` needs 16"),
        ("--tasks colour,shape --method auto --weights 1,1", "leave --weights out"),
        ("--tasks colour,shape --method auto --weights search", "leave --weights out"),
        ("--tasks colour,shape --method auto --probe-rows 8", "must be at least 16"),
        ("--tasks colour,shape --drop shape", "go with --from"),
        ("--tasks colour,shape --reweight shape=1", "go with --from"),
        ("--from colour@1 --drop colour", "no merge"),
        ("--from main@1 --drop colour,shape", "leave one"),
        ("--from main@1 --drop main@1", "not one of main@1's members"),
        ("--from main@1 --reweight shape", "such as a=0.3,b=1"),
        ("--from main@1 --reweight shape=x", "such as a=0.3,b=1"),
        ("--from main@1 --reweight shape=1,shape=2", "twice"),
        ("--from main@1 --reweight shape=inf", "finite"),
        ("--from main@1 --tasks colour", "give only --drop"),
        ("--from main@1 --adapters colour@1", "give only --drop"),
        ("--from main@1 --method concat", "give only --drop"),
        ("--from main@1 --weights 1,1", "give only --drop"),
        ("--from main@1 --max-rank 2", "give only --drop"),
        ("--from main@1 --probe-rows 2", "give only --drop"),
    ],
)
def test_merges_that_cannot_be_made_end_with_2(trained, options, told):
    assert told in trained.refuses("merge", *options.split(), code=2)
    assert len(trained.json("log", "main")) == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--replay 2", "--from or --sequence"),
        ("--from shape@1 --line on --replay -1", "`replay` must be 0 or more"),
    ],
)
def test_replays_that_cannot_be_end_with_2(trained, options, told):
    assert told in trained.refuses("train", "colour", *options.split(), code=2)


@pytest.mark.parametrize("drop", ["-1", "nan", "inf"])
def test_a_drop_that_cannot_be_allowed_ends_with_2(lori, drop):
    lori.refuses("audit", "--max-drop", drop, code=2)


def test_names_that_are_taken_end_with_10(trained):
    trained.refuses("init", trained.folder, "--base", trained.json("base")["path"], code=10)
    trained.refuses("merge", "--tasks", "colour,shape", "--into", "colour", code=10)
    trained.refuses(
        "add-task", "main", "--eval", trained.folder / "tasks/shape/eval.jsonl", code=10
    )
    trained.refuses("train", "colour", "shape", "--sequence", "main", code=10)


def test_a_base_that_is_none_ends_with_4(empty, tmp_path):
    assert "config.json" in empty.refuses("init", tmp_path / "ws", "--base", tmp_path, code=4)
    empty.refuses("init", tmp_path / "ws", "--base", tmp_path / "nowhere", code=4)
    assert not (tmp_path / "ws").exists()


def other_base(tiny_base, folder):
    """The same model with one weight moved."""
    shutil.copytree(tiny_base, folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return folder


def test_another_base_ends_with_6(lori, tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    assert lori.json("base", "--move", base)["path"] == str(base)
    other = other_base(tiny_base, tmp_path / "other")
    lori.refuses("base", "--move", other, code=6)
    shutil.rmtree(base)
    other.rename(base)
    assert "not the base of this workspace" in lori.refuses("train", "colour", code=6)
    lori.refuses("score", "base", code=6)


@pytest.mark.parametrize(
    ("revision", "told"), [("9999", "upgrade lori"), ("0000", "lori db upgrade"), ("odd", "lori")]
)
def test_a_database_of_another_version_ends_with_7(lori, revision, told):
    with sqlite3.connect(lori.folder / ".lori" / "registry.db") as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    database.close()
    assert told in lori.refuses("tasks", code=7)
    if revision == "9999":
        lori.refuses("db", "upgrade", code=7)


def test_a_database_of_this_version_needs_no_upgrade(lori):
    done = {"before": HEAD, "after": HEAD, "backup": None, "unsaved": ""}
    assert lori.json("db", "upgrade") == done


def object_file(lori, ref):
    digest = lori.json("show", ref)["record"]["digest"]
    return lori.folder / ".lori" / "objects" / digest[:2] / digest[2:]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, cut, os.unlink])
def test_a_damaged_adapter_ends_with_8_and_verify_names_it(trained, tmp_path, damage):
    damage(object_file(trained, "colour@1"))
    trained.refuses("export", "colour@1", tmp_path / "out", code=8)
    assert not (tmp_path / "out").exists()
    trained.refuses("merge", "--tasks", "colour,shape", "--into", "again", code=8)
    found = trained.json("verify", code=8)
    assert "colour@1" in {finding["subject"] for finding in found}
    assert "colour@1" in trained("verify", code=8).stdout


def test_a_full_disk_ends_with_9_and_nothing_is_stored(lori, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        assert "space" in lori.refuses("calibrate", "colour", code=9)
    lori.refuses("show", "colour%1", code=4)


def test_an_export_never_writes_over_anything(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    for form in ("peft", "full"):
        said = trained.refuses("export", "colour@1", tmp_path / "out", "--format", form, code=10)
        assert said.endswith("is not empty: choose another directory or empty it")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
    trained.refuses("export", "colour@1", tmp_path / "new", "--format", "gguf", code=2)
    trained.refuses("export", "base", tmp_path / "new", code=2)


def test_all_and_tasks_exclude_each_other(lori):
    lori.refuses("score", "base", "--all", "--tasks", "colour", code=2)


def test_an_alias_needs_a_name(lori):
    assert "NAME" in lori.refuses("alias", "colour@1", code=2)
