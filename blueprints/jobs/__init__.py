"""Look at background jobs, follow them, cancel them."""
