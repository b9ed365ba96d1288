"""Metrics, logs and traces of what the server does."""
