"""Bases: the digest of code that came with one and may be run."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("base", sa.Column("code", sa.Text()))
