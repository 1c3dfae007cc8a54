"""Gateway, worker and scheduler: sans-I/O cores and the shells that run them."""
