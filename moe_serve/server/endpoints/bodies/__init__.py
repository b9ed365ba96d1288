"""What a request's body is, and how it becomes a request of the engine."""
