"""What a training takes from a task, by what the base is: rows, steps, and an encoder's head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.errors import InvalidInput
from lori_manager.kinds import LORI, kind_of
from lori_manager.records import Task

if TYPE_CHECKING:
    from lori_manager.adapters.heads import HeadTraining
    from lori_manager.engine.weights import Head, Stored
    from lori_manager.training import StepsOf


def check_fits(ws: Context, config: Config) -> None:
    """Refuse a kind or an A that is not trained on such a base, before anything is loaded.

    Raises:
        InvalidInput: names it, what it needs and what the base is.
    """
    kind = kind_of(config.kind)
    if not kind.encoders:
        ws.check_language(f"kind `{kind.name}`")
    if not kind.pipelines:
        ws.check_transformer(f"kind `{kind.name}`")
    if reason := kind.not_on.get(found := ws.store.base().model_type):
        raise InvalidInput(
            f"kind `{config.kind}` does not train on {found}, since {reason}: choose another kind"
        )
    if config.kind == LORI and config.projection == "nullspace":
        ws.check_language("`projection` nullspace")


def rows_of(ws: Context, task: Task, split: str, config: Config) -> list[Any]:
    """A split's rows as training takes them: encoded text, with labels or without, or pictures."""
    if ws.architecture.encoder:
        return list(ws.labelled(task, split, config.max_length)[1])
    if task.images is not None:
        return ws.pictures(task, split)
    return list(ws.rows(task, split, config.max_length)[1])


def steps_of(ws: Context, base: Any, config: Config, label: str) -> StepsOf | None:
    """How the base is trained on such rows; None is the usual way, by completions.

    Args:
        label: of what is drawn at every step, the noise on pictures.
    """
    if ws.architecture.encoder:
        from lori_manager.classification import label_steps

        return label_steps(base, config)
    if not ws.makes_images:
        return None
    from lori_manager.diffusion.noise_loss import noise_steps

    return noise_steps(base, config, label)


@contextmanager
def head_of(
    ws: Context, task: Task, base: Any, config: Config, start: Stored | None = None
) -> Iterator[HeadTraining | None]:
    """The task's head in the model, to be trained; None where the base is no encoder.

    It goes on from the head that `start` has for the task, where that one knows the same labels.
    """
    from lori_manager.adapters.heads import fresh_head, head_attached

    if not ws.architecture.encoder:
        yield None
        return
    head = None if start is None else start.heads.get(task.name)
    if head is None or head.labels != task.labels:
        head = fresh_head(base, task.labels, config.seed)
    with head_attached(base, head) as training:
        yield training


def all_heads(
    task: Task, head: HeadTraining | None, start: Stored | None, config: Config
) -> dict[str, Head]:
    """All heads of the adapter to be stored: its parent's, and the task's as it was trained."""
    from lori_manager.adapters.lori import DTYPES

    if head is None:
        return {}
    held = {} if start is None else dict(start.heads)
    return held | {task.name: head.head(DTYPES[config.store_dtype])}
