"""Run by the tests beside it under a launcher: one process group does everything with experts on different ranks.

argv: a folder with ``cases.json``: {"scores": cases of score_worker, "tuned": cases of tune_worker, "perturbed":
cases of perturb_worker, "answered": [{"model", "prompts", "deepspeed", "out"}], "refused": [{"model", "deepspeed",
"error"}]}. An answered case writes every prompt's greedy answer. Grouped products leave garbage in the gradients of
experts without tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import perturb_worker
import score_worker
import tune_worker
from cases import ask_each_model_once, replace
from idle_kernels import spoil_kernels
from transformers import AutoTokenizer

from esi_ds.cli import leave
from esi_ds.data.chat import encode_prompt
from esi_ds.errors import UserError
from esi_ds.models.folder import ModelSource
from esi_ds.stages.esi import work as esi_work
from esi_ds.stages.tune import work as tune_work
from esi_ds.zero import gradients, routing, runtime
from esi_ds.zero.engine import load_sharded
from esi_ds.zero.generate import generate, in_step, ready_to_generate


def answer(case: dict) -> None:
    """Prompts are divided as the stages do it: the last ranks run out of them first."""
    model = load_sharded(ModelSource(case["model"]), "fp32", {"train_micro_batch_size_per_gpu": 1, **case["deepspeed"]})
    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    prompts = [encode_prompt(tokenizer, prompt, None) for prompt in case["prompts"]]
    said: dict[int, str] = {}
    for mode in ("gathered", "per_token"):
        with ready_to_generate(model, mode):
            for start in range(0, len(prompts), runtime.world_size()):
                mine = start + runtime.rank()
                texts = []
                if mine < len(prompts) or in_step(model, mode):
                    rows = [prompts[mine if mine < len(prompts) else 0]]
                    texts = generate(model, tokenizer, rows, 12, mode, [tokenizer.eos_token_id]).texts
                if mine < len(prompts):
                    assert said.setdefault(mine, texts[0]) == texts[0], "gathered and per token say different things"
    gathered = {index: text for part in runtime.gather_objects(said) for index, text in part.items()}
    if runtime.is_main():
        Path(case["out"]).write_text(json.dumps([gathered[index] for index in sorted(gathered)]))


def refuse(case: dict) -> None:
    try:
        load_sharded(ModelSource(case["model"]), "fp32", {"train_micro_batch_size_per_gpu": 1, **case["deepspeed"]})
    except UserError as error:
        assert case["error"] in str(error), error
        return
    raise AssertionError(f"not refused: {case}")


def main() -> None:
    runtime.start()
    spoil_kernels()
    replace(gradients, "BUCKET_NUMEL", 2000)  # of models this small, so that there are several reductions
    score_worker.leave_out_pages()
    tune_worker.dump_and_leave_out_pages()
    ask_each_model_once(esi_work, routing, tune_work)
    cases = json.loads((Path(sys.argv[-1])).read_text())
    for case in cases["scores"]:
        score_worker.run_case(case)
    for case in cases["tuned"]:
        tune_worker.run_case(case)
    for case in cases["perturbed"]:
        perturb_worker.run_case(case)
    for case in cases["answered"]:
        answer(case)
    for case in cases["refused"]:
        refuse(case)
    runtime.stop()
    leave(0)


if __name__ == "__main__":
    main()
