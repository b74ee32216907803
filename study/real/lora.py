"""LoRA on the rows of a SET run, merged into the model.

python -m study.real.lora --config FILE --rank 4 --targets q_proj v_proj

Not resumable: a start after a kill starts over.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch
from transformers import AutoModelForCausalLM

from esi_ds.artifacts import RunFolder, whole_folder
from esi_ds.config import load_config
from esi_ds.core.stored import MODEL_DTYPES
from esi_ds.data.chat import load_tokenizer
from esi_ds.errors import ends_with_message
from esi_ds.models.folder import ModelSource
from study.lora import finish, train_adapters


@ends_with_message
def main(argv: list[str] | None = None) -> int:
    """Train and leave a run folder: config, ``model/``, manifest, and the number of trained weights in the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--targets", nargs="+", required=True)
    args = parser.parse_args(argv)
    started, config = time.time(), load_config(args.config, [])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(config.run.seed)
    folder = RunFolder(config.run.output_dir)
    folder.open(config)
    tokenizer = load_tokenizer(ModelSource.of(config.model))
    # The adapters are fp32 whatever the model is (PEFT's default).
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=MODEL_DTYPES[config.model.dtype])
    base.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]  # transformers' wrapper hides self
    model, num_trained = train_adapters(config, base, tokenizer, args.rank, args.targets)
    with whole_folder(folder.path / "model") as output:
        model.merge_and_unload().save_pretrained(output)
        tokenizer.save_pretrained(output)
    finish(folder, num_trained, started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
