"""Sequence classifiers: which labels mean unsafe, and such a model as a differentiable judge (docs/method.md §1)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from esi_ds.config import ClassifierModel, GuardModel, JudgeModel
from esi_ds.core.batch import right_pad
from esi_ds.errors import UserError
from esi_ds.judge.families import FAMILIES, Family
from esi_ds.judge.guard import Guard, Weights, verdict_score
from esi_ds.judge.pairs import EncodedPair
from esi_ds.models.rows import accepted

# Tokenizers without a limit report a number of this order.
NO_LIMIT = 10**9


@dataclass(frozen=True)
class SequenceRule:
    """How a sequence classifier is read.

    template: text with {response} and usually {prompt}; the tokenizer adds its own special tokens.
    unsafe_labels: names or indices; None: every label (of several, multi-label only, as BeaverDam's fourteen).
    multi_label: labels are judged one by one (sigmoid) and not against each other (softmax); None: as the model's
    config says. A model with one label is always read by sigmoid.
    threshold: a probability; unsafe above it. Multi-label: any listed label's; otherwise the sum of the listed ones.
    max_length: in tokens, where it is less than the limits of model and tokenizer.
    """

    template: str
    unsafe_labels: Sequence[str | int] | None
    multi_label: bool | None = None
    threshold: float = 0.5
    max_length: int | None = None


def model_class(section: JudgeModel, config: PretrainedConfig) -> type:
    """transformers' class for a judge's model, whose own configuration is ``config``."""
    architectures = set(config.architectures or ())
    is_classifier = any(name.endswith("ForSequenceClassification") for name in architectures)
    if isinstance(section, ClassifierModel) or (is_classifier and _may_be(section, "labels")):
        return AutoModelForSequenceClassification
    of_tokens = {name for family in FAMILIES.values() if family.reads == "tokens" for name in family.architectures}
    return AutoModel if of_tokens & architectures and _may_be(section, "tokens") else AutoModelForCausalLM


def _may_be(section: JudgeModel, reads: str) -> bool:
    """Whether a judge's section leaves open, or names, a family that is read so."""
    family = section.family if isinstance(section, GuardModel) else "custom"
    return family == "auto" or (family in FAMILIES and FAMILIES[family].reads == reads)


def classifier_family(template: str) -> Family:
    """A classifier's text: no forced prefix and no verdict words."""
    return Family("classifier", "", (), (), template, reads="labels")


def family_rule(family: Family, threshold: float = 0.5, max_length: int | None = None) -> SequenceRule:
    """How a family's sequence classifier is read: every label by itself, and each means unsafe.

    max_length: in tokens, where it is less than the family's.
    """
    assert family.template is not None
    limits = [limit for limit in (max_length, family.max_length) if limit is not None]
    return SequenceRule(family.template, None, True, threshold, min(limits, default=None))


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

    unsafe, is_multi: as ``read_rule`` returns them. A decoder without a padding token takes one pair at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        score: str,
        weights: Weights,
        unsafe: Sequence[int],
        is_multi: bool,
    ):
        super().__init__(model, tokenizer, score, weights)
        self._unsafe, self._is_multi = list(unsafe), is_multi

    def _batch(self, pairs: Sequence[EncodedPair], device: torch.device | str) -> dict[str, Tensor]:
        return classifier_batch(pairs, pad_token_id(self.model), device)

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = self.model(**accepted(self.model, batch)).logits
        return logits

    def _score(self, logits: Tensor, pair: EncodedPair) -> Tensor:
        return label_score(self.score, logits, self._unsafe, self._is_multi)


def pad_token_id(model: PreTrainedModel) -> int | None:
    """The padding token that the model itself knows; None where its config names none."""
    return model.config.get_text_config().pad_token_id


