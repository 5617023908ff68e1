"""Routing: features of prompts, each row by its member, out to a directory and back."""

import json
import shutil
from types import SimpleNamespace

import architectures
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small_workspaces import WORDS, copied, make_workspace

import lori_manager
from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.engine.router import fit_router
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.errors import Conflict, DamagedObject, ImportRefused, InvalidInput
from lori_manager.generation import generate
from lori_manager.merging.methods import MergeOptions
from lori_manager.models import BaseModel, linear_shapes, load_base
from lori_manager.repair import repair
from lori_manager.routed import RoutedModel, load_routed, member_names
from lori_manager.routing import build_router, features_of, merge_routed
from lori_manager.scoring import score_rows
from lori_manager.tasks.encoding import Encoded
from lori_manager.tasks.scorers import scorers
from lori_manager.teaching import TrainOptions

pytestmark = pytest.mark.usefixtures("one_thread")

RANGES = ((1, 4), (20, 23), (40, 43))  # of token ids: what a member's prompts are made of
EXACT, NATS = scorers.get("exact_match"), scorers.get("perplexity")


def make_base(make, folder):
    torch.manual_seed(0)
    base = BaseModel(make().eval().requires_grad_(False), folder, "fp32")
    base.tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=0)
    return base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(architectures.llama, tmp_path_factory.mktemp("llama"))


def rows_of(member, count=8, seed=0):
    """Prompts of the member's own tokens, each with a completion of two."""
    draw = np.random.default_rng([seed, member])
    rows = []
    for _ in range(count):
        prompt = draw.integers(*RANGES[member], int(draw.integers(3, 9)))
        rows.append(Encoded(np.concatenate([prompt, [5, 0]]), len(prompt)))
    return rows


PROBES = [rows_of(i) for i in range(3)]
HELD = [rows_of(i, 6, 1) for i in range(3)]


def member(model, seed):
    g = torch.Generator().manual_seed(seed)
    shapes = linear_shapes(model)
    A = {n: torch.randn(2, s[1], generator=g) / s[1] ** 0.5 for n, s in shapes.items()}
    B = {n: torch.randn(s[0], 2, generator=g) * 0.5 for n, s in shapes.items()}
    return AdapterWeights((Block(B, 1.0, tensors=A),))


@pytest.fixture(scope="module")
def members(base):
    return [member(base.model, i) for i in range(3)]


@pytest.fixture(scope="module")
def model(base, members):
    return RoutedModel(base, merge_routed(base, members, [1 / 3] * 3, PROBES), "abc")


# ---- features


def by_hand(model, rows, depth):
    """From hidden states of every prompt alone."""
    out = []
    for row in rows:
        ids = torch.as_tensor(np.asarray(row.ids[: row.prompt_length], np.int64))[None]
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[depth][0].float()
        states = states / states.norm(dim=1, keepdim=True)
        out.append(torch.cat([states.mean(0), states[-1]]))
    return torch.stack(out)


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("make", [architectures.llama, architectures.gemma2, architectures.gpt2])
def test_features_are_the_prompts_own_in_any_batch_padded_or_packed(tmp_path, make, batch, packing):
    base = make_base(make, tmp_path)
    stem = "transformer.h" if make is architectures.gpt2 else "model.layers"
    rows = [row for own in HELD for row in own]
    names = [f"{stem}.0", f"{stem}.1"]
    found = features_of(base, rows, names, batch, packing)
    for depth, name in enumerate(names):
        expected = by_hand(base.model, rows, depth)
        assert found[name].shape == (18, 64)
        assert torch.allclose(found[name], expected, atol=1e-5)


def test_features_of_a_bfloat16_base_are_float32_and_near(tmp_path, base):
    half = make_base(architectures.llama, tmp_path)
    half.model.to(torch.bfloat16)
    half.precision = "bf16"
    name = "model.layers.1"
    found = features_of(half, HELD[0], [name], 4)[name]
    assert found.dtype == torch.float32
    assert torch.allclose(found, features_of(base, HELD[0], [name], 4)[name], atol=0.02)


