"""``--dry-run``: what a stage would do and hold, from shapes alone."""
