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
from esi_ds.stages.esi.score import ScoringPass
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
        spans = [(i, i + 1) for i in range(response)]
        judged = EncodedPair(EncodedText(ids, spans, [7], [8]), list(range(prompt, len(ids))), spans, (0, response))
        examples.append(Example(index, ids[:prompt], EncodedResponse(ids[prompt:], spans), judged))
    return examples


def make_judge(guard: PreTrainedModel) -> Guard:
    """A whole guard that pads with token 0."""
    return Guard(guard, SimpleNamespace(pad_token_id=0), "margin", WholeWeights())


def make_scoring(
    folder: Path, dtype: str, model: ShardedModel, guard: PreTrainedModel, examples: list[Example], batch_size: int
) -> ScoringPass:
    """A pass that saves nothing. guard: whole, with the model's vocabulary."""
    config = validate(
        {
            "run": {"output_dir": str(folder / "run")},
            "model": {"path": "m", "dtype": dtype},
            "esi": {"batch_size": batch_size, "save_every": 10**6},
        }
    )
    # One vocabulary for both: the map is the identity.
    vocabulary = VocabularyMap.__new__(VocabularyMap)
    vocabulary.num_logits, vocabulary.is_identity = model.num_logits, True
    vocabulary.has_text = [True] * model.num_logits
    gradients = GradientShards(model, runtime.device())
    objective = SafetyObjective(config, model, make_judge(guard), vocabulary, examples, gradients, 0)
    tracker = Tracker(folder, enabled=False, tensorboard=False, stage="esi")
    return ScoringPass(config, model, objective, folder / "checkpoint", tracker)
