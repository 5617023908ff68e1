"""The words of the project as frozen values. Rows become these; nothing else leaves the store.

Base, Task, Mask, Adapter, Line, Score and Alias are defined in the README's
"Words". All times are UTC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

JSON = Mapping[str, Any]
SPLITS = ("train", "eval", "calibration", "probe")


@dataclass(frozen=True)
class Base:
    """The one frozen model of a workspace, known by the fingerprint of its weights."""

    fingerprint: str
    source: str  # what the user named: a path or a hub id
    revision: str | None  # the hub's commit, None for a path
    path: str  # the local folder that holds the files
    model_type: str
    created_at: datetime
    code: str | None = None  # SHA-256 of the base's own Python files, where these may be run


@dataclass(frozen=True)
class Split:
    """One frozen list of rows of a task."""

    digest: str  # SHA-256 of the stored JSONL
    rows: int
    tokens: int = 0  # sum over rows of prompt + completion + end of text, after truncation
    longest: int = 0  # the longest row in tokens, before truncation
    truncated: int = 0  # rows longer than max_length


@dataclass(frozen=True)
class Task:
    """A scorer and frozen rows; changed rows or scorer make a new revision."""

    name: str
    revision: int
    scorer: str
    scorer_version: str  # a number, or a source's digest
    description: str
    splits: Mapping[str, Split]
    options: JSON  # how the rows were read: sources, sizes, seeds
    created_at: datetime

    @property
    def ref(self) -> str:
        """`safety#2`."""
        return f"{self.name}#{self.revision}"

    @property
    def requests(self) -> JSON | None:
        """How lm-evaluation-harness knows the task, where its rows are that one's requests."""
        told: JSON | None = self.options.get("lm_eval")
        return told

    @property
    def labels(self) -> tuple[str, ...]:
        """What an encoder's head tells, sorted; empty where rows are answered in words."""
        return tuple(self.options.get("labels", ()))

    @property
    def images(self) -> JSON | None:
        """How the rows' images were read, where they are images; None of text."""
        told: JSON | None = self.options.get("images")
        return told

    @property
    def trainable(self) -> bool:
        """Whether there are rows to train on; a task may be for scoring only."""
        return "train" in self.splits


@dataclass(frozen=True)
class Mask:
    """Which entries of B may train for a task, bound to the A it was calibrated on."""

    task: str
    task_revision: int
    version: int
    digest: str  # of the stored file
    projection: str  # digest of the A it belongs to
    sparsity: float
    scope: str
    kept: int
    total: int
    config: JSON
    created_at: datetime

    @property
    def ref(self) -> str:
        """`safety%2`."""
        return f"{self.task}%{self.version}"


@dataclass(frozen=True)
class Parent:
    """An adapter that another was continued or merged from."""

    ref: str
    digest: str
    weight: float | None = None  # the weight in a merge, None for a continuation


@dataclass(frozen=True)
class NewAdapter:
    """What the store needs to commit an adapter; version, digest and time are its to give."""

    line: str
    origin: str  # "trained", "merged" or "imported"
    task: str | None  # the task trained at this stage, None for merges and imports
    task_revision: int | None
    mask: str | None  # "safety%2"
    parents: Sequence[Parent]
    method: str  # "lori-s", "lori-d", "concat", "linear", "peft-lora", a kind
    rank: int  # the largest rank of any module
    projection: str | None  # digest of A where there is one A, else None
    base: str  # fingerprint
    sequence: bool = False  # a stage of a line that is a sequence
    run: str | None = None
    stage: int | None = None  # position in the run's plan
    config: JSON = field(default_factory=dict)  # the resolved configuration, seeds included
    versions: JSON = field(default_factory=dict)  # library versions
    facts: JSON = field(default_factory=dict)  # measured on the way: loss, seconds, ...


@dataclass(frozen=True)
class Adapter(NewAdapter):
    """Immutable weights with a version: `safety@3`."""

    version: int = 0
    digest: str = ""
    bytes: int = 0
    created_at: datetime = datetime.min
    hidden: bool = False  # removed: only shown where it is asked for

    @property
    def ref(self) -> str:
        """`safety@3`."""
        return f"{self.line}@{self.version}"

    @property
    def compared(self) -> str | None:
        """The digest of the comparison of kinds that it was trained for, None for others."""
        found: str | None = self.config.get("options", {}).get("compared")
        return found


@dataclass(frozen=True)
class Line:
    """A named history of adapters."""

    name: str
    task: str | None  # the task whose own line this is
    sequence: tuple[str, ...]  # task refs in the order taught; empty where it is no sequence
    versions: int  # how many there are, removed ones left out
    latest: Adapter | None
    aliases: Mapping[str, int]
    created_at: datetime


