"""SET and SPA: from a mask and rows to a tuned model."""
