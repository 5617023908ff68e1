"""The Python API: a workspace and everything that can be done in it, in order.

    task -> calibrate -> mask -> train -> score -> merge -> audit

The command line calls these methods and nothing else. Each stage lies in a module
of its own, which takes the open workspace and returns what it stored.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lori_manager import (
    combining,
    evaluation,
    forecasting,
    gating,
    image_intake,
    intake,
    integrity,
    models,
    moving,
    pipelines,
    placing,
    sampling,
    teaching,
    transfer,
)
from lori_manager.config import default_toml
from lori_manager.context import FOLDER, SETTINGS, Context
from lori_manager.errors import Conflict, NotFound, WrongBase
from lori_manager.records import Adapter, Alias, Base
from lori_manager.refs import AdapterRef, check_name
from lori_manager.store import databases
from lori_manager.store.database import reach
from lori_manager.store.postgres import Postgres
from lori_manager.store.s3 import normal_url
from lori_manager.store.store import Store

if TYPE_CHECKING:
    from lori_manager.auditing import Audit, AuditRun
    from lori_manager.benching import Bench
    from lori_manager.blaming import Blame
    from lori_manager.config import Config
    from lori_manager.differing import Diff
    from lori_manager.reporting.changed_rows import Answers
    from lori_manager.reporting.contents import Report
    from lori_manager.reporting.kind_comparisons import KindsCompared
    from lori_manager.store.moving import Moved
    from lori_manager.suggesting import Suggestion
    from lori_manager.teaching import Trained, TrainOptions


class Workspace(Context):
    """A folder with `.lori/` in it: one base, its tasks, adapters and scores."""

    @classmethod
    def create(
        cls,
        root: str | Path,
        base: str,
        revision: str | None = None,
        *,
        database: str | None = None,
        objects: str | None = None,
        trust_remote_code: bool = False,
    ) -> Workspace:
        """Make a workspace in `root` for a base model.

        Args:
            root: a folder, made where it is missing.
            base: a model folder or a hub id.
            revision: of the hub id.
            database: `postgresql://USER@HOST/DATABASE`, empty, for the rows; a file in `root` where
                None. A password in it is used now and not kept.
            objects: `s3://bucket/prefix` for all files; the workspace's own folder where None.
            trust_remote_code: run Python code that comes with the base, see `base_files`.
        Raises:
            NotFound: no such base. Conflict: there is a workspace already.
            StorageFailed: no such server, database or bucket, or it does not let us in.
            InvalidInput: the base asks for more than lori lets it, or for its own code.
        """
        root = Path(root).absolute()
        objects = None if objects is None else normal_url(objects)
        server = None if database is None else Postgres.at(database)
        begun = _begun(root / FOLDER, server)
        if begun is not None and _has_base(begun):
            begun.close()
            raise Conflict(f"{root} holds a workspace already; remove {FOLDER}/ or choose another")
        if begun is None and server is not None:
            reach(server)
        path, commit = models.locate(base, revision, code=trust_remote_code)
        code = models.check_base(path, trust_remote_code, base, revision)
        mark = models.fingerprint(path)
        kind = models.model_type(path)
        root.mkdir(parents=True, exist_ok=True)
        store = begun or Store.create(root / FOLDER, server)
        if objects is not None:
            store.keep_objects_at(objects)
        source = str(Path(base).expanduser().resolve()) if commit is None else base
        now = datetime.now(UTC)
        store.set_base(Base(mark, source, commit, str(path), kind, now, code))
        if not (root / SETTINGS).exists():
            text = default_toml(pipelines.DEFAULTS if pipelines.is_pipeline(path) else None)
            (root / SETTINGS).write_text(text, encoding="utf-8")
        return cls(root, store)

    def move_base(self, path: str) -> Base:
        """The same weights now lie elsewhere.

        Raises:
            WrongBase: `path` holds other weights.
        """
        folder, _ = models.locate(path)
        base = self.store.base()
        models.check_base(folder, False, path, None, known=base.code)
        mark = models.fingerprint(folder)
        if mark != base.fingerprint:
            raise WrongBase(
                f"{folder} holds weights {mark[:12]}, this workspace's base is "
                f"{base.fingerprint[:12]}: one workspace has one base"
            )
        return self.store.move_base(path=str(folder), source=str(folder))

    add_task = intake.add_task
    add_image_task = image_intake.add_image_task
    place = placing.place
    apply_placement = placing.apply_placement
    calibrate = teaching.calibrate
    abandon = teaching.abandon
    train = teaching.train
    score = evaluation.score
    add_outcomes = evaluation.add_outcomes
    merge = combining.merge
    merge_again = combining.merge_again
    forecast = forecasting.forecast
    gate = gating.gate
    promote = gating.promote
    rollback = gating.rollback
    sample = sampling.sample
    export = transfer.export
    routed = transfer.routed
    import_adapters = transfer.import_adapters
    verify = integrity.verify
    push = moving.push
    pull = moving.pull
    bundle = moving.bundle

    @classmethod
    def clone(
        cls,
        source: str | Path,
        root: str | Path,
        *,
        base: str | None = None,
        objects: str | None = None,
        on_message: Callable[[str], None] = lambda _: None,
    ) -> tuple[Workspace, Moved]:
        """A new workspace with all that is in another one or in a bundle; again, it goes on.

        Args:
            source: a workspace's folder, or a bundle's file.
            root: the new folder.
            base: where the base's weights are on this machine; where the source has them if None.
            objects: as for `create`.
        Raises:
            WrongBase: those are other weights.
        """
        root = Path(root).absolute()
        origin = moving.origin(source)
        begun = _begun(root / FOLDER, None)
        if begun is not None and _has_base(begun):
            ws = cls(root, begun)
            moving.check_base(ws.store.base(), origin.base, root)
        else:
            if begun is not None:
                begun.close()
            given, revision = moving.find_base(origin.base, base)
            ws = cls.create(root, given, revision, objects=objects)
            if origin.settings is not None:
                shutil.copyfile(origin.settings, root / SETTINGS)
        ws.on_message = on_message
        return ws, ws.pull(source, aliases=True)

    def audit(
        self,
        ref: str | None = None,
        task: str | Sequence[str] | None = None,
        max_drop: float | None = None,
        **options: Any,
    ) -> Audit:
        """What every step did to every task; reads the store only.

        `options` are those of `lori_manager.auditing.audit`, which says what all of them mean.
        """
        from lori_manager.auditing import audit

        return audit(self.store, ref, task, max_drop, **options)

    def audit_run(
        self,
        ref: str | None = None,
        task: str | Sequence[str] | None = None,
        max_drop: float | None = None,
        **options: Any,
    ) -> AuditRun:
        """The same, one task at a time, each as soon as it is ready."""
        from lori_manager.auditing import AuditRun

        return AuditRun(self.store, ref, task, max_drop, **options)

    def diff(
        self,
        before: str,
        after: str,
        task: str | None = None,
        *,
        rows: int = 20,
        answers: bool | None = None,
        config: Config | None = None,
    ) -> Diff:
        """What differs between two versions, and the rows that flipped; see `differing.diff`."""
        from lori_manager.differing import diff

        return diff(self, before, after, task, rows=rows, answers=answers, config=config)

    def blame(
        self,
        ref: str,
        task: str,
        *,
        halve: bool = False,
        general: str | Path | None = None,
        config: Config | None = None,
    ) -> Blame:
        """Which member or stage a task's loss is owed to; see `blaming.blame`."""
        from lori_manager.blaming import blame

        return blame(self, ref, task, halve=halve, general=general, config=config)

    def train_jobs(
        self,
        tasks: Sequence[str],
        config: Config | None = None,
        options: TrainOptions | None = None,
        *,
        jobs: int | None = None,
        slurm: str | None = None,
    ) -> list[Trained]:
        """Independent trainings at once; see `jobs.driving.train_jobs`.

        Args:
            jobs: how many at a time; as many as there are tasks where None.
            slurm: options of `sbatch`: then they are jobs of that cluster, else Ray's.
        """
        from lori_manager.jobs.driving import train_jobs
        from lori_manager.jobs.on_ray import RayWorkers
        from lori_manager.jobs.on_slurm import SlurmWorkers, slurm_options

        at_once = max(1, len(tasks)) if jobs is None else jobs
        if slurm is None:
            return train_jobs(self, tasks, config, options, at_once, RayWorkers)
        told = slurm_options(slurm)
        return train_jobs(
            self, tasks, config, options, at_once, lambda _, folder: SlurmWorkers(told, folder)
        )

    def compare_kinds(self, task: str, kinds: Sequence[str], **options: Any) -> KindsCompared:
        """Several kinds of adapters on one task; see `kind_comparison.compare_kinds`."""
        from lori_manager.kind_comparison import compare_kinds

        return compare_kinds(self, task, kinds, **options)

    def suggest(self, task: str, **options: Any) -> Suggestion:
        """Settings for a task out of short trainings; see `suggesting.suggest`."""
        from lori_manager.suggesting import suggest

        return suggest(self, task, **options)

    def bench(self, refs: Sequence[str], **options: Any) -> Bench:
        """What adapters cost at use; see `benching.bench`."""
        from lori_manager.benching import bench

        return bench(self, refs, **options)

    def report(
        self,
        ref: str | None = None,
        tasks: Sequence[str] = (),
        *,
        rows: int = 20,
        answers: Answers | None = None,
    ) -> Report:
        """What `lori report` shows, as data; reads the store only.

        Args:
            ref, tasks: as for `audit`, with several tasks.
            rows: changed rows to keep of each direction, task and comparison.
            answers: tells what two versions answered to a row; what `diff` has kept, where None.
        """
        from lori_manager.differing import stored_answers
        from lori_manager.reporting.gather import gather
        from lori_manager.reporting.source import Source

        return gather(
            Source(self.store), self.root.name, ref, tasks, rows, answers or stored_answers(self)
        )

    def remove(self, refs: Sequence[str], *, reason: str = "") -> list[Adapter]:
        """Hide versions, all of them or none; `Store.collect` frees their files later.

        Raises:
            Conflict: an alias, an unfinished training, or a version that was made from one and
                is not among them needs it.
        """
        return self.store.remove(self._refs(refs), reason=reason)

    def restore(self, refs: Sequence[str], *, reason: str = "") -> list[Adapter]:
        """Bring removed versions back, while their files are there."""
        return self.store.restore(self._refs(refs), reason=reason)

    def _refs(self, refs: Sequence[str]) -> list[AdapterRef]:
        found = [self.adapter(ref, removed=True) for ref in dict.fromkeys(refs)]
        return [AdapterRef(a.line, str(a.version)) for a in found]

    def set_alias(self, ref: str, alias: str) -> Alias:
        """Let `line@alias` mean the adapter `ref`."""
        adapter = self.adapter(ref)
        return self.store.set_alias(adapter.line, check_name(alias, "alias"), adapter.version)


def _begun(folder: Path, server: Postgres | None) -> Store | None:
    """The store in the folder, if one was made.

    Raises:
        Conflict: on another database than was asked for.
    """
    if not databases.begun(folder):
        return None
    store = Store.open(folder, None if server is None else server.password)
    if server is not None and store.database != server.shown:
        store.close()
        raise Conflict(
            f"{folder} was begun on {store.database}: name that, remove {folder}, or choose another"
        )
    return store


def _has_base(store: Store) -> bool:
    """Whether a store is a workspace's; one without a base is of an `init` that was cut short."""
    try:
        store.base()
    except NotFound:
        return False
    return store.settled
