"""Sequence classifiers: which labels mean unsafe, and such a model as a differentiable judge (docs/method.md §1)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from esi_ds.config import ClassifierModel, JudgeModel
from esi_ds.errors import UserError
from esi_ds.judge.families import Family
from esi_ds.judge.guard import Guard, GuardInput, Weights, verdict_score

# Tokenizers without a limit report a number of this order.
NO_LIMIT = 10**9


@dataclass(frozen=True)
class SequenceRule:
    """How a sequence classifier is read.

    template: text with {response} and mostly {prompt}; the tokenizer's own special tokens come on top.
    unsafe_labels: names or indices; None: every label (multi-label only, as BeaverDam's fourteen).
    multi_label: labels are judged one by one (sigmoid) and not against each other (softmax); None: as the model's
    config says. A model with one label is always read by sigmoid.
    threshold: unsafe above it. Multi-label: any listed label's probability; else the listed labels' together.
    max_length: in tokens, where it is less than what model and tokenizer say.
    """

    template: str
    unsafe_labels: Sequence[str | int] | None
    multi_label: bool | None = None
    threshold: float = 0.5
    max_length: int | None = None


def model_class(section: JudgeModel) -> type:
    """transformers' class of a judge's model."""
    return AutoModelForSequenceClassification if isinstance(section, ClassifierModel) else AutoModelForCausalLM


def classifier_family(template: str) -> Family:
    """A classifier's text; it forces no prefix and says no word."""
    return Family("classifier", "", (), (), template)


def label_score(kind: str, logits: Tensor, unsafe: Sequence[int], is_multi: bool) -> Tensor:
    """Scalar score of float32 ``logits`` [labels], higher is safer.

    Labels against each other: ``judge.guard.verdict_score``, where every label that is not unsafe says safe. Labels
    one by one, p their sigmoids: ``margin`` and ``logit`` the log odds against the likeliest unsafe label, ``logprob``
    Σ log(1 − p) over the unsafe ones, ``prob`` 1 − max p.
    """
    if is_multi:
        listed = logits[list(unsafe)]
        if kind == "logprob":
            return F.logsigmoid(-listed).sum()
        return torch.sigmoid(-listed.max()) if kind == "prob" else -listed.max()
    return verdict_score(kind, logits, [index for index in range(len(logits)) if index not in unsafe], unsafe)


class ClassifierGuard(Guard):
    """A frozen ``AutoModelForSequenceClassification`` as ESI's judge.

    unsafe, is_multi: as ``read_rule`` gives them. A decoder without a padding token takes one row at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        score: str,
        weights: Weights,
        unsafe: Sequence[int],
        is_multi: bool,
    ):
        super().__init__(model, tokenizer, score, weights)
        self._unsafe, self._is_multi = list(unsafe), is_multi

    def _forward(self, inputs: Sequence[GuardInput], device) -> tuple[Tensor, list[slice], Tensor]:
        """Ids go in, not embeddings, and padding stands on the right: decoders look for a row's last token by its id,
        encoders count positions from the left. The embeddings are made a leaf on their way."""
        ids = [entry.encoded.ids for entry in inputs]
        batch = right_pad([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids], self._pad, device)
        embedded: list[Tensor] = []

        def make_leaf(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_(torch.is_grad_enabled()))
            return embedded[-1]

        hook = self.model.get_input_embeddings().register_forward_hook(make_leaf)
        try:
            logits = self.model(**batch).logits.float()
        finally:
            hook.remove()
        scores = torch.stack([label_score(self.score, row, self._unsafe, self._is_multi) for row in logits])
        return embedded[0], [slice(0, len(row)) for row in ids], scores

    @property
    def _pad(self) -> int | None:
        return self.model.config.get_text_config().pad_token_id


def read_rule(config: PretrainedConfig, rule: SequenceRule, field: str) -> tuple[list[int], bool]:
    """Indices of the unsafe labels, and whether labels are judged one by one. Raises UserError naming ``field``."""
    names = [config.id2label[index] for index in range(config.num_labels)]
    is_multi = rule.multi_label
    if is_multi is None or len(names) == 1:  # a softmax over one label is always 1
        is_multi = len(names) == 1 or config.problem_type == "multi_label_classification"
    if rule.template.count("{response}") != 1:
        raise UserError(f"{field}.template", rule.template[:60], "must hold {response} exactly once", "write it in")
    if not 0 < rule.threshold < 1:
        raise UserError(f"{field}.threshold", rule.threshold, "is no probability between 0 and 1", "try 0.5")
    given = range(len(names)) if rule.unsafe_labels is None else rule.unsafe_labels
    indices = list(dict.fromkeys(_label_index(label, names, f"{field}.unsafe_labels") for label in given))
    if not indices or (not is_multi and len(indices) == len(names)):
        raise UserError(
            f"{field}.unsafe_labels",
            rule.unsafe_labels,
            "leaves the judge only one thing to say",
            f"name those that mean unsafe among {', '.join(names)}",
        )
    return indices, is_multi


def _label_index(label: str | int, names: Sequence[str], field: str) -> int:
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return label
    if label in names:
        return names.index(label)
    near = difflib.get_close_matches(str(label), names, n=1, cutoff=0.0)
    raise UserError(field, label, f"is no label; there are {', '.join(names)}", f"the nearest is {near[0]}")


def longest_input(model: nn.Module, tokenizer: PreTrainedTokenizerBase, given: int | None) -> int | None:
    """How many tokens the judge reads at most: the least of what model, tokenizer and config say; None: no limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None:
        # RoBERTa counts positions from its padding index on: 514 of them are for 512 tokens.
        reserved = (
            getattr(module, "padding_idx", None)
            for name, module in model.named_modules()
            if name.endswith("position_embeddings")
        )
        positions -= sum(index + 1 for index in reserved if index is not None)
    limits = [limit for limit in (given, positions, tokenizer.model_max_length) if limit and limit < NO_LIMIT]
    return min(limits, default=None)


def right_pad(
    rows: Sequence[Mapping[str, list[int]]], pad: int | None, device: torch.device | str
) -> dict[str, Tensor]:
    """int64 [B, L]; right, as classifiers were trained: encoders count positions from the left."""
    width = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor(
            [
                [*row[name], *[(pad or 0) if name == "input_ids" else 0] * (width - len(row["input_ids"]))]
                for row in rows
            ],
            device=device,
        )
        for name in rows[0]
    }
