"""Everything about a tuning run that can be known, and refused, before a weight is loaded or a file written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from esi_ds.config import BenignMix, Config, Model, RowSource, require_tune
from esi_ds.core.mask import Mask, load_mask
from esi_ds.core.trained import Trained
from esi_ds.core.units import Parameter
from esi_ds.data.chat import load_chat_tokenizer, special_strings
from esi_ds.data.conversations import TuningSet, encode_rows, find_columns
from esi_ds.data.prompts import load_question_sets
from esi_ds.data.rows import read_rows
from esi_ds.errors import UserError
from esi_ds.models.fingerprint import check_mask_structure
from esi_ds.models.folder import ModelSource, check_weights, load_model_config, max_positions
from esi_ds.models.roles import router_names
from esi_ds.patch import check_names

TRAIN = {"set": "selected", "spa": "complement"}


@dataclass(frozen=True)
class TuningInputs:
    """Mask, rows and prompts of one run. ``questions``: set name → prompts to answer before and after."""

    stage: str
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    mask: Mask
    trained: Trained
    rows: TuningSet
    benign: TuningSet | None
    questions: dict[str, list[str]]
    source: dict[str, Any]
    specials: tuple[str, ...]


def prepare_tuning(config: Config, stage: str) -> TuningInputs:
    """Read mask, rows and tokenizer and check them against each other. Raises UserError; reads only."""
    require_tune(config)
    model, tune = config.model, config.tune
    source = ModelSource.of(model)
    model_config = load_model_config(source)
    if (Path(model.path) / "adapter_config.json").is_file():
        raise UserError("model.path", model.path, "holds an adapter (LoRA)", "merge it into its base model first")
    check_weights(source)
    mask = load_mask(tune.mask)
    trained = describe_trained(config, stage, mask, model_config)
    if tune.patch:
        check_names(source, model_config, trained.numels)
    tokenizer = load_training_tokenizer(model)
    specials = special_strings(tokenizer)
    longest = tune.max_length
    rows = read_tuning_set(config, tune.data, "tune.data", tokenizer, model_config, longest, tune.data.limit)
    benign = None
    if tune.data.benign is not None and tune.data.benign.fraction > 0:
        benign = read_tuning_set(config, tune.data.benign, "tune.data.benign", tokenizer, model_config, longest)
    data_facts = {"rows": tune.data.path, "sha256": rows.sha256, "columns": rows.columns}
    if benign is not None:
        data_facts |= {
            "benign": tune.data.benign.path,
            "benign_sha256": benign.sha256,
            "benign_columns": benign.columns,
        }
    questions = _questions(config)
    return TuningInputs(stage, model_config, tokenizer, mask, trained, rows, benign, questions, data_facts, specials)


def load_training_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that learns rows. Raises UserError where it has no chat template or no end token."""
    tokenizer = load_chat_tokenizer(ModelSource.of(model), model)
    if tokenizer.eos_token_id is None:
        raise UserError("model.path", model.path, "has a tokenizer without an end token", "set its eos_token")
    return tokenizer


def describe_trained(config: Config, stage: str, mask: Mask, model_config: PretrainedConfig) -> Trained:
    """What would train, from the model's configuration alone. Raises UserError where the mask does not fit, or where
    nothing would train."""
    from esi_ds.models.meta import meta_parameters

    model = config.model
    parameters: tuple[Parameter, ...] = meta_parameters(model_config, ModelSource.of(model), model.roles)
    check_mask_structure(mask, parameters, "tune.mask")
    tune, shapes = config.tune, {p.name: p.shape for p in parameters}
    names = check_routers(config, parameters)
    trained = Trained(mask, TRAIN[stage], tune.unscored, shapes, names, tune.router)
    if trained.total == 0:
        problem = "selects nothing" if stage == "set" else "selects every scored weight"
        raise UserError("tune.mask", str(mask.path), f"{problem}: nothing would train", "give another mask")
    return trained


def check_routers(config: Config, parameters: Sequence[Parameter]) -> list[str]:
    """Names of the routers' parameters. Raises UserError where ``tune.router`` speaks of them and there are none."""
    names, router = router_names(parameters), config.tune.router
    if router is not None and not names:
        raise UserError("tune.router", router, "speaks of routers, and this model has none", "leave it out")
    return names


def read_tuning_set(
    config: Config,
    section: RowSource | BenignMix,
    field: str,
    tokenizer: PreTrainedTokenizerBase,
    model_config: PretrainedConfig,
    max_length: int,
    limit: int | None = None,
) -> TuningSet:
    """Rows of one section as the model reads them. Raises UserError naming ``field`` where there is none to learn."""
    rows = read_rows(section.path, f"{field}.path", name=section.name, split=section.split)[:limit]
    columns = find_columns(rows, section.columns, f"{field}.columns")
    positions = max_positions(model_config)
    found = encode_rows(
        rows,
        columns,
        tokenizer,
        system_prompt=config.model.system_prompt,
        specials=special_strings(tokenizer),
        end_ids=end_ids(config, tokenizer),
        max_length=min(max_length, positions or max_length),
    )
    if not found.sequences:
        reasons = "; ".join(sorted({reason for _, reason in found.skipped}))
        raise UserError(f"{field}.path", section.path, f"gives no row to learn ({reasons})", "look at its rows")
    return found


def end_ids(config: Config, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a turn: the tokenizer's and the model's generation configuration's."""
    found = {tokenizer.eos_token_id}
    try:
        own = GenerationConfig.from_pretrained(config.model.path, revision=config.model.revision).eos_token_id
    except OSError:  # a model need not have one
        own = None
    found.update(own if isinstance(own, list) else [own])
    return found - {None}


def _questions(config: Config) -> dict[str, list[str]]:
    """Prompts of ``eval.prompts`` (harmful) and ``eval.benign``, where the config has them."""
    if config.eval is None:
        return {}
    sets = load_question_sets(config.eval)
    kinds = dict.fromkeys(found.kind for found in sets)
    return {kind: [prompt for found in sets if found.kind == kind for prompt in found.prompts] for kind in kinds}
