"""SET or SPA with TRL's SFTTrainer or DPOTrainer and ZeRO-3: the masked optimizer in TRL's training scripts.

    deepspeed examples/trl_trainer.py sft --model FOLDER --mask RUN/mask --rows rows.jsonl --output OUT
    deepspeed examples/trl_trainer.py dpo --model FOLDER --mask RUN/mask --rows pairs.jsonl --output OUT

rows.jsonl: {"prompt", "response"} a line, pairs.jsonl: {"prompt", "chosen", "rejected"}. The masked AdamW is all that
differs from a plain TRL script; ``pip install 'esi_ds[trl]'`` brings TRL.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import Dataset
from trainer import ZERO3  # the script beside this one
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from esi_ds import MaskedAdamW
from esi_ds.cli import leave

TRAINERS = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}


def conversation(trainer: str, row: dict[str, str]) -> dict[str, Any]:
    """A row in TRL's conversational format: the trainer applies the chat template, and only answers are learnt."""
    answers = {"completion": row["response"]} if trainer == "sft" else {key: row[key] for key in ("chosen", "rejected")}
    turns: dict[str, Any] = {"prompt": [{"role": "user", "content": row["prompt"]}]}
    return turns | {key: [{"role": "assistant", "content": text}] for key, text in answers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainer", choices=TRAINERS)
    for name in ("model", "mask", "rows", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--train", choices=("selected", "complement"), default="selected")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()

    trainer_class, config_class = TRAINERS[options.trainer]
    arguments = config_class(  # before the model: it makes from_pretrained cut the weights while reading
        output_dir=options.output,
        deepspeed=ZERO3,
        bf16=True,
        max_steps=options.max_steps,
        per_device_train_batch_size=2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    rows = [json.loads(line) for line in Path(options.rows).read_text().splitlines()]
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([conversation(options.trainer, row) for row in rows]),
        processing_class=tokenizer,
        # Under DeepSpeed Trainer makes its own schedule (lr_scheduler_type), whatever is given; it scales options.lr.
        optimizers=(MaskedAdamW(model, options.mask, train=options.train, lr=options.lr), None),
    )
    trainer.train()
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
    leave(0)  # see there: threads of C++ libraries would be torn down in no order
