"""Where a store's objects lie, when not in its own folder."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.create_table(
        "object_place",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_object_place_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_object_place")),
    )
