"""The reference service: drop-in blueprints around one document workflow, run from a checkout."""
