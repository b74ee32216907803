"""The paper's procedure as benchmarks/published.py writes it: the same mathematics as ``paper_code`` here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import build_guard, build_model, byte_bpe_tokenizer
from reference import at_the_embeddings, load, num_selected, select, units
from torch import Tensor

from benchmarks import published, reference_procedure
from benchmarks.published import Row
from esi_ds.core.score import score_shard
from esi_ds.core.surrogate import estimate
from esi_ds.core.units import Shard
from esi_ds.models.roles import describe
from esi_ds.zero.engine import full_shapes

SAFE = 11
ROWS = [
    Row([5, 40, 41, 42], [50, 61, 72], [30, 31, 32], [33, 34], SAFE),
    Row([5, 43], [80, 81, 80, 82, 83, 84], [30, 31, 32], [33, 34], SAFE),
    Row([5, 44, 45, 46, 47, 48], [90], [30, 31, 32], [33, 34], SAFE),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    build_model("llama", folder / "model", byte_bpe_tokenizer())
    build_guard(folder / "guard", byte_bpe_tokenizer(), extra_rows=3)  # as many as the model
    return folder


def our_scores(folder: Path, rows: list[Row]) -> dict[str, Tensor]:
    """Scores by this project's rules (``estimate``, ``score_shard``), fp32; the oracle takes J's gradient."""
    (model, _), (guard, _) = load(folder / "model"), load(folder / "guard")
    table = guard.get_input_embeddings().weight.detach()
    for index, row in enumerate(rows):
        where = slice(len(row.before), len(row.before) + len(row.response))
        ids = row.before + row.response + row.after
        _, gradient = at_the_embeddings(guard, ids, lambda logits: logits[-1, SAFE])
        logits = model(torch.tensor([row.prompt + row.response])).logits[0, len(row.prompt) - 1 : -1]
        sampled = torch.tensor(row.response)
        _, start = estimate(
            "paper_code",
            logits.detach(),
            gradient[where] @ table.T,
            sampled,
            temperature=0.3,
            samples=1,
            seed=0,
            prompt_index=index,
        )
        logits.backward(start)
    parameters = [parameter for parameter in describe(model, full_shapes(model)) if parameter.scored]
    sigma_of = {unit.name: unit.sigma for unit in units(model)}
    scores = {}
    for parameter in parameters:
        weight = model.get_parameter(parameter.name)
        sigma = {unit: sigma_of[unit.name] for unit in parameter.units}
        whole = Shard(parameter, ((0, parameter.numel),), parameter.name)
        mean = weight.grad.flatten() / len(rows)
        flat = score_shard("esi", whole, mean, weight.detach().flatten(), sigma, 0)
        scores[parameter.name] = flat.view(weight.shape)
    return scores


def their_scores(folder: Path, rows: list[Row], dtype: torch.dtype) -> dict[str, Tensor]:
    model, guard = (load(folder / name)[0].to(dtype) for name in ("model", "guard"))
    guard.requires_grad_(False)
    for row in rows:
        published.add_gradient(model, guard, row)
    return published.scores(model, len(rows))


def test_the_scores_are_those_of_paper_code(folder: Path) -> None:
    """In float64, since the sampled token's entry of the softmax's gradient is a difference of nearly equal numbers;
    1e-5 is what fp32 here leaves, as in the tests of ranks against the oracle."""
    ours, theirs = our_scores(folder, ROWS), their_scores(folder, ROWS, torch.float64)
    assert list(ours) == list(theirs)
    for name, values in ours.items():
        assert float((values - theirs[name]).norm() / values.norm()) < 1e-5, name
    k = num_selected(load(folder / "model")[0], 0.01)
    mask, expected = published.selected(theirs, k), select(ours, k)
    assert sum(int(bits.sum()) for bits in mask.values()) == k
    assert sum(int((mask[name] & bits).sum()) for name, bits in expected.items()) >= 0.99 * k


def test_a_tied_head_is_not_scored(tmp_path: Path) -> None:
    build_model("llama_tied", tmp_path, byte_bpe_tokenizer())
    model, _ = load(tmp_path)
    expected = [parameter.name for parameter in describe(model, full_shapes(model)) if parameter.scored]
    assert list(published.scored_weights(model)) == expected


def test_a_pass_of_the_benchmark(folder: Path) -> None:
    """Its mask is the one of these scores, whatever was added up before; a mask overlaps with itself alone in full."""
    model, _ = load(folder / "model")
    figures, mask = reference_procedure.run_published(folder, "fp32", ROWS)
    expected = published.selected(their_scores(folder, ROWS, torch.float32), num_selected(model, 0.01))
    assert all(bool((mask[name] == bits).all()) for name, bits in expected.items())
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert figures["peak_bytes"] > 2 * weights  # at least the model and a gradient of all its weights
    assert figures["prompts_per_second"] > 0
    assert reference_procedure.overlap(mask, mask) == 1
    assert reference_procedure.overlap(mask, {name: ~bits for name, bits in mask.items()}) == 0
