"""What alembic runs for every command; the connection comes from ``migrations.__main__``, there is no alembic.ini."""

from __future__ import annotations

from alembic import context

import blueprints.batches.models
import blueprints.documents.models  # noqa: F401  # both fill the metadata
from blueprints.db import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    compare_type=True,
    render_as_batch=connection.dialect.name == "sqlite",
    # The whole way is one transaction, which whoever opened the connection began and will commit.
    transactional_ddl=False,
)
context.run_migrations()
