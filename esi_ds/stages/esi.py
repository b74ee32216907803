"""The ESI stage: prompts and responses → gradient sums → scores → mask → report (METHOD §1, §2)."""

from __future__ import annotations

import os

from esi_ds.artifacts import RunFolder
from esi_ds.cli import Options
from esi_ds.config import Config, require_esi
from esi_ds.deepspeed_config import resolve_deepspeed
from esi_ds.errors import UserError
from esi_ds.stages.prepare import Inputs, clean, encode_examples, encode_prompts, prepare
from esi_ds.stages.respond import respond, write_responses
from esi_ds.stages.run import CHECKPOINTS, StageRun
from esi_ds.tracking import Tracker


def run(config: Config, options: Options) -> None:
    """Run the stage to its end, or to an ``Interrupted``. Everything that can be refused is refused first."""
    require_esi(config)
    if options.dry_run:
        from esi_ds.stages.plan import print_plan

        print_plan(config, options)
        return
    folder = RunFolder(config.run.output_dir)
    folder.check(config)
    resolve_deepspeed(config, int(os.environ.get("WORLD_SIZE", "1")))
    inputs = prepare(config)
    if inputs is not None:
        folder.check_same("data_hashes", inputs.source, "data")
    from esi_ds.zero import runtime

    with runtime.process_group():
        deepspeed_config = resolve_deepspeed(config, runtime.world_size())
        EsiRun(config, options, inputs, folder, deepspeed_config).run()


class EsiRun(StageRun):
    """One run of the stage on this rank. ``inputs`` is None for criteria that need no gradient."""

    def __init__(
        self, config: Config, options: Options, inputs: Inputs | None, folder: RunFolder, deepspeed_config: dict
    ):
        super().__init__(config, options, folder, deepspeed_config, inputs.source if inputs else {})
        self.inputs = inputs

    def work(self, tracker: Tracker) -> None:
        from esi_ds.stages.finish import finish
        from esi_ds.zero.engine import load_sharded
        from esi_ds.zero.score import score, unit_sigmas

        config = self.config
        guard = self._load_guard(tracker) if self.inputs else None
        model = load_sharded(
            config.model.path,
            config.model.dtype,
            self.deepspeed_config,
            field="model.path",
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )
        if config.model.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.begin(model)
        outcome = self._accumulate(model, guard, tracker) if self.inputs else None
        sigma = unit_sigmas(model)
        scores = score(
            model,
            config.select.criterion,
            outcome.gradients.sums if outcome else None,
            outcome.num_prompts if outcome else 1,
            sigma,
            config.run.seed,
        )
        finish(config, self.folder.path, model, scores, sigma, self.fingerprint, outcome, self.started, tracker)

    def _load_guard(self, tracker: Tracker):
        from esi_ds.judge.guard import Guard
        from esi_ds.zero.placement import choose_placement, load_frozen

        section, judge = self.config.judge, self.inputs.judge
        dtype = self.config.model.dtype if section.dtype == "auto" else section.dtype
        placement, reason = choose_placement(judge.config, dtype, section.placement)
        tracker.log(f"judge: family {judge.family.name}, {placement} ({reason})")
        module, weights = load_frozen(
            section.path,
            dtype,
            placement,
            self.deepspeed_config,
            field="judge.path",
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )
        return Guard(module, judge.tokenizer, section.score, weights)

    def _accumulate(self, model, guard, tracker: Tracker):
        """Responses, then the scoring pass. Raises UserError where no prompt can be used."""
        import torch

        from esi_ds.judge.vocabulary import VocabularyMap
        from esi_ds.stages.finish import Outcome
        from esi_ds.stages.score import ScoringPass
        from esi_ds.zero.gradients import GradientShards

        config, inputs = self.config, self.inputs
        tracker.log(f"prompts: {len(inputs.prompts)} from {inputs.source}, {len(inputs.skipped)} rows skipped")
        prompts, num_broken = clean(inputs, inputs.prompts)
        prompt_ids = encode_prompts(inputs, config, prompts)
        responses = respond(config, inputs, model, prompt_ids, self.folder.path, tracker)
        cleaned, num_broken_responses = clean(inputs, responses)
        examples, excluded = encode_examples(inputs, prompt_ids, prompts, cleaned, config.esi.max_new_tokens)
        if not examples:
            reasons = "; ".join(sorted(set(excluded.values())))
            raise UserError(
                "data",
                f"{len(prompts)} prompts",
                f"none can be used ({reasons})",
                "look at responses.jsonl in the run folder",
            )
        on_cpu = config.esi.accumulator_device == "cpu"
        gradients = GradientShards(model, torch.device("cpu") if on_cpu else self.runtime.device())
        vocabulary = VocabularyMap(inputs.tokenizer, inputs.judge.tokenizer, model.num_logits)
        scoring = ScoringPass(
            config,
            model,
            guard,
            vocabulary,
            examples,
            gradients,
            self.folder.path / CHECKPOINTS,
            tracker,
            inputs.tokenizer.pad_token_id,
        )
        state = scoring.run()
        excluded.update(state.excluded)
        if self.runtime.is_main():
            write_responses(self.folder.path, inputs.prompts, responses, state.scores, excluded)
        num_prompts = len(prompts) - len(excluded)
        if num_prompts == 0:
            raise UserError(
                "data",
                f"{len(prompts)} prompts",
                "none gave a finite gradient",
                "look at responses.jsonl in the run folder; is the model sound?",
            )
        return Outcome(
            gradients, num_prompts, inputs, responses, state.scores, excluded, num_broken + num_broken_responses
        )
