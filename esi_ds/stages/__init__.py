"""Stages: each joins the pieces into one step of the line and is what one launch script runs."""
