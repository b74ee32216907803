"""The DeepSpeed configuration: its file sets ZeRO's mechanics, the YAML everything else (docs/design.md §5)."""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from esi_ds.config import Config
from esi_ds.config.deepspeed_file import read_deepspeed_file
from esi_ds.errors import UserError
from esi_ds.reading import check_type, reading

# The keys that DeepSpeed 0.19.8 reads, with the kind of their values; it silently ignores every other key. Sections
# that this toolkit refuses, and those that it has removed, are refused with their own messages.
_KINDS: dict[Any, str] = {
    dict: "activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger compile "
    "compression_training csv_monitor curriculum_learning data_efficiency data_types datastates_ckpt eigenvalue "
    "elasticity expert_parallel flops_profiler fp16 hybrid_engine nebula optimizer pipeline progressive_layer_drop "
    "scheduler sequence_parallel tensor_parallel tensorboard timers torch_autocast wandb weight_quantization_config "
    "zenflow zero_optimization",
    bool: "check_overflow dataloader_drop_last disable_allgather disable_python_gc dump_state "
    "managed_gradient_accumulation memory_breakdown prescale_gradients sparse_gradients "
    "use_data_before_expert_parallelism use_node_local_storage wall_clock_breakdown zero_allow_untested_optimizer "
    "zero_force_ds_cpu_optimizer",
    int: "gradient_accumulation_steps sequence_parallel_size steps_per_print train_batch_size "
    "train_micro_batch_size_per_gpu vocabulary_size",
    float: "gradient_clipping gradient_predivide_factor",
    str: "communication_data_type gradient_allreduce_op log_level seq_parallel_communication_data_type",
    Any: "graph_harvesting sparse_attention zero_allow_comm_data_type_fp32",
}
KEYS = {key: kind for kind, keys in _KINDS.items() for key in keys.split()}
# Sections that no stage supports, and whether one that does not say ``enabled`` is on. DeepSpeed's autotuner ends the
# process after a few steps. Quantisation, curricula and dropped tokens or layers would train something else, and are
# read by DeepSpeed's own loaders and wrappers only.
UNSUPPORTED = {
    **dict.fromkeys(("amp", "datastates_ckpt", "elasticity", "tensor_parallel", "pipeline"), True),
    **dict.fromkeys(("compression_training", "weight_quantization_config"), True),
    **dict.fromkeys(("autotuning", "hybrid_engine"), False),
    **dict.fromkeys(("curriculum_learning", "data_efficiency", "progressive_layer_drop"), False),
}
# The keys of bf16 and fp16 that DeepSpeed 0.19.8 reads (precision_config.py). Those of the first kind keep a training's
# weights, gradients and moments in 16 bits, also where their section is not enabled. The others change nothing here:
# they are of other optimizers than ZeRO-3's, or of fp16, in which no model is.
LOW_PRECISION = {
    "bf16": ("bf16_master_weights_and_grads", "bf16_optimizer_states"),
    "fp16": ("fp16_master_weights_and_grads",),
}
PRECISION_KEYS = {
    "bf16": (*LOW_PRECISION["bf16"], "enabled", "check_grad_overflow", "immediate_grad_update"),
    "fp16": (
        *(*LOW_PRECISION["fp16"], "enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window"),
        *("hysteresis", "consecutive_hysteresis", "min_loss_scale"),
    ),
}
DATA_TYPES = ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules")  # all that DeepSpeed reads
FP32_NAMES = ("fp32", "float32", "float", "torch.float32")  # as DeepSpeed spells it under data_types
WORDS = {dict: "a mapping", bool: "true or false", int: "a whole number", float: "a number", str: "text"}
REDUCE_BUCKET = 50_000_000
OFFLOAD_OPTIMIZER = "deepspeed.zero_optimization.offload_optimizer"
REMEDY = "remove it from the DeepSpeed config, or set it to auto"


