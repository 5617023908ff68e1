"""Learning from what a teacher says: the loss, the teacher's table, and the repair of a merge."""

import architectures
import numpy as np
import pytest
import torch

from lori_manager.config import Config
from lori_manager.distillation import own_words, taught_rows, teacher_words
from lori_manager.engine.head import IGNORED, SoftTargets, head_loss, logits_loss
from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.errors import InvalidInput
from lori_manager.forward import Forward, place
from lori_manager.merging.concat import merge_concat
from lori_manager.merging.methods import MergeOptions
from lori_manager.models import BaseModel, linear_shapes
from lori_manager.repair import merge_repair, repair
from lori_manager.soups import merge_soups
from lori_manager.tasks.encoding import Encoded
from lori_manager.training import fit

pytestmark = pytest.mark.usefixtures("one_thread")


def make_base(make, folder):
    torch.manual_seed(0)
    return BaseModel(make().eval().requires_grad_(False), folder, "fp32")


def adapter(model, seed, rank=3, size=0.3, density=None, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = linear_shapes(model)
    A = {n: torch.randn(rank, s[1], generator=g) / s[1] ** 0.5 for n, s in shapes.items()}
    B = {n: torch.randn(s[0], rank, generator=g) * size for n, s in shapes.items()}
    mask = None
    if density is not None:
        mask = {n: torch.rand(b.shape, generator=g) < density for n, b in B.items()}
        B = {n: b * mask[n] for n, b in B.items()}
    return AdapterWeights(
        (Block({n: b.to(dtype) for n, b in B.items()}, 0.7, tensors=A, mask=mask),)
    )


def rows_of(seed, count=8, low=0, high=61):
    draw = np.random.default_rng(seed)
    return [
        Encoded(draw.integers(low, high, n).astype(np.int32), int(draw.integers(1, n - 1)))
        for n in draw.integers(4, 9, count)
    ]


def soft_table(places, k, vocabulary, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(vocabulary, generator=g)[:k] for _ in range(places)])
    return SoftTargets(ids, torch.rand(places, k, generator=g).softmax(1))


@pytest.mark.parametrize("way", ["head", "logits"])
def test_the_soft_loss_is_the_cross_entropy_against_the_whole_distribution(way):
    g = torch.Generator().manual_seed(1)
    h, W = torch.randn(5, 4, generator=g).double(), torch.randn(11, 4, generator=g).double()
    table = soft_table(7, 3, 11)
    targets = torch.tensor([6, 0, IGNORED, 3, 3])
    h.requires_grad_(True)
    if way == "head":
        loss = head_loss(h, W, None, targets, table)
    else:
        loss = logits_loss(h @ W.t(), targets, table)
    expected = torch.zeros((), dtype=torch.float64)
    for i, place_ in enumerate(targets.tolist()):
        if place_ != IGNORED:
            q = torch.zeros(11, dtype=torch.float64)
            q[table.ids[place_]] = table.probabilities[place_].double()
            expected = expected - (q * (h[i] @ W.t()).log_softmax(0)).sum()
    (wanted,) = torch.autograd.grad(expected, h, retain_graph=True)
    (found,) = torch.autograd.grad(loss, h)
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-7)
    assert bool((found[2] == 0).all())


@pytest.mark.parametrize("packing", ["off", "on"])
@pytest.mark.parametrize("make", [architectures.llama, architectures.gemma2])
def test_a_teacher_that_is_sure_of_the_completions_gives_the_usual_loss(tmp_path, make, packing):
    base, rows = make_base(make, tmp_path), rows_of(0)
    usual = Forward(base, packing=packing)
    taught, table = taught_rows([own_words(rows[:3]), own_words(rows[3:])], base.device)
    soft = Forward(base, packing=packing, soft=table)
    with usual.ready():
        a = usual.loss(place(usual.batch(rows), base.device))
        b = soft.loss(place(soft.batch(taught), base.device))
    assert float(a) == pytest.approx(float(b), rel=1e-5)


def test_a_teachers_words_are_its_own_likeliest_with_the_label_mixed_in(tmp_path):
    base, rows = make_base(architectures.llama, tmp_path), rows_of(3, 5)
    one = adapter(base.model, 1)
    words = teacher_words(base, one.updates(), rows, 2, labels=0.25)
    at = 0
    with attached(base.model, low_rank_layers(base.model, one.updates())), torch.no_grad():
        for row in rows:
            logits = base.model(torch.as_tensor(np.asarray(row.ids, np.int64))[None]).logits[0]
            for i in range(row.prompt_length, len(row.ids)):
                p, said = logits[i - 1].softmax(0).topk(32)
                assert torch.equal(words.ids[at, :32].sort()[0], said.sort()[0])
                by = dict(zip(words.ids[at, :32].tolist(), words.probabilities[at, :32].tolist(),
                              strict=True))  # fmt: skip
                for token, share in zip(said.tolist(), (p / p.sum()).tolist(), strict=True):
                    assert by[token] == pytest.approx(0.75 * share, abs=1e-5)
                assert int(words.ids[at, 32]) == int(row.ids[i])
                assert float(words.probabilities[at, 32]) == 0.25
                at += 1
    assert at == len(words.ids)


def distance_to(base, teacher, student, rows):
    """Mean cross-entropy of the student against the teacher's words."""
    taught, table = taught_rows([teacher_words(base, teacher.updates(), rows, 8)], base.device)
    forward = Forward(base, soft=table)
    with (
        attached(base.model, low_rank_layers(base.model, student.updates())),
        torch.no_grad(),
        forward.ready(),
    ):
        return float(forward.loss(place(forward.batch(taught), base.device)))


