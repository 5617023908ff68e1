"""One task of a training, done in a process of its own on the workspace that all share."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lori_manager import errors
from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.errors import LoriError, first_line
from lori_manager.jobs.news import Writer
from lori_manager.store.store import Store
from lori_manager.teaching import Course, Trained, TrainOptions, held_lock, train_stage

# Seconds for what is left of a lost worker to let go of its task: on a network's disk the lock
# of a machine that died is held until its lease ends, which takes minutes.
PATIENCE = 300.0


@dataclass(frozen=True)
class Job:
    """What a worker is told: plain values, so that any process can take it.

    Attributes:
        root: the workspace's folder, the same path on every machine.
        store: its store's folder.
        run: the open run, held by whoever hands out its jobs.
        tasks: (name, revision) of all its tasks.
        stage: the place of this one among them.
        config, options: the run's, as JSON.
        threads: of this process.
    """

    root: str
    store: str
    run: str
    tasks: tuple[tuple[str, int], ...]
    stage: int
    config: dict[str, Any]
    options: dict[str, Any]
    threads: int

    @property
    def task(self) -> str:
        """The task's name."""
        return self.tasks[self.stage][0]


@dataclass(frozen=True)
class Failed:
    """A job that ended in an error: the name of its class and what it says."""

    kind: str
    message: str


def work(job: Job) -> Trained | Failed:
    """Train, store and score the job's task, or what is left of that to do."""
    os.environ["OMP_NUM_THREADS"] = str(job.threads)  # for libraries still to be loaded
    if "SLURM_JOB_ID" in os.environ and threading.current_thread() is threading.main_thread():
        # At the end of its time, submitit would make the job fail; so it is lost, and goes on.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        import torch

        torch.set_num_threads(job.threads)
        with Store.open(Path(job.store)) as store:
            return _trained(job, store)
    except LoriError as e:
        return Failed(_class_of(e), str(e))
    except Exception as e:  # noqa: BLE001 - whoever waits for this job tells it
        disk = isinstance(e, OSError) and e.errno is not None
        return Failed("StorageFailed" if disk else type(e).__name__, first_line(e))


def _class_of(error: LoriError) -> str:
    """The name of the nearest class that whoever waits finds in `errors`."""
    return next(c.__name__ for c in type(error).__mro__ if hasattr(errors, c.__name__))


def _trained(job: Job, store: Store) -> Trained:
    folder = store.runs / job.run
    news = Writer(folder, job.stage)
    ws = Context(Path(job.root), store, news.progress, news.message)
    options = TrainOptions(**job.options)
    if options.avoid is not None:
        options = TrainOptions(**job.options | {"avoid": tuple(options.avoid)})
    course = Course(
        tuple(store.task(name, revision) for name, revision in job.tasks),
        Config.from_json(job.config),
        options,
    )
    lock = held_lock(folder / f"{job.stage}.lock", f"training {job.task}", PATIENCE)
    try:
        with _warnings_to(news):
            done = {a.stage: a for a in store.run_adapters(job.run)}
            return train_stage(ws, course, job.stage, job.run, folder, done.get(job.stage))
    finally:
        lock.release()


@contextmanager
def _warnings_to(news: Writer) -> Iterator[None]:
    """What lori's modules log as warnings is told as news."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            news.message(record.getMessage())

    handler, logger = Handler(logging.WARNING), logging.getLogger("lori_manager")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