@dataclass(frozen=True)
class Run:
    """A training command in progress: what was planned, so that it can go on."""

    id: str
    plan: JSON
    done: bool
    created_at: datetime


@dataclass(frozen=True)
class NewScore:
    """One evaluation of an adapter or the base on a task revision's eval rows."""

    subject: str  # "base" or an adapter ref
    digest: str  # of the weights that act: the adapter's, or the base's fingerprint
    task: str
    task_revision: int
    scorer: str
    scorer_version: str
    precision: str  # "fp32", "bf16", "bf16-nf4", ...; "" for outcomes measured elsewhere
    value: float
    error: float  # standard error of `value`
    rows: int
    origin: str = "measured"  # or what the user said of outcomes measured elsewhere
    facts: JSON = field(default_factory=dict)
    encoding: str = ""  # digest of what made tokens of the rows; "" where it was not noted


@dataclass(frozen=True)
class Score(NewScore):
    """A stored score; its outcome per row is fetched apart, by `Store.outcomes`."""

    id: int = 0
    created_at: datetime = datetime.min


@dataclass(frozen=True)
class Alias:
    """A movable name for one adapter: `main@production`."""

    line: str
    name: str
    version: int
    moved_at: datetime

    @property
    def ref(self) -> str:
        """`main@production`."""
        return f"{self.line}@{self.name}"


@dataclass(frozen=True)
class JournalEntry:
    """One move of an alias: who made it point where, when, why, and what was said of it."""

    id: int
    at: datetime
    user: str
    action: str  # "set", "removed", or what was told: "promoted", "rolled back"
    line: str
    name: str
    from_version: int | None  # None: it was new
    to_version: int | None  # None: it was removed
    forced: bool = False  # against the verdict
    reason: str = ""
    verdict: JSON | None = None  # what the gate said, None where it was not asked

    @property
    def ref(self) -> str:
        """`main@production`."""
        return f"{self.line}@{self.name}"


@dataclass(frozen=True)
class Removal:
    """A version was hidden, or brought back: by whom, when and why."""

    id: int
    at: datetime
    user: str
    line: str
    version: int
    hidden: bool
    reason: str = ""

    @property
    def ref(self) -> str:
        """`safety@3`."""
        return f"{self.line}@{self.version}"


@dataclass(frozen=True)
class Freed:
    """What `gc` freed, or would free."""

    kind: str  # "orphan", "removed", "run" or "temporary"
    subject: str  # a digest, the removed versions, a run, a file's name
    bytes: int
    place: str


@dataclass(frozen=True)
class Expected:
    """What a dry run expects of a merge on one task."""

    member: str  # the adapter that stands for the task
    task: str
    task_revision: int
    scorer: str
    scorer_version: str
    agrees: float  # share of probe prompts on which the merge says what the member says
    rows: int  # so many prompts
    own: float  # the member's score; NaN where not known, or not a share of right answers
    score: float  # expected: own times agrees; NaN as `own`
    error: float  # its standard error


@dataclass(frozen=True)
class Forecasted:
    """A stored expectation: of which merge, known by a digest of what goes into it."""

    merge: str
    precision: str
    encoding: str
    expected: Expected
    created_at: datetime = datetime.min

    def comparable(self, score: Score) -> bool:
        """Whether the score measures what was expected."""
        names = ("task", "task_revision", "scorer", "scorer_version")
        same = all(getattr(self.expected, name) == getattr(score, name) for name in names)
        return same and (self.precision, self.encoding) == (score.precision, score.encoding)


@dataclass(frozen=True)
class KindComparison:
    """Several kinds of adapters against one another on one task, known by its plan."""

    digest: str  # of the plan
    task: str
    task_revision: int
    plan: JSON  # kinds, seeds, settings, and how learning rates are searched
    created_at: datetime


@dataclass(frozen=True)
class KindStep:
    """One finished step of a comparison of kinds."""

    entry: str  # which of the kinds
    step: str  # "search" (of a rate, briefly), "settle" (at full length) or "train"
    point: str  # the rate that was tried, or the seed that was trained
    adapter: str | None  # its ref, where one was stored
    facts: JSON  # what was measured


@dataclass(frozen=True)
class Finding:
    """Something that `verify` or `audit` has to tell."""

    kind: str  # "missing", "damaged", "unfit", "orphan", "drop"
    subject: str
    message: str
    facts: JSON = field(default_factory=dict)
