"""Adapters x tasks -> stored scores; nothing is run twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.errors import InvalidInput
from lori_manager.ranks import ranks
from lori_manager.records import Adapter, NewScore, Score, Task
from lori_manager.refs import BASE

if TYPE_CHECKING:
    import numpy as np

    from lori_manager.engine.weights import Stored
    from lori_manager.tasks.scorers import LabelScorer


def score(
    ws: Context,
    refs: Sequence[str],
    names: Sequence[str] | None = None,
    config: Config | None = None,
) -> list[Score]:
    """Score adapters or the base on tasks; what is scored already is not run again.

    Args:
        refs: `line@3`, `base`, or a task's name for its own adapter.
        names: tasks; None means all.
        config: settings; the workspace's own where None.
    """
    config = config or ws.settings.config
    tasks = [ws.store.task(n) for n in names] if names is not None else ws.store.tasks()
    if not refs or not tasks:
        raise InvalidInput("name at least one adapter (or `base`) and have at least one task")
    known = {t.name for t in ws.store.tasks()}
    tasks = [_as_scored_now(ws, task) for task in tasks]
    out = []
    for ref in refs:
        if ref in known:
            adapter = ws.task_adapter(ref)
            ws.on_message(f"{ref} means {adapter.ref}")
            ref = adapter.ref
        subject = BASE if ref == BASE else ws.adapter(ref).ref
        out.extend(score_missing(ws, subject, tasks, config))
    return out


def score_missing(ws: Context, subject: str, tasks: Sequence[Task], config: Config) -> list[Score]:
    """Scores of one subject on tasks, run only where they are not known yet.

    Known is what was measured of the same weights on the same rows, as the same tokens, by
    the same version of the scorer, in the same precision and on as many bits of the base.
    """
    precision = ws.score_precision(config)
    encoding = ws.encoding
    adapter = None if subject == BASE else ws.adapter(subject)
    digest = adapter.digest if adapter else ws.store.base().fingerprint
    keys = [(t, t.scorer, str(ws.scorer(t).version)) for t in tasks]
    known = ws.store.find_scores(digest, keys, precision=precision, encoding=encoding)
    found = {t.name: score for t, score in zip(tasks, known, strict=True) if score is not None}
    missing = [t for t in tasks if t.name not in found]
    if missing:
        _check_ready(ws, missing, config)
        for task, outcomes, weights in _run(ws, adapter, missing, config):
            found[task.name] = _keep_score(
                ws, subject, digest, task, outcomes, weights, precision, "measured", encoding
            )
    # Equal weights share scores: what is returned is the one that was asked for.
    return [replace(found[t.name], subject=subject) for t in tasks]


def ready_to_score(ws: Context, tasks: Sequence[Task], config: Config) -> list[Task]:
    """The tasks as they are scored now, refused before a model is loaded where they cannot be.

    A scorer that has changed since its task was added (a new version of lori's, a user's
    edited function) makes a new revision of the task, on the same rows.
    Raises:
        InvalidInput: a library or a permission is missing. BadData: a user's scorer is broken.
    """
    tasks = [_as_scored_now(ws, task) for task in tasks]
    _check_ready(ws, tasks, config)
    return tasks


def _as_scored_now(ws: Context, task: Task) -> Task:
    scorer = ws.scorer(task)
    if str(scorer.version) == task.scorer_version:
        return task
    found = ws.store.add_task(
        task.name,
        scorer=task.scorer,
        scorer_version=str(scorer.version),
        description=task.description,
        splits=task.splits,
        options=task.options,
    )
    ws.on_message(
        f"scorer `{task.scorer}` is not what it was when {task.ref} was added: {found.ref} "
        "begins, on the same rows"
    )
    return found


def _check_ready(ws: Context, tasks: Sequence[Task], config: Config) -> None:
    """Every task's scorer can work here; each one's note is told once."""
    notes = []
    for task in tasks:
        scorer = ws.scorer(task)
        notes.append(scorer.ready(config.run_code))
        if scorer.reads == "requests":
            from lori_manager.harness.definitions import check_unchanged

            check_unchanged(scorer)
    for note in dict.fromkeys(filter(None, notes)):
        ws.on_message(note)


def _run(
    ws: Context, adapter: Adapter | None, tasks: Sequence[Task], config: Config
) -> Iterator[tuple[Task, np.ndarray, np.ndarray | None]]:
    """Outcomes of one subject on tasks, from the model."""
    if adapter is not None and "routing" in adapter.facts:
        yield from _run_routed(ws, adapter, tasks, config)
    else:
        stored = ws.stored(adapter) if adapter is not None else None
        yield from run_weights(ws, adapter.ref if adapter else BASE, stored, tasks, config)


def run_weights(
    ws: Context,
    subject: str,
    weights: Stored | None,
    tasks: Sequence[Task],
    config: Config,
) -> Iterator[tuple[Task, np.ndarray, np.ndarray | None]]:
    """Each task with outcomes and weights by row, from the model; nothing is stored.

    Args:
        subject: what to call it where progress is told.
        weights: not routed; None is the base alone.
    """
    from lori_manager.adapters.applying import applied

    worded = []
    for task in tasks:
        scorer = ws.scorer(task)
        if scorer.reads == "labels":
            yield task, _labelled(ws, subject, weights, task, scorer, config), None
        else:
            worded.append(task)
    if not worded:
        return
    base = ws.model(config)
    with applied(base, weights):
        for task in worded:
            progress = counted_progress(ws, f"scoring {subject} on {task.name}")
            yield task, *_outcomes(ws, base, task, config, progress)


def _outcomes(
    ws: Context, base: Any, task: Task, config: Config, progress: Callable[[int, int], None]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Outcomes and weights of a task's eval rows by the model as it now is."""
    scorer = ws.scorer(task)
    if scorer.reads == "noise":
        from lori_manager.diffusion.noise_loss import held_out_losses

        pictures = ws.pictures(task, "eval")

        def losses(own: Sequence[int]) -> tuple[np.ndarray, None]:
            mine = [pictures[i] for i in own]
            return held_out_losses(base, mine, scorer.draws, config.score_batch, progress), None

        return ranks().by_row(len(pictures), losses)
    from lori_manager.scoring import score_rows

    rows, encoded = ws.rows(task, "eval")

    def outcomes(own: Sequence[int]) -> tuple[np.ndarray, np.ndarray | None]:
        mine, tokens = [rows[i] for i in own], [encoded[i] for i in own]
        return score_rows(
            base, mine, tokens, scorer, config.score_batch, progress, config.packing, among=encoded
        )

    return ranks().by_row(len(rows), outcomes)


