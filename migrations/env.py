"""Alembic's entry. lori hands over its own connection, already in a transaction.

On the command line: `alembic -x store=DIR/.lori current` (for people who write
migrations; users have `lori db upgrade`, which also keeps a backup).
"""

from __future__ import annotations

from pathlib import Path

from alembic import context
from sqlalchemy import Connection

from lori_manager.store.database import Database
from lori_manager.store.databases import backend
from lori_manager.store.tables import metadata


def migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=connection.dialect.name == "sqlite",  # which rebuilds a table to alter it
        transactional_ddl=True,  # true of SQLite once the driver leaves transactions to us
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    store = Path(context.get_x_argument(as_dictionary=True).get("store", ".lori"))
    with Database(backend(store)).migrating() as connection:
        migrate(connection)
