"""A scoring pass over random ids, without tokenizers: what benchmarks time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import PreTrainedModel

from esi_ds.config import validate
from esi_ds.data.chat import EncodedResponse
from esi_ds.judge.guard import Guard, WholeWeights
from esi_ds.judge.pairs import EncodedPair, EncodedText
from esi_ds.judge.vocabulary import VocabularyMap
from esi_ds.stages.esi.objectives import SafetyObjective
from esi_ds.stages.esi.prepare import Example
from esi_ds.stages.esi.score import PassData, ScoringPass
from esi_ds.stages.saving import SaveClock
from esi_ds.tracking import Tracker
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.gradients import GradientShards


def make_examples(count: int, prompt: int, response: int, vocabulary: int) -> list[Example]:
    """``count`` examples of ``prompt`` and ``response`` random ids below ``vocabulary``; the judge reads the same."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for index in range(count):
        ids = torch.randint(5, vocabulary, (prompt + response,), generator=generator).tolist()
        examples.append(make_example(index, ids[:prompt], ids[prompt:], ids[:prompt], [], 7, 8))
    return examples


def make_example(
    index: int, prompt: list[int], response: list[int], before: list[int], after: list[int], safe: int, unsafe: int
) -> Example:
    """An example of ids alone. before, after: what the judge reads around the response. safe, unsafe: its verdicts."""
    spans = [(i, i + 1) for i in range(len(response))]
    text = EncodedText(before + response + after, [safe], [unsafe])
    positions = list(range(len(before), len(before) + len(response)))
    judged = EncodedPair(text, positions, spans, (0, len(response)))
    return Example(index, prompt, EncodedResponse(response, spans), judged)


def make_judge(guard: PreTrainedModel, score: str = "margin") -> Guard:
    """A whole guard that pads with token 0."""
    return Guard(guard, SimpleNamespace(pad_token_id=0), score, WholeWeights())


def make_scoring(
    folder: Path,
    dtype: str,
    model: ShardedModel,
    guard: PreTrainedModel,
    examples: list[Example],
    batch_size: int,
    estimator: str = "soft",
    score: str = "margin",
) -> ScoringPass:
    """A pass that saves nothing. guard: whole, with the model's vocabulary. score: of the judge."""
    config = validate(
        {
            "run": {"output_dir": str(folder / "run")},
            "model": {"path": "m", "dtype": dtype},
            "esi": {"batch_size": batch_size, "estimator": estimator},
        }
    )
    # One vocabulary for both: the map is the identity.
    vocabulary = VocabularyMap.__new__(VocabularyMap)
    vocabulary.num_logits, vocabulary.is_identity = model.num_logits, True
    vocabulary.has_text = [True] * model.num_logits
    gradients = GradientShards(model, runtime.device())
    data = PassData("safety", model, examples, gradients, pad=0, batch_size=batch_size)
    objective = SafetyObjective(data, config, make_judge(guard, score), vocabulary)
    tracker = Tracker(folder, enabled=False, tensorboard=False, stage="esi")
    return ScoringPass(config, model, objective, folder / "checkpoint", tracker, SaveClock(10**6, 0.0))