def _labelled(
    ws: Context,
    subject: str,
    weights: Stored | None,
    task: Task,
    scorer: LabelScorer,
    config: Config,
) -> np.ndarray:
    """Outcomes of rows with labels; what has no head for the task answers nothing."""
    import numpy as np

    from lori_manager.adapters.applying import applied
    from lori_manager.classification import label_outcomes

    head = None if weights is None else weights.heads.get(task.name)
    if head is None:
        ws.on_message(f"{subject} has no head for {task.name}: it answers nothing there")
        rows = task.splits["eval"].rows
        return np.full(rows, scorer.unanswered(len(task.labels)), np.float32)
    base = ws.base_model(config)
    _, encoded = ws.labelled(task, "eval")
    progress = counted_progress(ws, f"scoring {subject} on {task.name}")

    def outcomes(own: Sequence[int]) -> tuple[np.ndarray, None]:
        mine = [encoded[i] for i in own]
        found = label_outcomes(base, head, task.labels, mine, scorer, config.score_batch, progress)
        return found, None

    with applied(base, weights):
        return ranks().by_row(len(encoded), outcomes)[0]


def _run_routed(
    ws: Context, adapter: Adapter, tasks: Sequence[Task], config: Config
) -> Iterator[tuple[Task, np.ndarray, np.ndarray | None]]:
    """As `_run`, each row by the member that its prompt goes to."""
    from lori_manager.routed import RoutedModel, member_names

    names = member_names([ws.adapter(parent.ref) for parent in adapter.parents])
    model = RoutedModel(ws.base_model(config), ws.weights(adapter), names)
    for task in tasks:
        rows, encoded = ws.rows(task, "eval")
        routes = model.routes(encoded, config.score_batch, config.packing)
        ws.on_message(f"{adapter.ref} on {task.ref}: rows go to {model.tally(routes)}")
        outcomes, weighed = model.score_rows(
            rows,
            encoded,
            ws.scorer(task),
            config.score_batch,
            counted_progress(ws, f"scoring {adapter.ref} on {task.name}"),
            config.packing,
            routes=routes,
        )
        yield task, outcomes, weighed


def counted_progress(ws: Context, phase: str, rate: bool = True) -> Callable[[int, int], None]:
    """What to call with (done, in all), to be told on through the workspace.

    Args:
        ws: whose `on_progress` is told.
        phase: what is being done.
        rate: tell how many rows a second, too.
    """
    from lori_manager.training import Progress

    start = time.monotonic()

    def told(done: int, total: int) -> None:
        spent = max(time.monotonic() - start, 1e-9)
        left = spent / done * (total - done)
        speed = done / spent if rate else float("nan")
        ws.on_progress(Progress(phase, done, total, float("nan"), speed, left))

    return told


def _keep_score(
    ws: Context,
    subject: str,
    digest: str,
    task: Task,
    outcomes: np.ndarray,
    weights: np.ndarray | None,
    precision: str,
    origin: str,
    encoding: str = "",
) -> Score:
    from lori_manager.metrics.summary import summarize

    scorer = ws.scorer(task)
    summary = summarize(outcomes, weights)
    score = ws.store.add_score(
        NewScore(
            subject=subject,
            digest=digest,
            task=task.name,
            task_revision=task.revision,
            scorer=task.scorer,
            scorer_version=str(scorer.version),
            precision=precision,
            value=summary.value,
            error=summary.error,
            rows=summary.rows,
            origin=origin,
            facts={"higher_is_better": scorer.higher_is_better, "unit": scorer.unit},
            encoding=encoding,
        ),
        outcomes,
        weights,
    )
    ws.on_message(f"{subject} on {task.ref}: {score.value:.3f} +- {score.error:.3f}")
    return score


def add_outcomes(ws: Context, ref: str, name: str, file: str | Path, origin: str) -> Score:
    """Store outcomes that were measured elsewhere.

    Args:
        ref: whose they are.
        name: the task.
        file: JSONL of {"row": index or key in hex, "value": number}, a row each.
        origin: where they come from, kept with the score.
    Raises:
        BadData: unknown or repeated rows, values that are not numbers.
    """
    from lori_manager.tasks.outcomes import read_outcomes

    task = ws.store.task(name)
    outcomes = read_outcomes(Path(file), ws.store.eval_keys(task))
    adapter = None if ref == BASE else ws.adapter(ref)
    digest = adapter.digest if adapter else ws.store.base().fingerprint
    subject = adapter.ref if adapter else BASE
    return _keep_score(ws, subject, digest, task, outcomes, None, "", origin)
