"""Layers whose routed experts got no gradient at all are told of; an expert that nobody chose is not."""

from __future__ import annotations

from esi_ds.zero.score import silent_experts


def row(layer: int | None, expert: int | None, largest: float) -> dict:
    return {"layer": layer, "expert": expert, "max_score": largest, "mean_score": largest / 2}


def test_layers_without_any_score_are_named() -> None:
    rows = [
        row(layer, expert, 0.0 if layer in (2, 5) else 1e-30 * expert) for layer in (0, 2, 5) for expert in range(3)
    ]
    warning = silent_experts([*rows, row(2, None, 1.0), row(None, None, 0.0)])
    assert warning is not None and warning.startswith("WARNING: every routed expert of 2 of 3 layers")
    assert "(layers 2, 5)" in warning


def test_nothing_is_said_of_single_experts_and_dense_models() -> None:
    assert silent_experts([row(0, 0, 0.0), row(0, 1, 1e-30), row(0, None, 0.0)]) is None
    assert silent_experts([row(0, None, 0.0)]) is None
