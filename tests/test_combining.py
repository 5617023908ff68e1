"""Merges of a workspace: the method by default and by trial, searched weights, merges made anew."""

import shutil

import pytest
import torch
from small_workspaces import DEFAULTS, WORDS, copied, write_rows

from lori_manager import combining, trials
from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.errors import BadData, InvalidInput, LoriError, NotFound
from lori_manager.forward import Forward, place
from lori_manager.merge_inputs import MergeInputs
from lori_manager.merging.methods import options_of
from lori_manager.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
PROBES = {"colour": 18, "shape": 24, "size": 4}
REFS = ["colour@1", "shape@1", "size@1"]
PAIR = REFS[:2]


@pytest.fixture(scope="module")
def taught(tiny_base, tmp_path_factory):
    """Three tasks with an adapter each, the last with few probe rows. Not to be changed."""
    folder = tmp_path_factory.mktemp("combining") / "ws"
    ws = Workspace.create(folder, str(tiny_base))
    lines = [f"{key} = {value}" for key, value in (DEFAULTS | {"steps": 12}).items()]
    (folder / "lori.toml").write_text("[defaults]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    for task in WORDS:
        write_rows(folder / "tasks" / task / "train.jsonl", task, 24)
        write_rows(folder / "tasks" / task / "eval.jsonl", task, 8, 100)
        write_rows(folder / "tasks" / task / "probe.jsonl", task, PROBES[task], 200)
        ws.add_task(task)
    ws.train(list(WORDS))
    return ws


@pytest.fixture
def ws(taught, tmp_path):
    ws = copied(taught, tmp_path / "ws")
    ws.said = []
    ws.on_message = ws.said.append
    return ws


def with_scorer(ws, **scorers):
    """The tasks again under other scorers, with adapters as good as before."""
    for task, scorer in scorers.items():
        ws.add_task(task, scorer=scorer)
    return ws


# The method by default


def test_a_merge_is_fitted_to_probe_rows_by_default_where_all_tasks_have_enough(ws):
    assert ws.merge(PAIR).adapter.method == "layerwise"
    assert ws.merge(REFS).adapter.method == "concat"  # size has 4 probe rows
    assert ws.merge(PAIR[:1]).adapter.method == "concat"
    merged = ws.merge([], names=["colour", "shape"]).adapter
    assert merged.config["probe_rows"] == 32
    assert ws.said.count("merging by layerwise") == 2


@pytest.mark.parametrize("method", ["layerwise", "iteris", "soups", "repair", "regmean"])
def test_every_method_that_runs_the_model_merges_in_a_workspace(ws, method):
    before = {ref: ws.adapter(ref).digest for ref in PAIR}
    taken = options_of(combining.method_of(method))
    options = {k: v for k, v in {"steps": 3, "iterations": 2}.items() if k in taken}
    made = [ws.merge(PAIR, method=method, options=options).adapter for _ in range(2)]
    assert made[0].method == method
    assert made[0].digest == made[1].digest
    assert made[0].config["options"] == options
    assert [p.weight for p in made[0].parents] == [0.5, 0.5]
    assert {ref: ws.adapter(ref).digest for ref in PAIR} == before
    assert [f for f in ws.verify() if f.kind != "orphan"] == []


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"method": "concat", "options": {"density": 0.3}},
         "method `concat` does not use --density: it takes --max-rank$"),
        ({"method": "concat", "options": {"density": 0.5}}, "--density"),  # its own default
        ({"method": "linear", "options": {"max_rank": 2, "eps": 0.1}},
         "`linear` does not use --max-rank, --eps: it takes no such option$"),
        ({"method": "regmean", "options": {"shrink": 0.9, "answers": 0.5}},
         "`regmean` does not use --answers: it takes --max-rank, --eps, --shrink, --probe-rows$"),
        ({"method": "auto", "options": {"density": 0.3}}, "`auto` does not use --density: .*steps"),
        ({"options": {"density": 0.3}}, "`layerwise` does not use --density"),
        ({"weights": "search", "options": {"eps": 0.3}}, "`concat` does not use --eps"),
        ({"method": "concat", "probe_rows": 8}, "`concat` does not use --probe-rows"),
        ({"method": "concat", "general": "no.txt"}, "`concat` does not use --general-text"),
        ({"method": "routed", "options": {"max_rank": 2}}, "`routed` does not use --max-rank"),
    ],
)  # fmt: skip
def test_an_option_that_the_method_would_pass_over_is_refused(ws, how, told):
    count = len(ws.store.adapters())
    with pytest.raises(InvalidInput, match=told):
        ws.merge(PAIR, **how)
    assert len(ws.store.adapters()) == count


