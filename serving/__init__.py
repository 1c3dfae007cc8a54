"""Requests in, tokens out: the serving layer."""
