"""Caches without a device: events from routing traces, replay, shadow caches, the optimal bound. Loads no torch."""
