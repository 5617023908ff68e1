"""Allocating ranks as PEFT does, to the entry; and what it costs a GPU to wait for nothing."""

import architectures
import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from lori_manager.adapters.kind import module_of
from lori_manager.adapters.rank_budget import RankBudget, Schedule, Triplets, orthogonality
from lori_manager.config import Config
from lori_manager.kinds import resolved
from lori_manager.models import BaseModel
from lori_manager.tasks.encoding import Encoded
from lori_manager.training import fit

SHAPES = {"q": (8, 6), "k": (3, 6), "v": (8, 6), "down": (6, 11)}
RANK, TARGET, STEPS = 5, 2, 24


def drawn(seed):
    g = torch.Generator().manual_seed(seed)

    def one(*shape):
        return nn.Parameter(torch.randn(shape, generator=g))

    return {
        name: Triplets(one(RANK, inside), one(RANK, 1), one(out, RANK))
        for name, (out, inside) in SHAPES.items()
    }


class Theirs:
    """What PEFT's allocator asks of a model."""

    def __init__(self, modules):
        self.modules = modules

    def named_parameters(self):
        for name, triplets in self.modules.items():
            for part in ("A", "E", "B"):
                yield f"{name}.lora_{part}.default", getattr(triplets, part)


def walked(modules, g):
    """Another value and gradient for every parameter, as a step of an optimizer leaves them."""
    for triplets in modules.values():
        for p in (triplets.A, triplets.E, triplets.B):
            p.grad = torch.randn(p.shape, generator=g)
            p.data -= 0.1 * p.grad


@pytest.mark.parametrize(("tinit", "tfinal", "every"), [(4, 6, 3), (0, 0, 1), (3, 10, 7)])
@pytest.mark.parametrize("seed", range(4))
def test_every_step_leaves_the_triplets_that_peft_leaves(tinit, tfinal, every, seed):
    config = AdaLoraConfig(init_r=RANK, target_r=TARGET, total_step=STEPS, tinit=tinit,
                           tfinal=tfinal, deltaT=every)  # fmt: skip
    modules, theirs = drawn(seed), Theirs(drawn(seed))
    allocator = RankAllocator(theirs, config, "default")
    last = STEPS - tfinal
    schedule = Schedule(
        RANK * len(SHAPES), TARGET * len(SHAPES), tinit, last, every, config.beta1, config.beta2
    )
    own = RankBudget(modules, schedule)
    mine, yours = (torch.Generator().manual_seed(seed) for _ in range(2))
    pattern, cuts = None, 0
    for step in range(1, STEPS + 1):
        walked(modules, mine)
        walked(theirs.modules, yours)
        if step > last:
            allocator.mask_using_rank_pattern(theirs, pattern)
        else:
            _, found = allocator.update_and_allocate(theirs, step, force_mask=step == last)
            pattern, cuts = found or pattern, cuts + bool(found)
        own.after_step(step)
        for name, triplets in modules.items():
            assert torch.equal(triplets.E, theirs.modules[name].E), step
        if step in (5, last, last + 1):  # a checkpoint in the midst changes nothing
            held = {key: t.clone() for key, t in own.state().items()}
            own = RankBudget(modules, schedule)
            own.load_state(held)
    assert cuts >= 2
    assert sum(int((t.E != 0).sum()) for t in modules.values()) == TARGET * len(SHAPES)


def test_orthogonality_is_the_mean_of_every_factor_s_distance():
    modules = drawn(0)
    eye = torch.eye(RANK)
    norms = [torch.linalg.norm(m.A @ m.A.T - eye) for m in modules.values()]
    norms += [torch.linalg.norm(m.B.T @ m.B - eye) for m in modules.values()]
    expected = torch.stack(norms).mean()
    assert torch.allclose(orthogonality(modules), expected)
    everything = [p for m in modules.values() for p in (m.A, m.B)]
    for ours, theirs in zip(torch.autograd.grad(orthogonality(modules), everything),
                            torch.autograd.grad(expected, everything), strict=True):  # fmt: skip
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "svfit"])
def test_recorded_steps_train_as_unrecorded_ones(tmp_path, kind, monkeypatch):
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay",
                        lambda graph: (replays.append(1), replay(graph))[1])  # fmt: skip
    g = torch.Generator().manual_seed(0)
    rows = [Encoded(torch.randint(0, 61, (12,), generator=g).tolist(), 4) for _ in range(4)] * 16
    losses = {}
    for graphs in ("off", "auto"):
        torch.manual_seed(0)
        model = (
            architectures.llama(initializer_range=0.2)
            .eval()
            .requires_grad_(False)
            .to("cuda", torch.bfloat16)
        )
        base = BaseModel(model, tmp_path, "bf16")
        config = resolved(Config(kind=kind, rank=4, batch=4, graphs=graphs))
        with module_of(kind).training(base, config, steps=60) as training:
            losses[graphs] = torch.tensor(
                fit(base, training.parameters, rows, config, steps=60, peak=1e-1,
                    training=training).losses
            )  # fmt: skip
        if graphs == "off":
            assert not replays
    assert len(replays) > 40
    learned = losses["off"][0] - losses["off"][-1]
    assert learned > 0.2 * losses["off"][0]
    assert (losses["off"] - losses["auto"]).abs().max() < 0.1 * learned
