"""Scores in pages, scorers' versions as text, one journal instead of the aliases' moves.

Outcomes are written by the package's own pages: their format has a number of its own,
and what can write them now can read them later. A score whose outcomes were damaged
stays one: it is listed with its figures, and reading it says so.
"""

import hashlib
import zlib
from datetime import datetime

import numpy as np
import sqlalchemy as sa
from alembic import op

from lori_manager.store import outcomes, pages

revision = "0002"
down_revision = "0001"

_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
_KEY = "task, task_revision, scorer, scorer_version, precision, origin"


def upgrade() -> None:
    with op.batch_alter_table("tasks") as tasks:
        tasks.alter_column(
            "scorer_version", type_=sa.Text(), existing_type=sa.Integer(), existing_nullable=False
        )
        tasks.drop_column("eval_keys")  # hashes of the lines of the stored eval rows
    op.execute("UPDATE tasks SET scorer_version = CAST(scorer_version AS TEXT)")
    _make_scores()
    _carry_scores()
    op.drop_table("scores")
    _make_journal()
    op.execute(
        'INSERT INTO journal (id, at, "user", action, line, name, from_version, to_version, '
        "forced, reason, verdict) SELECT id, moved_at, \"user\", CASE WHEN to_version IS NULL "
        "THEN 'removed' ELSE 'set' END, line, name, from_version, to_version, FALSE, '', 'null' "
        "FROM alias_moves ORDER BY id"
    )
    op.drop_table("alias_moves")
    _let_the_journal_only_grow()


def _let_the_journal_only_grow() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION refuse_journal_change() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'the journal only grows'; END $$"
        )
        op.execute(
            "CREATE TRIGGER journal_refuses_change BEFORE UPDATE OR DELETE OR TRUNCATE "
            "ON journal FOR EACH STATEMENT EXECUTE FUNCTION refuse_journal_change()"
        )
        return
    for change in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER journal_refuses_{change.lower()} BEFORE {change} ON journal "
            "BEGIN SELECT RAISE(ABORT, 'the journal only grows'); END"
        )


