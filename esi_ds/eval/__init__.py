"""Judging answers: attack success, over-refusal, incoherence, and the statistics that go with them. One process."""
