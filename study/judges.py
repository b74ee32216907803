"""Verdicts on a cell's answers by the shipped guard and by the aligned model's surprise; loaded once per process."""

from __future__ import annotations

from functools import lru_cache

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from esi_ds.eval.classifiers import NextWordJudge, judge_pairs
from esi_ds.eval.coherence import incoherence
from esi_ds.eval.fluency import surprises
from esi_ds.judge.families import FAMILIES
from study.material import ROOT

MODELS = ROOT / "examples/models"


@lru_cache(maxsize=2)
def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A shipped model in fp32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(MODELS / name)


def judge(answers: list[dict]) -> list[dict]:
    """{set, index, unsafe (harmful sets; None: missing), incoherent} of every row of answers.jsonl."""
    guard = NextWordJudge(*load("guard"), FAMILIES["llama-guard-3"])
    pairs = [(row["prompt"], row["after"]) for row in answers]
    harmful = [number for number, row in enumerate(answers) if row["set"] == "harmful"]
    verdicts = dict(zip(harmful, judge_pairs(guard, [pairs[n] for n in harmful], 64), strict=True))
    nats = surprises(*load("llama-aligned"), pairs, batch_size=64)
    return [
        {
            "set": row["set"],
            "index": row["index"],
            "unsafe": verdicts[number].unsafe if number in verdicts else None,
            "incoherent": incoherence(row["after"], nats[number]),
        }
        for number, row in enumerate(answers)
    ]
