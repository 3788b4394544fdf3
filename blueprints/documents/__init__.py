"""Process one document: a summary, its keywords, its language."""
