"""The store of a workspace: records in, records out, each method one short transaction.

Files are written first, rows committed after: what a method has returned survives
kill -9 and a power cut, and an interruption leaves at most a file that no row needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from lori_manager.errors import InvalidInput
from lori_manager.records import (
    Adapter,
    Alias,
    Base,
    Finding,
    Forecasted,
    Freed,
    JournalEntry,
    KindComparison,
    KindStep,
    Line,
    Mask,
    NewAdapter,
    NewScore,
    Removal,
    Run,
    Score,
    Split,
    Task,
)
from lori_manager.refs import AdapterRef
from lori_manager.store import (
    adapters,
    adding,
    aliases,
    answers,
    bases,
    collecting,
    database,
    databases,
    forecasts,
    homes,
    integrity,
    journal,
    kind_comparisons,
    lines,
    masks,
    parcels,
    places,
    receiving,
    removals,
    runs,
    scores,
    tasks,
    trials,
)
from lori_manager.store.databases import REGISTRY
from lori_manager.store.files import (
    MissingObject,
    ObjectStore,
    lasting_folder,
    private_folder,
    storing,
    sync_folder,
)
from lori_manager.store.objects import Objects
from lori_manager.store.parcels import Parcel
from lori_manager.store.postgres import Postgres
from lori_manager.store.s3 import check_installed, normal_url

if TYPE_CHECKING:
    import numpy as np
    from sqlalchemy import Connection

_Record = TypeVar("_Record")
_ATTEMPTS = 5  # gc frees a file in between hardly ever


class Store:
    """Registry and objects of one workspace; safe to use from many processes and threads.

    Every method may raise StorageFailed (full, read-only or failing disk, locked
    database), DamagedObject (what was read is not what was written) and
    IncompatibleStore (the schema was changed meanwhile). Unknown names are NotFound.
    """

    def __init__(self, root: Path, db: database.Database, objects: Objects) -> None:
        self.root = root
        self.objects = objects
        self.runs = root / "runs"  # checkpoints of open runs, a folder each
        self._db = db

    @classmethod
    def create(cls, root: Path, server: Postgres | None = None) -> Store:
        """Make a store in the folder `root` (usually `.lori`), which only its owner may enter.

        Args:
            server: an empty database for the rows; a file in `root` where None.
        Raises:
            Conflict: there is one already, or the database is another's.
        """
        with storing(root):
            lasting_folder(root.parent)
            private_folder(root)
            sync_folder(root.parent)  # whoever made `root` may not have come to this
        if server is None:
            database.create(root)
            return cls.open(root)
        database.create_served(root, server)
        return cls.open(root, server.password)

    @classmethod
    def open(cls, root: Path, password: str | None = None) -> Store:
        """Open the store in `root`.

        Args:
            password: for a server's database; None leaves it to PGPASSWORD and ~/.pgpass.
        Raises:
            NotFound: none there.
            IncompatibleStore: it is older or newer than this lori, or not lori's.
        """
        backend = databases.backend(root, password)
        db = database.Database(backend)
        try:
            with db.read() as c:
                place = places.one(c)
                if isinstance(backend, Postgres) and place is None:
                    homes.check(c, databases.served(root).folder)
                objects = places.objects(place, root)
        except BaseException:
            db.close()
            raise
        store = cls(root, db, objects)
        with storing(root):
            private_folder(root / places.OWN)
            private_folder(store.runs)
        return store

    @property
    def database(self) -> str:
        """Where the rows are: a path, or a URL without a password."""
        return self._db.shown

    @property
    def shared(self) -> bool:
        """Whether other folders may work on the same rows and files: both are on servers."""
        return not isinstance(self.objects, ObjectStore) and not (self.root / REGISTRY).is_file()

    def keep_objects_at(self, url: str) -> None:
        """Keep objects in a bucket, `s3://bucket/prefix`, from the first one on.

        Raises:
            InvalidInput: no such URL, or the extra is not installed.
            Conflict: they are kept elsewhere already, or others keep theirs there.
            StorageFailed: no bucket, no network, no permission.
        """
        url = normal_url(url)
        check_installed()
        with self._db.write() as c:
            place = places.choose(c, url)
        objects = place.open(self.root)
        objects.claim()
        self.objects = objects

    def close(self) -> None:
        """Release what is held; nothing is lost without it."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # base

    def set_base(self, base: Base) -> Base:
        """Set the base model; the same weights again change nothing.

        A further folder on the same rows notes where it has them.
        Raises:
            Conflict: other weights are set.
        """
        with self._db.write() as c:
            kept = bases.add(c, base)
        if self.shared:
            bases.note(self.root, path=base.path, source=base.source)
            return self.base()
        return kept

    @property
    def settled(self) -> bool:
        """Whether the base was set in this folder; elsewhere alone, it has only begun to join."""
        return not self.shared or bases.noted(self.root)

    def base(self) -> Base:
        """The base model, where this folder has it."""
        with self._db.read() as c:
            return bases.here(self.root, bases.one(c))

    def move_base(self, *, path: str, source: str) -> Base:
        """Note where the same weights were found: for this folder, where others share the rows."""
        if self.shared:
            bases.note(self.root, path=path, source=source)
            return self.base()
        with self._db.write() as c:
            return bases.move(c, path=path, source=source)

    # tasks

    def add_task(
        self,
        name: str,
        *,
        scorer: str,
        scorer_version: str,
        description: str,
        splits: Mapping[str, Split],
        options: Mapping[str, Any],
    ) -> Task:
        """Add a task and its line, or a revision where rows or scorer differ from the latest.

        Args:
            splits: must have "eval"; their files are in `objects` already, and so are the
                images that their rows name.
        Returns:
            The new revision, or the latest one, unchanged, where nothing differs.
        Raises:
            Conflict: the name is that of a line.
            InvalidInput: the name is not usable.
            MissingObject: a file is not there.
        """
        files = {split.digest for split in splits.values()}
        if "images" in options:
            images = integrity.Images(self.objects)
            files |= {image for digest in files for image in images.of_rows(digest)}
        with self._db.write() as c:
            self._look(files)
            return tasks.add(
                c,
                name,
                scorer=scorer,
                scorer_version=scorer_version,
                description=description,
                splits=splits,
                options=options,
            )

    def task(self, name: str, revision: int | None = None) -> Task:
        """That revision of the task, or the latest."""
        with self._db.read() as c:
            return tasks.one(c, name, revision)

    def tasks(self) -> list[Task]:
        """The latest revision of each task, by the creation of the tasks."""
        with self._db.read() as c:
            return tasks.every(c)

    def task_revisions(self, name: str) -> list[Task]:
        """All revisions of a task, oldest first."""
        with self._db.read() as c:
            return tasks.revisions(c, name)

    def eval_keys(self, task: Task) -> list[bytes]:
        """The 16-byte hashes of the revision's eval rows, in order.

        They follow from the frozen rows, so nothing is stored beside those.
        Raises:
            DamagedObject: the file of the rows is gone or altered.
        """
        return tasks.row_keys(task, self.objects.get(task.splits["eval"].digest))

    # lines

    def add_line(self, name: str, *, sequence: Sequence[str] = ()) -> Line:
        """Add a free line, as a sequence of task refs or none; the same again changes nothing.

        Raises:
            Conflict: the name is a task's, or a line's of another sequence.
            InvalidInput: the name is not usable.
        """
        with self._db.write() as c:
            lines.add(c, name, sequence)
            return lines.one(c, name)

    def line(self, name: str) -> Line:
        """The line of that name."""
        with self._db.read() as c:
            return lines.one(c, name)

    def lines(self) -> list[Line]:
        """All lines, by creation, in a fixed number of queries."""
        with self._db.read() as c:
            return lines.every(c)

    # runs

    def open_run(self, plan: Mapping[str, Any]) -> Run:
        """The open run of an equal plan, to go on with, or a new one."""
        folder = databases.served(self.root).folder if self.shared else ""
        with self._db.write() as c:
            return runs.start(c, plan, folder)

    def finish_run(self, run_id: str) -> None:
        """Close the run; an equal plan then starts anew."""
        with self._db.write() as c:
            runs.finish(c, run_id)

    def open_runs(self) -> list[Run]:
        """The open runs, oldest first."""
        with self._db.read() as c:
            return runs.unfinished(c)

    def run_adapters(self, run_id: str) -> list[Adapter]:
        """What the run has stored, by stage."""
        with self._db.read() as c:
            runs.one(c, run_id)
            return adapters.of_run(c, run_id)

    # masks

    def add_mask(
        self,
        *,
        task: Task,
        blob: bytes,
        projection: str,
        sparsity: float,
        scope: str,
        kept: int,
        total: int,
        config: Mapping[str, Any],
    ) -> Mask:
        """Store the task's next mask; `projection` is the digest of the A it belongs to."""
        return self._stored(
            blob,
            lambda c, digest: masks.add(
                c,
                task=task,
                digest=digest,
                projection=projection,
                sparsity=sparsity,
                scope=scope,
                kept=kept,
                total=total,
                config=config,
            ),
        )

    def _stored(self, blob: bytes, commit: Callable[[Connection, str], _Record]) -> _Record:
        """Put the file, then commit its row."""
        return self._with_files(
            lambda: [self.objects.put(blob)], lambda c, files: commit(c, files[0])
        )

    def _with_files(
        self,
        put: Callable[[], Sequence[str]],
        commit: Callable[[Connection, Sequence[str]], _Record],
    ) -> _Record:
        """Put files, then commit the rows that need them; once more where gc came in between.

        After some attempts the files are put within the transaction.
        Args:
            put: has the files in `objects`, and says their digests.
            commit: adds the rows; raises MissingObject where another file is needed by now.
        """
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(MissingObject):
                files = put()
                with self._db.write() as c:
                    self._look(files)
                    return commit(c, files)
        with self._db.write() as c:  # gc waits meanwhile, as all writers do
            return commit(c, put())

    def _look(self, files: Collection[str]) -> None:
        """See that files are there, within the transaction that adds or shows rows that need them.

        It must be there, for a look before it does not last: gc, with no time of grace, may free
        a file that no row needs yet. gc judges and frees within writing transactions, too, of
        which there is one at a time: what is seen here stays until the rows are there, and then
        gc sees these. That a file is whole may be looked at before, for nothing alters one.
        Raises:
            MissingObject: one is gone.
        """
        for digest in self.objects.missing(files):
            self.objects.size(digest)  # says which, and where it was looked for

    def mask(self, task_name: str, version: int) -> Mask:
        """The mask `task%version`."""
        with self._db.read() as c:
            return masks.one(c, task_name, version)

    def masks(self, task_name: str) -> list[Mask]:
        """The task's masks, oldest first."""
        with self._db.read() as c:
            return masks.every(c, task_name)

    def mask_bytes(self, mask: Mask) -> bytes:
        """The mask's file, checked against its digest."""
        return self.objects.get(mask.digest)

    # adapters

    def add_adapter(self, new: NewAdapter, blob: bytes) -> Adapter:
        """Store the line's next version; the line is made if there is none.

        Versions are consecutive whoever else writes. A stage that its run has stored
        is returned as it is, so that a resumed command may repeat it.
        Raises:
            WrongBase: made for another base.
            NotFound: no such task revision, mask, parent or run.
        """
        return self._stored(
            blob, lambda c, digest: adapters.add(c, new, digest=digest, size=len(blob))
        )

    def adapter(self, ref: AdapterRef, *, removed: bool = False) -> Adapter:
        """The adapter that a version, `latest` or an alias means.

        Args:
            removed: take a removed version, too; `latest` never means one.
        """
        with self._db.read() as c:
            return adapters.one(c, ref, hidden=removed)

    def adapters(
        self, line: str | None = None, *, removed: bool = False, last: int | None = None
    ) -> list[Adapter]:
        """Adapters of one line or of all, by creation.

        Args:
            removed: removed versions, too.
            last: only so many of the newest.
        """
        with self._db.read() as c:
            return adapters.every(c, line, hidden=removed, last=last)

    def remove(self, refs: Sequence[AdapterRef], *, reason: str = "") -> list[Adapter]:
        """Hide versions, all of them or none; their rows stay, and `gc` frees their files.

        Raises:
            Conflict: an alias, an unfinished training, or a version that was made from one and
                is not among them needs it.
        """
        with self._db.write() as c:
            chosen = [adapters.one(c, ref) for ref in refs]
            removals.hide(c, [(a.line, a.version) for a in chosen], reason)
            return [adapters.of_version(c, a.line, a.version, hidden=True) for a in chosen]

    def restore(self, refs: Sequence[AdapterRef], *, reason: str = "") -> list[Adapter]:
        """Bring removed versions back, all of them or none.

        Raises:
            NotFound: one is not removed.
            MissingObject: `gc` has freed its file.
            DamagedObject: the file is not what was written.
        """
        with self._db.read() as c:
            chosen = [adapters.one(c, ref, hidden=True) for ref in refs]
        for adapter in chosen:
            if adapter.hidden:
                self.objects.check(adapter.digest)
        with self._db.write() as c:
            for adapter in chosen:
                removals.restore(c, adapter.line, adapter.version, reason)
            self._look([adapter.digest for adapter in chosen])
            return [adapters.of_version(c, a.line, a.version) for a in chosen]

    def removals(self, line: str | None = None) -> list[Removal]:
        """Every removal and return there ever was, oldest first."""
        with self._db.read() as c:
            return removals.every(c, line)

    def children(self, ref: AdapterRef) -> list[Adapter]:
        """The adapters that were continued or merged from that one, by creation."""
        with self._db.read() as c:
            return adapters.children(c, ref)

    def adapter_bytes(self, adapter: Adapter) -> bytes:
        """The adapter's file, checked against its digest."""
        return self.objects.get(adapter.digest)

    # scores

    def add_score(
        self, new: NewScore, outcomes: np.ndarray, weights: np.ndarray | None = None
    ) -> Score:
        """Store a score with one outcome, and perhaps one weight, for each eval row.

        A score of the same weights, task revision, scorer, precision, encoding and
        origin is returned as stored; where it was damaged, it is stored anew.
        Args:
            outcomes: (eval rows,) in their order, kept exactly as float32; NaN is not
                measured. Right and wrong (0, 1 and NaN) take a bit each at most.
            weights: (eval rows,), such as token counts; kept as float32, once for all
                scores that have the same.
        Raises:
            Conflict: other outcomes are stored for an origin other than "measured".
        """
        return self.add_scores([(new, outcomes, weights)])[0]

    def add_scores(
        self, new: Sequence[tuple[NewScore, np.ndarray, np.ndarray | None]]
    ) -> list[Score]:
        """As `add_score`, all of them or none."""
        with self._db.write() as c:
            return adding.add(c, new)

    def find_score(
        self,
        *,
        digest: str,
        task: Task,
        scorer: str,
        scorer_version: str,
        precision: str,
        encoding: str = "",
    ) -> Score | None:
        """What lori measured of those weights, if it did and the outcomes are whole.

        A score of which no encoding was noted fits any.
        """
        key = [(task, scorer, scorer_version)]
        return self.find_scores(digest, key, precision=precision, encoding=encoding)[0]

    def find_scores(
        self,
        digest: str,
        keys: Sequence[tuple[Task, str, str]],
        *,
        precision: str,
        encoding: str = "",
    ) -> list[Score | None]:
        """As `find_score`, for many (task, scorer, scorer's version) in one look."""
        with self._db.read() as c:
            return scores.known(c, digest=digest, keys=keys, precision=precision, encoding=encoding)

    def add_forecasts(self, new: Sequence[Forecasted]) -> None:
        """Keep what a dry run expected."""
        with self._db.write() as c:
            forecasts.add(c, new)

    def forecasts(self) -> list[Forecasted]:
        """What dry runs expected, oldest first."""
        with self._db.read() as c:
            return forecasts.every(c)

    def scores(
        self,
        *,
        subject: str | None = None,
        task: str | None = None,
        revision: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[Score]:
        """Scores by creation, also those measured under another name of the same weights.

        Args:
            subject: `base` or an adapter's reference.
            task, revision: of one task, or one revision of it.
            since, until: made then or later; made before.
        """
        with self._db.read() as c:
            return scores.every(
                c, subject=subject, task=task, revision=revision, since=since, until=until
            )

    def scores_of(self, subjects: Collection[str]) -> list[Score]:
        """`scores` of several subjects, in one reading; unknown ones have none.

        Args:
            subjects: `base` and adapters by version, `line@3`.
        """
        with self._db.read() as c:
            return scores.every(c, subjects=subjects)

    def scores_by_task(
        self,
        *,
        subject: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Iterator[tuple[Task, list[Score]]]:
        """As `scores`, one task after the other in their order, all revisions of each.

        Only one task's scores are read at a time, each in a transaction of its own.
        """
        for task in self.tasks():
            yield task, self.scores(subject=subject, task=task.name, since=since, until=until)

    def outcomes(self, score: Score) -> tuple[np.ndarray, np.ndarray | None]:
        """Outcomes and weights of a score, each (eval rows,) float32."""
        return self.outcomes_of([score])[0]

    def outcomes_of(self, wanted: Sequence[Score]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """As `outcomes` for many scores, of which those of one task are decoded together.

        Raises:
            DamagedObject: names the first that is damaged.
        """
        with self._db.read() as c:
            return scores.arrays(c, wanted)

    def reuse(self, task: str, revision: int) -> int:
        """How many different weights were ever scored on that revision's eval rows.

        The more, the more the best of them owes to luck. Adapters of equal weights
        count once, the base counts too.
        """
        with self._db.read() as c:
            return scores.reuse(c, task, revision)

    # what can be made again, kept so that no model runs for it twice

    def answers(
        self,
        *,
        digest: str,
        task: Task,
        scorer_version: str,
        precision: str,
        encoding: str,
        rows: Sequence[int],
    ) -> dict[int, str]:
        """Row -> what those weights answered to it, of the rows that are known."""
        with self._db.read() as c:
            return answers.find(
                c,
                digest=digest,
                task=task,
                scorer_version=scorer_version,
                precision=precision,
                encoding=encoding,
                rows=rows,
            )

    def answered(self) -> set[tuple[str, int]]:
        """The task revisions of which any answer is known."""
        with self._db.read() as c:
            return answers.answered(c)

    def add_answers(
        self,
        *,
        digest: str,
        task: Task,
        scorer_version: str,
        precision: str,
        encoding: str,
        found: Mapping[int, str],
    ) -> None:
        """Keep what those weights answered, by row."""
        with self._db.write() as c:
            answers.add(
                c,
                digest=digest,
                task=task,
                scorer_version=scorer_version,
                precision=precision,
                encoding=encoding,
                answers=found,
            )

    def trial(
        self, *, recipe: str, task: Task, scorer_version: str, precision: str
    ) -> tuple[str, np.ndarray, np.ndarray | None] | None:
        """Digest, outcomes and weights of an adapter that was tried, if they are whole."""
        with self._db.read() as c:
            return trials.find(
                c, recipe=recipe, task=task, scorer_version=scorer_version, precision=precision
            )

    def add_trial(
        self,
        *,
        recipe: str,
        digest: str,
        task: Task,
        scorer_version: str,
        precision: str,
        outcomes: np.ndarray,
        weights: np.ndarray | None = None,
    ) -> None:
        """Keep the outcomes of an adapter that is not kept, by what it was made of.

        Args:
            recipe: a digest of what it was made of. digest: of its weights.
            outcomes, weights: (eval rows,), kept as float32; NaN is not measured.
        """
        with self._db.write() as c:
            trials.add(
                c,
                recipe=recipe,
                digest=digest,
                task=task,
                scorer_version=scorer_version,
                precision=precision,
                outcomes=outcomes,
                weights=weights,
            )

    # comparisons of kinds

    def open_kind_comparison(self, task: Task, plan: Mapping[str, Any]) -> KindComparison:
        """The comparison of an equal plan, to go on with, or a new one."""
        with self._db.write() as c:
            return kind_comparisons.start(c, task, plan)

    def kind_comparisons(self) -> list[KindComparison]:
        """All comparisons of kinds, oldest first."""
        with self._db.read() as c:
            return kind_comparisons.every(c)

    def add_kind_step(self, digest: str, step: KindStep) -> None:
        """Note a finished step of a comparison; one that is noted already stays as it is."""
        with self._db.write() as c:
            kind_comparisons.add_step(c, digest, step)

    def kind_steps(self, digest: str) -> list[KindStep]:
        """The finished steps of a comparison, in their order."""
        with self._db.read() as c:
            return kind_comparisons.steps(c, digest)

    # aliases

    def set_alias(
        self,
        line: str,
        name: str,
        version: int,
        *,
        action: str = "set",
        reason: str = "",
        forced: bool = False,
        verdict: Mapping[str, Any] | None = None,
        expected: int | Literal["any"] | None = "any",
    ) -> Alias:
        """Point an alias at a version of its line; the move goes into the journal.

        Args:
            action: what the journal calls it: "set", "promoted", "rolled back".
            reason: the user's words.
            forced: against the verdict.
            verdict: what the gate said, as JSON; None where it was not asked.
            expected: the version that it must point at before, None for none.
        Raises:
            Conflict: it points elsewhere.
        """
        with self._db.write() as c:
            return aliases.point(
                c, line, name, version, action=action, reason=reason, forced=forced,
                verdict=verdict, expected=expected,
            )  # fmt: skip

    def aliases(self, line: str | None = None) -> list[Alias]:
        """Aliases of one line or of all, by line and name."""
        with self._db.read() as c:
            return aliases.every(c, line)

    def remove_alias(self, line: str, name: str, *, reason: str = "") -> None:
        """Take an alias away; that goes into the journal too."""
        with self._db.write() as c:
            aliases.remove(c, line, name, reason=reason)

    def journal(
        self,
        line: str | None = None,
        alias: str | None = None,
        since: datetime | None = None,
    ) -> list[JournalEntry]:
        """Every move of an alias there ever was, oldest first.

        Args:
            line, alias: of one line, of aliases of that name.
            since: then or later.
        """
        with self._db.read() as c:
            return journal.entries(c, line=line, alias=alias, since=since)

    # moving between stores: see `moving`

    def parcel(self, refs: Sequence[AdapterRef] | None = None) -> Parcel:
        """Adapters with all that they need, or everything, as of one moment."""
        with self._db.read() as c:
            return parcels.whole(c) if refs is None else parcels.of_adapters(c, refs)

    def news(self, parcel: Parcel) -> receiving.News:
        """What of another store's parcel is new here.

        Raises:
            WrongBase: it is of another base.
            Conflict: the same name is something else here.
        """
        with self._db.read() as c:
            return receiving.compare(c, parcel)

    def score_keys(self) -> set[tuple[Any, ...]]:
        """What each score here is known by; see `receiving.score_key`."""
        with self._db.read() as c:
            return receiving.score_keys(c)

    def take(
        self,
        parcel: Parcel,
        outcomes: Sequence[tuple[np.ndarray, np.ndarray | None]],
        said: str,
        put: Callable[[Parcel], Sequence[str]],
    ) -> receiving.News:
        """Add what is new of a parcel, all of it or nothing.

        Args:
            outcomes: of the parcel's scores.
            said: where it is from, for the record.
            put: has the files of these records in `objects`, and says their digests; called
                again where gc came in between.
        Raises:
            As `news` and `put`.
        """
        return self._with_files(
            lambda: put(self.news(parcel).only_new(parcel)),
            lambda c, files: receiving.add(c, parcel, outcomes, said, files),
        )

    # care

    def times(self) -> list[list[datetime]]:
        """When each version was made by the clock of then, line by line in their order.

        Between lines there is no order: versions of other stores come when they come.
        """
        with self._db.read() as c:
            return adapters.times(c)

    def collect(
        self, *, grace: timedelta = collecting.GRACE, dry_run: bool = False
    ) -> Iterator[Freed]:
        """Free what no row needs: files, ended runs' folders, what killed writers left.

        Args:
            grace: since a file was written, a version removed, or a folder last changed.
            dry_run: tell only.
        Raises:
            DamagedObject, MissingObject: rows that name images cannot be read; nothing was freed.
        """
        if grace < timedelta(0):
            raise InvalidInput(f"the time of grace must be 0 or more, got {grace}")
        self.objects.confirm()
        return collecting.collect(self._db, self.objects, self.root, grace=grace, dry_run=dry_run)

    def verify(self) -> Iterator[Finding]:
        """Everything that is wrong with rows, files and the database; changes nothing."""
        return integrity.verify(self._db, self.objects)
