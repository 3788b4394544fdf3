"""Run async workflows from synchronous code, on one managed event loop per process."""
