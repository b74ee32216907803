"""Run by the tests beside it under a launcher: one process group trains many models.

argv: a JSON list of cases {"stage", "config" (mapping), "poison" (optional), "drop" (optional), "error" (optional),
"detached" (optional: the model's norms let no gradient through), "frees" (optional: the stage must free all memory,
which takes a second to see)}; each runs the stage, and writes the
tuner's state of every rank beside the run's model/. poison: ``frozen`` puts NaN and inf into gradients of frozen
coordinates, ``trained`` one NaN into a trained one of rank 1, ``loss`` makes rank 1's loss NaN at step 3. drop: an
obligation of docs/zero3.md that is not met, to see that the tests notice. Grouped
products leave garbage in the gradients of experts without tokens.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from cases import ask_each_model_once, frees_all, replace, run_cases, take_a_second
from idle_kernels import spoil_kernels
from safetensors.torch import save_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from esi_ds.artifacts import RunFolder
from esi_ds.config import validate
from esi_ds.deepspeed_config import resolve_deepspeed
from esi_ds.errors import UserError
from esi_ds.options import Options
from esi_ds.stages.tune import training
from esi_ds.stages.tune import work as tune_work
from esi_ds.stages.tune.prepare import prepare_tuning
from esi_ds.stages.tune.work import TuneRun
from esi_ds.zero import gradients, runtime
from esi_ds.zero import optimizer as zero_optimizer
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.sparse import CompactGradients
from esi_ds.zero.tuner import Tuner

plain_run, plain_norm = training.Training.run, LlamaRMSNorm.forward
ORIGINALS = {
    (Tuner, "__init__"): Tuner.__init__,
    (ShardedModel, "release"): ShardedModel.release,
    (ShardedModel, "publish"): ShardedModel.publish,
    (CompactGradients, "zero"): CompactGradients.zero,
    (training.Training, "_forward_backward"): training.Training._forward_backward,
    (LlamaRMSNorm, "forward"): LlamaRMSNorm.forward,
    (zero_optimizer.FlatGroups, "_mask_gradients"): zero_optimizer.FlatGroups._mask_gradients,
}


def restore_originals() -> None:
    for (owner, name), value in ORIGINALS.items():
        setattr(owner, name, value)


def run_and_dump(loop: training.Training) -> None:
    """Masters and moments as a checkpoint holds them, once all steps are made."""
    plain_run(loop)
    saved = {
        key: torch.cat([values.detach() for _, values in parts]) for key, parts in loop.tuner.saved().items() if parts
    }
    save_file(
        {key: values for key, values in saved.items() if len(values)},
        loop.folder.parent / f"state-{runtime.rank()}.safetensors",
    )


def poison(kind: str) -> None:
    """Gradient hooks that bring in what is not finite; laid before the tuner's own."""

    def bad_init(original):
        def init(self, model, trained):
            for parameter in model.parameters:
                count = trained.count(parameter.name)
                if not count or (kind == "trained" and runtime.rank() != 1):
                    continue
                bits = trained.bits(parameter.name, 0, parameter.numel)
                wanted = bits if kind == "trained" else ~bits
                positions = wanted.nonzero().flatten()[:3]

                def spoil(gradient, positions=positions):
                    spoilt = gradient.clone().reshape(-1)
                    spoilt[positions] = torch.tensor([torch.nan, torch.inf, -torch.inf])[: len(positions)].to(spoilt)
                    return spoilt.view(gradient.shape)

                model.by_name[parameter.name].requires_grad_(True).register_hook(spoil)
            original(self, model, trained)

        return init

    if kind == "loss":
        plain = training.Training._forward_backward

        def bad_loss(self, batch, learnt):
            return plain(self, batch, float("nan") if self.step == 2 and runtime.rank() == 1 else learnt)

        training.Training._forward_backward = bad_loss
        return
    Tuner.__init__ = bad_init(Tuner.__init__)


def drop(obligation: str) -> None:
    """Break one thing."""
    if obligation == "release":
        ShardedModel.release = lambda self: None
    elif obligation == "publish":
        ShardedModel.publish = lambda self: None
    elif obligation == "zero":
        CompactGradients.zero = lambda self: None
    elif obligation == "mask":
        zero_optimizer.FlatGroups._mask_gradients = lambda self, index, flat: None


def run_case(case: dict) -> None:
    config = validate(case["config"])
    folder = RunFolder(config.run.output_dir)
    restore_originals()
    if case.get("detached"):
        LlamaRMSNorm.forward = lambda self, hidden: plain_norm(self, hidden).detach()
    if "poison" in case:
        poison(case["poison"])
    if "drop" in case:
        drop(case["drop"])
    try:
        settings = resolve_deepspeed(config, runtime.world_size(), case["stage"])
        with frees_all() if case.get("frees") else nullcontext():
            inputs = prepare_tuning(config, case["stage"])
            TuneRun(config, Options(), inputs, folder, settings, inputs.source).run()
            del inputs
    except (UserError, RuntimeError, AssertionError) as error:
        if case.get("error") is None:
            raise
        assert case["error"] in str(error), error
        return
    assert case.get("error") is None


def dump_and_leave_out_pages() -> None:
    """Every run ends with ``run_and_dump`` and the exported model; its report is tested elsewhere."""
    replace(training.Training, "run", run_and_dump)
    replace(tune_work, "finish_tuning", lambda *arguments: None)


def main() -> None:
    spoil_kernels()
    replace(gradients, "BUCKET_NUMEL", 2000)  # of models this small, so that several reductions are in flight
    dump_and_leave_out_pages()
    take_a_second(training)
    ask_each_model_once(tune_work)
    run_cases(run_case)


if __name__ == "__main__":
    main()
