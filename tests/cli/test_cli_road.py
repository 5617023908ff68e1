"""The whole road by commands alone, on the tiny model."""

import json
import os
import pty
import signal
import subprocess
import sys

import pytest

from lori_manager.cli.progress import Teller


def test_tasks_are_listed_with_their_rows(lori):
    told = lori("tasks").stdout.splitlines()
    assert told[0].split() == [
        "task", "scorer", "train", "eval", "calibration", "probe", "added", "description",
    ]  # fmt: skip
    assert told[1].split()[:6] == ["colour#1", "exact_match", "21", "8", "-", "3"]
    assert [task["ref"] for task in lori.json("tasks")] == ["colour#1", "shape#1"]


def test_a_workspace_is_made_where_c_points_and_found_from_below(empty, tiny_base, tmp_path):
    told = empty("init", "--base", tiny_base).stdout
    assert told.startswith(f"workspace in {tmp_path}")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert empty.json("-C", tmp_path / "a" / "b", "base")["source"] == str(tiny_base)


def test_add_task_says_what_it_read(lori):
    told = lori("add-task", "colour").stdout
    assert told.startswith("task colour#1 (unchanged), scored by exact_match\n")
    told = lori("add-task", "colour", "--scorer", "perplexity", "--description", "new").stdout
    assert told.startswith("task colour#2 (new), scored by perplexity\n")
    assert lori.json("show", "colour")["record"]["description"] == "new"
    assert lori.json("show", "colour#1")["record"]["scorer"] == "exact_match"


def test_add_task_trains_at_once_when_told_to(lori):
    told = lori.json("add-task", "again", "--train", lori.folder / "tasks/shape/train.jsonl",
                     "--eval", lori.folder / "tasks/shape/eval.jsonl", "--run")  # fmt: skip
    assert told["added"]["new"] is True
    assert told["trained"][0]["adapter"]["ref"] == "again@1"


def test_a_task_with_eval_rows_alone_is_only_scored(lori):
    lori("add-task", "only", "--eval", lori.folder / "tasks/shape/eval.jsonl")
    assert "--train" in lori.refuses("train", "only", code=2)
    assert lori.json("score", "base", "--tasks", "only")[0]["rows"] == 8


def test_options_become_the_settings_of_the_run(lori):
    mask = lori.json("calibrate", "colour", "--sparsity", 0.5, "--scope", "matrix", "--steps", 1)
    assert mask["kept"] * 2 == mask["total"]
    assert mask["config"]["calibration_steps"] == 1
    options = "--rank 2 --targets q_proj,mlp.up_proj --lr 1e-3 --dense-lr 1e-4 --steps 2"
    made = lori.json("train", "colour", *options.split(), "--store-dtype", "fp32")[0]
    config = made["adapter"]["config"]
    assert config["targets"] == ["q_proj", "mlp.up_proj"]
    assert (config["rank"], config["steps"], config["store_dtype"]) == (2, 2, "fp32")
    assert (config["learning_rate"], config["dense_learning_rate"]) == (1e-3, 1e-4)
    assert config["batch"] == 8  # from lori.toml


def test_training_ends_with_a_table_and_tells_its_steps_on_stderr(lori):
    result = lori("train", "colour", "shape", "--dense")
    head, first, second = result.stdout.splitlines()
    assert head.split() == ["adapter", "task", "mask", "score", "trained", "size", "time"]
    assert first.startswith("colour@1  colour#1  -")
    assert second.startswith("shape@1   shape#1   -")
    assert " 2,048 " in first
    assert "colour@1: 4 steps" in result.stderr
    assert lori("--quiet", "train", "colour", "--dense", "--seed", 1).stderr == ""