def _make_scores() -> None:
    op.create_table(
        "subjects",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_subjects")),
        sa.UniqueConstraint("digest", name=op.f("uq_subjects_digest")),
    )
    op.create_table(
        "settings",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("task_revision", sa.Integer(), nullable=False),
        sa.Column("scorer", sa.Text(), nullable=False),
        sa.Column("scorer_version", sa.Text(), nullable=False),
        sa.Column("precision", sa.Text(), nullable=False),
        sa.Column("encoding", sa.Text(), nullable=False),
        sa.Column("origin", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["task", "task_revision"],
            ["tasks.name", "tasks.revision"],
            name=op.f("fk_settings_task_task_revision"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_settings")),
        sa.UniqueConstraint(
            "task",
            "task_revision",
            "scorer",
            "scorer_version",
            "precision",
            "encoding",
            "origin",
            name=op.f("uq_settings_key"),
        ),
    )
    op.create_table(
        "score_facts",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("facts", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_score_facts")),
        sa.UniqueConstraint("facts", name=op.f("uq_score_facts_facts")),
    )
    op.create_table(
        "row_weights",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_row_weights")),
        sa.UniqueConstraint("digest", name=op.f("uq_row_weights_digest")),
    )
    op.create_table(
        "score_pages",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("setting", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("directory", sa.LargeBinary(), nullable=False),
        sa.Column("reference", sa.LargeBinary()),
        sa.Column("bodies", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["setting"], ["settings.id"], name=op.f("fk_score_pages_setting")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_score_pages")),
        sa.UniqueConstraint("setting", "number", name=op.f("uq_score_pages_setting_number")),
    )


def _make_journal() -> None:
    op.create_table(
        "journal",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", sa.Text(), nullable=False),
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("line", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("from_version", sa.Integer()),
        sa.Column("to_version", sa.Integer()),
        sa.Column("forced", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["line"], ["lines.name"], name=op.f("fk_journal_line")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_journal")),
    )
    op.create_index(op.f("ix_journal_line"), "journal", ["line"])


def _carry_scores() -> None:
    db = op.get_bind()
    db.exec_driver_sql(
        "INSERT INTO subjects (id, digest) SELECT 127 + row_number() OVER (ORDER BY min(id)), "
        "digest FROM scores GROUP BY digest"
    )
    db.exec_driver_sql(
        f"INSERT INTO settings ({_KEY}, encoding) SELECT task, task_revision, scorer, "
        "CAST(scorer_version AS TEXT), precision, origin, '' FROM scores "
        f"GROUP BY {_KEY} ORDER BY min(id)"
    )
    subjects = {r.digest: r.id for r in db.exec_driver_sql("SELECT digest, id FROM subjects")}
    settings = {
        tuple(row)[1:]: row.id
        for row in db.exec_driver_sql(f"SELECT id, {_KEY} FROM settings")
    }
    kept = {}  # table -> what is in it -> its key
    open_pages = {}
    query = (
        f"SELECT scores.*, splits.rows AS all_rows FROM scores JOIN splits ON "
        "splits.task = scores.task AND splits.task_revision = scores.task_revision AND "
        "splits.name = 'eval' ORDER BY scores.id"
    )
    for row in db.exec_driver_sql(query):
        setting = settings[
            row.task, row.task_revision, row.scorer, str(row.scorer_version), row.precision,
            row.origin,
        ]
        facts = _key_of(db, kept, "score_facts", ("facts",), (row.facts,))
        values = _outcomes(row.encoding, _opened(row.outcomes), row.all_rows)
        weights = 0
        if row.weights is not None:
            tokens = _outcomes("float32", _opened(row.weights), row.all_rows)
            digest, content = f"damaged, of score {row.id}", b""
            if tokens is not None:
                content = outcomes.encode_floats(tokens)
                digest, content = hashlib.sha256(content).hexdigest(), pages.sealed(content)
            columns = "digest", "content"
            weights = _key_of(db, kept, "row_weights", columns, (digest, content))
        lost = values is None
        if lost:
            values = np.zeros(row.all_rows, np.float32)
        value, error = (float("nan") if x is None else x for x in (row.value, row.error))
        right, figures = pages.figures_of(values, value, error, row.rows)
        at = _microseconds(row.created_at)
        entry = pages.Entry(subjects[row.digest], at, facts, weights, right, figures)
        page = open_pages.get(setting)
        slot = None if page is None else page.add(entry, values)
        if slot is None:
            consensus = None if page is None else page.consensus()
            if page is not None:
                _write(db, setting, page)
            number = 0 if page is None else page.number + 1
            page = open_pages[setting] = pages.Page.begin(number, row.all_rows, consensus, values)
            page.add(entry, values)
        if lost:
            page.spoil()
    for setting, page in open_pages.items():
        _write(db, setting, page)


def _write(db: sa.Connection, setting: int, page: pages.Page) -> None:
    db.exec_driver_sql(
        "INSERT INTO score_pages (setting, number, directory, reference, bodies) "
        "VALUES (?, ?, ?, ?, ?)",
        (setting, page.number, page.directory, page.reference, page.bodies),
    )


def _key_of(db: sa.Connection, kept: dict, table: str, columns: tuple, values: tuple) -> int:
    key = (table, values[0])
    if key not in kept:
        marks = ", ".join("?" for _ in columns)
        made = db.exec_driver_sql(
            f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", values
        )
        kept[key] = made.lastrowid
    return kept[key]


def _microseconds(text: str) -> int:
    since = datetime.fromisoformat(text) - _EPOCH
    return (since.days * 86400 + since.seconds) * 1_000_000 + since.microseconds


def _opened(content: object) -> bytes | None:
    """Bytes without the CRC-32 that follows them; None where it does not fit."""
    if not isinstance(content, bytes):
        return None
    inner, mark = content[:-4], content[-4:]
    return inner if zlib.crc32(inner).to_bytes(4, "little") == mark else None


def _outcomes(encoding: str, content: bytes | None, rows: int) -> np.ndarray | None:
    """What revision 0001 kept as "bits" or "float32"; None where it is damaged."""
    if encoding == "bits" and content is not None and len(content) == (rows + 7) // 8:
        return np.unpackbits(np.frombuffer(content, np.uint8), count=rows).astype(np.float32)
    if encoding == "float32" and content is not None and len(content) == 4 * rows:
        return np.frombuffer(content, "<f4").astype(np.float32)
    return None