def test_no_block_runs_that_is_not_needed_and_nothing_stays_in_the_model(base):
    ran = []
    hooks = [
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(base.model.model.layers)
    ]
    try:
        features_of(base, HELD[0], ["model.layers.1"], 100)
        assert ran == [0]
        assert not any(b._forward_pre_hooks for b in base.model.model.layers)
    finally:
        for hook in hooks:
            hook.remove()


def test_a_block_that_the_base_lacks_or_does_not_call_is_told(base):
    with pytest.raises(InvalidInput, match=r"reads model\.layers\.9, which the base lacks"):
        features_of(base, HELD[0], ["model.layers.1", "model.layers.9"], 4)
    assert not any(b._forward_pre_hooks for b in base.model.model.layers)
    base.model.spare = torch.nn.Identity()
    try:
        with pytest.raises(InvalidInput, match="which the base does not call"):
            features_of(base, HELD[0], ["spare"], 4)
    finally:
        del base.model.spare


# ---- the merge


def test_the_router_tells_prompts_of_unlike_tokens_apart(model):
    assert model.router.accuracy == 1
    for number, rows in enumerate(HELD):
        assert model.routes(rows, 4).tolist() == [number] * len(rows)


def test_the_depth_is_the_one_whose_held_out_prompts_are_told_apart_best(tmp_path):
    base = make_base(lambda: architectures.llama(num_hidden_layers=8), tmp_path)
    modules = list(linear_shapes(base.model))
    close = [rows_of(0, 8, seed) for seed in (3, 4)]  # of the same tokens
    router = build_router(base, modules, close, [1, 1], 4)
    told = {}
    for depth in (2, 4, 6):
        name = f"model.layers.{depth}"
        told[name] = fit_router([features_of(base, r, [name], 4)[name] for r in close], name)[1]
    assert router.reads == max(told, key=told.get)
    assert len(set(told.values())) == 3


def test_one_member_is_returned_and_more_are_kept_bit_for_bit(base, members):
    assert merge_routed(base, members[:1], [0.3], PROBES[:1]) is members[0]
    whole = merge_routed(base, members, [1, 1, 1], PROBES)
    for i, one in enumerate(members):
        assert all(a is b for a, b in zip(whole.member(i).blocks, one.blocks, strict=True))


@pytest.mark.parametrize(
    ("weights", "options", "told"),
    [
        ([1, 0], {}, "expected positive numbers, got 1, 0"),
        ([1, -1], {}, "expected positive"),
        ([1, 1], {"max_rank": 2}, "leave --max-rank out"),
    ],
)
def test_what_means_nothing_to_a_router_is_refused(base, members, weights, options, told):
    with pytest.raises(InvalidInput, match=told):
        merge_routed(base, members[:2], weights, PROBES[:2], MergeOptions(**options))


def test_one_prompt_of_a_member_is_too_few(base, members):
    with pytest.raises(InvalidInput, match="two probe prompts"):
        merge_routed(base, members[:2], [1, 1], [PROBES[0], PROBES[1][:1]])


def test_a_routed_adapter_is_no_start_for_a_repair(base, model):
    with pytest.raises(InvalidInput, match="no single update"):
        repair(base, model._weights, [], [], None, steps=1, peak=0.1)


# ---- rows by their members


def own_scores(base, members, number, rows, scorer=NATS, batch=4):
    layers = low_rank_layers(base.model, members[number].updates())
    with attached(base.model, layers):
        return score_rows(base, rows, rows, scorer, batch)


@pytest.mark.parametrize("scorer", [EXACT, NATS], ids=["exact_match", "perplexity"])
def test_rows_routed_right_get_exactly_their_members_scores(base, members, model, scorer):
    for number, rows in enumerate(HELD):
        outcomes, weights = model.score_rows(rows, rows, scorer, 4)
        expected, weighed = own_scores(base, members, number, rows, scorer)
        assert np.array_equal(outcomes, expected)
        assert (weights is None) == (weighed is None)
        assert weights is None or np.array_equal(weights, weighed)


def test_rows_of_all_members_in_one_call_are_put_back_in_order(base, members, model):
    rows = [row for trio in zip(*HELD, strict=True) for row in trio]
    outcomes, weights = model.score_rows(rows, rows, NATS, 4)
    for number in range(3):
        expected, weighed = own_scores(base, members, number, HELD[number])
        assert np.allclose(outcomes[number::3], expected, rtol=1e-5)
        assert weights is None or np.array_equal(weights[number::3], weighed)