@pytest.mark.parametrize("density", [None, 0.3])
def test_repair_brings_a_merge_nearer_to_its_members_and_moves_nothing_else(tmp_path, density):
    base = make_base(architectures.llama, tmp_path)
    dtype = torch.float32 if density is None else torch.bfloat16
    members = [adapter(base.model, s, density=density, dtype=dtype, size=1.0) for s in (1, 2)]
    rows = [rows_of(1, 12, 0, 30), rows_of(2, 12, 30, 61)]
    merged = merge_concat(members, [0.9, 0.1])
    before = [distance_to(base, m, merged, r) for m, r in zip(members, rows, strict=True)]
    config = Config(batch=8, packing="off", warmup=0.0, clip=0.0)
    found, result = repair(base, merged, members, rows, config, steps=40, peak=2e-2, labels=0.0)
    after = [distance_to(base, m, found, r) for m, r in zip(members, rows, strict=True)]
    assert sum(after) < sum(before) - 1
    assert len(result.losses) == 40
    for old, new in zip(merged.blocks, found.blocks, strict=True):
        assert new.scaling == old.scaling
        assert new.tensors is old.tensors
        for name, B in new.B.items():
            assert B.dtype == old.B[name].dtype
            assert not torch.equal(B, old.B[name])
            if density is not None:
                assert torch.equal(B != 0, B.bool() & old.mask[name])


def test_soft_training_matches_hard_training_step_by_step(tmp_path):
    base, rows = make_base(architectures.llama, tmp_path), rows_of(5, 16)
    taught, table = taught_rows([own_words(rows)], base.device)
    from lori_manager.adapters import lori

    config = Config(batch=4, rank=2, packing="off")
    losses = []
    for given, soft in ((rows, None), (taught, table)):
        layers = lori.trainable_layers(
            base.model, lori.fresh_block(linear_shapes(base.model), config, "x"), None
        )
        with lori.in_training(base, layers) as parameters:
            losses.append(
                fit(base, parameters, given, config, steps=6, peak=1e-2, soft=soft).losses
            )
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_part_without_scaling_cannot_be_repaired(tmp_path):
    """Nor may it turn to numbers that are none."""
    base = make_base(architectures.llama, tmp_path)
    members = [adapter(base.model, s) for s in (1, 2)]
    rows = [rows_of(1), rows_of(2)]
    merged = merge_concat(members, [1.0, 0.0])
    with pytest.raises(InvalidInput, match="scaling 0"):
        repair(base, merged, members, rows, Config(batch=8), steps=1, peak=1e-2)
    kept = MergeOptions(span="members", steps=1)
    found = merge_repair(base, members, [0.5, 0.0], rows, kept)  # who counts nothing is left out
    assert len(found.blocks) == 1
    silent = merge_concat(members[1:], [0.0])
    with pytest.raises(InvalidInput, match="scaling 0"):
        merge_repair(base, [members[0], silent], [0.5, 0.5], rows, kept)


def test_soups_learn_weights_that_bring_the_merge_nearer_to_its_members(tmp_path):
    base = make_base(architectures.llama, tmp_path)
    members = [adapter(base.model, s, size=1.0, density=0.5) for s in (1, 2)]
    rows = [rows_of(1, 12, 0, 30), rows_of(2, 12, 30, 61)]
    start = merge_concat(members, [0.9, 0.1])
    told = []
    found = merge_soups(
        base, members, [0.9, 0.1], rows, MergeOptions(steps=60, rate=1e-2, labels=0.0),
        on_progress=lambda *done: told.append(done),
    )  # fmt: skip
    assert told[-1] == (60, 60)
    least = sum(distance_to(base, m, m, r) for m, r in zip(members, rows, strict=True))
    before, after = (
        sum(distance_to(base, m, w, r) for m, r in zip(members, rows, strict=True)) - least
        for w in (start, found)
    )
    assert 0 < after < 0.9 * before
    # Each module's update is one number times the member's, whose A and mask are kept.
    numbers = set()
    for one, member in zip(found.blocks, members, strict=True):
        (old,) = member.blocks
        assert one.tensors is old.tensors
        assert one.mask is old.mask
        for name, B in old.B.items():
            c = float((one.B[name] * B).sum() / B.square().sum())
            assert torch.allclose(one.B[name], c * B, rtol=1e-4, atol=1e-6)
            numbers.add(round(c, 4))
    assert len(numbers) > len(members)


def test_soups_of_few_steps_begin_at_the_weights_given(tmp_path):
    base = make_base(architectures.llama, tmp_path)
    members = [adapter(base.model, s) for s in (1, 2)]
    options = MergeOptions(steps=1, rate=1e-9)
    found = merge_soups(base, members, [0.5, -2.0], [rows_of(1), rows_of(2)], options)
    expected = merge_concat(members, [0.5, -2.0]).updates()
    for name, update in found.updates().items():
        assert torch.allclose(update.delta(), expected[name].delta(), atol=1e-5)


def test_soups_of_one_member_find_their_way_back_to_weight_one(tmp_path):
    base = make_base(architectures.llama, tmp_path)
    one, rows = adapter(base.model, 1, size=1.0), rows_of(1, 16)
    least = distance_to(base, one, one, rows)
    found = merge_soups(
        base, [one], [0.3], [rows], MergeOptions(steps=80, rate=5e-3, labels=0.0)
    )  # fmt: skip
    start = distance_to(base, one, merge_concat([one], [0.3]), rows) - least
    assert distance_to(base, one, found, rows) - least < 0.1 * start
