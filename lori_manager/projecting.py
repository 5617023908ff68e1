"""Where a training starts: the block whose B will train, and what stays fixed beside it.

With a `task` or `shared` A, training goes on with a parent's B. `orthogonal` and
`nullspace` give every training an A of its own: a parent's blocks stay as they are, to
the bit, and the new block is added to them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lori_manager.avoiding import avoiding_block, without_probes
from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.errors import DamagedObject, InvalidInput
from lori_manager.ranks import ranks
from lori_manager.records import Adapter, Task

if TYPE_CHECKING:
    from lori_manager.engine.weights import AdapterWeights, Block
    from lori_manager.models import BaseModel

logger = logging.getLogger(__name__)

APART = frozenset({"orthogonal", "nullspace"})


@dataclass(frozen=True)
class Start:
    """What a training starts from.

    Attributes:
        block: its B trains.
        beside: blocks that stay fixed, or None.
        facts: how A was made, kept with the adapter.
        meta: the same by module, kept in its file.
    """

    block: Block
    beside: AdapterWeights | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


def check_projection(
    config: Config,
    tasks: Sequence[Task],
    *,
    sequence: bool,
    protect: bool,
    avoid: Sequence[str] | None,
) -> None:
    """Refuse options that do not go with the projection, before anything is loaded.

    Raises:
        InvalidInput.
    """
    kind = config.projection
    if config.init == "svd" and kind in APART:
        raise InvalidInput(
            f"--init svd takes A from the base's weights, and `projection` {kind} makes another "
            "one: leave one of them out"
        )
    if protect and kind in APART:
        raise InvalidInput(
            f"--protect keeps clear of the parents' entries of B; with `projection` {kind} every "
            "training has a B of its own: leave it out"
        )
    if avoid is not None and kind != "nullspace":
        raise InvalidInput(f"--avoid goes with --projection nullspace, not with {kind}")
    if avoid is not None and sequence:
        raise InvalidInput("a sequence avoids the tasks of its earlier stages: leave --avoid out")
    for task in tasks:
        if task.name in (avoid or ()):
            raise InvalidInput(f"--avoid names {task.name!r}, which is to be trained")
    if sequence and kind == "nullspace" and (lacking := without_probes(tasks[:-1])):
        raise InvalidInput(
            f"task {lacking[0]!r} has no probe rows, so later stages cannot avoid what it sees: "
            "add it again with --probe or with more training rows, or teach it last"
        )


def start_of(
    ws: Context,
    task: Task,
    config: Config,
    line: str,
    parent: Adapter | None = None,
    avoid: Sequence[str] | None = None,
    kept: Path | None = None,
) -> Start:
    """The block to train for a task on a line, from the base or from a parent.

    Args:
        avoid: tasks whose inputs a nullspace A avoids; None means those taught before.
        kept: a file for an A that took running the model, until its training is done: gone
            on with, the training has the very same one.
    Raises:
        InvalidInput: settings that no block can have, nothing or too much to avoid.
    """
    from lori_manager.adapters import lori

    if config.projection == "nullspace":
        ws.check_language("`projection` nullspace")
    base = ws.model(config)
    shapes = base.linear_shapes
    weights = None if parent is None else ws.weights(parent)
    if config.projection not in APART:
        if weights is None:
            return Start(_first(base, config, line, kept))
        return Start(lori.continued_block(weights, config))
    label = _label(line, task, weights)
    fresh = lori.fresh_block(shapes, config, label)
    if config.projection == "orthogonal":
        row = _first_row(ws, label, config.rank)
        narrowest = min(shapes[name][1] for name in fresh.B)
        if row + config.rank > narrowest:
            ws.on_message(
                f"rows {row} to {row + config.rank - 1} of A are more than the {narrowest} inputs "
                "of the narrowest modules: there A is not orthogonal to every A before it"
            )
        facts = {"A": {"label": label, "rank": config.rank, "first_row": row}}
        return Start(lori.fresh_block(shapes, config, label, row), weights, facts)
    found = None if kept is None else _kept(kept)
    if found is None:
        block, how = avoiding_block(ws, task, config, fresh, parent, avoid)
        tensors, how = ranks().led(lambda: (block.tensors, how), "A")
        found = replace(block, tensors=tensors), how
        if kept is not None:
            _keep(kept, *found)
    block, how = found
    return Start(block, weights, {"A": how["A"]} if how else {}, how)


def reserve_rows(
    ws: Context, task: Task, config: Config, line: str, parent: Adapter | None
) -> None:
    """Give an orthogonal A its rows before its training begins.

    They are given in the order in which trainings ask: of those that run at once, that
    order must not be left to chance.
    """
    weights = None if parent is None else ws.weights(parent)
    _first_row(ws, _label(line, task, weights), config.rank)


def _label(line: str, task: Task, weights: AdapterWeights | None) -> str:
    """What an A is seeded by: beside others on a line, neither as they are nor as another task."""
    return line if weights is None else f"{line}/{task.name}/{len(weights.blocks)}"


def _first(base: BaseModel, config: Config, line: str, kept: Path | None) -> Block:
    """The block from the base; where its A is no seeded one, the training keeps it in `kept`."""
    from lori_manager.adapters import lori

    found = None if kept is None or config.init != "svd" else _kept(kept)
    if found is not None:
        return found[0]
    block = lori.first_block(base, config, line)
    if kept is not None:
        _keep(kept, block, {})
    return block


def _first_row(ws: Context, label: str, rank: int) -> int:
    from lori_manager.store.rows import give_rows, rows_key

    made = [a.facts["A"] for a in ws.store.adapters() if "first_row" in a.facts.get("A", {})]
    used = {rows_key(A["label"], A["rank"]): A["first_row"] for A in made}
    return ranks().led(lambda: give_rows(ws.store.root, label, rank, used), "rows of A")


def _keep(path: Path, block: Block, how: Mapping[str, Any]) -> None:
    """Write a block whose B is 0."""
    import torch

    from lori_manager.engine.codec import encode_adapter
    from lori_manager.engine.weights import AdapterWeights
    from lori_manager.store.files import write_atomic

    if block.tensors is None or not ranks().first:
        return
    nothing = {name: torch.zeros_like(b, dtype=torch.bool) for name, b in block.B.items()}
    write_atomic(path, encode_adapter(AdapterWeights((replace(block, mask=nothing),)), how))


def _kept(path: Path) -> tuple[Block, dict[str, Any]] | None:
    return ranks().led(lambda: _read(path), "the kept A")


def _read(path: Path) -> tuple[Block, dict[str, Any]] | None:
    from lori_manager.engine.codec import decode_adapter

    if not path.is_file():
        return None
    try:
        weights, how = decode_adapter(path.read_bytes())
    except DamagedObject as e:
        logger.warning("%s is unusable (%s): A is made again", path.name, e)
        return None
    return replace(weights.blocks[0], mask=None), how
