"""How far tuning moved the routers' choices: the same tokens before and after (drift is how MoE safety fails)."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from esi_ds.artifacts import content_of_file
from esi_ds.journal import NOTHING, check_file, write_record
from esi_ds.models.roles import layer_of
from esi_ds.report.contents import DriftRow
from esi_ds.stages.run import StageRun
from esi_ds.stages.tune.prepare import TuningInputs
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.files import save_tensors
from esi_ds.zero.routing import Choices, drift, routing_choices

BEFORE = "routing.before.safetensors"  # kept: a resumed run has other weights


def _choices_by_set(run: StageRun[TuningInputs], model: ShardedModel) -> dict[str, Choices]:
    """Set → choices for the tuning rows and the questions; on rank 0, empty choices on others."""
    inputs = run.inputs
    sets = {
        "tuning": [sequence.ids for sequence in inputs.rows.sequences],
        **{name: list(ids.values()) for name, ids in inputs.question_ids.items()},
    }
    pad, size = inputs.tokenizer.pad_token_id, inputs.tune.batch_size
    return {name: routing_choices(model, rows, pad, size) or {} for name, rows in sets.items()}


def measure_before(run: StageRun[TuningInputs], model: ShardedModel) -> None:
    """Write the choices of the untuned model to the run folder, once.

    Collectives: one broadcast, and those of ``routing_choices`` for each set.
    """
    file = run.folder.path / BEFORE
    if not model.routers or runtime.from_main(lambda: _is_written(file)):
        return
    sets = _choices_by_set(run, model)
    if runtime.is_main():
        temporary = file.with_suffix(".tmp")
        tensors = {f"{name}/{router}": chosen for name, choices in sets.items() for router, chosen in choices.items()}
        save_tensors(tensors, temporary)
        write_record(file, NOTHING, content_of_file(temporary))
        temporary.replace(file)


def _is_written(file: Path) -> bool:
    """Whether the choices are there already. Raises UserError where they were altered."""
    if file.exists():
        check_file(file)
    return file.exists()


def drift_rows(run: StageRun[TuningInputs], model: ShardedModel) -> list[DriftRow]:
    """A row per router and set, on rank 0: tokens that are now routed to another set of experts.

    Collectives: those of ``routing_choices`` for each set.
    """
    if not model.routers:
        return []
    sets = _choices_by_set(run, model)
    if not runtime.is_main():
        return []
    before = load_file(run.folder.path / BEFORE)
    return [
        {"set": name, "layer": layer_of(router), "tokens": tokens, "changed": changed}
        for name, choices in sets.items()
        for router, (changed, tokens) in drift({key: before[f"{name}/{key}"] for key in choices}, choices).items()
    ]
