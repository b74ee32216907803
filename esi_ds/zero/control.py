"""The control on ZeRO-3 partitions: what the scores of some criteria are set against (docs/method.md §2)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from esi_ds.core.control import MeanScores, excess, exclusive, specific
from esi_ds.core.score import scale_by_unit
from esi_ds.core.units import Unit
from esi_ds.errors import UserError
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.score import Scores, model_mean, unit_means


class ControlGradients:
    """σ·g_C of every shard, with the sign of the direction in which the control's objective improves.

    gradients: its mean gradient g_C, fp32 [shard.numel] by shard's name; overwritten. is_loss: it is descended, not
    climbed. field, path: of the config, for messages. Raises UserError, on every rank, where the control gives no
    weight any gradient. Collectives: one all-reduce of float64 [units].
    """

    def __init__(
        self,
        model: ShardedModel,
        gradients: Mapping[str, Tensor],
        sigma: Mapping[Unit, float],
        is_loss: bool,
        field: str,
        path: str,
    ):
        self._model = model
        self._signed = dict(gradients)
        factors = {unit: -deviation if is_loss else deviation for unit, deviation in sigma.items()}
        for shard in model.scored:
            scale_by_unit(shard, self._signed[shard.name], factors)
        self._means = unit_means(model, self._signed)
        if model_mean(self._means) == 0:
            problem = "gives no weight a gradient, so nothing can be compared with it"
            raise UserError(field, path, problem, "give other data, or leave the control out")

    def relate(self, criterion: str, scores: Scores, tuning: Mapping[str, Tensor] | None) -> None:
        """Overwrite the scores that ``criteria.AGAINST_CONTROL`` names with the criterion's own.

        tuning: g_T by shard's name, for ``exclusive``. Collectives: for ``specific`` and ``excess`` an all-reduce of
        float64 [units].
        """
        if criterion == "exclusive":
            assert tuning is not None
            for name, values in scores.items():
                exclusive(values, self._signed[name], tuning[name])
            return
        safety = model_mean(unit_means(self._model, scores))
        means = MeanScores(safety, model_mean(self._means), self._means)
        for shard in self._model.scored:
            values, control = scores[shard.name], self._signed[shard.name]
            if criterion == "specific":
                specific(shard, values, control, means)
            else:
                excess(values, control, means)

    def take_scores(self) -> Scores:
        """The control's own scores |σ·g_C|, in the place of what has a sign: to be called last."""
        return {name: values.abs_() for name, values in self._signed.items()}
