"""What of a harness task is kept as rows, what is refused, and what a change of it does."""

import random
from pathlib import Path

import numpy as np
import pytest
from harness_tasks import write_tasks

from lori_manager.errors import BadData, InvalidInput, NotFound
from lori_manager.harness.answering import answered
from lori_manager.harness.definitions import check_unchanged
from lori_manager.harness.freezing import freeze, requests_of
from lori_manager.tasks.choosing import request_scorer
from lori_manager.tasks.rows import Row, rows_from_jsonl, rows_to_jsonl


@pytest.fixture
def own(tmp_path):
    """A folder to change, of few documents."""
    return write_tasks(tmp_path / "tasks", rows=6)


def scorer_of(frozen):
    return request_scorer(frozen.options, frozen.version, Path("/"))


def test_a_row_carries_the_document_and_all_that_is_asked_about_it(folder):
    rows = freeze("tiny_choice", str(folder)).rows
    assert len(rows) == 24
    for row in rows:
        doc, asked = requests_of(row)
        assert asked == [("loglikelihood", (row.prompt, f" {c}")) for c in doc["choices"]]
        assert row.prompt == f"Q: {doc['q']}\nA:"
        assert row.completion == f" {doc['choices'][doc['gold']]}"
    assert rows_from_jsonl(rows_to_jsonl(rows)) == rows
    assert rows[0].where == "tiny_choice, document 1"


def test_a_written_answer_keeps_how_it_is_to_be_written(folder):
    row = freeze("tiny_written", str(folder)).rows[3]
    doc, ((kind, (context, how)),) = requests_of(row)
    assert (kind, context) == ("generate_until", doc["q"])
    assert how == {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    assert row.completion == doc["a"]


def test_examples_before_a_question_are_drawn_once_and_kept(folder):
    first, again = (freeze("tiny_shots", str(folder)).rows for _ in range(2))
    assert first == again
    assert all(row.prompt.count("Q: ") == 3 for row in first)
    assert len({row.prompt.partition("\n\n")[0] for row in first}) > 3
    four = freeze("tiny_shots", str(folder), fewshot=4)
    assert all(row.prompt.count("Q: ") == 5 for row in four.rows)
    assert four.options["fewshot"] == 4
    # A task that says 0 stays at 0, as in the harness.
    assert freeze("tiny_choice", str(folder), fewshot=4).options["fewshot"] == 0


def test_the_random_states_are_as_before(folder):
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    freeze("tiny_shots", str(folder))
    assert (random.random(), np.random.rand()) == expected


def test_only_the_first_documents(folder):
    every = freeze("tiny_choice", str(folder)).rows
    assert freeze("tiny_choice", str(folder), limit=5).rows == every[:5]
    for told in ({"limit": 0}, {"fewshot": -1}):
        with pytest.raises(InvalidInput, match="must be at least"):
            freeze("tiny_choice", str(folder), **told)


@pytest.mark.parametrize(
    ("task", "metric", "scorer", "better", "unit"),
    [
        ("tiny_choice", None, "lm_eval:acc", True, "share"),
        ("tiny_choice", "acc_norm", "lm_eval:acc_norm", True, "share"),
        ("tiny_written", None, "lm_eval:exact_match,whole", True, "share"),
        ("tiny_written", "exact_match,begins", "lm_eval:exact_match,begins", True, "share"),
        ("tiny_judged", "length", "lm_eval:length", False, "length"),
        ("tiny_rolling", None, "lm_eval:word_perplexity", False, "nats per word"),
    ],
)
def test_a_metric_is_chosen_by_name(folder, task, metric, scorer, better, unit):
    frozen = freeze(task, str(folder), metric=metric)
    assert frozen.scorer == scorer
    made = scorer_of(frozen)
    assert (made.higher_is_better, made.unit, made.version) == (better, unit, frozen.version)


def test_metrics_that_are_not_there_or_no_means_are_refused(folder):
    with pytest.raises(InvalidInput, match=r"no metric 'f1'; it has acc, acc_norm$"):
        freeze("tiny_choice", str(folder), metric="f1")
    with pytest.raises(InvalidInput, match=r"no metric 'exact_match,x'; .*filters whole, begins"):
        freeze("tiny_written", str(folder), metric="exact_match,x")
    with pytest.raises(InvalidInput, match=r"'brier_score' .* no mean over rows.*: acc_norm$"):
        freeze("tiny_brier", str(folder))
    assert freeze("tiny_brier", str(folder), metric="acc_norm").options["metric"] == "acc_norm"


def test_what_is_no_task_is_refused(folder, own):
    with pytest.raises(InvalidInput, match=r"group of harness tasks.*: tiny_choice, tiny_written"):
        freeze("tiny_group", str(folder))
    with pytest.raises(NotFound, match="nowhere: no such folder"):
        freeze("tiny_choice", str(folder / "nowhere"))
    (own / "written.jsonl").unlink()
    with pytest.raises(BadData, match="'tiny_written' cannot be read: "):
        freeze("tiny_written", str(own))
    (own / "functions.py").write_text("def judged(")
    with pytest.raises(BadData, match="'tiny_judged' cannot be loaded: SyntaxError"):
        freeze("tiny_judged", str(own))


def test_an_unknown_name_names_what_is_near(folder):
    """The harness's own tasks are known too, beside those of the folder."""
    with pytest.raises(NotFound, match="no task 'hellaswagg'; near it: hellaswag"):
        freeze("hellaswagg", str(folder))
    with pytest.raises(InvalidInput, match="'mmlu' is a group"):
        freeze("mmlu")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("unsafe_code: true", "runs programs.*--scorer pass_at_1"),
        ("doc_to_image: [picture]", "pictures or sounds"),
        ("generation_kwargs: {do_sample: true}", "samples its answers"),
        ("generation_kwargs: {temperature: 0.7}", "samples its answers"),
    ],
)
def test_kinds_that_cannot_be_frozen_are_told(own, line, problem):
    told = f"include: written.yaml\ntask: tiny_other\n{line}\n"
    (own / "other.yaml").write_text(told)
    with pytest.raises(InvalidInput, match=f"'tiny_other' .*{problem}"):
        freeze("tiny_other", str(own))