def read(config: Config) -> dict[str, Any]:
    """The ``deepspeed`` mapping of the YAML, or of the file that the YAML names."""
    if isinstance(config.deepspeed, dict):
        return json.loads(json.dumps(config.deepspeed))
    return read_deepspeed_file(config.deepspeed)


def _check_keys(settings: Mapping[str, Any]) -> None:
    """Raise UserError for a key that DeepSpeed would silently ignore, and for a value that is not of its kind."""
    _check_known(settings, KEYS, "deepspeed")
    for key, value in settings.items():
        kind = KEYS[key]
        if value is None or value == "auto" or kind is Any:
            continue
        try:
            check_type(value, kind)
        except ValueError as error:
            problem = f"must be {WORDS[kind]}"
            raise UserError(f"deepspeed.{key}", value, problem, "see DeepSpeed's documentation") from error


def _check_known(section: Mapping[str, Any], known: Collection[str], field: str) -> None:
    """Raise UserError for a key that is not one of ``known``. field: the section's name."""
    for key, value in section.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise UserError(f"{field}.{key}", value, "is an unknown key", f"the nearest known one is {near}")


ID_DIGITS = 8  # of a run's id, in the names of folders
TUNING = ("set", "spa")  # the stages that take optimizer steps
GRADIENTS = ("esi", *TUNING)  # the stages with gradients, which are reduced and kept in fp32
# DeepSpeed's monitors, and the package that each needs besides DeepSpeed.
MONITORS = {"csv_monitor": None, "tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


def monitor_settings(config: Config, run: str = "") -> dict[str, dict[str, Any]]:
    """The monitors that the DeepSpeed config enables, by section.

    Files go to the run's folder unless it sets a path; below that each run has a folder, since several runs may share
    one DeepSpeed config. run: its id. Raises UserError if a package is missing.
    """
    settings, monitors = read(config), {}
    for name, package in MONITORS.items():
        section = _mapping(settings, name, f"deepspeed.{name}")
        enabled = section.get("enabled", False)
        if not isinstance(enabled, bool):
            raise UserError(f"deepspeed.{name}.enabled", enabled, "is neither true nor false", "write one of them")
        if not enabled:
            continue
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(
                f"deepspeed.{name}.enabled",
                True,
                f"needs the package {package}, which is not installed",
                f"pip install {package}, or set it to false",
            )
        section = {key: value for key, value in section.items() if value != "auto"}
        if name in ("csv_monitor", "tensorboard"):
            files = {"output_path": config.run.output_dir, "job_name": f"deepspeed_{name}", **section}
            if "output_path" in section:
                files["job_name"] = f"{files['job_name']}/{Path(config.run.output_dir).name}-{run[:ID_DIGITS]}"
            section = files
        elif name == "comet":
            # Else Comet gets a point each 100 steps: DeepSpeed counts samples, these curves count steps and answers.
            section = {"samples_log_interval": 0, **section}
        monitors[name] = section
    return monitors


def ignored_sections(config: Config, stage: str) -> list[str]:
    """Lines for the log about settings of speed or memory that DeepSpeed reads in other training loops only. Of an
    offloaded optimizer the stages without one, which may use SPA's file, say nothing."""
    settings, lines = read(config), []
    checkpointing = _mapping(settings, "activation_checkpointing", "deepspeed.activation_checkpointing")
    if any(value not in ("auto", False, None) for value in checkpointing.values()):
        lines.append("deepspeed.activation_checkpointing: ignored; see model.gradient_checkpointing")
    if _mapping(settings, "compile", "deepspeed.compile").get("deepcompile") is True:
        lines.append("deepspeed.compile.deepcompile: ignored; the model is not compiled")
    zero = _mapping(settings, "zero_optimization", "deepspeed.zero_optimization")
    offload = _mapping(zero, "offload_optimizer", OFFLOAD_OPTIMIZER)
    if stage == "set" and offload.get("device", "none") not in ("none", "auto", None):
        kept = "SET keeps its masters and moments, 12 bytes for each trained weight, beside the weights"
        lines.append(f"{OFFLOAD_OPTIMIZER}: ignored; {kept}")
    return lines


def resolve_deepspeed(config: Config, world_size: int, stage: str = "esi") -> dict[str, Any]:
    """The mapping for ``deepspeed.initialize`` in a stage (esi, set, spa, eval, perturb), "auto" filled in.

    Raises UserError, with both values, if it contradicts the YAML or asks for something unsupported.
    """
    settings = read(config)
    _check_keys(settings)
    if "bfloat16" in settings:  # DeepSpeed's older name
        if "bf16" in settings:
            raise UserError("deepspeed.bfloat16", None, "is given beside bf16, its other name", "keep bf16 alone")
        settings["bf16"] = settings.pop("bfloat16")
    _check_zero(settings, world_size)
    monitor_settings(config)
    for name in MONITORS:
        settings.pop(name, None)  # the monitors get the run's curves, not the engine's
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise UserError(
                f"deepspeed.{section}",
                None,
                "does not belong here: this stage takes no optimizer steps"
                if stage not in TUNING
                else "does not belong here: the tune section configures the masked AdamW and its schedule",
                "remove it; learning rates belong in the YAML's tune section",
            )
    for section, default in UNSUPPORTED.items():
        if _is_on(settings.get(section), default):
            raise UserError(f"deepspeed.{section}", None, "is not supported by this stage", "remove it")
    if settings.get("managed_gradient_accumulation") is False:
        raise UserError("deepspeed.managed_gradient_accumulation", False, "is not supported by this stage", "remove it")
    _check_expert_parallel(settings, world_size)
    for key, ours, owner in _owned(config, world_size, stage):
        value = settings.get(key, "auto")
        if value not in ("auto", ours):
            raise UserError(f"deepspeed.{key}", value, f"contradicts {ours} ({owner})", REMEDY)
        settings[key] = ours
    if _is_on(settings.get("torch_autocast"), default=False):
        raise UserError("deepspeed.torch_autocast", None, f"contradicts model.dtype = {config.model.dtype}", REMEDY)
    _check_rounding(settings, config.model.dtype)
    if stage in GRADIENTS:
        _check_gradients(settings)
    _fill_precision(settings, config.model.dtype)
    if stage != "spa":
        # For SPA, which may use the same file; here there is no optimizer.
        settings["zero_optimization"].pop("offload_optimizer", None)
    else:
        _fill_optimizer(settings)
    return _without_auto(settings)  # the rest is for training only, or DeepSpeed has a default


def _check_rounding(settings: dict[str, Any], dtype: str) -> None:
    """Raise UserError where weights would be gathered rounded, or buffers cast, so that the model would not compute
    with the weights that it has."""
    types, zero = _mapping(settings, "data_types", "deepspeed.data_types"), settings["zero_optimization"]
    _check_known(types, DATA_TYPES, "deepspeed.data_types")
    keys = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
    asked = {f"zero_optimization.{key}": zero.get(key) for key in keys}
    asked["data_types.buffer_dtype"] = types.get("buffer_dtype")
    for key, value in asked.items():
        if value not in ("auto", False, None):
            raise UserError(f"deepspeed.{key}", value, f"contradicts model.dtype = {dtype}", REMEDY)


def _is_on(section: Any, default: bool) -> bool:
    """Whether a section asks for something. default: where it does not say whether it is ``enabled``."""
    if isinstance(section, dict):
        return bool(section) and section.get("enabled", default) not in (False, None, "auto")
    return bool(section) and section != "auto"


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without "auto", which is Hugging Face's notation and unknown to DeepSpeed."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != "auto"
    }