def test_a_dry_run_refuses_what_the_merge_would(ws):
    with pytest.raises(InvalidInput, match="`concat` does not use --density"):
        ws.forecast(PAIR, method="concat", options={"density": 0.3})


def test_a_shrunk_regression_is_made_anew_as_it_would_be_merged_afresh(ws):
    how = {"method": "regmean", "options": {"shrink": 0.8}, "probe_rows": 4}
    old = ws.merge(REFS, **how).adapter
    assert old.config["settings"]["shrink"] == 0.8
    assert (
        ws.merge_again(old.ref, drop=["size"]).adapter.digest
        == ws.merge(PAIR, **how).adapter.digest
    )
    weights = {"weights": [0.2, 1 / 3, 1 / 3]}
    again = ws.merge_again(old.ref, reweight={"colour": 0.2}).adapter
    assert again.digest == ws.merge(REFS, **how, **weights).adapter.digest
    plain = ws.merge(REFS, method="regmean", probe_rows=4).adapter
    assert plain.digest != old.digest


def test_the_seed_decides_what_trains(ws):
    options = {"steps": 3}
    first = ws.merge(PAIR, method="repair", options={**options, "seed": 0}).adapter
    other = ws.merge(PAIR, method="repair", options={**options, "seed": 1}).adapter
    same = ws.merge(PAIR, method="repair", options={**options, "seed": 1}).adapter
    assert first.digest != other.digest == same.digest


def test_a_member_that_belongs_to_no_task_is_merged_by_its_weights_alone(ws, tmp_path):
    ws.export("colour@1", tmp_path / "foreign")
    (imported,) = ws.import_adapters([tmp_path / "foreign"])
    refs = ["shape@1", imported.adapter.ref]
    assert ws.merge(refs).adapter.method == "concat"
    for method in ("layerwise", "auto"):
        with pytest.raises(InvalidInput, match=r"belongs to no task.*--method concat"):
            ws.merge(refs, method=method)


# General text


def logits_on(ws, adapter, text):
    base = ws.base_model(ws.settings.config)
    ids = torch.tensor([base.tokenizer(text, add_special_tokens=False)["input_ids"][:120]])
    layers = {} if adapter is None else low_rank_layers(base.model, ws.weights(adapter).updates())
    with attached(base.model, layers), torch.no_grad():
        return base.model(ids).logits


def test_general_text_keeps_the_merge_nearer_to_the_base_there(ws, tmp_path):
    text = "The quick brown fox jumps over the lazy dog, and then it sleeps a while. " * 40
    (tmp_path / "text.txt").write_text(text)
    plain = ws.merge(PAIR, method="layerwise", options={"general": 0.0}).adapter
    options = {"general": 2.0}
    kept = [
        ws.merge(PAIR, method="layerwise", options=options, general=tmp_path / "text.txt").adapter
        for _ in range(2)
    ]
    assert kept[0].digest == kept[1].digest
    base = logits_on(ws, None, text)
    far = [float((logits_on(ws, a, text) - base).square().sum()) for a in (plain, kept[0])]
    assert far[1] < 0.7 * far[0]
    usual = ws.merge(PAIR, method="layerwise", options=options).adapter
    assert usual.digest not in (plain.digest, kept[0].digest)


def test_general_text_that_nothing_reads_or_that_is_none_is_refused(ws, tmp_path):
    (tmp_path / "text.txt").write_text("short")
    text, count = tmp_path / "text.txt", len(ws.store.adapters())
    with pytest.raises(InvalidInput, match="--general above 0"):
        ws.merge(PAIR, method="layerwise", options={"general": 0.0}, general=text)
    for file, told in ((text, "5 tokens"), (tmp_path / "none.txt", "cannot read")):
        with pytest.raises(BadData, match=told):
            ws.merge(PAIR, method="layerwise", options={"general": 1.0}, general=file)
    assert len(ws.store.adapters()) == count


# Searched weights


