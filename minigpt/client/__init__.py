"""The user's side of a pipeline, and a whole model in this process."""
