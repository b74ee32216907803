"""SET or SPA with transformers' Trainer and ZeRO-3: the masked optimizer in somebody else's training script.

    deepspeed examples/trainer.py --model FOLDER --mask RUN/mask --rows rows.jsonl --output OUT [--train complement]

rows.jsonl: {"prompt", "response"} a line, or other rows that SET and SPA read. All that differs from a plain Trainer
script are the masked AdamW and the rows' encoding, which is that of SET and SPA.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import deepspeed
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments

from esi_ds import MaskedAdamW
from esi_ds.cli import leave
from esi_ds.data.chat import special_strings
from esi_ds.data.conversations import encode_rows, find_columns
from esi_ds.data.end_tokens import end_tokens
from esi_ds.data.rows import read_rows
from esi_ds.models.folder import ModelSource

# On CPUs DeepSpeed would compile an all-reduce that nothing here calls, and leave 66 MiB of shared memory per rank.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    # Gradients are reduced and summed in fp32; in bf16 a thousandth of them would be lost.
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_force_ds_cpu_optimizer": False,
}
MAX_LENGTH = 1024  # tokens of a row; what is longer is cut


def encode(file: str, model: str, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Ids and labels of every row. The whole text of the chat template is tokenized, and of it only the answer and the
    token that ends its turn are learnt: by itself an answer may be split otherwise, and have another end."""
    rows = read_rows(file, "--rows")
    encoded = encode_rows(
        rows,
        find_columns(rows, "auto", "--rows"),
        tokenizer,
        system_prompt=None,
        specials=special_strings(tokenizer),
        end_ids=end_tokens(ModelSource(model), tokenizer),
        max_length=MAX_LENGTH,
    )
    return [{"input_ids": sequence.ids, "labels": sequence.labels} for sequence in encoded.sequences]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Padded on the right, with an id that nothing reads: not every tokenizer has one for padding."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    ids, labels = padded("input_ids", 0), padded("labels", -100)
    seen = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": seen, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "mask", "rows", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--train", choices=("selected", "complement"), default="selected")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--offload", action="store_true", help="optimizer and parameters on the CPU")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.offload:
        ZERO3["zero_optimization"] |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}

    arguments = TrainingArguments(  # before the model: it makes from_pretrained cut the weights while reading
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
    optimizer = MaskedAdamW(model, options.mask, train=options.train, lr=options.lr)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=encode(options.rows, options.model, tokenizer),
        data_collator=collate,
        # Under DeepSpeed Trainer makes its own schedule (lr_scheduler_type), whatever is given; it scales options.lr.
        optimizers=(optimizer, None),
    )
    trainer.train()
    trainer.save_model(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
    leave(0)  # see there: threads of C++ libraries would be torn down in no order
