"""The database's history, and how to bring a database to any point of it."""
