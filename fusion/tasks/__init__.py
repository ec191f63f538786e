"""Generated tasks: each module's GENERATORS maps a task's name to `generator(rng, split) -> ChatExample`."""