def test_documents_that_json_does_not_carry_are_refused(own):
    with (own / "functions.py").open("a") as file:
        file.write(
            "\n\ndef dated(dataset):\n    import datetime\n"
            "    return dataset.map(lambda doc: {'when': datetime.datetime(2020, 1, 1)})\n"
        )
    told = "include: written.yaml\ntask: tiny_dated\nprocess_docs: !function functions.dated\n"
    (own / "dated.yaml").write_text(told)
    with pytest.raises(BadData, match=r"tiny_dated, document 1: JSON cannot carry it: .*datetime"):
        freeze("tiny_dated", str(own))


def test_a_change_of_what_judges_is_noticed_and_one_of_the_data_is_not(own):
    frozen = freeze("tiny_judged", str(own))
    scorer = scorer_of(frozen)
    check_unchanged(scorer)
    (own / "written.jsonl").write_text("")
    check_unchanged(scorer)
    source = (own / "functions.py").read_text()
    (own / "functions.py").write_text(source.replace("len(text)", "len(text) + 1"))
    with pytest.raises(InvalidInput, match=r"'tiny_judged' is not what it was .* add it again"):
        check_unchanged(scorer)
    (own / "functions.py").write_text(source)
    check_unchanged(scorer)
    text = (own / "judged.yaml").read_text()
    (own / "judged.yaml").write_text(text.replace('["z"]', '["y"]'))
    with pytest.raises(InvalidInput, match="is not what it was"):
        check_unchanged(scorer)


def test_another_version_of_the_harness_is_another_scorer(own, monkeypatch):
    import lm_eval

    frozen = freeze("tiny_choice", str(own))
    monkeypatch.setattr(lm_eval, "__version__", "99.0")
    assert freeze("tiny_choice", str(own)).version != frozen.version


def test_scoring_needs_neither_the_data_nor_a_network(own, tiny_base, monkeypatch):
    from lori_manager.models import load_base

    frozen = freeze("tiny_choice", str(own))
    base = load_base(tiny_base, "fp32", "cpu")
    before = answered(base, frozen.rows, scorer_of(frozen), 4)
    for name in ("choice.jsonl", "shots.jsonl"):
        (own / name).unlink()
    monkeypatch.setattr("datasets.load_dataset", pytest.fail)
    seen = []
    after = answered(base, frozen.rows, scorer_of(frozen), 4, lambda *done: seen.append(done))
    assert after == before
    requests = sum(len(requests_of(row)[1]) for row in frozen.rows)
    assert seen[-1] == (requests, requests)
    assert answered(base, [], scorer_of(frozen), 4) == []
    with pytest.raises(BadData, match="holds no request of lm-evaluation-harness"):
        answered(base, [Row("p", "c")], scorer_of(frozen), 4)


def test_code_of_a_task_that_fails_is_one_line(own, tiny_base):
    from lori_manager.models import load_base

    source = (own / "functions.py").read_text()
    (own / "functions.py").write_text(source.replace("(text,) = results", "text = results['a']"))
    frozen = freeze("tiny_judged", str(own))
    with pytest.raises(BadData, match="'tiny_judged' cannot be scored: TypeError"):
        answered(load_base(tiny_base, "fp32", "cpu"), frozen.rows, scorer_of(frozen), 4)


def test_without_the_extra_the_command_that_brings_it_is_named(monkeypatch):
    monkeypatch.setattr("lori_manager.extras.find_spec", lambda _: None)
    with pytest.raises(InvalidInput, match=r"library lm_eval: .*lori-manager\[lm-eval\]"):
        freeze("hellaswag")
    options = dict.fromkeys(
        ("task", "include", "metric", "filter", "higher_is_better", "unit", "binary")
    )
    with pytest.raises(InvalidInput, match=r"lori-manager\[lm-eval\]"):
        request_scorer(options, "1", Path()).ready(run_code=False)
