"""Perturbation: noise on the masked weights."""