def read_rule(config: PretrainedConfig, rule: SequenceRule, field: str) -> tuple[list[int], bool]:
    """Indices of the unsafe labels, and whether labels are judged one by one.

    Raises UserError naming a key below ``field`` for a rule that does not fit the model's ``config``.
    """
    names = label_names(config, field)
    if rule.unsafe_labels is None and len(names) == 1:
        raise UserError(
            f"{field}.unsafe_labels",
            None,
            "is not set, and the model has a single output, which may mean unsafe or, as a reward, good",
            "set it to [0] if a high output means unsafe; a reward model cannot be the judge",
        )
    is_multi = rule.multi_label
    if is_multi is None and config.problem_type == "regression":
        raise UserError(
            f"{field}.multi_label",
            None,
            "is not set, and the model's outputs are not logits of labels (problem_type: regression)",
            "set it to true if the sigmoid of an output is a probability of unsafe, or take another judge",
        )
    if is_multi is None or len(names) == 1:  # a softmax over one label is always 1
        is_multi = len(names) == 1 or config.problem_type == "multi_label_classification"
    if rule.template.count("{response}") != 1:
        raise UserError(f"{field}.template", rule.template[:60], "must hold {response} exactly once", "write it in")
    if not 0 < rule.threshold < 1:
        raise UserError(f"{field}.threshold", rule.threshold, "is not a probability between 0 and 1", "try 0.5")
    labels = range(len(names)) if rule.unsafe_labels is None else rule.unsafe_labels
    chosen = (index for label in labels for index in _label_indices(label, names, f"{field}.unsafe_labels"))
    indices = list(dict.fromkeys(chosen))
    if not indices or (not is_multi and len(indices) == len(names)):
        raise UserError(
            f"{field}.unsafe_labels",
            rule.unsafe_labels,
            "leaves the judge only one verdict",
            f"name the ones that mean unsafe among {', '.join(names)}",
        )
    return indices, is_multi


def label_names(config: PretrainedConfig, field: str) -> list[str]:
    """Names of a classifier's labels in the order of its logits. Raises UserError where one has none."""
    names = {int(index): str(name) for index, name in (config.id2label or {}).items()}
    num_labels = config.num_labels or 0
    if sorted(names) != list(range(num_labels)):
        problem = f"numbers its labels {', '.join(map(str, sorted(names)))} in id2label of config.json, and not from 0"
        raise UserError(f"{field}.path", config.name_or_path, problem, "number them as the head's outputs are")
    return [names[index] for index in range(num_labels)]


def _label_indices(label: str | int, names: Sequence[str], field: str) -> list[int]:
    """The label's outputs: several may have one name."""
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return [label]
    if str(label) in names and isinstance(label, str | bool):
        return [index for index, name in enumerate(names) if name == str(label)]
    near = difflib.get_close_matches(str(label), names, n=1, cutoff=0.0)
    raise UserError(field, label, f"is not a label of {', '.join(names)}", f"the nearest is {near[0]}")


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, configured: int | None) -> int | None:
    """How many tokens a classifier reads at most: the least limit of model, tokenizer and config; None: no limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None:
        # RoBERTa counts positions from its padding index on: 514 of them serve 512 tokens.
        reserved = (
            getattr(module, "padding_idx", None)
            for name, module in model.named_modules()
            if name.endswith("position_embeddings")
        )
        positions -= sum(index + 1 for index in reserved if index is not None)
    limits = [limit for limit in (configured, positions, tokenizer.model_max_length) if limit and limit < NO_LIMIT]
    return min(limits, default=None)


def classifier_batch(pairs: Sequence[EncodedPair], pad: int | None, device: torch.device | str) -> dict[str, Tensor]:
    """A classifier's inputs, int64 [B, L]: input_ids, attention_mask and, where the tokenizer gives them,
    token_type_ids.
    """
    texts = [pair.text for pair in pairs]
    batch = right_pad([text.ids for text in texts], pad or 0, device)
    token_types = [text.token_types for text in texts if text.token_types is not None]
    if token_types:
        batch["token_type_ids"] = right_pad(token_types, 0, device)["input_ids"]
    return batch
