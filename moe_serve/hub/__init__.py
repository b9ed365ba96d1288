"""MODEL as the user wrote it becomes a checkpoint folder, wherever the checkpoint is: here, in a cache, or on a hub."""
