"""LoRA on the rows of a SET run, merged into the model.

python -m study.real.lora --config FILE --rank 4 --targets q_proj v_proj

Not resumable: a start after a kill begins anew.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from esi_ds.artifacts import RunFolder, whole_folder, write_json_atomic
from esi_ds.config import load_config
from esi_ds.data.chat import load_tokenizer
from esi_ds.errors import ends_with_message
from esi_ds.models.folder import ModelSource
from study.lora import train


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
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.model.dtype]
    # The adapters are fp32 whatever the model is (PEFT's default).
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=dtype)
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    settings = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=args.targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    train(config, model, trained, tokenizer)
    with whole_folder(folder.path / "model") as output:
        model.merge_and_unload().save_pretrained(output)
        tokenizer.save_pretrained(output)
    facts = {"trained": sum(parameter.numel() for parameter in trained)}
    write_json_atomic(folder.path / "report.json", {"kind": "lora", **facts})
    folder.write_manifest(
        exit_state="done",
        world_size=1,
        started=started,
        model_fingerprint=None,
        data={},
        notes={"method": "lora", **facts},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
