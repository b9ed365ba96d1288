"""The only folder that knows transformers' internals: its two hooks, its checkpoints, its families."""
