"""Say whether the process lives, and whether what it needs answers."""
