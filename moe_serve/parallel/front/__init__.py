"""The front process: it holds no weights, starts the ranks, and runs the engine over them."""
