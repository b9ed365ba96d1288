"""Expert bytes: where they lie, and how they come from disk into slots."""
