"""Bodies and answers: what the HTTP API takes and gives, as values."""