def test_the_weight_that_is_found_has_the_least_loss(ws):
    """Against the loss computed here: the teacher's whole distribution on its own answers."""
    config = ws.settings.config
    merged = ws.merge(PAIR, method="concat", weights="search", probe_rows=8)
    base = ws.base_model(config)
    members = [ws.weights(ws.adapter(ref)) for ref in PAIR]
    inputs = MergeInputs(ws, [ws.adapter(r) for r in PAIR], config, 8)
    from lori_manager.distillation import taught_rows, teacher_words
    from lori_manager.merging.concat import merge_concat

    losses = {}
    for weight in trials.WEIGHTS:
        both = merge_concat(members, [weight, weight])
        losses[weight] = 0.0
        for i, member in enumerate(members):
            rows = inputs.answered(i)
            words = teacher_words(base, member.updates(), rows, 4)
            taught, table = taught_rows([words], base.device)
            forward = Forward(base, soft=table)
            with (
                attached(base.model, low_rank_layers(base.model, both.updates())),
                torch.no_grad(),
                forward.ready(),
            ):
                total = sum(
                    float(forward.loss(place(forward.batch([r]), base.device))) for r in taught
                )
            losses[weight] += total / len(words.ids) / 2
    best = min(losses, key=losses.__getitem__)
    assert merged.weights == (best, best)
    assert [p.weight for p in merged.adapter.parents] == [best, best]
    kept = merged.adapter.config
    assert {float(w): x for w, x in kept["searched"].items()} == pytest.approx(losses, abs=2e-4)
    assert kept["weights"] == [best, best]
    assert kept["probe_rows"] == 8
    told = ws.merge(PAIR, method="concat", weights=[best, best]).adapter
    assert told.digest == merged.adapter.digest


def test_a_search_without_a_method_is_over_exact_sums_and_others_refuse_it(ws):
    assert ws.merge(PAIR, weights="search", probe_rows=4).adapter.method == "concat"
    for method in ("layerwise", "regmean", "iteris", "soups", "repair"):
        with pytest.raises(InvalidInput, match=f"{method}.*reads probe rows itself"):
            ws.merge(PAIR, method=method, weights="search")
    with pytest.raises(InvalidInput, match="numbers or `search`"):
        ws.merge(PAIR, weights="some")


# The method by trial


@pytest.fixture
def few_candidates(monkeypatch):
    """Two, so that a test does not train for long."""
    monkeypatch.setattr(combining, "CANDIDATES", (("concat", {}), ("layerwise", {})))


def test_auto_tries_all_candidates_and_keeps_the_table(ws):
    merged = ws.merge(PAIR, method="auto", options={"steps": 2})
    kept = merged.adapter.config
    # Of rank 64 the pair, of rank 8 together, cannot be cut: that one is not tried.
    assert [one["name"] for one in kept["tried"]] == ["concat", "tsv", "layerwise", "repair"]
    assert merged.adapter.method in {one["name"] for one in kept["tried"]}
    for one in kept["tried"]:
        assert set(one["scores"]) == {"colour", "shape"}
        assert 0 <= one["kept"] <= 1
        assert one["rank"] >= 1
    (chosen,) = [one for one in kept["tried"] if one["name"] == merged.adapter.method]
    assert merged.weights == (chosen["weight"],) * 2
    assert kept["options"] == {"steps": 2}
    assert any(line.startswith(f"auto means {merged.adapter.method}") for line in ws.said)
    again = ws.merge(PAIR, method="auto", options={"steps": 2}).adapter
    assert (again.digest, again.config) == (merged.adapter.digest, kept)


def test_autos_ranks_never_go_beyond_the_one_asked_for(ws, monkeypatch):
    monkeypatch.setattr(combining, "CANDIDATES", (("layerwise", {"max_rank": 3}), ("concat", {})))
    merged = ws.merge(PAIR, method="auto", options={"max_rank": 2}).adapter
    assert [one["name"] for one in merged.config["tried"]] == ["concat"]
    assert merged.rank == 2
    smaller = ws.merge(PAIR, method="auto", options={"max_rank": 5}).adapter.config
    assert [one["rank"] for one in smaller["tried"]] == [3, 5]


@pytest.mark.usefixtures("few_candidates")
def test_auto_takes_the_simplest_that_is_shown_to_keep_enough(ws, monkeypatch):
    """On outcomes made up: `judged` says what each candidate gets right of 10 rows."""
    import numpy as np

    def choose(judged, higher=True, own=None):
        def outcomes(_, __, ___, label, names=None):
            right = judged.get(label, 10 if own is None else own)
            values = np.zeros(10, np.float32)
            values[: int(right)] = 1.0
            if not higher:
                values = np.full(10, right, np.float32) + np.arange(10, dtype=np.float32) / 100
            return {n: trials._Judged(values, None, higher) for n in names or ("colour", "shape")}

        monkeypatch.setattr(trials, "_outcomes", outcomes)
        return ws.merge(PAIR, method="auto").adapter.method

    assert choose({"concat": 2, "layerwise": 9}) == "layerwise"
    # Two rows of 20 may be chance, but nothing shows that they are.
    assert choose({"concat": 8, "layerwise": 9}) == "layerwise"
    assert choose({"concat": 9, "layerwise": 9}) == "concat"
    assert choose({"concat": 9, "layerwise": 2}) == "concat"
    assert choose({"concat": 0, "layerwise": 0}, own=0) == "concat"
    assert choose({"concat": 3.0, "layerwise": 1.1}, higher=False, own=1.0) == "layerwise"
    assert choose({"concat": 1.1, "layerwise": 3.0}, higher=False, own=1.0) == "concat"


