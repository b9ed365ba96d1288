"""Batches: files of requests in OpenAI's batch format, answered by any server of these endpoints. Knows no engine."""
