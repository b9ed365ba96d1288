"""Experts computed on the host, where their weights lie, instead of being brought to the device."""
