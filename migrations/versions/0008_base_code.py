"""Bases: the digest of code that came with one and may be run."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("base", sa.Column("code", sa.Text()))
