"""Connections, limits, keys and draining: what comes before and after a request's own work."""