def test_a_row_that_goes_wrong_gets_the_wrong_members_score(base, members, model):
    wrong = np.array([1, 0, 0, 0, 0, 0])
    outcomes, _ = model.score_rows(HELD[0], HELD[0], NATS, 4, routes=wrong)
    strays, _ = own_scores(base, members, 1, HELD[0][:1])
    right, _ = own_scores(base, members, 0, HELD[0][:1])
    assert outcomes[0] == pytest.approx(strays[0], rel=1e-5)
    assert abs(outcomes[0] - right[0]) > 1e-3


def test_completions_do_not_change_routes(base, model):
    for rows, strange in zip(HELD, (HELD[1], HELD[2], HELD[0]), strict=True):
        changed = [
            Encoded(np.concatenate([r.ids[: r.prompt_length], s.ids]), r.prompt_length)
            for r, s in zip(rows, strange, strict=True)
        ]
        assert np.array_equal(model.routes(changed, 4), model.routes(rows, 4))
        names = [model.router.reads]
        found, plain = (features_of(base, r, names, 4)[names[0]] for r in (changed, rows))
        assert torch.equal(found, plain)


def test_routing_reads_the_base_whatever_member_acts(model):
    expected = features_of(model.base, HELD[0], [model.router.reads], 4)
    with model.member(1):
        inside = features_of(model.base, HELD[0], [model.router.reads], 4)
    after = features_of(model.base, HELD[0], [model.router.reads], 4)
    assert not torch.equal(inside[model.router.reads], expected[model.router.reads])
    assert torch.equal(after[model.router.reads], expected[model.router.reads])


def test_progress_counts_rows_to_the_last_one(model):
    told = []
    rows = [row for own in HELD for row in own]
    model.score_rows(rows, rows, NATS, 2, lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (18, 18)


def test_no_rows_have_no_routes(model):
    assert model.routes([], 4).shape == (0,)
    assert model.score_rows([], [], NATS, 4)[0].shape == (0,)


def test_a_routed_model_wants_a_router_and_a_name_a_member(base, members, model):
    with pytest.raises(InvalidInput, match="is not routed"):
        RoutedModel(base, members[0])
    with pytest.raises(ValueError, match="2 names for 3 members"):
        RoutedModel(base, model._weights, ["a", "b"])


def adapter(line, version=1, task=None):
    return SimpleNamespace(line=line, version=version, task=task)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ([adapter("a", 3, "nlu"), adapter("b", 1, "code")], ["nlu", "code"]),
        ([adapter("a", 3, "nlu"), adapter("b", 1, "NLU")], ["a", "b"]),
        ([adapter("a", 3, "nlu"), adapter("b", 1)], ["a", "b"]),
        ([adapter("a", 3, "nlu"), adapter("a", 1, "nlu")], ["a-3", "a-1"]),
        ([adapter("a", 1, "router.json"), adapter("Readme.md", 1, "b")], ["a-1", "Readme.md-1"]),
    ],
)
def test_members_are_named_by_what_tells_them_apart(given, names):
    assert member_names(given) == names


# ---- in a workspace


@pytest.fixture(scope="module")
def taught(tiny_base, tmp_path_factory):
    """colour@1, shape@1, size@1 and the routed merge main@1. Not to be changed."""
    workspace = make_workspace(tmp_path_factory.mktemp("routed") / "ws", tiny_base)
    workspace.train(list(WORDS))
    workspace.merge([], names=list(WORDS), method="routed", weights=[1, 1, 1])
    return workspace


@pytest.fixture
def ws(taught, tmp_path):
    return copied(taught, tmp_path / "ws")


