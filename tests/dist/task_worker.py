"""Run under the launcher: tasks on a model, shared between the ranks; rank 0 writes what every rank found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from esi_ds.cli import leave
from esi_ds.config import Task
from esi_ds.data.chat import load_tokenizer
from esi_ds.errors import UserError
from esi_ds.eval.harness import run_tasks
from esi_ds.eval.tasks import prepare_tasks
from esi_ds.models.folder import ModelSource
from esi_ds.zero import runtime
from esi_ds.zero.engine import load_replicated


def main() -> None:
    folder, tasks, kind = Path(sys.argv[-3]), json.loads(sys.argv[-2]), sys.argv[-1]
    runtime.start()
    runtime.seed_everything(0)
    if kind == "fails":
        break_the_last_rank()
    try:
        prepared = prepare_tasks([Task(**task) for task in tasks])
        source = ModelSource(str(folder / "model"))
        model, tokenizer = load_replicated(source, "fp32"), load_tokenizer(source)
        options = {"end_ids": [tokenizer.eos_token_id], "batch_size": 3, "seed": 0}
        results = run_tasks(model, tokenizer, prepared, **options, ranks=runtime.JobRanks())
        said = [result.as_row() for result in results]
    except (RuntimeError, UserError, ZeroDivisionError) as error:
        said = [f"{type(error).__name__}: {error}"]
    everyone = runtime.gather_objects(said)
    if runtime.is_main():
        (folder / f"results-{kind}-{runtime.world_size()}.json").write_text(json.dumps(everyone))
    runtime.stop()
    leave(0)


def break_the_last_rank() -> None:
    prepare_tasks([Task(name="examples/benign")])  # imports lm-eval
    from lm_eval.models.huggingface import HFLM

    if runtime.rank() == runtime.world_size() - 1:
        HFLM._loglikelihood_tokens = lambda *arguments, **named: 1 / 0


if __name__ == "__main__":
    main()
