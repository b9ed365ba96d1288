"""The HTTP face: the only folder that knows FastAPI, pydantic, uvicorn and Prometheus."""
