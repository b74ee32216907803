"""Which guard family a judge is of: what its path, its chat template and its architecture say, which must agree."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from esi_ds.config import GuardModel
from esi_ds.errors import UserError
from esi_ds.judge.families import FAMILIES, Family

CLASSIFIER = "ForSequenceClassification"


def choose_family(
    section: GuardModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig | None = None,
    field: str = "judge",
) -> Family:
    """The family of the guard that ``section``, at ``field`` of the experiment's config, describes.

    config: the guard's own; None: unknown. ``custom`` builds a family from the section. Raises UserError where ``auto``
    recognises none or more than one, where a named family needs a chat template that the tokenizer lacks, where the
    architecture is not that family's, and for a family that is read through an endpoint only.
    """
    if section.family == "custom":
        assert section.template is not None and section.verdict is not None  # config.validate has checked it
        verdict = section.verdict
        return Family("custom", section.verdict_prefix, (verdict.safe,), (verdict.unsafe,), section.template)
    chat_template = str(tokenizer.chat_template or "")
    architectures = tuple(getattr(config, "architectures", None) or ())
    if section.family == "auto":
        family = _recognise(section.path, chat_template, architectures, field)
    else:
        family = FAMILIES[section.family]
    if family.reads == "endpoint":
        raise UserError(
            f"{field}.path",
            section.path,
            f"is a {family.name}, which reasons before its verdict: it is read through an endpoint only, and has no "
            "gradient",
            "serve it and ask it by eval.judges with kind: rubric and a policy; for ESI name another judge, or give "
            "its scores with data.responses (esi.estimator: score_function)",
        )
    if family.uses_chat_template and not chat_template:
        raise UserError(
            f"{field}.path",
            section.path,
            f"has no chat template, which {family.name} guards need",
            "give the guard's original folder, or family: custom with a template",
        )
    if config is not None and not _fits(family, architectures):
        raise UserError(
            f"{field}.family",
            section.family,
            f"does not fit {section.path}, whose architecture is {', '.join(architectures) or 'not named'}",
            f"name another family than {family.name}, or kind: classifier with template and unsafe_labels",
        )
    return family


def _recognise(path: str, chat_template: str, architectures: tuple[str, ...], field: str) -> Family:
    """The one family that everything known of a guard points to."""
    by_name = _by_name(path)
    by_template = [family for family in FAMILIES.values() if chat_template and _in_template(family, chat_template)]
    by_architecture = [family for family in FAMILIES.values() if set(family.architectures) & set(architectures)]
    evidence = {"path": by_name, "chat template": by_template, "architecture": by_architecture}
    families = [names for names in evidence.values() if names]
    common = [family for family in FAMILIES.values() if families and all(family in names for names in families)]
    # A chat template that is not the family's would build another text than the family's.
    certain = [family for family in common if not family.marks or not chat_template or family in by_template]
    if len(certain) == 1:
        return certain[0]
    said = "; ".join(f"by its {key}: {', '.join(f.name for f in names)}" for key, names in evidence.items() if names)
    if common and not certain:
        said += f", whose marks its chat template lacks ({', '.join(common[0].marks)})"
    raise UserError(
        f"{field}.family",
        "auto",
        f"does not recognise the guard at {path}" + (f" ({said})" if said else ""),
        f"name one of {', '.join(FAMILIES)}, or custom with template and verdict",
    )


def _by_name(path: str) -> list[Family]:
    """Families that a path names, but for those whose name is only a part of another's there.

    Of a path the last part counts, in a hub's cache (models--org--name/snapshots/commit) the repository: folders above
    it may be called after anything.
    """
    last = Path(path).parts[-3:] or ("",)
    name = last[0] if last[1:2] == ("snapshots",) else last[-1]
    spans: dict[str, tuple[int, int]] = {}
    for family in FAMILIES.values():
        for pattern in family.names:
            if match := re.search(rf"{pattern}(?![a-z])", name.lower().replace("_", "-")):
                spans[family.name] = match.span()
    return [
        FAMILIES[name]
        for name, (start, end) in spans.items()
        if not any(s <= start and end <= e and (s, e) != (start, end) for s, e in spans.values())
    ]


def _in_template(family: Family, chat_template: str) -> bool:
    return (
        bool(family.marks)
        and all(mark in chat_template for mark in family.marks)
        and not any(text in chat_template for text in family.foreign)
    )


def _fits(family: Family, architectures: Sequence[str]) -> bool:
    """Whether a model of these architectures is read as the family is. A model that names none is not a classifier."""
    is_classifier = any(name.endswith(CLASSIFIER) for name in architectures)
    if family.reads == "labels":
        return is_classifier
    if family.reads == "tokens":
        return bool(set(family.architectures) & set(architectures))
    of_others = {name for other in FAMILIES.values() if other is not family for name in other.architectures}
    return not is_classifier and not of_others & set(architectures)
