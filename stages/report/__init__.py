"""report: one self-contained HTML page about a run, made from the store alone."""