def _check_zero(settings: dict[str, Any], world_size: int) -> None:
    zero = settings.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") != 3:
        stage = zero.get("stage") if isinstance(zero, dict) else None
        raise UserError("deepspeed.zero_optimization.stage", stage, "must be 3", "see ds_configs/zero3.json")
    mics = [key for key in zero if key.startswith("mics_")]
    if mics:
        raise UserError(
            f"deepspeed.zero_optimization.{mics[0]}",
            zero[mics[0]],
            "is MiCS, which DeepSpeed no longer has",
            "remove it",
        )
    if _mapping(zero, "offload_param", "deepspeed.zero_optimization.offload_param").get("device") == "nvme":
        field = "deepspeed.zero_optimization.offload_param.device"
        raise UserError(field, "nvme", "is not supported: weights on NVMe cannot be scored", "use cpu")
    if _mapping(zero, "offload_optimizer", OFFLOAD_OPTIMIZER).get("device") == "nvme":
        problem = "is not supported: the mask cannot reach weights on NVMe"
        raise UserError(f"{OFFLOAD_OPTIMIZER}.device", "nvme", problem, "use cpu")
    size = zero.get("zero_hpz_partition_size", 1)
    if isinstance(size, int) and 1 < size < world_size and world_size % size:
        field, remedy = "deepspeed.zero_optimization.zero_hpz_partition_size", "give the number of ranks on a node"
        raise UserError(field, size, f"does not divide {world_size} ranks", remedy)