def test_what_is_kept_is_of_the_own_adapters_score_whichever_way_is_better():
    import numpy as np

    def judged(value, higher):
        return trials._Judged(np.full(4, value, np.float32), None, higher)

    assert judged(0.25, True).kept_of(judged(0.5, True)) == 0.5
    assert judged(0.75, True).kept_of(judged(0.5, True)) == 1.0
    assert judged(2.0, False).kept_of(judged(1.0, False)) == 0.5
    assert judged(0.5, False).kept_of(judged(1.0, False)) == 1.0
    assert judged(0.0, True).kept_of(judged(0.0, True)) == 1.0  # nothing could be lost
    assert list(judged(2.0, False).gain_over(judged(3.0, False))) == [1.0] * 4
    weighed = trials._Judged(np.array([1.0, 3.0]), np.array([3.0, 1.0]), False)
    assert weighed.value == 1.5
    assert list(weighed.gain_over(judged(4.0, False).__class__(np.full(2, 4.0), None, False))) == [
        4.5, 0.5,
    ]  # fmt: skip


@pytest.mark.usefixtures("few_candidates")
@pytest.mark.parametrize(("one", "other"), [("perplexity", "text_match"), ("rouge_l", "contains")])
def test_auto_judges_by_every_kind_of_scorer(ws, one, other):
    with_scorer(ws, colour=one, shape=other)
    merged = ws.merge(PAIR, method="auto")
    table = merged.adapter.config["tried"]
    assert all(0 <= entry["kept"] <= 1 for entry in table)
    if one == "perplexity":
        for entry in table:
            assert entry["scores"]["colour"] > 0.1  # nats


@pytest.mark.usefixtures("few_candidates")
def test_auto_refuses_weights_few_rows_and_rows_that_cannot_be_scored(ws):
    for weights in ([0.5, 0.5], "search"):
        with pytest.raises(InvalidInput, match="leave --weights out"):
            ws.merge(PAIR, method="auto", weights=weights)
    with pytest.raises(InvalidInput, match="`probe_rows` must be at least 16"):
        ws.merge(PAIR, method="auto", probe_rows=15)
    with pytest.raises(InvalidInput, match="'size' has 4 probe rows"):
        ws.merge(REFS, method="auto")
    eval_rows = ws.root / "tasks" / "colour" / "eval.jsonl"
    lines = eval_rows.read_text().replace("}", ', "choices": [" red", " blue"]}')
    eval_rows.write_text(lines)
    ws.add_task("colour", scorer="choice_accuracy")  # whose probe rows have no choices
    with pytest.raises(InvalidInput, match="'colour' cannot be scored by choice_accuracy"):
        ws.merge(PAIR, method="auto")


@pytest.mark.usefixtures("few_candidates")
def test_auto_without_any_probe_rows_says_so(ws):
    shutil.rmtree(ws.root / "tasks" / "colour")
    folder = ws.root / "tasks" / "colour"
    write_rows(folder / "train.jsonl", "colour", 24)
    write_rows(folder / "eval.jsonl", "colour", 8, 100)
    ws.add_task("colour", probe_rows=0)
    with pytest.raises(InvalidInput, match="'colour' has no probe rows"):
        ws.merge(PAIR, method="auto")


# Merges made anew


@pytest.mark.parametrize("method", ["concat", "layerwise"])
def test_a_merge_without_a_member_is_that_of_the_rest(ws, method):
    fitted = {"options": {"max_rank": 6}, "probe_rows": 4} if method == "layerwise" else {}
    how = {"method": method, **fitted}
    old = ws.merge(REFS, into="all", **how).adapter
    fresh = ws.merge(REFS[::2], into="fresh", **how)
    for name in ("shape", "shape@1", "shape@latest"):
        made = ws.merge_again(old.ref, drop=[name])
        assert made.adapter.line == "all"
        assert made.adapter.digest == fresh.adapter.digest
        assert made.adapter.config == fresh.adapter.config
        assert [(p.ref, p.weight) for p in made.adapter.parents] == [
            ("colour@1", 0.5), ("size@1", 0.5),
        ]  # fmt: skip