def test_a_routed_merge_is_one_version_with_members_and_scores(taught):
    made = taught.adapter("main@1")
    refs = [f"{task}@1" for task in WORDS]
    assert (made.origin, made.method, made.projection) == ("merged", "routed", None)
    assert [p.ref for p in made.parents] == refs
    assert [p.digest for p in made.parents] == [taught.adapter(ref).digest for ref in refs]
    assert made.rank == 4
    weights = taught.weights(made)
    assert made.facts["routing"] == weights.router.report()
    probes = [taught.store.task(task).splits["probe"].rows for task in WORDS]
    assert [sum(row) for row in made.facts["routing"]["held_out"]] == probes
    for i, ref in enumerate(refs):
        (block,) = weights.member(i).blocks
        (own,) = taught.weights(taught.adapter(ref)).blocks
        assert block.projection == own.projection
        assert all(torch.equal(block.B[n], own.B[n]) for n in own.B)
        assert all(torch.equal(block.mask[n], own.mask[n]) for n in own.B)
    parts = sum(taught.adapter(ref).bytes for ref in refs)
    assert parts * 0.8 < made.bytes < parts + 8000


def test_its_scores_are_its_members_own_where_all_rows_go_right(taught):
    """The tiny base tells the three tasks' words apart, so every outcome is the member's."""
    model = taught.routed("main@1")
    for number, task in enumerate(map(taught.store.task, WORDS)):
        _, encoded = taught.rows(task, "eval")
        assert model.routes(encoded, 4).tolist() == [number] * 8
        (mine,) = taught.score(["main@1"], [task.name])
        (own,) = taught.score([f"{task.name}@1"], [task.name])
        assert np.array_equal(taught.store.outcomes(mine)[0], taught.store.outcomes(own)[0])
    table = {t.ref: t for t in taught.audit("main@1").tasks}
    assert "main@1" in {e.subject for e in table["colour#1"].entries}


def test_a_routed_adapter_is_refused_where_one_update_is_wanted(ws, tmp_path):
    told = r"main@1 is routed: one of colour@1, shape@1, size@1 acts on each input"
    for use in (
        lambda: ws.merge(["main@1", "colour@1"], into="again"),
        lambda: ws.train(["colour"], options=TrainOptions(start="main@1", line="more")),
        lambda: ws.export("main@1", tmp_path / "whole", full=True),
    ):
        with pytest.raises(InvalidInput, match=told):
            use()
    assert not (tmp_path / "whole").exists()
    assert {line.name for line in ws.store.lines()} == {*WORDS, "main"}
    with pytest.raises(InvalidInput, match="colour@1 is not routed"):
        ws.routed("colour@1")


def test_verify_finds_the_a_of_a_mask_in_a_sum_and_passes_routed_adapters_by(ws):
    def stop(progress):
        if progress.phase.startswith("training"):
            raise KeyboardInterrupt

    ws.merge(["colour@1", "shape@1"], method="concat", into="sum")
    ws.merge(["colour@1", "shape@1"], method="routed", into="later")
    ws.on_progress = stop
    with pytest.raises(KeyboardInterrupt):
        ws.train(["size"], options=TrainOptions(start="sum@1", line="more"))
    assert list(ws.verify()) == []


def test_one_member_alone_is_no_routed_adapter(ws):
    made = ws.merge(["colour@1"], method="routed", into="alone").adapter
    assert made.facts == {}
    assert made.digest == ws.adapter("colour@1").digest
    ws.export("alone@1", ws.root / "out")


# ---- out and in


PROMPTS = ["colour 7:", "size 12:", "shape 3:", "colour 100:", "size 3:"]


@pytest.fixture(scope="module")
def exported(taught, tmp_path_factory):
    return taught.export("main@1", tmp_path_factory.mktemp("exported") / "out")


def test_a_directory_holds_a_peft_adapter_a_member_and_the_router(taught, exported):
    names = {p.name for p in exported.iterdir()}
    assert names == {*WORDS, "router.json", "router.safetensors", "README.md"}
    config = json.loads((exported / "router.json").read_text())
    assert config["members"] == list(WORDS)
    assert config["reads"] == taught.adapter("main@1").facts["routing"]["reads"]
    found = taught.export("colour@1", exported.parent / "colour")
    own, alone = (folder / "adapter_config.json" for folder in (exported / "colour", found))
    assert own.read_bytes() == alone.read_bytes()
    own, alone = (load_file(c.parent / "adapter_model.safetensors") for c in (own, alone))
    assert all(np.array_equal(own[name], alone[name]) for name in alone | own)
    assert "load_routed" in (exported / "README.md").read_text()


