"""What the endpoints say about themselves: the OpenAPI document and docs/api.md's tables."""
