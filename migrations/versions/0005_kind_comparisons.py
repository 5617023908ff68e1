"""Comparisons of kinds: what was planned, and every step that is done."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "kind_comparisons",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("task_revision", sa.Integer(), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["task", "task_revision"],
            ["tasks.name", "tasks.revision"],
            name=op.f("fk_kind_comparisons_task_task_revision"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_kind_comparisons")),
        sa.UniqueConstraint("digest", name=op.f("uq_kind_comparisons_digest")),
    )
    op.create_table(
        "kind_steps",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("comparison", sa.Integer(), nullable=False),
        sa.Column("entry", sa.Text(), nullable=False),
        sa.Column("step", sa.Text(), nullable=False),
        sa.Column("point", sa.Text(), nullable=False),
        sa.Column("line", sa.Text()),
        sa.Column("version", sa.Integer()),
        sa.Column("facts", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["comparison"], ["kind_comparisons.id"], name=op.f("fk_kind_steps_comparison")
        ),
        sa.ForeignKeyConstraint(
            ["line", "version"],
            ["adapters.line", "adapters.version"],
            name=op.f("fk_kind_steps_line_version"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_kind_steps")),
        sa.UniqueConstraint(
            "comparison", "entry", "step", "point", name=op.f("uq_kind_steps_key")
        ),
    )