def test_a_sequence_shows_every_stage_on_every_task(lori):
    told = lori("train", "colour", "shape", "--sequence", "both", "--protect").stdout
    assert "share of B that no task uses yet" in told
    lines = told.partition("every stage on every task\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == ["adapter", "both@1", "both@2"]
    assert lori.json("lines")[2]["sequence"] == ["colour#1", "shape#1"]
    found = lori.json("audit", "both")
    assert found["sequences"][0]["stages"] == ["both@1", "both@2"]
    told = lori("audit", "both").stdout
    assert "both: R, every stage on every task" in told
    for figure in ("ACC", "LA", "BWT", "BWT_TRACE", "FWT", "F", "I"):
        assert f"  {figure} " in told
    assert "none for colour#1, shape#1" in told


def test_continuing_keeps_the_parent(trained):
    made = trained.json("train", "shape", "--from", "colour@1", "--line", "on")[0]["adapter"]
    assert [parent["ref"] for parent in made["parents"]] == ["colour@1"]
    assert " colour@1 " in trained("log", "on").stdout


def test_a_mask_of_another_a_is_taken_only_when_allowed(trained):
    trained("calibrate", "colour", "--line", "other")
    options = ("train", "colour", "--mask", "colour%2", "--line", "third")
    assert "--allow-foreign-mask" in trained.refuses(*options, code=2)
    trained(*options, "--allow-foreign-mask")
    assert trained.json("show", "third")["record"]["mask"] == "colour%2"


def test_a_merge_is_shown_beside_its_members(trained):
    result = trained("merge", "--tasks", "colour,shape", "--weights", "0.5,1", "--into", "sum")
    lines = result.stdout.splitlines()
    assert lines[1].split() == ["colour@1", "colour", "0.5", "4"]
    assert lines[2].split() == ["shape@1", "shape", "1", "4"]
    assert lines[4].startswith("sum@1: concat at rank 8, ")
    assert lines[6].split()[:2] == ["colour#1", "colour@1"]
    assert "colour means colour@1" in result.stderr
    merged = trained.json("merge", "--adapters", "colour@1,shape@latest", "--into", "pair")[
        "merged"
    ]
    assert merged["weights"] == [0.5, 0.5]


def test_merge_methods_are_listed_outside_a_workspace(empty):
    told = empty("merge", "--list-methods").stdout
    names = [line.split()[0] for line in told.splitlines()[1:]]
    assert names == sorted(names)
    assert {"concat", "layerwise", "linear", "regmean", "routed", "svd"} <= set(names)
    for name, reads in (("layerwise", "probe prompts"), ("routed", "probe rows")):
        (line,) = [line for line in told.splitlines() if line.startswith(name)]
        assert reads in line


@pytest.mark.parametrize("method", ["layerwise", "regmean"])
def test_a_merge_by_probe_prompts_keeps_masks_and_says_what_it_read(trained, method):
    line = f"by-{method}"
    result = trained.json(
        "merge", "--tasks", "colour,shape", "--method", method, "--into", line,
        "--probe-rows", "2",
    )  # fmt: skip
    adapter = result["merged"]["adapter"]
    assert (adapter["method"], adapter["rank"]) == (method, 8)
    assert adapter["config"]["probe_rows"] == 2
    cut = trained.json(
        "merge", "--tasks", "colour,shape", "--method", method, "--into", line, "--max-rank", "3"
    )
    assert cut["merged"]["adapter"]["rank"] == 3
    assert cut["merged"]["adapter"]["config"]["options"]["max_rank"] == 3


def test_a_routed_merge_shows_where_prompts_go_and_is_refused_where_it_cannot_go_on(
    trained, tmp_path
):
    options = ("--tasks", "colour,shape", "--method", "routed", "--into", "all")
    result = trained("merge", *options)
    lines = result.stdout.splitlines()
    assert lines[4].startswith("all@1: routed at rank 4, ")
    assert lines[5].startswith("router: 100.0% of held-out probe prompts go to their own member")
    assert [line.split()[0] for line in lines[7:9]] == ["colour@1", "shape@1"]
    assert "all@1 on colour#1: rows go to colour 8" in result.stderr
    assert trained.json("merge", *options)["merged"]["adapter"]["version"] == 2
    trained("export", "all@1", tmp_path / "out")
    for refused in (
        ("merge", "--adapters", "all@1,colour@1"),
        ("train", "colour", "--from", "all@1", "--line", "more"),
        ("export", "all@1", tmp_path / "whole", "--format", "full"),
        ("merge", *options, "--max-rank", "2"),
        ("merge", *options, "--weights", "1,0"),
    ):
        trained.refuses(*refused, code=2)


def test_a_merge_says_which_method_it_takes_by_itself(trained):
    """Two probe rows a task are too few to fit anything to."""
    assert "merging by concat" in trained("merge", "--tasks", "colour,shape").stderr


def test_weights_are_searched_and_shown(trained):
    result = trained(
        "merge", "--tasks", "colour,shape", "--weights", "search", "--probe-rows", "2"
    )  # fmt: skip
    kept = trained.json("show", "main@2")["record"]["config"]
    (weight,) = set(kept["weights"])
    assert min(kept["searched"].values()) == kept["searched"][str(weight)]
    assert f"weight {weight:g} each, of " in result.stderr
    assert result.stdout.splitlines()[1].split() == ["colour@1", "colour", f"{weight:g}", "4"]


def test_a_stored_merge_is_made_anew_with_fewer_members_or_other_weights(trained):
    less = trained.json("merge", "--from", "main@1", "--drop", "shape")["merged"]
    assert [p["ref"] for p in less["adapter"]["parents"]] == ["colour@1"]
    assert less["adapter"]["ref"] == "main@2"
    assert less["weights"] == [1.0]
    other = trained.json("merge", "--from", "main@1", "--reweight", "shape=0.25,colour@1=-1",
                         "--into", "more")["merged"]  # fmt: skip
    assert other["weights"] == [-1.0, 0.25]
    fresh = trained.json("merge", "--tasks", "colour,shape", "--weights", "-1,0.25")["merged"]
    assert other["adapter"]["digest"] == fresh["adapter"]["digest"]
    refused = trained.refuses("merge", "--from", "more@1", "--drop", "main", code=2)
    assert "'main' is not one of more@1's members: colour@1, shape@1" in refused


def test_general_text_is_read_from_a_file(trained, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("So it goes, and so it went, and so it will go on. " * 20)
    options = ("merge", "--tasks", "colour,shape", "--method", "layerwise", "--probe-rows", "2")
    made = [
        trained.json(*options, *more)["merged"]["adapter"]["digest"]
        for more in (("--general", "0"), (), ("--general-text", file))
    ]
    assert len(set(made)) == 3
    file.write_text("So it goes.")
    assert "11 tokens" in trained.refuses(*options, "--general-text", file, code=5)
    assert "cannot read" in trained.refuses(*options, "--general-text", tmp_path / "no", code=5)


def test_scores_are_measured_once(trained):
    first = trained.json("score", "base", "colour@1", "--all")
    assert [(s["subject"], s["task"]) for s in first] == [
        ("base", "colour"), ("base", "shape"), ("colour@1", "colour"), ("colour@1", "shape"),
    ]  # fmt: skip
    again = trained("score", "base", "colour@1")
    assert again.stderr == ""
    assert again.stdout.count("exact_match") == 4
    assert trained("score", "--tasks", "shape", "colour").stderr == "colour means colour@1\n"


def outcomes(path, values):
    path.write_text(
        "".join(json.dumps({"row": i, "value": v}) + "\n" for i, v in enumerate(values))
    )
    return path


def test_outcomes_measured_elsewhere_are_marked_and_audited(trained, tmp_path):
    file = outcomes(tmp_path / "outcomes.jsonl", [1] * 8)
    score = trained.json("score", "add", "base", "--task", "colour", "--outcomes", file,
                         "--origin", "a paper")  # fmt: skip
    assert (score["value"], score["origin"]) == (1.0, "a paper")
    told = trained("audit", "colour@1", "--task", "colour")
    assert "base (a paper)" in told.stdout
    assert "worse" in told.stdout


def test_an_audit_that_finds_a_drop_prints_everything_and_ends_with_3(trained, tmp_path):
    file = outcomes(tmp_path / "outcomes.jsonl", [1] * 8)
    trained("score", "add", "base", "--task", "colour", "--outcomes", file)
    result = trained("audit", "main", "--max-drop", "0.5", code=3)
    assert "shape#1: exact_match" in result.stdout
    assert "drop: colour#1: main@1 is at" in result.stdout
    assert result.stderr == "lori: more than 0.5 below the best: colour\n"
    found = trained.json("audit", "main", "--max-drop", "0.5", code=3)
    assert [finding["kind"] for finding in found["findings"]] == ["drop"]
    trained("audit", "main", "--max-drop", "1")


def test_audit_loads_no_model(trained):
    code = (
        "import sys; from lori_manager.cli.app import app\n"
        "try: app(['audit'], prog_name='lori')\n"
        "except SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=trained.folder, check=True)


def test_aliases_move_and_are_listed(trained):
    assert trained("alias").stdout == "alias  means  since\n"
    trained("alias", "main@1", "production")
    assert trained.json("show", "main@production")["record"]["ref"] == "main@1"
    assert [alias["ref"] for alias in trained.json("alias")] == ["main@production"]
    assert "production -> 1" in trained("lines").stdout
    assert "production" in trained("log", "main").stdout


def test_every_kind_of_ref_is_shown(trained):
    kinds = {"base": "base", "colour": "task", "colour#1": "task", "colour%1": "mask",
             "colour@1": "adapter", "main": "adapter", "main@latest": "adapter"}  # fmt: skip
    for ref, kind in kinds.items():
        assert trained.json("show", ref)["kind"] == kind
        assert trained("show", ref).stdout.startswith(kind)


def test_what_is_exported_can_be_imported_and_the_rest_is_refused(trained, tmp_path):
    told = trained("export", "colour@1", tmp_path / "colour-v1").stdout
    assert told == f"colour@1 written to {tmp_path / 'colour-v1'} (peft)\n"
    (tmp_path / "nothing").mkdir()
    result = trained("import", tmp_path / "nothing", tmp_path / "colour-v1", code=11)
    refused, imported = result.stdout.splitlines()
    assert refused.startswith(f"{tmp_path / 'nothing'}: refused: ")
    assert imported.startswith(f"{tmp_path / 'colour-v1'}: colour-v1@1 at rank ")
    assert result.stderr.splitlines()[-1] == "lori: 1 of 2 refused, 1 imported"
    found = trained.json("import", tmp_path / "colour-v1", code=11)
    assert found[0]["adapter"] is None
    assert "exists" in found[0]["reason"]
    assert trained.json("show", "colour-v1")["record"]["origin"] == "imported"


def test_the_form_that_was_written_is_told_and_comes_back(trained, tmp_path):
    for kind, form in (("bottleneck", "own"), ("prefix", "peft"), ("ia3", "peft")):
        trained("train", "colour", "--kind", kind, "--line", kind, "--steps", 1)
        told = trained("export", f"{kind}@1", tmp_path / f"{kind}-out").stdout
        assert told == f"{kind}@1 written to {tmp_path / f'{kind}-out'} ({form})\n"
        found = trained.json("export", f"{kind}@1", tmp_path / f"{kind}-again")
        assert found["format"] == form
        (back,) = trained.json("import", tmp_path / f"{kind}-again")
        assert back["adapter"]["method"] == kind
    told = trained.json("export", "bottleneck-again@1", tmp_path / "more")
    assert told["format"] == "own"


def test_a_full_export_is_a_model_folder(trained, tmp_path):
    told = trained.json("export", "main", tmp_path / "model", "--format", "full")
    assert told == {"ref": "main@1", "directory": str(tmp_path / "model"), "format": "full"}
    assert (tmp_path / "model" / "config.json").is_file()


def test_verify_finds_nothing_wrong_at_the_end(trained):
    assert trained("verify").stdout == "all is well: 3 adapters, every file whole\n"
    assert trained.json("verify") == []


PRINTING = ["base", "tasks", "lines", "log", "alias", "audit", "verify", "db upgrade",
            "show main", "show colour%1", "score base", "train colour --seed 9"]  # fmt: skip


@pytest.mark.parametrize("command", PRINTING)
def test_json_is_all_that_is_on_stdout(trained, command):
    trained.json(*command.split())


def test_output_for_people_has_no_colour_codes_off_a_terminal(trained):
    for command in ("tasks", "lines", "log", "show main", "audit"):
        assert "\x1b" not in trained(*command.split()).output


def test_headings_stand_out_on_a_terminal(trained):
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-m", "lori_manager", "tasks"], cwd=trained.folder, stdout=theirs,
        check=True, env=os.environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert shown.startswith("\x1b[1mtask ")
    assert "colour#1  exact_match" in shown


def test_an_interrupted_training_goes_on_where_it_was(lori, monkeypatch):
    steps = []

    def interrupt(self, state):
        if state.phase.startswith("training"):
            steps.append(state.step)
            if len(steps) == 3:
                raise KeyboardInterrupt

    options = ("train", "colour", "--checkpoint-seconds", 0)
    monkeypatch.setattr(Teller, "progress", interrupt)
    told = lori(*options, code=130).stderr.splitlines()
    assert told[-1].startswith("lori: interrupted")
    assert lori.json("log") == []
    lori(*options)
    assert len(steps) < 3 + 4
    assert [adapter["ref"] for adapter in lori.json("log")] == ["colour@1"]


def test_ctrl_c_ends_the_process_with_130_and_one_line(lori):
    code = (
        "import os, signal, lori_manager.workspace as w\n"
        # A shell's background job is born with SIGINT ignored, and so are these tests in one.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "w.Workspace.verify = lambda self, deep: os.kill(os.getpid(), signal.SIGINT) or []\n"
        "from lori_manager.cli.app import main; main()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "verify"], cwd=lori.folder, capture_output=True, text=True
    )
    assert run.returncode == 128 + signal.SIGINT
    assert len(run.stderr.splitlines()) == 1
    assert run.stdout == ""


def test_a_dry_run_tells_of_the_members_and_stores_nothing(trained):
    before = trained("lines").stdout
    options = ("merge", "--tasks", "colour,shape", "--dry-run", "--probe-rows", "2")
    shown = trained(*options).stdout
    assert "how loud a column's adapter speaks" in shown
    assert "disturb each other most" in shown
    found = trained.json(*options)
    assert found["interference"]["response"][0][0] == pytest.approx(1)
    assert found["weights"] == [0.5, 0.5]
    assert trained("lines").stdout == before
    assert "leave --from" in trained.refuses("merge", "--from", "x@1", "--dry-run", code=2)
