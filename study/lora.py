"""LoRA (PEFT) with nearly as many weights as SET trains, on its rows in the same order, with its loss and schedule."""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from esi_ds.artifacts import RunFolder, write_json_atomic, write_text_atomic
from esi_ds.config import Config, Tune
from esi_ds.core.batch import left_pad
from esi_ds.core.schedule import learning_rate
from esi_ds.data.chat import encode_prompt, load_tokenizer, special_strings
from esi_ds.data.conversations import DataOrder, TuningSet, encode_rows, find_columns
from esi_ds.data.end_tokens import end_tokens
from esi_ds.data.prompts import load_question_sets
from esi_ds.data.rows import read_rows
from esi_ds.eval.refusals import is_refusal
from esi_ds.models.decoding import greedy_ids
from esi_ds.models.folder import ModelSource
from esi_ds.models.rows import last_logits
from esi_ds.stages.learnt_rows import padded
from esi_ds.zero.tuner import summed_loss

# Rank 1 on these is the number of weights nearest to 1 % of the tiny model (0.7 %); the report holds it.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train_and_answer(config: Config) -> None:
    """Train, answer, and leave a run folder with the config, answers.jsonl and manifest of a SET run."""
    started = time.time()
    folder = RunFolder(config.run.output_dir)
    folder.open(config)
    tokenizer = load_tokenizer(ModelSource.of(config.model))
    torch.manual_seed(config.run.seed)
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    model, num_trained = train_adapters(config, base, tokenizer, 1, TARGETS)
    write_text_atomic(folder.path / "answers.jsonl", _answers(config, model, tokenizer))
    finish(folder, num_trained, started)


def train_adapters(
    config: Config, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rank: int, targets: list[str]
) -> tuple[PeftModel, int]:
    """The base model with trained adapters on ``targets``, and how many weights they have."""
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    train(config, model, trained, tokenizer)
    return model, sum(parameter.numel() for parameter in trained)


def finish(folder: RunFolder, num_trained: int, started: float) -> None:
    """Write a LoRA run's report and manifest. started: seconds since the epoch."""
    facts = {"trained": num_trained}
    write_json_atomic(folder.path / "report.json", {"kind": "lora", **facts})
    folder.write_manifest(
        exit_state="done",
        world_size=1,
        started=started,
        model_fingerprint=None,
        data={},
        notes={"method": "lora", **facts},
    )


def train(
    config: Config, model: PeftModel, trained: list[torch.nn.Parameter], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Train the adapters as SET trains: its rows, order, loss and schedule."""
    tune = config.tune
    assert tune is not None and tune.data.benign is not None
    rows, benign = (_rows(config, tune, path, tokenizer) for path in (tune.data.path, tune.data.benign.path))
    order = DataOrder(len(rows.sequences), len(benign.sequences), tune.data.benign.fraction, config.run.seed)
    optimizer = torch.optim.AdamW(
        trained, lr=tune.lr, betas=(tune.betas[0], tune.betas[1]), eps=tune.eps, weight_decay=0.0
    )
    for step in range(tune.max_steps):
        chosen = [order[position] for position in range(step * tune.batch_size, (step + 1) * tune.batch_size)]
        sequences = [(benign if other else rows).sequences[n] for other, n in chosen]
        inputs, labels = padded(sequences, tokenizer.pad_token_id, model.device)
        logits = last_logits(model, inputs, labels.shape[1])
        loss = summed_loss(logits, labels) / sum(sequence.num_learnt for sequence in sequences)
        loss.backward()
        if tune.clip is not None:
            torch.nn.utils.clip_grad_norm_(trained, tune.clip)
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, lr=tune.lr, scheduler=tune.scheduler, max_steps=tune.max_steps, warmup_ratio=tune.warmup_ratio
        )
        optimizer.step()
        optimizer.zero_grad()


def _rows(config: Config, tune: Tune, path: str, tokenizer: PreTrainedTokenizerBase) -> TuningSet:
    rows = read_rows(path, "tune.data.path")
    return encode_rows(
        rows,
        find_columns(rows, "auto", "tune.data.columns"),
        tokenizer,
        system_prompt=None,
        specials=special_strings(tokenizer),
        end_ids=end_tokens(ModelSource.of(config.model), tokenizer),
        max_length=tune.max_length,
    )


@torch.inference_mode()
def _answers(config: Config, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of answers.jsonl, in the SET stage's format."""
    assert config.eval is not None
    base: Any = model.get_base_model()  # with the adapter's layers in it
    lines, size = [], config.eval.batch_size
    end_ids = end_tokens(ModelSource.of(config.model), tokenizer)
    for question_set in load_question_sets(config.eval):
        said: list[str] = []
        for start in range(0, len(question_set.prompts), size):
            ids = [encode_prompt(tokenizer, prompt, None) for prompt in question_set.prompts[start : start + size]]
            batch = left_pad(ids, tokenizer.pad_token_id, "cpu")
            responses = greedy_ids(
                base,
                batch,
                end_ids=end_ids,
                pad_id=tokenizer.pad_token_id,
                max_new_tokens=config.eval.max_new_tokens,
            )
            said += tokenizer.batch_decode(responses, skip_special_tokens=True)
        for index, (prompt, text) in enumerate(zip(question_set.prompts, said, strict=True)):
            row = {
                "set": question_set.kind,
                "index": index,
                "prompt": prompt,
                "after": text,
                "refused_after": is_refusal(text),
            }
            lines.append(json.dumps(row) + "\n")
    return "".join(lines)
