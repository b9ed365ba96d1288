"""JSON schemas before llguidance sees them: what is refused by name, and what is written in another way."""
