"""First schema: base, lines, tasks, masks, runs, adapters, scores, aliases.

It names plain column types only, so that later changes of the package's own types
cannot change what this revision meant.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "base",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text()),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("model_type", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_base_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_base")),
        sa.UniqueConstraint("fingerprint", name=op.f("uq_base_fingerprint")),
    )
    op.create_table(
        "lines",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("of_task", sa.Boolean(), nullable=False),
        sa.Column("sequence", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_lines")),
        sa.UniqueConstraint("name", name=op.f("uq_lines_name")),
    )
    op.create_table(
        "tasks",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("scorer", sa.Text(), nullable=False),
        sa.Column("scorer_version", sa.Integer(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("options", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.Column("eval_keys", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["name"], ["lines.name"], name=op.f("fk_tasks_name")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tasks")),
        sa.UniqueConstraint("name", "revision", name=op.f("uq_tasks_name_revision")),
    )
    op.create_table(
        "splits",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("task_revision", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("longest", sa.BigInteger(), nullable=False),
        sa.Column("truncated", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["task", "task_revision"],
            ["tasks.name", "tasks.revision"],
            name=op.f("fk_splits_task_task_revision"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_splits")),
        sa.UniqueConstraint(
            "task", "task_revision", "name", name=op.f("uq_splits_task_task_revision_name")
        ),
    )
    op.create_table(
        "masks",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("task_revision", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("projection", sa.Text(), nullable=False),
        sa.Column("sparsity", sa.Float(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("kept", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["task", "task_revision"],
            ["tasks.name", "tasks.revision"],
            name=op.f("fk_masks_task_task_revision"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_masks")),
        sa.UniqueConstraint("task", "version", name=op.f("uq_masks_task_version")),
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.Column("open_plan", sa.Text()),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.UniqueConstraint("open_plan", name=op.f("uq_runs_open_plan")),
    )
    op.create_table(
        "adapters",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("line", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("origin", sa.Text(), nullable=False),
        sa.Column("task", sa.Text()),
        sa.Column("task_revision", sa.Integer()),
        sa.Column("mask_task", sa.Text()),
        sa.Column("mask_version", sa.Integer()),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("projection", sa.Text()),
        sa.Column("base", sa.Text(), nullable=False),
        sa.Column("sequence", sa.Boolean(), nullable=False),
        sa.Column("run", sa.Text()),
        sa.Column("stage", sa.Integer()),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("versions", sa.Text(), nullable=False),
        sa.Column("facts", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["line"], ["lines.name"], name=op.f("fk_adapters_line")),
        sa.ForeignKeyConstraint(["base"], ["base.fingerprint"], name=op.f("fk_adapters_base")),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name=op.f("fk_adapters_run")),
        sa.ForeignKeyConstraint(
            ["task", "task_revision"],
            ["tasks.name", "tasks.revision"],
            name=op.f("fk_adapters_task_task_revision"),
        ),
        sa.ForeignKeyConstraint(
            ["mask_task", "mask_version"],
            ["masks.task", "masks.version"],
            name=op.f("fk_adapters_mask_task_mask_version"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapters")),
        sa.UniqueConstraint("line", "version", name=op.f("uq_adapters_line_version")),
        sa.UniqueConstraint("run", "stage", name=op.f("uq_adapters_run_stage")),
    )
    op.create_index(op.f("ix_adapters_digest"), "adapters", ["digest"])
    op.create_table(
        "parents",
        sa.Column("adapter", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("line", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("weight", sa.Float()),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.id"], name=op.f("fk_parents_adapter")),
        sa.ForeignKeyConstraint(
            ["line", "version"],
            ["adapters.line", "adapters.version"],
            name=op.f("fk_parents_line_version"),
        ),
        sa.PrimaryKeyConstraint("adapter", "position", name=op.f("pk_parents")),
    )
    op.create_index(op.f("ix_parents_line_version"), "parents", ["line", "version"])
    op.create_table(
        "scores",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("task_revision", sa.Integer(), nullable=False),
        sa.Column("scorer", sa.Text(), nullable=False),
        sa.Column("scorer_version", sa.Integer(), nullable=False),
        sa.Column("precision", sa.Text(), nullable=False),
        sa.Column("origin", sa.Text(), nullable=False),
        sa.Column("value", sa.Float()),
        sa.Column("error", sa.Float()),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("facts", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.Column("encoding", sa.Text(), nullable=False),
        sa.Column("outcomes", sa.LargeBinary(), nullable=False),
        sa.Column("weights", sa.LargeBinary()),
        sa.ForeignKeyConstraint(
            ["task", "task_revision"],
            ["tasks.name", "tasks.revision"],
            name=op.f("fk_scores_task_task_revision"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_scores")),
        sa.UniqueConstraint(
            "digest",
            "task",
            "task_revision",
            "scorer",
            "scorer_version",
            "precision",
            "origin",
            name=op.f("uq_scores_key"),
        ),
    )
    op.create_index(op.f("ix_scores_task_task_revision"), "scores", ["task", "task_revision"])
    op.create_table(
        "aliases",
        sa.Column("line", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("moved_at", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["line", "version"],
            ["adapters.line", "adapters.version"],
            name=op.f("fk_aliases_line_version"),
        ),
        sa.PrimaryKeyConstraint("line", "name", name=op.f("pk_aliases")),
    )
    op.create_table(
        "alias_moves",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("line", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("from_version", sa.Integer()),
        sa.Column("to_version", sa.Integer()),
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("moved_at", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["line"], ["lines.name"], name=op.f("fk_alias_moves_line")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alias_moves")),
    )
    op.create_index(op.f("ix_alias_moves_line"), "alias_moves", ["line"])
