"""Rows of earlier tasks among those of a new one, with the adapters of then as teachers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.errors import InvalidInput
from lori_manager.records import Adapter, Task

if TYPE_CHECKING:
    from lori_manager.engine.head import SoftTargets
    from lori_manager.tasks.encoding import Encoded

LABELS = 0.5  # share of a row's own completion in what it teaches; the rest is the teacher's
PIECE = 48  # tokens of general text in one row: as long as a task's, so that it weighs no more


def check_replay(
    ws: Context, tasks: Sequence[Task], parent: Adapter | None, *, sequence: bool
) -> None:
    """Refuse a training that could not replay, before anything is trained.

    Args:
        tasks: to be trained; in a sequence each after those before it.
        parent: what a training outside a sequence goes on from.
    Raises:
        InvalidInput: an earlier task without probe rows.
    """
    if sequence:
        earlier = list(tasks[:-1])
    else:
        earlier = [] if parent is None else [e for t in tasks for e, _ in _teachers(ws, t, parent)]
    for task in earlier:
        if "probe" not in task.splits:
            raise InvalidInput(
                f"task {task.name!r} has no probe rows to replay: add it again with --probe "
                "or with more training rows, or leave --replay out"
            )


def with_replay(
    ws: Context,
    task: Task,
    rows: Sequence[Encoded],
    parent: Adapter | None,
    config: Config,
    count: int,
    general: int = 0,
    text: Path | None = None,
) -> tuple[list[Encoded], SoftTargets]:
    """The rows of a task, up to `count` of every task taught before it, and general text.

    Earlier rows are probe rows first, then rows that were trained on. What is right for one
    is half its completion and half what was said by the adapter that its task was taught
    to, the latest of them among the parent and what the parent goes back to. What is right
    for general text is what the base says there.

    Args:
        rows: of the task.
        parent: what is trained on; None for a first stage, which has no earlier tasks.
        general: how many pieces of general text of `PIECE` tokens.
        text: where they are from; None is the manual that comes with Python.
    Returns:
        All rows, and the table that their `taught` name places of.
    """
    from lori_manager.adapters.applying import applied
    from lori_manager.distillation import own_words, taught_rows, teacher_words
    from lori_manager.tasks.general import general_rows

    base = ws.base_model(config)
    parts = [own_words(rows)]
    for earlier, teacher in [] if parent is None else _teachers(ws, task, parent):
        kept = ws.rows(earlier, "probe", config.max_length)[1][:count]
        if len(kept) < count:
            kept = [*kept, *ws.rows(earlier, "train", config.max_length)[1][: count - len(kept)]]
        with applied(base, ws.stored(teacher)):
            parts.append(teacher_words(base, {}, kept, config.score_batch, labels=LABELS))
        ws.on_message(f"{len(kept)} rows of {earlier.ref} are replayed, {teacher.ref} teaches them")
    if general:
        pieces = general_rows(base.tokenizer, text, general, base.context, PIECE)
        parts.append(teacher_words(base, {}, pieces, config.score_batch))
    return taught_rows(parts, base.device)


def _teachers(ws: Context, task: Task, parent: Adapter) -> list[tuple[Task, Adapter]]:
    """Each task taught before, with the adapter that it was taught to."""
    found: dict[str, Adapter] = {}
    for adapter in _ancestors(ws, parent):
        if adapter.task is not None and adapter.task != task.name:
            found.setdefault(adapter.task, adapter)
    return [(ws.store.task(name), adapter) for name, adapter in sorted(found.items())]


def _ancestors(ws: Context, adapter: Adapter) -> Iterator[Adapter]:
    """The adapter and what it was made of, the latest first."""
    yield adapter
    for parent in adapter.parents:
        yield from _ancestors(ws, ws.adapter(parent.ref))