EXPERT_PARALLEL = "deepspeed.expert_parallel"
AUTOEP_SIZE = f"{EXPERT_PARALLEL}.autoep_size"
# The section's keys that DeepSpeed 0.19.8 reads; it silently ignores every other key (auto_ep_config.py).
# fmt: off
EXPERT_PARALLEL_KEYS = frozenset((
    "enabled", "autoep_size", "expert_tensor_parallel_size", "validate_folding_routing", "async_split_plan",
    "preset_model", "moe_layer_pattern", "expert_pattern", "router_pattern", "use_grouped_mm",
    "disable_triton_grouped_mm", "route_norm", "route_scale", "score_apply", "combine_impl", "row_weighting_impl",
    "gate_up_impl", "comm_backend", "comm_num_sm", "comm_qp_margin", "comm_max_tokens_per_rank",
    "num_expert_groups", "num_limited_groups", "score_func", "top_k", "load_balance_coeff", "routed_scaling_factor",
    "expert_w1", "expert_w2", "expert_w3", "num_experts_attr", "top_k_attr", "has_shared_experts",
    "shared_experts_pattern", "shared_experts_gate_pattern", "expert_activation",
))
# fmt: on


def expert_parallel_size(settings: Mapping[str, Any]) -> int | None:
    """``autoep_size`` of a resolved mapping: how many ranks share a layer's routed experts; None if disabled."""
    return settings["expert_parallel"]["autoep_size"] if "expert_parallel" in settings else None


def check_experts(settings: Mapping[str, Any], num_experts: Iterable[int], listed: Collection[str] = ()) -> None:
    """Raises UserError if expert parallelism does not fit a model.

    num_experts: the number of routed experts of every layer that has any. listed: names of blocks with a list of them.
    """
    size = expert_parallel_size(settings)
    if size is None:
        return
    if listed:
        problem = "has its experts in a list, but only experts fused in one tensor are supported"
        raise UserError(EXPERT_PARALLEL, next(iter(listed)), problem, f"remove {EXPERT_PARALLEL}")
    counts = sorted(set(num_experts))
    if not counts:
        raise UserError(AUTOEP_SIZE, size, "the model has no routed experts", f"remove {EXPERT_PARALLEL}")
    for count in counts:
        if count % size:
            fitting = ", ".join(map(str, _divisors(count)))
            raise UserError(AUTOEP_SIZE, size, f"does not divide {count} experts a layer", f"use one of {fitting}")


