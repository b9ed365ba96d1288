"""Quantised checkpoints: what config.json says about them, how their tensors are named, and writing them."""
