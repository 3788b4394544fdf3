"""Process up to a thousand documents in the background."""
