"""The managed loop thread: life cycle, submission, caller work, streaming, resources, watchdog."""
