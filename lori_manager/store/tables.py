"""The registry's tables. Their rows stay inside `store/`; the modules beside make records of them.

Keys are the words that people use (line and version, task and revision), so that a
row reads like the record it becomes; `id` only keeps the order of creation. Nothing
here creates a schema: that is Alembic's alone, and a test holds both together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

from lori_manager.errors import DamagedObject

_DAMAGED = "run `lori verify`, then restore the database from a copy"


def canonical(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text.

    Raises:
        TypeError: a value that JSON cannot hold.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"JSON cannot hold {value!r}, a {type(value).__name__}")


class Json(TypeDecorator[Any]):
    """Canonical JSON text."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str:
        """To text."""
        return canonical(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """From text; what does not parse was altered."""
        try:
            return json.loads(value)
        except (TypeError, ValueError) as e:
            raise DamagedObject(f"the database holds broken JSON: {_DAMAGED}") from e


def now() -> datetime:
    """The time in UTC."""
    return datetime.now(UTC)


class Measured(TypeDecorator[float]):
    """A figure that may be NaN, which is kept as NULL because SQLite has no NaN."""

    impl = Float
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        """NaN to NULL."""
        return None if value is None or value != value else float(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> float:
        """NULL to NaN."""
        return float("nan") if value is None else float(value)


class UtcTime(TypeDecorator[datetime]):
    """ISO 8601 text in UTC with microseconds: it sorts like the time it tells."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> str:
        """To text; a time without a zone is a caller's bug."""
        if value is None or value.tzinfo is None:
            raise ValueError(f"expected a time with a time zone, got {value!r}")
        return value.astimezone(UTC).isoformat(timespec="microseconds")

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime:
        """From text; what does not parse was altered."""
        try:
            return datetime.fromisoformat(value)
        except (TypeError, ValueError) as e:
            raise DamagedObject(f"the database holds a broken time: {_DAMAGED}") from e


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

base = Table(
    "base",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("fingerprint", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("revision", Text),
    Column("path", Text, nullable=False),
    Column("model_type", Text, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("code", Text),
    UniqueConstraint("fingerprint"),
    CheckConstraint("id = 1", name="one_row"),
)

object_place = Table(  # where objects lie when not in the store's own folder
    "object_place",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("url", Text, nullable=False),
    Column("owner", Text, nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)

home = Table(  # of a server's database: the folder that it goes with
    "home",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("folder", Text, nullable=False),
    Column("place", Text, nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)

# Every task owns the line of its name, so this table alone keeps names unique.
lines = Table(
    "lines",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("of_task", Boolean, nullable=False),
    Column("sequence", Json, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    UniqueConstraint("name"),
)

tasks = Table(
    "tasks",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, ForeignKey("lines.name"), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("scorer", Text, nullable=False),
    Column("scorer_version", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("options", Json, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    UniqueConstraint("name", "revision"),
)

splits = Table(
    "splits",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("task", Text, nullable=False),
    Column("task_revision", Integer, nullable=False),
    Column("name", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("longest", BigInteger, nullable=False),
    Column("truncated", BigInteger, nullable=False),
    ForeignKeyConstraint(["task", "task_revision"], ["tasks.name", "tasks.revision"]),
    UniqueConstraint("task", "task_revision", "name"),
)

masks = Table(
    "masks",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("task", Text, nullable=False),
    Column("task_revision", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("digest", Text, nullable=False),
    Column("projection", Text, nullable=False),
    Column("sparsity", Float, nullable=False),
    Column("scope", Text, nullable=False),
    Column("kept", BigInteger, nullable=False),
    Column("total", BigInteger, nullable=False),
    Column("config", Json, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    ForeignKeyConstraint(["task", "task_revision"], ["tasks.name", "tasks.revision"]),
    UniqueConstraint("task", "version"),
)

runs = Table(
    "runs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("plan", Json, nullable=False),
    Column("open_plan", Text),  # the plan's digest, NULL once done: one open run a plan
    Column("created_at", UtcTime, nullable=False),
    UniqueConstraint("open_plan"),
)

adapters = Table(
    "adapters",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("line", Text, ForeignKey("lines.name"), nullable=False),
    Column("version", Integer, nullable=False),
    Column("origin", Text, nullable=False),
    Column("task", Text),
    Column("task_revision", Integer),
    Column("mask_task", Text),
    Column("mask_version", Integer),
    Column("method", Text, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("projection", Text),
    Column("base", Text, ForeignKey("base.fingerprint"), nullable=False),
    Column("sequence", Boolean, nullable=False),
    Column("run", Text, ForeignKey("runs.id")),
    Column("stage", Integer),
    Column("digest", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("config", Json, nullable=False),
    Column("versions", Json, nullable=False),
    Column("facts", Json, nullable=False),
    ForeignKeyConstraint(["task", "task_revision"], ["tasks.name", "tasks.revision"]),
    ForeignKeyConstraint(["mask_task", "mask_version"], ["masks.task", "masks.version"]),
    UniqueConstraint("line", "version"),
    UniqueConstraint("run", "stage"),
    Index("ix_adapters_digest", "digest"),
)

parents = Table(
    "parents",
    metadata,
    Column("adapter", Integer, ForeignKey("adapters.id"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("line", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("digest", Text, nullable=False),
    Column("weight", Float),
    PrimaryKeyConstraint("adapter", "position"),
    ForeignKeyConstraint(["line", "version"], ["adapters.line", "adapters.version"]),
    Index("ix_parents_line_version", "line", "version"),
)

# A score belongs to weights, not to a name: every adapter of that digest has it.
subjects = Table(
    "subjects",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("digest", Text, nullable=False),
    UniqueConstraint("digest"),
)

# With a subject, all that decides its outcomes: the key under which nothing is scored twice.
settings = Table(
    "settings",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("task", Text, nullable=False),
    Column("task_revision", Integer, nullable=False),
    Column("scorer", Text, nullable=False),
    Column("scorer_version", Text, nullable=False),
    Column("precision", Text, nullable=False),
    Column("encoding", Text, nullable=False),
    Column("origin", Text, nullable=False),
    ForeignKeyConstraint(["task", "task_revision"], ["tasks.name", "tasks.revision"]),
    UniqueConstraint(
        "task",
        "task_revision",
        "scorer",
        "scorer_version",
        "precision",
        "encoding",
        "origin",
        name="uq_settings_key",
    ),
)

score_facts = Table(
    "score_facts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("facts", Json, nullable=False),
    Column("digest", Text, nullable=False),
    UniqueConstraint("digest"),
)

row_weights = Table(  # token counts and the like, which many scores share
    "row_weights",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("digest", Text, nullable=False),
    Column("content", LargeBinary, nullable=False),
    UniqueConstraint("digest"),
)

score_pages = Table(  # what the parts hold: `pages`
    "score_pages",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("setting", Integer, ForeignKey("settings.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("directory", LargeBinary, nullable=False),
    Column("reference", LargeBinary),
    Column("bodies", LargeBinary, nullable=False),
    UniqueConstraint("setting", "number"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("line", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("moved_at", UtcTime, nullable=False),
    PrimaryKeyConstraint("line", "name"),
    ForeignKeyConstraint(["line", "version"], ["adapters.line", "adapters.version"]),
)

journal = Table(  # rows are only ever added: triggers refuse the rest
    "journal",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", UtcTime, nullable=False),
    Column("user", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("line", Text, ForeignKey("lines.name"), nullable=False),
    Column("name", Text, nullable=False),
    Column("from_version", Integer),
    Column("to_version", Integer),
    Column("forced", Boolean, nullable=False),
    Column("reason", Text, nullable=False),
    Column("verdict", Json, nullable=False),
    Index("ix_journal_line", "line"),
)

removals = Table(  # rows are only ever added: triggers refuse the rest
    "removals",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", UtcTime, nullable=False),
    Column("user", Text, nullable=False),
    Column("line", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("hidden", Boolean, nullable=False),  # else brought back
    Column("reason", Text, nullable=False),
    ForeignKeyConstraint(["line", "version"], ["adapters.line", "adapters.version"]),
    Index("ix_removals_line_version", "line", "version"),
)

forecasts = Table(  # rows are only ever added
    "forecasts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("merge", Text, nullable=False),
    Column("precision", Text, nullable=False),
    Column("member", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("task_revision", Integer, nullable=False),
    Column("scorer", Text, nullable=False),
    Column("scorer_version", Text, nullable=False),
    Column("encoding", Text, nullable=False),
    Column("agrees", Float, nullable=False),
    Column("rows", Integer, nullable=False),
    Column("own", Measured),
    Column("score", Measured),
    Column("error", Measured),
    Column("created_at", UtcTime, nullable=False),
    ForeignKeyConstraint(["task", "task_revision"], ["tasks.name", "tasks.revision"]),
)

# What the model wrote or chose for single rows, kept so that it is asked once.
answers = Table(
    "answers",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("digest", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("task_revision", Integer, nullable=False),
    Column("scorer", Text, nullable=False),
    Column("scorer_version", Text, nullable=False),
    Column("precision", Text, nullable=False),
    Column("encoding", Text, nullable=False),
    Column("row", BigInteger, nullable=False),  # of the eval rows, from 0
    Column("answer", LargeBinary, nullable=False),
    ForeignKeyConstraint(["task", "task_revision"], ["tasks.name", "tasks.revision"]),
    UniqueConstraint(
        "digest",
        "task",
        "task_revision",
        "scorer",
        "scorer_version",
        "precision",
        "encoding",
        "row",
        name="uq_answers_key",
    ),
)

# Outcomes of adapters that were made to be tried and not kept, by what they were made of.
trials = Table(
    "trials",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("recipe", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("task_revision", Integer, nullable=False),
    Column("scorer", Text, nullable=False),
    Column("scorer_version", Text, nullable=False),
    Column("precision", Text, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("outcomes", LargeBinary, nullable=False),
    Column("weights", LargeBinary),
    ForeignKeyConstraint(["task", "task_revision"], ["tasks.name", "tasks.revision"]),
    UniqueConstraint(
        "recipe",
        "task",
        "task_revision",
        "scorer",
        "scorer_version",
        "precision",
        name="uq_trials_key",
    ),
)

# Comparisons of kinds by the digest of their plan, and what is done of each.
kind_comparisons = Table(
    "kind_comparisons",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("digest", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("task_revision", Integer, nullable=False),
    Column("plan", Json, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    ForeignKeyConstraint(["task", "task_revision"], ["tasks.name", "tasks.revision"]),
    UniqueConstraint("digest"),
)

kind_steps = Table(  # rows are only ever added
    "kind_steps",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("comparison", Integer, ForeignKey("kind_comparisons.id"), nullable=False),
    Column("entry", Text, nullable=False),
    Column("step", Text, nullable=False),
    Column("point", Text, nullable=False),
    Column("line", Text),
    Column("version", Integer),
    Column("facts", Json, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    ForeignKeyConstraint(["line", "version"], ["adapters.line", "adapters.version"]),
    UniqueConstraint("comparison", "entry", "step", "point", name="uq_kind_steps_key"),
)
