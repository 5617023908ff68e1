"""What lori stores of a harness task is what `lm_eval.simple_evaluate` alone finds, row by row."""

import numpy as np
import pytest
from harness_tasks import write_tasks
from small_workspaces import make_workspace

from lori_manager.config import Config
from lori_manager.harness.definitions import SUMMED

pytestmark = pytest.mark.usefixtures("one_thread")
METRICS = {
    "tiny_choice": ("acc", "acc_norm"),
    "tiny_shots": ("acc", "acc_norm"),
    "tiny_written": ("exact_match,whole", "exact_match,begins"),
    "tiny_judged": ("starts", "length"),
    "tiny_rolling": ("word_perplexity", "bits_per_byte"),
    "tiny_last": ("perplexity", "acc"),
}


@pytest.fixture(scope="module")
def workspace(tiny_base, tmp_path_factory, folder):
    """colour@1 acts strongly; every metric of every harness task is a task of its own."""
    root = tmp_path_factory.mktemp("harness") / "ws"
    ws = make_workspace(root, tiny_base, learning_rate=0.3, steps=12, score_batch=5)
    ws.train(["colour"], ws.settings.config.replace(sparsity=0.0))
    # Of random answers none is right, so some of the documents have what the adapter writes.
    from lori_manager.engine.layers import attached, low_rank_layers
    from lori_manager.generation import generate, text_of

    base = ws.base_model(ws.settings.config)
    weights = ws.weights(ws.adapter("colour@1"))
    import json

    asked = [json.loads(line)["q"] for line in (folder / "written.jsonl").read_text().splitlines()]
    prompts = [base.tokenizer(q)["input_ids"] for q in asked[:8]]
    with attached(base.model, low_rank_layers(base.model, weights.updates())):
        said = [text_of(base, ids) for ids in generate(base, prompts, 6, 4)]
    write_tasks(folder, written=[text.split("\n")[0] for text in said])
    for task, metrics in METRICS.items():
        for i, metric in enumerate(metrics):
            added = ws.add_task(
                f"{task}-{i}", lm_eval=task, lm_eval_include=str(folder), lm_eval_metric=metric
            )
            assert added.new
    ws.export("colour@1", root / "peft")
    return ws


def alone(tiny_base, folder, names, peft=None):
    """What `simple_evaluate` says: task -> samples, and task -> results."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    told = {"pretrained": str(tiny_base), "dtype": "float32"}
    found = simple_evaluate(
        model="hf",
        model_args=told | ({"peft": str(peft)} if peft else {}),
        tasks=list(names),
        task_manager=TaskManager(include_path=[str(folder)], include_defaults=False),
        batch_size=5,
        device="cpu",
        bootstrap_iters=0,
    )
    return found["samples"], found["results"]


@pytest.fixture(scope="module")
def found(workspace, tiny_base, folder):
    """subject -> (lori's outcomes by task and metric, the harness's samples and results)."""
    out = {}
    for subject, peft in (("base", None), ("colour@1", workspace.root / "peft")):
        names = [f"{task}-{i}" for task in METRICS for i in range(2)]
        scores = {s.task: s for s in workspace.score([subject], names)}
        own = {
            (task, metric): (
                scores[f"{task}-{i}"],
                *workspace.store.outcomes(scores[f"{task}-{i}"]),
            )
            for task, metrics in METRICS.items()
            for i, metric in enumerate(metrics)
        }
        out[subject] = own, alone(tiny_base, folder, METRICS, peft)
    return out


@pytest.mark.parametrize("subject", ["base", "colour@1"])
@pytest.mark.parametrize(("task", "metric"), [(t, m) for t, ms in METRICS.items() for m in ms])
def test_every_row_has_the_outcome_that_the_harness_alone_finds(found, subject, task, metric):
    own, (samples, _) = found[subject]
    _, outcomes, weights = own[task, metric]
    name, _, filter = metric.partition(",")
    filter = filter or "none"
    by_row = {s["doc_id"]: s[name] for s in samples[task] if s["filter"] == filter}
    assert len(by_row) == len(outcomes) == 24
    expected = [by_row[i] for i in range(24)]
    if name in SUMMED:
        pairs = np.array([SUMMED[name].row(x) for x in expected])
        # Float32, through another order of sums where an adapter acts.
        np.testing.assert_allclose(outcomes, pairs[:, 0], rtol=1e-5)
        assert np.array_equal(np.ones(24) if weights is None else weights, pairs[:, 1])
    else:
        assert outcomes.tolist() == [float(x) for x in expected]


@pytest.mark.parametrize("subject", ["base", "colour@1"])
def test_the_figure_is_the_harnesses_own(found, subject):
    own, (_, results) = found[subject]
    for (task, metric), (score, *_) in own.items():
        name, _, filter = metric.partition(",")
        told = results[task][f"{name},{filter or 'none'}"]
        value = score.value
        if name in SUMMED and name != "bits_per_byte":
            value = np.exp(value)
        assert value == pytest.approx(told, rel=1e-5), (task, metric)


def test_the_rows_tell_models_and_metrics_apart(found):
    """Else equal outcomes would prove nothing."""
    base, colour = found["base"][0], found["colour@1"][0]
    for task in ("tiny_choice", "tiny_shots", "tiny_judged"):
        metric = METRICS[task][0]
        assert not np.array_equal(base[task, metric][1], colour[task, metric][1]), task
    assert not np.array_equal(base["tiny_choice", "acc"][1], base["tiny_choice", "acc_norm"][1])
    written = colour["tiny_written", "exact_match,whole"][1]
    assert 0 < written.sum() < 24
    assert not np.array_equal(written, colour["tiny_written", "exact_match,begins"][1])


def test_nothing_is_asked_twice(workspace, monkeypatch):
    monkeypatch.setattr(workspace, "base_model", pytest.fail)
    monkeypatch.setattr("lori_manager.harness.definitions.definition", pytest.fail)
    names = [f"{task}-{i}" for task in METRICS for i in range(2)]
    assert len(workspace.score(["base", "colour@1"], names)) == 2 * len(names)


def test_a_routed_adapter_answers_each_row_by_its_member(workspace):
    workspace.train(["shape"], Config.replace(workspace.settings.config, sparsity=0.0))
    merged = workspace.merge(["colour@1", "shape@1"], method="routed", into="all", probe_rows=2)
    (score,) = workspace.score([merged.adapter.ref], ["tiny_choice-0"])
    single = {
        ref: workspace.store.outcomes(workspace.score([ref], ["tiny_choice-0"])[0])[0]
        for ref in ("colour@1", "shape@1")
    }
    outcomes, _ = workspace.store.outcomes(score)
    assert np.all((outcomes == single["colour@1"]) | (outcomes == single["shape@1"]))
