"""A drawn where the inputs of the tasks taught before hardly go.

After InfLoRA (arXiv:2404.00228) and OSRM (arXiv:2505.22934). The directions themselves are
not stored: there are far more of them than rows of A. A is, so that it returns to the bit
whatever a matrix product gives elsewhere; how it was made stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.errors import InvalidInput, NotFound
from lori_manager.records import Adapter, Task

if TYPE_CHECKING:
    from torch import Tensor

    from lori_manager.engine.weights import Block
    from lori_manager.tasks.encoding import Encoded

PROMPTS = 64  # of each task
MOST = 8.0  # times the rows of A are enlarged at most


def without_probes(tasks: Sequence[Task]) -> list[str]:
    """Names of those that have no probe rows."""
    return [task.name for task in tasks if "probe" not in task.splits]


def avoiding_block(
    ws: Context,
    task: Task,
    config: Config,
    fresh: Block,
    parent: Adapter | None,
    avoid: Sequence[str] | None,
) -> tuple[Block, dict[str, Any]]:
    """The block with its A taken out of what earlier tasks' inputs span.

    Per module, the leading directions that hold `nullspace_energy` of each earlier task's
    inputs, as the model sees them with the adapter of that task, are projected out of A's
    rows, and A is enlarged by one factor a module. `nullspace_scale` says to what:

    rows: the rows of A are as large as before, so that a learning rate carries over;
    inputs: E ||A x||^2 on the task's own prompts is that of the A before, as far as `MOST`.
        What A still answers to earlier tasks grows as well: the new task was learned no
        better for it and an earlier one half forgotten (docs/experiments.md).

    Args:
        fresh: B = 0 on the seeded A. Not modified.
        parent: what the new block is to lie beside, or None.
        avoid: names of tasks; None means those taught before: the parent's, or without a
            parent every task that has an adapter of its own and probe rows.
    Returns:
        The block, and how its A was made, as plain JSON; `fresh` itself and nothing where
        nothing was taught before.
    Raises:
        InvalidInput: a task without probe rows, or fewer free directions than the rank.
    """
    earlier = _earlier(ws, task, parent, avoid)
    if not earlier:
        ws.on_message(f"nothing was taught before {task.name}: its A is not restricted")
        return fresh, {}
    from lori_manager.adapters.lori import DTYPES
    from lori_manager.engine.nullspace import leading_directions, outside, response

    bases: dict[str, Tensor] = {}
    leaders: dict[str, str] = {}
    prompts: list[int] = []
    for one, adapter in earlier:
        seen = _prompts(ws, one)
        prompts.append(len(seen))
        moments = _moments(ws, config, fresh, adapter, seen)
        leaders = _leaders(moments)
        for first in sorted(set(leaders.values())):
            known = bases.get(first)
            bases[first] = leading_directions(moments[first], config.nullspace_energy, known).cpu()
    own = _moments(ws, config, fresh, parent, _prompts(ws, task))
    tensors, removed, scales = {}, {}, {}
    for name in sorted(fresh.B):
        before, Q = fresh.A[name], bases[leaders[name]]
        size = len(Q)
        free = size - Q.shape[1]
        if free < config.rank:
            raise InvalidInput(
                f"`nullspace_energy` {config.nullspace_energy:g} leaves {free} of {size} input "
                f"directions of {name}, rank {config.rank} needs as many: lower one of them, or "
                "avoid fewer tasks"
            )
        A = outside(before, Q)
        if config.nullspace_scale == "rows":
            wanted, got = float(before.double().square().sum()), float(A.square().sum())
        else:
            wanted, got = response(before, own[name]), response(A, own[name])
        scale = min(math.sqrt(wanted / got), MOST) if got > 0 else MOST
        tensors[name] = (A * scale).to(DTYPES[config.store_dtype]).contiguous()
        removed[name], scales[name] = Q.shape[1], round(scale, 4)
    block = replace(fresh, projection=None, tensors=tensors)
    share = sum(removed.values()) / sum(map(len, (bases[leaders[n]] for n in removed)))
    enlarged = math.exp(sum(map(math.log, scales.values())) / len(scales))
    avoided = [f"{one.ref} by {adapter.ref}" for one, adapter in earlier]
    ws.on_message(
        f"A of {task.name} avoids {', '.join(avoided)}: {share:.0%} of its directions taken "
        f"out, its rows times {enlarged:.2f}"
    )
    how = {
        "avoided": avoided,
        "prompts": prompts,
        "energy": config.nullspace_energy,
        "directions_removed": round(share, 4),
        "enlarged": round(enlarged, 4),
    }
    return block, {"A": how, "removed": removed, "scale": scales}


def _earlier(
    ws: Context, task: Task, parent: Adapter | None, avoid: Sequence[str] | None
) -> list[tuple[Task, Adapter]]:
    """The tasks to avoid, each with the adapter whose model sees its prompts."""
    held = [] if parent is None else ws.tasks_of(parent)
    names = held if parent is not None else [one.name for one in ws.store.tasks()]
    chosen: list[tuple[Task, Adapter]] = []
    lacking: list[tuple[Task, Adapter]] = []
    for name in names if avoid is None else avoid:
        if name == task.name:
            continue
        one = ws.store.task(name)
        try:
            adapter = parent if parent is not None and name in held else ws.task_adapter(name)
        except NotFound:
            if avoid is not None:
                raise
            continue  # not taught yet
        (lacking if without_probes([one]) else chosen).append((one, adapter))
    # By default what can be avoided is, but of a parent's tasks none is left out unsaid.
    if lacking and not (chosen and parent is None and avoid is None):
        raise InvalidInput(
            f"task {lacking[0][0].name!r} has no probe rows, so what it sees cannot be avoided: "
            "add it again with --probe or with more training rows, or name others by --avoid"
        )
    return chosen


def _prompts(ws: Context, task: Task) -> list[Encoded]:
    from lori_manager.consolidation import prompts_of

    split = "probe" if "probe" in task.splits else "train"
    return prompts_of(ws.rows(task, split)[1][:PROMPTS])


def _moments(
    ws: Context, config: Config, block: Block, adapter: Adapter | None, prompts: list[Encoded]
) -> dict[str, Tensor]:
    """Second moments of the inputs of the block's modules, with an adapter in the model."""
    from lori_manager.consolidation import input_grams
    from lori_manager.engine.update import LowRankUpdate

    updates = {} if adapter is None else ws.weights(adapter).updates()
    for name, B in block.B.items():
        if name not in updates:  # looked at, not changed
            updates[name] = LowRankUpdate(block.A[name], B).zero()
    return input_grams(ws.base_model(config), updates, prompts, config.score_batch)


def _leaders(moments: dict[str, Tensor]) -> dict[str, str]:
    """Module name -> the first of the modules that see the same input."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(gram), name) for name, gram in moments.items()}
