"""One replica: request states, batching, step plans, executors."""
