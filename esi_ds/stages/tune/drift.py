"""How far tuning moved the routers' choices: the same tokens before and after (drift is how MoE safety fails)."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from esi_ds.data.chat import break_up, encode_prompt
from esi_ds.models.roles import layer_of
from esi_ds.stages.run import StageRun
from esi_ds.stages.tune.prepare import TuningInputs
from esi_ds.zero import runtime
from esi_ds.zero.files import save_tensors
from esi_ds.zero.routing import Choices, drift, routing_choices

BEFORE = "routing.before.safetensors"  # kept: a resumed run has other weights


def _measure(run: StageRun[TuningInputs], model) -> dict[str, Choices]:
    """Set → choices on rank 0, empty on others: tuning rows, and the prompts of ``eval`` where there are any."""
    inputs, config = run.inputs, run.config
    sets = {"tuning": [sequence.ids for sequence in inputs.rows.sequences]}
    for name, prompts in inputs.questions.items():
        cleaned = [break_up(prompt, inputs.specials)[0] for prompt in prompts]
        sets[name] = [encode_prompt(inputs.tokenizer, prompt, config.model.system_prompt) for prompt in cleaned]
    pad, size = inputs.tokenizer.pad_token_id, config.tune.batch_size
    return {name: routing_choices(model, rows, pad, size) or {} for name, rows in sets.items()}


def measure_before(run: StageRun[TuningInputs], model) -> None:
    """Write the choices of the untuned model to the run folder, once. Collectives: ``routing_choices``, a set each."""
    file: Path = run.folder.path / BEFORE
    if not model.routers or runtime.broadcast_object(file.is_file()):
        return
    found = _measure(run, model)
    if runtime.is_main():
        temporary = file.with_suffix(".tmp")
        save_tensors({f"{name}/{key}": chosen for name, own in found.items() for key, chosen in own.items()}, temporary)
        temporary.replace(file)


def drift_rows(run: StageRun[TuningInputs], model) -> list[dict]:
    """{set, layer, tokens, changed} of every router, on rank 0: tokens whose set of experts is another one than before.
    Collectives: ``routing_choices``, a set each."""
    if not model.routers:
        return []
    found = _measure(run, model)
    if not runtime.is_main():
        return []
    before = load_file(run.folder.path / BEFORE)
    return [
        {"set": name, "layer": layer_of(router), "tokens": tokens, "changed": changed}
        for name, own in found.items()
        for router, (changed, tokens) in drift({key: before[f"{name}/{key}"] for key in own}, own).items()
    ]
