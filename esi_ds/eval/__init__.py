"""What answers are worth: refusals."""