@pytest.mark.parametrize("method", ["concat", "layerwise"])
def test_a_merge_of_other_weights_is_a_fresh_one_of_those(ws, method):
    how = {"method": method, **({"probe_rows": 4} if method == "layerwise" else {})}
    old = ws.merge(PAIR, into="all", weights=[0.25, 0.5], **how).adapter
    made = ws.merge_again(old.ref, reweight={"shape": 1.0}, into="more").adapter
    fresh = ws.merge(PAIR, into="fresh", weights=[0.25, 1.0], **how).adapter
    assert made.ref == "more@1"
    assert made.digest == fresh.digest
    assert ws.merge_again(made.ref).adapter.digest == made.digest


def test_weights_that_were_no_mean_stay_when_a_member_is_dropped(ws):
    old = ws.merge(REFS, method="concat", weights=[1, 1, 1]).adapter
    assert ws.merge_again(old.ref, drop=["size"]).weights == (1.0, 1.0)
    other = ws.merge(REFS, method="concat").adapter
    assert ws.merge_again(other.ref, drop=["size"], reweight={"shape": 0.9}).weights == (
        pytest.approx(1 / 3), 0.9,
    )  # fmt: skip


def test_a_repeated_merge_reads_the_same_general_text(ws, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("It was a dark and stormy night; the rain fell in torrents. " * 20)
    how = {"method": "layerwise", "options": {"general": 1.0}}
    old = ws.merge(PAIR, **how, general=file).adapter
    assert ws.merge_again(old.ref, general=file).adapter.digest == old.digest
    with pytest.raises(InvalidInput, match="--general-text"):
        ws.merge_again(old.ref)
    file.write_text(file.read_text() * 2)
    with pytest.raises(InvalidInput, match="--general-text"):
        ws.merge_again(old.ref, general=file)
    usual = ws.merge(PAIR, **how).adapter
    with pytest.raises(InvalidInput, match="--general-text"):
        ws.merge_again(usual.ref, general=file)


@pytest.mark.parametrize(
    ("how", "kind", "told"),
    [
        ({"drop": ["size"]}, InvalidInput, "'size' is not one of main@1's members: colour@1, shap"),
        ({"drop": ["size@1"]}, InvalidInput, "not one of"),
        ({"drop": ["nothing@1"]}, NotFound, "nothing"),
        ({"reweight": {"size": 1.0}}, InvalidInput, "not one of"),
        ({"drop": ["colour", "shape"]}, InvalidInput, "leave one"),
        ({"drop": ["colour"], "reweight": {"colour": 1.0}}, InvalidInput, "twice"),
        ({"reweight": {"colour": 1.0, "colour@1": 2.0}}, InvalidInput, "twice"),
        ({"reweight": {"colour": float("nan")}}, InvalidInput, "finite"),
    ],
)
def test_members_that_cannot_be_changed_are_named(ws, how, kind, told):
    ws.merge(PAIR, method="concat")
    with pytest.raises(LoriError, match=told) as raised:
        ws.merge_again("main@1", **how)
    assert type(raised.value) is kind
    assert len(ws.store.adapters("main")) == 1


@pytest.mark.usefixtures("few_candidates")
def test_only_merges_that_were_not_found_by_trial_can_be_made_anew(ws):
    with pytest.raises(InvalidInput, match="colour@1 is no merge"):
        ws.merge_again("colour@1")
    searched = ws.merge(PAIR, method="concat", weights="search", probe_rows=4).adapter
    tried = ws.merge(PAIR, method="auto").adapter
    for ref in (searched.ref, tried.ref):
        with pytest.raises(InvalidInput, match=r"found by trying.*merge afresh"):
            ws.merge_again(ref, drop=["shape"])


def test_a_task_that_two_members_know_does_not_name_one(ws):
    ws.merge(PAIR, method="concat", into="pair")
    both = ws.merge(["pair@1", "colour@1"], method="concat").adapter
    with pytest.raises(InvalidInput, match="'colour' may be pair@1 or colour@1"):
        ws.merge_again(both.ref, drop=["colour"])
    assert len(ws.merge_again(both.ref, drop=["colour@1"]).members) == 1
