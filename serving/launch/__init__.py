"""Entry points: serve, gateway, worker."""
