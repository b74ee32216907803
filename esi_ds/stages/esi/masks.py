"""A mask for each criterion, from gradients that they share (docs/method.md §2): to ``scores/`` and ``mask/``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any, cast

import numpy as np
import torch

from esi_ds.config import Config, Criterion
from esi_ds.core.criteria import AGAINST_CONTROL, overwrites_gradient
from esi_ds.core.mask import pack_bits
from esi_ds.core.mask_metadata import SCORES_FORMAT, MaskMetadata, mask_texts
from esi_ds.core.select import key_to_score, may_lack_scores, without_score
from esi_ds.core.units import Parameter
from esi_ds.errors import UserError
from esi_ds.report.contents import MaskReport, Overlap, SelectionFacts, UnitControl
from esi_ds.report.experts import expert_tables
from esi_ds.report.tables import overlap
from esi_ds.stages.esi.prepare import EsiInputs
from esi_ds.stages.run import StageRun
from esi_ds.zero import runtime
from esi_ds.zero.control import ControlGradients
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.files import write_mask, write_scores
from esi_ds.zero.score import (
    Accumulated,
    Scores,
    Selection,
    contrast_denominators,
    contrast_scores,
    normalise_by_matrix,
    score,
    select_weights,
    unit_sigmas,
)
from esi_ds.zero.statistics import log_histograms, unit_rows

PackedBits = list[np.ndarray]  # a mask's bits on this rank: uint8 [⌈n/8⌉] of every scored shard


class SharedGradients:
    """The mean gradients of all passes, and the scores that each criterion makes of them.

    accumulated: by objective; the sums are overwritten. Collectives: those of ``unit_sigmas``, with a control of
    ``ControlGradients`` and, if contrastive, of ``contrast_denominators``. Raises UserError where a control gives no
    gradient.
    """

    def __init__(self, config: Config, model: ShardedModel, accumulated: Mapping[str, Accumulated]):
        self._config, self._model = config, model
        self.sigma = unit_sigmas(model)
        self._means = {name: sums.take_means() for name, sums in accumulated.items()}
        if config.select.contrastive:
            roots = {name: mean.sqrt_() for name, mean in self._means.pop("benign").items()}
            self._denominators = contrast_denominators(model, roots)
        self._control: ControlGradients | None = None
        if config.control is not None:
            means, is_loss = self._means.pop("control"), config.control.rows is not None
            self._control = ControlGradients(model, means, self.sigma, is_loss, *config.control.origin)

    def scores(self, criterion: Criterion) -> Scores:
        """The criterion's scores. To be asked in the order of the criteria, once each: the last that reads a gradient
        takes its place.

        Collectives: those of ``ControlGradients.relate`` for a criterion with a control, if contrastive those of
        ``contrast_scores``, and of ``normalise_by_matrix`` where the config says so. Raises UserError where one of them
        divides by 0.
        """
        section = self._config.select
        criteria = section.criteria
        overwrite = overwrites_gradient(criteria, criteria.index(criterion))
        base = AGAINST_CONTROL.get(criterion, criterion)
        scores = score(self._model, base, self._means, self.sigma, self._config.run.seed, overwrite)
        if criterion in AGAINST_CONTROL:
            assert self._control is not None  # require_esi
            self._control.relate(criterion, scores, self._means.get("tuning"))
        if section.contrastive:
            self._contrast(criterion, scores)
        if section.normalise == "matrix":
            normalise_by_matrix(self._model, scores)
        return scores

    def control_units(self) -> list[UnitControl] | None:
        """What each matrix has under the control, in the model's order; None without one. To be asked last, once.

        The scores are normalised as those of a mask are. Collectives: those of a selection and of ``unit_rows``, and of
        ``normalise_by_matrix`` where the config says so.
        """
        if self._control is None:
            return None
        scores = self._control.take_scores()
        if self._config.select.normalise == "matrix":
            normalise_by_matrix(self._model, scores)
        selection = select_as_configured(self._config, self._model, scores, "control")
        return [
            {"control_mean_score": row["mean_score"], "control_selected": row["selected"]}
            for row in unit_rows(self._model, scores, selection, self.sigma)
        ]

    def _contrast(self, criterion: Criterion, scores: Scores) -> None:
        undefined, section = contrast_scores(scores, self._denominators), self._config.data.benign
        assert section is not None  # require_esi
        if undefined:
            raise UserError(
                "data.benign.path",
                section.path,
                f"leaves more than half of the scored weights without any gradient, and {undefined:,} of these have a "
                f"score ({criterion}) to be divided by it",
                "give more rows, or set select.contrastive: false",
            )


def make_masks(
    run: StageRun[EsiInputs], model: ShardedModel, gradients: SharedGradients, loss_facts: Mapping[str, object]
) -> tuple[list[MaskReport], list[Overlap]]:
    """Write scores and mask of every criterion, one after the other, so that only one's scores exist at a time. Then
    every matrix of every mask gets what it has under the control.

    loss_facts: rows of the report's table that hold for every mask. Returns what the report says of each mask, and of
    every two. Collectives: those of ``_make_mask`` and ``SharedGradients.control_units``, and one all-reduce of a
    number for every two masks.
    """
    reports: list[MaskReport] = []
    packed: list[PackedBits] = []
    for criterion in run.config.select.criteria:
        report, bits = _make_mask(run, model, criterion, gradients, loss_facts)
        reports.append(report)
        packed.append(bits)
    if (controls := gradients.control_units()) is not None:
        for report in reports:
            for unit, control in zip(report["units"], controls, strict=True):
                unit.update(control)
    pairs = list(combinations(range(len(packed)), 2))
    local = [
        sum(int(np.bitwise_count(a & b).sum()) for a, b in zip(packed[first], packed[second], strict=True))
        for first, second in pairs
    ]
    counts = runtime.all_reduce_sum(torch.tensor(local, dtype=torch.int64)).tolist() if pairs else []
    selections = [report["selection"] for report in reports]
    return reports, [
        overlap(
            (selections[first]["criterion"], selections[second]["criterion"]),
            (selections[first]["k"], selections[second]["k"]),
            both,
            selections[first]["scored_numel"],
        )
        for (first, second), both in zip(pairs, counts, strict=True)
    ]


def _make_mask(
    run: StageRun[EsiInputs],
    model: ShardedModel,
    criterion: Criterion,
    gradients: SharedGradients,
    loss_facts: Mapping[str, object],
) -> tuple[MaskReport, PackedBits]:
    """Write one criterion's scores and mask. Collectives: those of the scores, of the selection, of writing both
    folders and of the statistics."""
    config, section, folder = run.config, run.config.select, run.folder.path
    scores = gradients.scores(criterion)
    selection = select_as_configured(config, model, scores, "select.criterion")
    scored = [parameter for parameter in model.parameters if parameter.scored]
    if selection.k == sum(parameter.numel for parameter in scored) and criterion == section.criteria[0]:
        run.tracker.log("select.ratio asks for at least as many weights as are scored: the mask holds all of them")
    metadata = mask_metadata(config, criterion, model, selection, run.fingerprint)
    subfolder = section.subfolder(criterion)
    if config.esi.save_scores:
        keys = ("criterion", "contrastive", "normalise", "fingerprint", "total_numel", "seed")
        shared = {key: metadata[key] for key in keys if key in metadata}
        write_scores(folder / "scores" / subfolder, scored, model.scored, scores, {"format": SCORES_FORMAT, **shared})
    write_mask(folder / "mask" / subfolder, scored, model.scored, selection.bits, metadata, units_json(scored))
    units = unit_rows(model, scores, selection, gradients.sigma)
    histogram, histograms_by_role = log_histograms(model, scores)
    if note := selected_without_score(criterion, scores, selection, section.order, section.scope):
        run.tracker.remark(note)
    report: MaskReport = {
        "selection": selection_facts(config, criterion, model, selection, loss_facts),
        "units": units,
        "experts": expert_tables(units, selection.k),
        "score_histogram": histogram,
        "score_histograms_by_role": histograms_by_role,
    }
    several = len(section.criteria) > 1
    return report, [pack_bits(selection.bits[shard.name]).numpy() for shard in model.scored] if several else []


def selected_without_score(criterion: str, scores: Scores, selection: Selection, order: str, scope: str) -> str | None:
    """``without_score`` of a selection. Collectives: one all-reduce of a number, where there may be such weights."""
    if not may_lack_scores(order, scope, threshold_of(selection, order)):
        return None
    counts = [(selection.bits[name] & (values == 0)).sum() for name, values in scores.items()]
    local = torch.stack(counts).sum().cpu() if counts else torch.tensor(0)  # a GPU is waited for once
    return without_score(criterion, int(runtime.all_reduce_sum(local)), selection.k, scope)


def select_as_configured(config: Config, model: ShardedModel, scores: Scores, field: str) -> Selection:
    """The selection that ``select`` of the config asks for; field and collectives: see ``select_weights``."""
    section = config.select
    return select_weights(
        model,
        scores,
        ratio=section.ratio,
        order=section.order,
        of=section.of,
        scope=section.scope,
        seed=config.run.seed,
        field=field,
    )


def units_json(scored: Sequence[Parameter]) -> list[dict[str, Any]]:
    """``units.json`` of a mask: which flat positions of which parameter are one logical matrix, and its role."""
    return [{"parameter": parameter.name, **asdict(unit)} for parameter in scored for unit in parameter.units]


def threshold_of(selection: Selection, order: str) -> float | None:
    """Score of the last weight selected; None where each matrix has a cut of its own (scope ``matrix``)."""
    return None if selection.cut is None else key_to_score(selection.cut, order)


def mask_metadata(
    config: Config, criterion: Criterion, model: ShardedModel, selection: Selection, fingerprint: str
) -> dict[str, str]:
    """The metadata of every file of a mask (docs/design.md §7); safetensors takes strings only."""
    section = config.select
    scored = [parameter for parameter in model.parameters if parameter.scored]
    return mask_texts(
        MaskMetadata(
            k=selection.k,
            ratio=section.ratio,
            total_numel=sum(parameter.numel for parameter in model.parameters),
            threshold=threshold_of(selection, section.order),
            criterion=criterion,
            contrastive=section.contrastive,
            normalise=section.normalise,
            order=section.order,
            of=section.of,
            scope=section.scope,
            seed=config.run.seed,
            fingerprint=fingerprint,
            shapes={parameter.name: parameter.shape for parameter in scored},
            counts=selection.counts,
            offsets={parameter.name: parameter.offset for parameter in scored},
        )
    )


def selection_facts(
    config: Config,
    criterion: Criterion,
    model: ShardedModel,
    selection: Selection,
    loss_facts: Mapping[str, object],
) -> SelectionFacts:
    """How the mask was chosen, and the rows of each loss that took part."""
    section = config.select
    facts: SelectionFacts = {
        "k": selection.k,
        "total_numel": sum(p.numel for p in model.parameters),
        "scored_numel": sum(p.numel for p in model.parameters if p.scored),
        "threshold": threshold_of(selection, section.order),
        "criterion": criterion,
        "contrastive": section.contrastive,
        "order": section.order,
        "ratio": section.ratio,
        "of": section.of,
        "scope": section.scope,
    }
    if section.normalise != "none":
        facts["normalise"] = section.normalise
    return cast(SelectionFacts, {**facts, **loss_facts})  # a TypedDict cannot name labels made at run time