def test_a_router_on_disk_is_plain_matrices(taught, exported):
    """The recipe of its README, with numpy alone behind the hidden states."""
    base = taught.base_model(taught.settings.config)
    tensors = load_file(exported / "router.safetensors")
    depth = int(json.loads((exported / "router.json").read_text())["reads"].rpartition(".")[2])
    _, encoded = taught.rows(taught.store.task("shape"), "eval")
    x = by_hand(base.model, encoded, depth).numpy()
    scores = x @ tensors["weights"].T + tensors["bias"]
    assert np.array_equal(scores.argmax(1), taught.routed("main@1").routes(encoded, 8))


def test_what_was_exported_routes_and_generates_as_in_the_workspace(taught, exported, tmp_path):
    here, there = taught.routed("main@1"), load_routed(exported, taught.base_folder)
    assert here.names == there.names == tuple(WORDS)
    assert there.route(PROMPTS) == here.route(PROMPTS)
    assert here.route(PROMPTS) == ["colour", "size", "shape", "colour", "size"]
    assert there.generate(PROMPTS, 6) == here.generate(PROMPTS, 6)
    again = load_routed(shutil.copytree(exported, tmp_path / "copy"), here.base)
    assert again.generate(PROMPTS, 6, batch=1) == here.generate(PROMPTS, 6)


def test_generated_text_is_the_members_own(taught):
    model = taught.routed("main@1")
    said = model.generate(PROMPTS, 6)
    for prompt, text, name in zip(PROMPTS, said, model.route(PROMPTS), strict=True):
        ids = model.base.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        updates = taught.weights(taught.adapter(f"{name}@1")).updates()
        with attached(model.base.model, low_rank_layers(model.base.model, updates)):
            (tokens,) = generate(model.base, [ids], 6, 1)
        assert text == model.base.tokenizer.decode(tokens)


def test_a_prompt_beyond_the_context_loses_its_beginning(taught):
    model = taught.routed("main@1")
    assert model.generate(["x" * 500 + PROMPTS[0]], 6) == model.generate(
        ["x" * (122 - len(PROMPTS[0])) + PROMPTS[0]], 6
    )


def test_exports_go_into_an_empty_directory_and_into_no_other(ws, tmp_path):
    (tmp_path / "empty").mkdir()
    ws.export("main@1", tmp_path / "empty")
    assert load_routed(tmp_path / "empty", ws.base_folder).names == tuple(WORDS)
    with pytest.raises(Conflict, match="not empty"):
        ws.export("main@1", tmp_path / "empty")


def edited(exported, folder, **changes):
    shutil.copytree(exported, folder)
    config = json.loads((folder / "router.json").read_text()) | changes
    (folder / "router.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"members": ["colour", "shape"]},
        {"members": ["colour", "shape", "../size"]},
        {"members": ["colour", "shape", 3]},
        {"version": 2},
        {"held_out": [[1]]},
        {"reads": None},
    ],
    ids=str,
)
def test_a_directory_that_contradicts_itself_is_damaged(taught, exported, tmp_path, changes):
    with pytest.raises(DamagedObject, match="router is malformed"):
        load_routed(edited(exported, tmp_path / "out", **changes), taught.base_folder)


def test_a_directory_without_its_parts_or_of_another_base_is_refused(
    taught, exported, tmp_path, tiny_base
):
    with pytest.raises(ImportRefused, match="no routed adapter"):
        load_routed(exported / "colour", taught.base_folder)
    lacking = shutil.copytree(exported, tmp_path / "lacking")
    shutil.rmtree(lacking / "size")
    with pytest.raises(ImportRefused, match="size"):
        load_routed(lacking, taught.base_folder)
    cut = shutil.copytree(exported, tmp_path / "cut")
    (cut / "router.safetensors").write_bytes((cut / "router.safetensors").read_bytes()[:-9])
    with pytest.raises(DamagedObject, match="malformed"):
        load_routed(cut, taught.base_folder)
    other = load_base(tiny_base, "fp32", "cpu")
    with torch.no_grad():
        other.model.model.norm.weight.mul_(2)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ImportRefused, match="fingerprint"):
        load_routed(exported, tmp_path / "other")


def test_the_public_names_are_there():
    assert lori_manager.RoutedModel is RoutedModel
    assert lori_manager.load_routed is load_routed
