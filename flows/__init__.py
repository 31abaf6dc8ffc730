"""Prefect, and only here: the pipeline as a flow. `flows` imports `stages`, never the reverse."""
