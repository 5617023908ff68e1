"""Hand out the tasks of a training, wait for them, give a lost worker's task to another."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lori_manager import errors
from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.errors import InvalidInput, LoriError
from lori_manager.jobs.job import Failed, Job
from lori_manager.jobs.news import Reader
from lori_manager.kinds import LORI
from lori_manager.projecting import reserve_rows
from lori_manager.ranks import ranks
from lori_manager.teaching import Course, Trained, TrainOptions, prepared, running

if TYPE_CHECKING:
    from lori_manager.training import Progress

LOOK = 0.25  # seconds between two looks at the workers
LOSSES = 3  # times that one task's worker may be lost


@dataclass(frozen=True)
class Lost:
    """A job whose worker ended before it did, and why."""

    why: str


class Workers(Protocol):
    """Where jobs are done."""

    @property
    def threads(self) -> int:
        """Of each job's process."""

    def start(self, job: Job) -> Any:
        """Begin the job; what it is known by from then on."""

    def answer(self, started: Any) -> Trained | Failed | Lost | None:
        """What came of it; None while it runs."""

    def stop(self) -> None:
        """End whatever still runs."""


def train_jobs(
    ws: Context,
    names: Sequence[str],
    config: Config | None,
    options: TrainOptions | None,
    at_once: int,
    workers: Callable[[int, Path], Workers],
) -> list[Trained]:
    """Train independent tasks, several at once, each in a process of its own.

    The run is the one that `teaching.train` would make of the same tasks: either goes on
    with what the other left. A task that fails leaves the others to their end. A task whose
    worker is lost goes on from its last checkpoint in another.

    Args:
        names, config, options: as for `teaching.train`.
        at_once: the most to run at a time.
        workers: makes them, when everything else is checked, for so many at once and with
            the run's folder.
    Returns:
        In the order of `names`.
    Raises:
        InvalidInput: what needs an order, as for `teaching.train` besides.
        LoriError: of the first task that failed.
    """
    if ranks().world > 1:
        raise InvalidInput(
            "--jobs starts its own processes: give it to lori itself, not to torchrun, or leave "
            "it out"
        )
    if at_once < 1:
        raise InvalidInput(f"--jobs must be at least 1, got {at_once}")
    course = prepared(ws, names, config, options)
    _check_independent(course)
    with running(ws, course.plan(ws)) as (run, folder):
        done = {a.stage for a in ws.store.run_adapters(run)}
        if course.config.kind == LORI and course.config.projection == "orthogonal":
            start = course.options.start
            parent = None if start is None else ws.adapter(start)
            for task in course.tasks:
                reserve_rows(ws, task, course.config, course.options.line or task.name, parent)
        crew = workers(min(at_once, len(course.tasks)), folder)
        jobs = [
            Job(
                str(ws.root),
                str(ws.store.root),
                run,
                tuple((task.name, task.revision) for task in course.tasks),
                stage,
                course.config.to_json(),
                course.options.to_json(),
                crew.threads,
            )
            for stage in range(len(course.tasks))
        ]
        readers = [Reader(folder, job.stage) for job in jobs]
        try:
            answers = _drive(ws, crew, jobs, readers, at_once)
        finally:
            crew.stop()
        trained = [one for one in answers if isinstance(one, Trained)]
        failed = [one for one in answers if isinstance(one, Failed)]
        if failed:
            raise _error(failed, len(trained))
        ws.store.finish_run(run)
    return [replace(one, resumed=stage in done) for stage, one in enumerate(trained)]


def _check_independent(course: Course) -> None:
    """Refuse tasks of which one's result depends on which others are done."""
    nullspace = course.config.kind == LORI and course.config.projection == "nullspace"
    if nullspace and course.options.avoid is None and course.options.start is None:
        raise InvalidInput(
            "with --projection nullspace a task avoids those taught before it, and with --jobs "
            "none is before another: name what to avoid by --avoid, or leave --jobs out"
        )


def _drive(
    ws: Context, crew: Workers, jobs: Sequence[Job], readers: Sequence[Reader], at_once: int
) -> list[Trained | Failed]:
    """The jobs' answers, in their order."""
    waiting, started = deque(jobs), dict[int, Any]()
    answers: dict[int, Trained | Failed] = {}
    losses = [0] * len(jobs)
    while waiting or started:
        while waiting and len(started) < at_once:
            job = waiting.popleft()
            started[job.stage] = crew.start(job)
        time.sleep(LOOK)
        for stage, handle in list(started.items()):
            task = jobs[stage].task
            answer = crew.answer(handle)
            readers[stage].tell(_progress_of(ws, task), _message_of(ws, task))
            if answer is None:
                continue
            del started[stage]
            if isinstance(answer, Lost):
                losses[stage] += 1
                if losses[stage] <= LOSSES:
                    ws.on_message(
                        f"{task}: its worker was lost ({answer.why}); it goes on from its last "
                        "checkpoint in another"
                    )
                    waiting.appendleft(jobs[stage])
                    continue
                answer = Failed("LoriError", f"its worker was lost {LOSSES + 1} times "
                                f"({answer.why}): is its memory enough?")  # fmt: skip
            if isinstance(answer, Failed):
                ws.on_message(f"{task} failed: {answer.message}")
                answer = replace(answer, message=f"{task}: {answer.message}")
            answers[stage] = answer
    return [answers[job.stage] for job in jobs]


def _progress_of(ws: Context, task: str) -> Callable[[Progress], None]:
    return lambda state: ws.on_progress(replace(state, job=task))


def _message_of(ws: Context, task: str) -> Callable[[str], None]:
    return lambda text: ws.on_message(f"{task}: {text}")


def _error(failed: Sequence[Failed], trained: int) -> LoriError:
    """The first one's, in its own class, saying what became of the others."""
    first = failed[0]
    named = getattr(errors, first.kind, None)
    known = isinstance(named, type) and issubclass(named, LoriError)
    kind: Any = named if known else LoriError
    message = first.message if known else f"{first.message} ({first.kind})"
    others = []
    if len(failed) > 1:
        others.append(f"{len(failed) - 1} more failed")
    if trained:
        others.append(f"{trained} trained, which the same command does not do again")
    error: LoriError = kind("; ".join([message, *others]))
    return error
