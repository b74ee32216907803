"""ESI: from prompts to scores, mask and report."""