def _check_expert_parallel(settings: dict[str, Any], world_size: int) -> None:
    """Check AutoEP's section, and the settings that DeepSpeed 0.19.8 cannot combine with it at stage 3 (engine.py,
    auto_ep_folding.py) or that are not followed here; drop the section if it is disabled."""
    section = _mapping(settings, "expert_parallel", EXPERT_PARALLEL)
    _check_known(section, EXPERT_PARALLEL_KEYS, EXPERT_PARALLEL)
    if not isinstance(section.get("enabled", False), bool):
        raise UserError(f"{EXPERT_PARALLEL}.enabled", section["enabled"], "must be true or false", "write one of them")
    if not section.get("enabled", False):
        settings.pop("expert_parallel", None)
        return
    size = section.get("autoep_size")
    if type(size) is not int or size < 1:
        remedy = "give a number that divides the ranks and every layer's experts"
        problem = "is missing" if size is None else "is not a number above 0"
        raise UserError(AUTOEP_SIZE, size, problem, remedy)
    pattern = section.get("moe_layer_pattern")
    with reading(f"{EXPERT_PARALLEL}.moe_layer_pattern", pattern, "write one", "is not a regular expression"):
        re.compile("" if pattern is None else pattern)
    _check_beside_experts(settings, section)
    if world_size % size:
        fitting = ", ".join(map(str, _divisors(world_size)))
        raise UserError(
            AUTOEP_SIZE,
            size,
            f"does not divide {world_size} rank{'s' * (world_size > 1)}",
            f"start a multiple of {size} ranks (a dry run: --world-size), or use one of {fitting}",
        )


def _check_beside_experts(settings: dict[str, Any], section: dict[str, Any]) -> None:
    zero, order = settings["zero_optimization"], "use_data_before_expert_parallelism"
    unsupported = [
        ("zero_optimization.zero_hpz_partition_size", zero.get("zero_hpz_partition_size", 1), ("auto", 1)),
        ("zero_optimization.zero_quantized_gradients", zero.get("zero_quantized_gradients", False), ("auto", False)),
        ("sequence_parallel_size", settings.get("sequence_parallel_size", 1), ("auto", 1)),
        # ``ShardedModel.readers`` knows DeepSpeed's default order of ranks.
        (order, settings.get(order), ("auto", False, None)),
        ("expert_parallel.expert_tensor_parallel_size", section.get("expert_tensor_parallel_size", 1), (1,)),
        ("expert_parallel.load_balance_coeff", section.get("load_balance_coeff"), (None,)),
    ]
    for key, value, accepted in unsupported:
        if value not in accepted:
            raise UserError(
                f"deepspeed.{key}",
                value,
                f"cannot be combined with {EXPERT_PARALLEL}.enabled = true",
                "remove one of the two",
            )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _owned(config: Config, world_size: int, stage: str) -> list[tuple[str, Any, str]]:
    """DeepSpeed's keys whose values come from the YAML: (key, value, the value's owner in the YAML)."""
    tune = config.tune if stage in TUNING else None
    if stage in TUNING:
        assert tune is not None  # ``require_tune`` has seen it
        size, accumulation = tune.batch_size, tune.gradient_accumulation
        owners = ("tune.batch_size", "tune.gradient_accumulation", "batch size times accumulation times the ranks")
    else:
        name, section = ("esi", config.esi) if stage == "esi" else ("eval", config.eval)
        assert section is not None  # ``require_eval`` has seen it
        # What `auto` will choose is not known yet, and means nothing to an engine without an optimizer.
        size, accumulation = 1 if section.batch_size == "auto" else section.batch_size, 1
        owner = f"{name}.batch_size, which is auto" if section.batch_size == "auto" else f"{name}.batch_size"
        owners = (owner, "fixed in this stage", f"{name}.batch_size times the ranks")
    owned: list[tuple[str, Any, str]] = [
        ("train_micro_batch_size_per_gpu", size, owners[0]),
        ("gradient_accumulation_steps", accumulation, owners[1]),
        ("train_batch_size", size * accumulation * world_size, owners[2]),
    ]
    if tune is not None:
        owned.append(("gradient_clipping", tune.clip or 0.0, "tune.clip"))
    return owned


