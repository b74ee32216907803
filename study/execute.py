"""One cell → one finished run folder, in this process, by the stages that ``launch/`` calls."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from esi_ds.artifacts import RunFolder, file_sha256, read_jsonl, write_json_atomic
from esi_ds.config import Config, validate
from esi_ds.core.mask import Mask
from esi_ds.options import Options
from esi_ds.reselect import write_selection
from esi_ds.stages import entry
from esi_ds.zero import runtime
from study.digests import model_sha256
from study.grid import (
    CONTRASTIVE,
    CRITERIA,
    NEEDS_CONTROL,
    NEEDS_RESPONSES,
    NEEDS_TUNING_ROWS,
    SPA_BATCH,
    SPA_STEPS,
    Cell,
)
from study.judges import judge
from study.material import DATA, ROOT

NUM_ASKED = 200  # held-out prompts of each sort
NUM_ROWS = 128  # read by a second objective
MAX_NEW_TOKENS = 48
STEPS = 100  # of SET and LoRA
BATCH = 4
NOISE = {"noise": [0.38, 1.0, 2.0], "ratios": [0.01, 0.05], "seeds": [0, 1, 2]}
BENIGN_SHARE = 0.75  # of SET's rows
ZERO3 = str(ROOT / "ds_configs/zero3.json")
MODELS = ROOT / "examples/models"
JUDGED = "judged.json"


def settings() -> dict[str, object]:
    """What the names of cells do not show: settings, data and models. One folder holds cells of one such set only.

    The study's own files are not among them: ``material.write`` refuses other rows.
    """
    masks = {"criteria": CRITERIA, "num_rows": NUM_ROWS, "num_asked": NUM_ASKED, "max_new_tokens": MAX_NEW_TOKENS}
    tuned = {
        "steps": STEPS,
        "batch": BATCH,
        "benign_share": BENIGN_SHARE,
        "spa_steps": SPA_STEPS,
        "spa_batch": SPA_BATCH,
    }
    digests = {
        "data": {file.name: file_sha256(file) for file in sorted(DATA.glob("*.jsonl"))},
        "models": {folder.name: model_sha256(folder) for folder in sorted(MODELS.iterdir()) if folder.is_dir()},
    }
    return {**masks, **tuned, "noise": NOISE, **digests}


def run_cell(cell: Cell, output: Path) -> None:
    """Run one cell unless it is finished; its output goes to NAME.out."""
    folder = output / cell.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    if _is_finished(cell, folder):
        return
    torch.set_num_threads(1)
    runtime.start()  # once per process: DeepSpeed keeps handles to the first process group
    with (output / f"{cell.name}.out").open("w") as said, contextlib.redirect_stdout(said):
        EXECUTE[cell.kind](cell, output)


def _is_finished(cell: Cell, folder: Path) -> bool:
    """Whether the cell is done and, if it answers, judged. Raises UserError where its results are no longer whole."""
    done = RunFolder(str(folder)).is_finished()
    return done and (cell.kind not in ("set", "spa", "lora") or (folder / JUDGED).is_file())


def config_of(cell: Cell, output: Path, **sections: dict) -> Config:
    raw = {
        "run": {"output_dir": str(output / cell.name), "seed": cell.seed, "tensorboard": False},
        "model": {"path": str(MODELS / cell.model), "dtype": "fp32"},
        "deepspeed": ZERO3,
        **sections,
    }
    return validate(raw)


def execute_mask(cell: Cell, output: Path) -> None:
    name = str(cell.facts["criterion"])
    plain = name.removesuffix(CONTRASTIVE)
    benign = {"path": str(DATA / "benign_train.jsonl"), "limit": NUM_ROWS}
    sections: dict[str, dict] = {
        "judge": {"family": "llama-guard-3", "path": str(MODELS / "guard")},
        "esi": {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": 16},
        "select": {"ratio": 0.01},
        "data": {},
    }
    for key, value in CRITERIA[plain].items():
        section, _, field = key.partition(".")
        sections[section][field] = value
    if plain != name:
        sections["select"]["contrastive"] = True
        sections["data"]["benign"] = benign
    if plain in NEEDS_CONTROL:
        sections["control"] = {"rows": benign}
    if plain in NEEDS_TUNING_ROWS:
        sections["data"]["tuning"] = {"path": str(DATA / "refusals_train.jsonl"), "limit": NUM_ROWS}
    if plain in NEEDS_RESPONSES:
        if cell.after:
            sections["data"]["responses"] = str(output / cell.after[0] / "responses.jsonl")
        else:
            prompts = {"path": str(output / f"data/prompts-s{cell.seed}.jsonl"), "limit": cell.facts.get("prompts")}
            sections["data"]["prompts"] = prompts
    entry("esi")(config_of(cell, output, **sections), Options())


def mask_of(cell: Cell, output: Path) -> str:
    """The cell's mask folder. For a ratio or order other than the run's, the mask is selected again from its scores."""
    criterion, ratio = cell.facts["criterion"], float(cell.facts["ratio"])
    run = output / cell.after[0]
    # "nothing" frozen still needs a mask of at least one weight: one of two million.
    order, wanted = ("bottom" if criterion == "bottom" else "top"), ratio or 1e-6
    if order == "top" and wanted == 0.01:
        return str(run / "mask")
    folder = run / f"mask-{order}-{wanted:g}"
    if not folder.is_dir():
        with contextlib.suppress(FileExistsError):
            write_selection(Mask.load(run / "mask"), run / "scores", folder, wanted, order, cell.seed)
    return str(folder)


def tune_section(cell: Cell, output: Path) -> dict:
    """Rows, steps and learning rate of a SET, SPA or LoRA cell."""
    if cell.kind == "spa":
        data: dict = {"path": str(output / f"data/{cell.facts['task']}-train.jsonl"), "columns": "prompt,response"}
    else:
        benign = {"path": str(DATA / "benign_train.jsonl"), "fraction": BENIGN_SHARE}
        data = {"path": str(DATA / "refusals_train.jsonl"), "benign": benign}
    return {
        "mask": mask_of(cell, output) if cell.after else "none",
        "data": data,
        "max_steps": SPA_STEPS.get(str(cell.facts.get("task")), STEPS),
        "lr": float(cell.facts["lr"]),
        "batch_size": SPA_BATCH.get(str(cell.facts.get("task")), BATCH),
        "save_every": 10_000,
        "export": False,
        "patch": False,
    }


def eval_section(cell: Cell, output: Path) -> dict:
    task = cell.facts.get("task")
    benign = output / f"data/{task}-heldout.jsonl" if task else DATA / "benign_heldout.jsonl"
    return {
        "before": False,
        "prompts": {"path": str(DATA / "harmful_heldout.jsonl"), "limit": NUM_ASKED},
        "benign": {"path": str(benign), "limit": NUM_ASKED},
        "max_new_tokens": MAX_NEW_TOKENS,
        "batch_size": 100,
    }


def execute_tuning(cell: Cell, output: Path) -> None:
    config = config_of(cell, output, tune=tune_section(cell, output), eval=eval_section(cell, output))
    entry(cell.kind)(config, Options())
    judge_answers(output / cell.name)


def execute_lora(cell: Cell, output: Path) -> None:
    from study.lora import train_and_answer  # needs PEFT, which only the extra `study` installs

    config = config_of(cell, output, tune=tune_section(cell, output), eval=eval_section(cell, output))
    train_and_answer(config)
    judge_answers(output / cell.name)


def judge_answers(folder: Path) -> None:
    """Write the guard's verdicts and the reference model's surprise for the answers after tuning."""
    write_json_atomic(folder / JUDGED, judge(read_jsonl(folder / "answers.jsonl")))


def execute_perturb(cell: Cell, output: Path) -> None:
    run = output / cell.after[0]
    judges = [
        {"kind": "guard", "name": "guard", "family": "llama-guard-3", "path": str(MODELS / "guard")},
        {"kind": "words", "words": "examples"},
    ]
    section = eval_section(cell, output) | {"judges": judges, "refusal_words": "examples"}
    noise = {"mask": str(run / "mask"), **NOISE, **cell.facts}  # facts: fewer, of a sample (estimate.py)
    entry("perturb")(config_of(cell, output, perturb=noise, eval=section), Options())


EXECUTE = {
    "mask": execute_mask,
    "set": execute_tuning,
    "spa": execute_tuning,
    "lora": execute_lora,
    "perturb": execute_perturb,
}
