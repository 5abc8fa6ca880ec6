"""Who starts stages: the plan of a pipeline, and launchers that run it."""
