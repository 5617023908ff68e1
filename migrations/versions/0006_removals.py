"""Removals: versions that are hidden, and those that were brought back."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "removals",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", sa.Text(), nullable=False),
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("line", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("hidden", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["line", "version"],
            ["adapters.line", "adapters.version"],
            name=op.f("fk_removals_line_version"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_removals")),
    )
    op.create_index("ix_removals_line_version", "removals", ["line", "version"])
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION refuse_removals_change() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'removals only grow'; END $$"
        )
        op.execute(
            "CREATE TRIGGER removals_refuse_change BEFORE UPDATE OR DELETE OR TRUNCATE "
            "ON removals FOR EACH STATEMENT EXECUTE FUNCTION refuse_removals_change()"
        )
        return
    for change in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER removals_refuse_{change.lower()} BEFORE {change} ON removals "
            "BEGIN SELECT RAISE(ABORT, 'removals only grow'); END"
        )