def _check_gradients(settings: dict[str, Any]) -> None:
    """Raise UserError for gradients, and what a training keeps beside them, of less than fp32: SPA's engine would have
    them so, and the hooks of ESI and SET would not."""
    fp32: dict[str, dict[str, tuple[Any, ...]]] = {
        "": {"communication_data_type": ("fp32",)},
        "data_types": {"grad_accum_dtype": FP32_NAMES},
        "zero_optimization": {"zero_quantized_gradients": (False,)},
        **{section: dict.fromkeys(keys, (False,)) for section, keys in LOW_PRECISION.items()},
    }
    for section, keys in fp32.items():
        field = f"deepspeed.{section}".rstrip(".")
        values = _mapping(settings, section, field) if section else settings
        for key, accepted in keys.items():
            if (value := values.get(key)) not in ("auto", None, *accepted):
                problem = "contradicts fp32, in which gradients and all that is trained are kept"
                raise UserError(f"{field}.{key}", value, problem, REMEDY)


def _fill_optimizer(settings: dict[str, Any]) -> None:
    """Add what an engine with a foreign optimizer needs, and fp32 reduction and accumulation of gradients.

    Raises UserError for what would scale or step differently.

    In bf16 the reduction loses three digits, which makes runs differ between world sizes (docs/zero3.md §1).
    """
    types = _mapping(settings, "data_types", "deepspeed.data_types")
    zero = settings["zero_optimization"]
    offload = _mapping(zero, "offload_optimizer", OFFLOAD_OPTIMIZER)
    mean, optimizer = "the mean over ranks, which SPA needs", "SPA's own optimizer"
    section = "zero_optimization"
    for key, value, ours, owner in (
        ("gradient_predivide_factor", settings.get("gradient_predivide_factor"), 1.0, mean),
        ("prescale_gradients", settings.get("prescale_gradients"), False, mean),
        (f"{section}.zenflow", zero.get("zenflow"), None, optimizer),
        (f"{section}.offload_optimizer.ratio", offload.get("ratio"), 1.0, optimizer),
        (f"{section}.offload_optimizer.super_offload", offload.get("super_offload"), False, optimizer),
    ):
        if value not in ("auto", ours, None):
            raise UserError(f"deepspeed.{key}", value, f"contradicts {owner}", REMEDY)
    settings["communication_data_type"] = "fp32"
    settings["data_types"] = {**types, "grad_accum_dtype": "fp32"}
    settings["zero_allow_untested_optimizer"] = True
    settings["zero_force_ds_cpu_optimizer"] = False
    if zero.get("reduce_bucket_size", "auto") == "auto":
        zero["reduce_bucket_size"] = REDUCE_BUCKET  # fp32: DeepSpeed's default of 5e8 elements would take 2 GB


def _mapping(parent: dict[str, Any], key: str, field: str) -> dict[str, Any]:
    """A section that may be absent, null or "auto", all of which give an empty one."""
    section = parent.get(key)
    if section is None or section == "auto":
        return {}
    if not isinstance(section, dict):
        raise UserError(field, section, "must be a mapping", "see ds_configs/zero3_offload.json")
    return section


def with_precision(settings: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The settings of a model whose ``dtype`` is not ``model.dtype``, as a judge's need not be."""
    others = {name: value for name, value in settings.items() if name not in ("bf16", "fp16")}
    _fill_precision(others, dtype)
    return others


def _fill_precision(settings: dict[str, Any], dtype: str) -> None:
    for key in ("bf16", "fp16"):
        section = _mapping(settings, key, f"deepspeed.{key}")
        ours = dtype == key
        enabled = section.get("enabled", "auto")
        if enabled not in ("auto", ours):
            raise UserError(f"deepspeed.{key}.enabled", enabled, f"contradicts model.dtype = {dtype}", REMEDY)
        _check_known(section, PRECISION_KEYS[key], f"deepspeed.{key}")
        settings[key] = {"enabled": ours}
    if not settings["fp16"]["enabled"]:
        del settings["fp16"]
