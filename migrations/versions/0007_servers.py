"""What a server's database needs: the folder it goes with, and facts found by their digest.

An index of PostgreSQL refuses long texts, so facts are unique by their digest.
"""

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "home",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("folder", sa.Text(), nullable=False),
        sa.Column("place", sa.Text(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_home_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_home")),
    )
    with op.batch_alter_table("score_facts") as table:
        table.add_column(sa.Column("digest", sa.Text()))
        table.drop_constraint("uq_score_facts_facts", type_="unique")
    facts = sa.table("score_facts", sa.column("id"), sa.column("facts"), sa.column("digest"))
    db = op.get_bind()
    for key, content in db.execute(sa.select(facts.c.id, facts.c.facts)).all():
        digest = hashlib.sha256(content.encode()).hexdigest()
        db.execute(facts.update().where(facts.c.id == key).values(digest=digest))
    with op.batch_alter_table("score_facts") as table:
        table.alter_column("digest", existing_type=sa.Text(), nullable=False)
        table.create_unique_constraint(op.f("uq_score_facts_digest"), ["digest"])
