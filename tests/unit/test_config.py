"""The config: what ships loads, what is wrong is named, what is resolved loads back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from conftest import ROOT

from esi_ds.artifacts import RunFolder, append_jsonl, read_jsonl, replace_folder
from esi_ds.config import Config, differences, load_config, resolved_yaml, validate
from esi_ds.config.needs import check_mix, require_esi, require_tune, unread_benign, unread_of_eval
from esi_ds.config.yaml import apply_override, parse_yaml
from esi_ds.data.conversations import DataOrder
from esi_ds.deepspeed_config import (
    check_experts,
    expert_parallel_size,
    ignored_sections,
    monitor_settings,
    resolve_deepspeed,
    with_precision,
)
from esi_ds.errors import UserError

SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(ROOT)))
def test_shipped_configs_load_and_resolve(file: Path) -> None:
    config = load_config(str(file), [])
    stage = next((stage for stage in ("spa", "set", "eval", "perturb") if stage in file.name), "esi")
    if stage in ("set", "spa"):
        require_tune(config)
        batch = config.tune.batch_size * config.tune.gradient_accumulation
    elif stage == "esi":
        require_esi(config)
        batch = config.esi.batch_size
    else:
        batch = config.eval.batch_size
    assert not unread_of_eval(config, stage)
    settings = resolve_deepspeed(config, 64, stage)  # a multiple of every shipped autoep_size
    assert settings["train_batch_size"] == 64 * batch
    assert settings["bf16"]["enabled"] == (config.model.dtype == "bf16")
    assert "'auto'" not in str(settings)  # as a value
    assert differences(config, validate(parse_yaml(resolved_yaml(config)))) == []


def test_what_a_stage_leaves_to_an_evaluation_is_named() -> None:
    """One YAML may be of several stages: SET gives no verdict and runs no task, though ``eval`` asks for them."""
    asked = {"judges": [{"kind": "words"}], "tasks": ["gsm8k"], "refusal_words": "gcg", "prompts": {"path": "p"}}
    asked |= {"models": [{"name": "other", "path": "a"}], "benign": {"path": "b"}, "max_new_tokens": 9}
    config = validate({"run": {"output_dir": "x"}, "model": {"path": "a"}, "eval": asked})
    of_answers = "eval.models, eval.judges, eval.refusal_words, eval.tasks: read by launch/eval.py, not by"
    assert unread_of_eval(config, "set") == [f"{of_answers} SET"]
    assert unread_of_eval(config, "esi") == [f"eval.prompts, {of_answers} ESI"]
    assert not unread_of_eval(config, "eval") and not unread_of_eval(config, "perturb")
    bare = validate({"run": {"output_dir": "x"}, "model": {"path": "a"}})
    assert not unread_of_eval(bare, "spa")


def test_overrides_reach_into_lists(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("run: {output_dir: x}\nmodel: {path: a}\neval: {prompts: {path: p}, judges: [{kind: words}]}\n")
    config = load_config(str(file), ["eval.judges.0.words=gcg", "eval.prompts.limit=3"])
    assert config.eval.judges[0].words == "gcg" and config.eval.prompts[0].limit == 3
    for override, words in (
        ("eval.judges.1.words=gcg", "not a position in the list"),
        ("model.path.x=1", "not a section"),
    ):
        with pytest.raises(UserError, match=words):
            load_config(str(file), [override])


def test_the_whole_contract_parses() -> None:
    """docs/design.md §5 as written, numbers in exponent notation included."""
    text = """
run: {output_dir: runs/x, seed: 0, resume: auto, tensorboard: true}
model: {path: a, revision: null, dtype: auto, trust_remote_code: false, chat_template: null, system_prompt: null}
judge: {kind: guard, family: custom, path: b, score: margin, context: prompt_and_response,
        template: "{prompt} {response}", verdict_prefix: "", verdict: {safe: " safe", unsafe: " unsafe"}}
data: {prompts: {path: advbench, split: null, column: auto, limit: null}, responses: null}
esi: {estimator: soft, temperature: 0.3, max_new_tokens: 256, batch_size: 8, save_scores: true, on_nonfinite: skip}
select: {criterion: esi, order: top, ratio: 1e-2, of: all, scope: model}
tune: {mask: m, data: {path: x, columns: auto, benign: {path: y, fraction: 0.0}}, max_steps: 100, lr: 1.0e-4,
       scheduler: cosine, warmup_ratio: 0.03, weight_decay: 0.0, betas: [0.9, 0.999], eps: 1e-8, clip: 1.0,
       batch_size: 4, gradient_accumulation: 1, max_length: 1024, unscored: freeze, save_every: 50, export: true,
       patch: true}
perturb: {mask: m, orders: [top, random, bottom], noise: 0.38, seeds: [0, 1, 2]}
eval: {judges: [], prompts: {path: x}, benign: {path: y}, tasks: [], max_new_tokens: 256, batch_size: 8}
deepspeed: ds_configs/zero3.json
"""
    config = validate(parse_yaml(text))
    assert config.select.ratio == 0.01 and config.tune.eps == 1e-8


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("template", "{prompt} {response}", "judge.template = {prompt} {response}: "),
        ("verdict", '{safe: " safe", unsafe: " unsafe"}', "judge.verdict = {'safe': ' safe', 'unsafe': ' unsafe'}: "),
        ("verdict_prefix", "prefix", "judge.verdict_prefix = prefix: "),
    ],
)
def test_a_key_of_family_custom_is_told_with_its_own_value(key: str, value: str, said: str) -> None:
    text = f"run: {{output_dir: x}}\nmodel: {{path: a}}\njudge:\n  kind: guard\n  path: b\n  {key}: {value!r}\n"
    text = text if key != "verdict" else text.replace(repr(value), value)
    with pytest.raises(UserError, match="belongs to family custom, not auto") as error:
        validate(parse_yaml(text))
    assert str(error.value).startswith(said)


def test_overrides_reach_any_depth(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("run: {output_dir: x}\nmodel: {path: a}\n")
    config = load_config(
        str(file), ["select.ratio=5e-2", "data.prompts.path=advbench", "deepspeed.zero_optimization.stage=2"]
    )
    assert config.select.ratio == 0.05 and config.data.prompts.path == "advbench"
    assert isinstance(config.deepspeed, dict) and config.deepspeed["zero_optimization"]["stage"] == 2
    assert load_config(str(file), [], "other.json").deepspeed == "other.json"
    file.write_text("run: {output_dir: x\n")
    with pytest.raises(UserError, match="line 2"):
        load_config(str(file), [])


def test_folders_are_replaced_whole_and_lines_survive_a_tear(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a").write_text("1")
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "b").write_text("2")
    replace_folder(tmp_path / "new", tmp_path / "final")
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["a"]
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n{"a": 2')  # killed in the middle of a line
    append_jsonl(file, [{"a": 3}])
    assert read_jsonl(file) == [{"a": 1}, {"a": 3}]


def test_data_that_changed_under_a_run_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    facts = {"exit_state": "running", "world_size": 1, "started": 0.0, "model_fingerprint": "a"}
    folder.write_manifest(**facts, data={"sha256": "1"})
    folder.check_same("data_hashes", {"sha256": "1"}, "data")
    with pytest.raises(UserError, match="data"):
        folder.check_same("data_hashes", {"sha256": "2"}, "data")


def test_a_run_goes_on_with_a_server_that_has_moved() -> None:
    server = {"base_url": "http://a/v1", "model": "m"}
    judge = {"kind": "rubric", "model": "j"}

    def config(server: dict, judge: dict = judge) -> Config:
        section = {"models": [{"endpoint": server}], "judges": [judge], "prompts": {"path": "p"}}
        return validate({**BASE, "data": {"responses": server, "prompts": {"path": "p"}}, "eval": section})

    moved = {"base_url": "http://b/v1", "concurrency": 2, "request_timeout": 5.0, "max_attempts": 9}
    assert differences(config(server), config({**server, **moved})) == []
    assert differences(config(server), config(server, {**judge, "concurrency": 1, "item_timeout": 9.0})) == []
    other = ["data.responses.model", "eval.models.0.endpoint.model"]
    assert differences(config(server), config({**server, "model": "n"})) == other
    assert differences(config(server), config(server, {**judge, "max_tokens": 9})) == ["eval.judges.0.max_tokens"]
    longer = config(server).model_copy(update={"eval": None})
    assert differences(config(server), longer) == ["eval"]


CUSTOM = {"path": "b", "family": "custom", "template": "{prompt} {response}", "verdict": {"safe": "a", "unsafe": "b"}}
BASE = {"run": {"output_dir": "x"}, "model": {"path": "a", "dtype": "bf16"}}


@pytest.mark.parametrize(
    ("section", "value", "words"),
    [
        ("esi", {"temperature": float("inf")}, "esi.temperature = inf.*finite"),
        ("esi", {"batch_size": True}, "esi.batch_size = True.*integer"),
        ("esi", {"save_scores": 1}, "esi.save_scores = 1.*boolean"),
        ("esi", {"save_every": "x"}, "esi.save_every = 'x'.*auto.*integer"),
        ("esi", {"save_every": 0}, "esi.save_every = 0"),
        ("select", {"criterion": ["esi", "x"]}, "select.criterion.1 = 'x'.*meaning: the score that ranks the weights"),
        ("judge", {**CUSTOM, "score": 3}, "judge.score = 3.*meaning: "),
        ("esi", None, "esi = None: must be a section"),
        ("esi", {"batch_siez": 1}, "esi.batch_siez.*nearest.*esi.batch_size"),
        ("deepspeed", 3, "deepspeed = 3.*string.*dictionary"),
        ("judge", {**CUSTOM, "template": "{response}"}, "judge.template.*prompt"),
        ("judge", {**CUSTOM, "template": "{prompt} {response} {response}"}, "judge.template.*once"),
        ("judge", {**CUSTOM, "family": "qwen3guard"}, "judge.template.*custom, not qwen3guard"),
        ("judge", {**CUSTOM, "verdict": {"safe": "", "unsafe": "b"}}, "judge.verdict.safe"),
    ],
)
def test_wrong_values_are_named(section: str, value: object, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        validate({**BASE, section: value})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("esi", "words"),
    [
        ({"samples": 2}, "esi.samples = 2: changes nothing with esi.estimator = soft"),
        ({"estimator": "score_function", "samples": 2}, "esi.samples = 2: changes nothing"),
        ({"estimator": "paper_code", "temperature": 1.0}, "esi.temperature = 1.0: changes nothing"),
        ({"estimator": "score_function", "temperature": 1.0}, "esi.temperature = 1.0: changes nothing"),
    ],
)
def test_values_that_an_estimator_does_not_read_are_refused(esi: dict, words: str) -> None:
    config = validate({**BASE, "esi": esi})  # as earlier versions stored it
    with pytest.raises(UserError, match=words):
        require_esi(config)


def test_estimators_take_what_they_read() -> None:
    for esi in (
        {"temperature": 1.0},
        {"estimator": "gumbel", "samples": 2, "temperature": 1.0},
        {"estimator": "paper_code", "samples": 1, "temperature": 0.3},  # given, as the defaults are
    ):
        with pytest.raises(UserError, match="judge: is missing"):
            require_esi(validate({**BASE, "esi": esi}))


def test_a_template_without_prompt_serves_the_response_alone() -> None:
    judge = {**CUSTOM, "template": "{response}", "context": "response_only"}
    assert validate({**BASE, "judge": judge}).judge.template == "{response}"


def test_text_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"run: \xff")
    with pytest.raises(UserError, match="UTF-8"):
        load_config(str(tmp_path / "a.yaml"), [])


def test_what_a_stage_needs() -> None:
    with pytest.raises(UserError, match="judge.*is missing"):
        require_esi(validate(BASE))
    with pytest.raises(UserError, match="data.prompts"):
        require_esi(validate({**BASE, "judge": {"path": "b"}}))
    require_esi(validate({**BASE, "select": {"criterion": "magnitude"}}))
    require_esi(validate({**BASE, "judge": {"path": "b"}, "data": {"responses": "r.jsonl"}}))


@pytest.mark.parametrize(
    ("steps", "fraction", "ranks", "remedy"),
    [
        (3, 0.05, 1, r"the 6 rows of 3 steps; give 0\.166667 or more, or take 10 steps or more"),
        (3, 0.05, 3, r"the 18 rows of 3 steps; give 0\.055556 or more, or take 4 steps or more"),
        (3, 0.05, 4, None),
        (3, 0.0, 1, None),
        (3, 0.166667, 1, None),
        (10, 0.05, 1, None),
    ],
)
def test_benign_rows_of_which_none_would_be_read(steps: int, fraction: float, ranks: int, remedy: str | None) -> None:
    data = {"path": "x", "benign": {"path": "y", "fraction": fraction}}
    tune = require_tune(validate({**BASE, "tune": {"mask": "m", "data": data, "max_steps": steps, "batch_size": 2}}))
    num_read = DataOrder(9, 9, fraction, 0).num_benign_before(steps * tune.step_rows(ranks))
    assert (num_read == 0) == (remedy is not None or fraction == 0)
    if remedy is None:
        check_mix(tune, ranks)
        return
    with pytest.raises(UserError, match=f"tune.data.benign.fraction = {fraction}: mixes no benign row into {remedy}"):
        check_mix(tune, ranks)


def test_differences_leave_out_how_to_resume() -> None:
    base = {**BASE, "esi": {"estimator": "gumbel"}}
    esi = {"estimator": "gumbel", "samples": 2}
    other = {**BASE, "run": {"output_dir": "x", "resume": "never"}, "esi": esi, "judge": {"path": "b"}}
    assert differences(validate(base), validate(other)) == ["judge", "esi.samples"]


def test_a_null_key_is_not_the_same_as_none() -> None:
    """In ``template_kwargs`` and ``extra``: a template may ask what is defined, and null removes a key of a request."""
    base = {"run": {"output_dir": "x"}, "model": {"path": "a"}}
    other = {**base, "model": {"path": "a", "template_kwargs": {"date": None}}}
    assert differences(validate(base), validate(other)) == ["model.template_kwargs.date"]


def test_a_deepspeed_file_beside_the_yaml_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("run: {output_dir: x}\nmodel: {path: a}\ndeepspeed: my.json\n")
    assert load_config(str(file), []).deepspeed == "my.json"
    (tmp_path / "my.json").write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 7}}')
    config = load_config(str(file), [])
    assert resolve_deepspeed(config, 1)["zero_optimization"]["reduce_bucket_size"] == 7
    monkeypatch.chdir(tmp_path)  # the default lies in the repository, wherever the command is given
    assert resolve_deepspeed(validate(BASE), 1)["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bf16": True}, "deepspeed.bf16 = True.*mapping"),
        ({"bfloat16": {"enabled": False}}, "deepspeed.bf16.enabled = False.*bf16"),
        ({"fp16": {"enabled": True}}, "deepspeed.fp16.enabled = True.*bf16"),
        ({"zero_optimization": {"stage": 3, "offload_param": "nvme"}}, "offload_param = nvme.*mapping"),
        ({"train_batch_size": 8}, "deepspeed.train_batch_size = 8.*16"),
        ({"scheduler": {"type": "WarmupLR"}}, "deepspeed.scheduler"),
        ({"elasticity": {"enabled": True}}, "deepspeed.elasticity"),
        ({"hybrid_engine": {"enabled": True}}, "deepspeed.hybrid_engine"),
        ({"autotuning": {"enabled": True, "start_profile_step": 1}}, "deepspeed.autotuning"),
        ({"datastates_ckpt": {"host_cache_size": 1}}, "deepspeed.datastates_ckpt"),
        ({"data_efficiency": {"enabled": True, "data_sampling": {"enabled": True}}}, "deepspeed.data_efficiency"),
        ({"curriculum_learning": {"enabled": True}}, "deepspeed.curriculum_learning"),
        ({"progressive_layer_drop": {"enabled": True}}, "deepspeed.progressive_layer_drop"),
        ({"compression_training": {"layer_reduction": {"enabled": True}}}, "deepspeed.compression_training"),
        ({"weight_quantization_config": {"quantized_initialization": {"num_bits": 8}}}, "weight_quantization_config"),
        ({"bf16": {"enabled": False}, "bfloat16": {"enabled": True}}, "deepspeed.bfloat16: is given beside bf16"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "NVMe cannot be scored"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
            "offload_optimizer.device = nvme: .* the mask cannot reach",
        ),
        ({"managed_gradient_accumulation": False}, "deepspeed.managed_gradient_accumulation = False"),
        ({"torch_autocast": {"enabled": True, "dtype": "fp16"}}, "deepspeed.torch_autocast.*model.dtype = bf16"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights = True.*bf16"),
    ],
)
def test_deepspeed_settings_that_contradict(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_deepspeed(validate({**BASE, "deepspeed": {"zero_optimization": {"stage": 3}, **changes}}), 2)


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"zenflow": {"topk_ratio": 0.1}}, "zenflow.*SPA's own optimizer"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.3}}, "offload_optimizer.ratio = 0.3"),
        ({"offload_optimizer": {"device": "cpu", "super_offload": True}}, "offload_optimizer.super_offload = True"),
    ],
)
def test_what_spa_cannot_have_of_deepspeed(zero: dict, words: str) -> None:
    config = tuning_config({"zero_optimization": {"stage": 3, **zero}})
    with pytest.raises(UserError, match=words):
        resolve_deepspeed(config, 2, "spa")
    for stage in ("esi", "set"):
        resolve_deepspeed(config, 2, stage)


@pytest.mark.parametrize(("ranks", "fits"), [(1, True), (4, True), (6, False), (16, True)])
def test_groups_of_hpz_divide_the_ranks(ranks: int, fits: bool) -> None:
    config = tuning_config({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}})
    if fits:
        resolve_deepspeed(config, ranks)
        return
    with pytest.raises(UserError, match="zero_hpz_partition_size = 4: does not divide 6 ranks; give the number of"):
        resolve_deepspeed(config, ranks)


def tuning_config(deepspeed: dict) -> Config:
    tune = {"mask": "m", "data": {"path": "rows"}, "max_steps": 1, "lr": 1e-3, "batch_size": 1}
    return validate({**BASE, "tune": tune, "deepspeed": {"zero_optimization": {"stage": 3}, **deepspeed}})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor = 2.0: contradicts the mean over ranks"),
        ({"prescale_gradients": True}, "prescale_gradients = True: contradicts the mean over ranks"),
        ({"gradient_predivide_factor": 1, "prescale_gradients": False}, None),
        ({"gradient_predivide_factor": "auto", "prescale_gradients": None}, None),
        ({"data_types": {"grad_accum_dtype": "float32"}}, None),
    ],
)
def test_how_spas_gradients_are_reduced(settings: dict, words: str | None) -> None:
    if words is None:
        assert resolve_deepspeed(tuning_config(settings), 2, "spa")["data_types"] == {"grad_accum_dtype": "fp32"}
        return
    with pytest.raises(UserError, match=words):
        resolve_deepspeed(tuning_config(settings), 2, "spa")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"communication_data_type": "bf16"}, "communication_data_type = bf16: contradicts fp32"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype = bf16: contradicts fp32"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients = True: con"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads = True: contradicts"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states = True: contradicts"),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, "fp16.fp16_master_weights_and_grads = True: contradicts"),
        ({"bf16": {"check_grad_overflow": False, "bf16_optimizer_states": False}}, None),
        ({"fp16": {"enabled": False, "loss_scale": 128, "fp16_master_weights_and_grads": "auto"}}, None),
        ({"communication_data_type": None, "data_types": {"grad_accum_dtype": "fp32"}}, None),
    ],
)
def test_gradients_of_every_stage_are_fp32(settings: dict, words: str | None) -> None:
    config = tuning_config(settings)
    for stage in ("esi", "set", "spa"):
        if words is None:
            assert resolve_deepspeed(config, 2, stage)["bf16"] == {"enabled": True}
            continue
        with pytest.raises(UserError, match=words):
            resolve_deepspeed(config, 2, stage)
    evaluated = validate({**BASE, "eval": {"prompts": {"path": "p"}}, "deepspeed": config.deepspeed})
    resolve_deepspeed(evaluated, 2, "eval")  # no gradients


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_buffers_are_not_cast(dtype: str) -> None:
    """DeepSpeed would after they have been read: rotary frequencies, and biases of routers, which are exported."""
    for value in (None, "auto"):
        resolve_deepspeed(tuning_config({"data_types": {"buffer_dtype": value}}), 2)
    config = tuning_config({"data_types": {"buffer_dtype": dtype}})
    evaluated = validate({**BASE, "eval": {"prompts": {"path": "p"}}, "deepspeed": config.deepspeed})
    for stage in ("esi", "set", "spa", "eval"):
        with pytest.raises(UserError, match=f"data_types.buffer_dtype = {dtype}: contradicts model.dtype = bf16"):
            resolve_deepspeed(evaluated if stage == "eval" else config, 2, stage)


@pytest.mark.parametrize(
    ("section", "key", "near"),
    [("bf16", "check_overflow", "check_grad_overflow"), ("data_types", "grad_acum_dtype", "grad_accum_dtype")],
)
def test_an_unknown_key_of_a_precision(section: str, key: str, near: str) -> None:
    with pytest.raises(UserError, match=f"{section}.{key} = fp32: is an unknown key; the nearest known one is {near}"):
        resolve_deepspeed(tuning_config({section: {key: "fp32"}}), 2)


@pytest.mark.parametrize("nothing", [{"enabled": False}, {"enabled": "auto"}, {"dtype": "fp16"}, {}, None, "auto"])
def test_sections_of_deepspeed_that_ask_for_nothing(nothing: object) -> None:
    zero = {"stage": 3, "zero_quantized_weights": None, "zero_quantized_gradients": None}
    off = dict.fromkeys(("torch_autocast", "hybrid_engine", "autotuning"), nothing)
    settings = {"zero_optimization": zero, **off}
    resolve_deepspeed(validate({**BASE, "deepspeed": settings}), 2)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("esi.ratio", "ratio is a key of other sections: select.ratio"),
        ("ratio", "ratio is a key of other sections: select.ratio"),
        ("esi.estimatr", "the nearest known one is esi.estimator"),
        ("a.b", "the known ones are run, model, judge, data"),
        ("data.prompts.columns", "the nearest known one is data.prompts.column; columns is also a key of other"),
        ("perturb.order", "the nearest known one is perturb.orders; order is also a key of .*: select.order$"),
        ("run.seeds", "the nearest known one is run.seed; seeds is also a key of other sections: perturb.seeds"),
        ("eval.judge", "the nearest known one is eval.judges; judge is also"),
    ],
)
def test_an_unknown_key_and_what_it_may_stand_for(key: str, words: str) -> None:
    raw = copy.deepcopy(BASE)
    apply_override(raw, f"{key}=0.1")
    with pytest.raises(UserError, match=f"is an unknown key; {words}"):
        validate(raw)


def test_a_key_of_another_kind() -> None:
    classifier = {"kind": "classifier", "path": "p", "template": "{response}"}
    judges = [{**classifier, "family": "auto"}, {"kind": "guard", "path": "p", "unsafe_labels": [1]}]
    for judge, key, kind in zip(judges, ("family", "unsafe_labels"), ("guard", "classifier"), strict=True):
        for name, section in (("judge", {"judge": judge}), ("eval.judges.0", {"eval": {"judges": [judge]}})):
            with pytest.raises(UserError, match=rf"{name}\.{key}: is an unknown key; it belongs to kind: {kind}$"):
                validate({**BASE, **section})


def test_number_0_of_a_set_without_its_list() -> None:
    for sets in ({"path": "p", "limit": 3}, [{"path": "p", "limit": 3}], None):
        raw = {**copy.deepcopy(BASE), "eval": {"prompts": copy.deepcopy(sets)}}
        apply_override(raw, "eval.prompts.0.path=q")
        apply_override(raw, "eval.prompts.0.limit=5")
        section = validate(raw).eval
        assert section is not None and [(one.path, one.limit) for one in section.prompts] == [("q", 5)]


def test_benign_rows_that_are_not_read_are_remarked_on() -> None:
    for benign, told in ({"path": "b"}, True), ({"path": "b", "fraction": 0.5}, False), (None, False):
        tune = {"mask": "m", "data": {"path": "r", "benign": benign}}
        assert bool(unread_benign(require_tune(validate({**BASE, "tune": tune})))) == told


def test_a_key_without_a_value() -> None:
    raw = copy.deepcopy(BASE)
    apply_override(raw, "select.ratio=")
    with pytest.raises(UserError, match="select.ratio: has no value: "):
        validate(raw)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"zero_optimization": {"stage": 3}, "zero_optimization": {}}', "appears twice"),
        ('{"zero_optimization": {"stage": 3, "stage": 3}}', "the key 'stage' appears twice"),
        ("[" * 100_000, "recursion"),
        ('{"gradient_clipping": NaN}', "NaN"),
        ('{"train_batch_size": ' + "9" * 5000 + "}", "4300 digits"),
        ('{"gradient_clipping": 1e300}', r"deepspeed.gradient_clipping = 1e\+300"),
        ("[]", "is not a mapping"),
        ("{", "is not valid JSON"),
        ('{"zero_optimisation": {"stage": 3}}', "deepspeed.zero_optimisation.*unknown key.*zero_optimization"),
        ('{"steps_per_print": 1.5}', "deepspeed.steps_per_print = 1.5: must be a whole number"),
    ],
    ids=range(10),
)
def test_a_deepspeed_file_that_is_wrong(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(UserError, match=words) as raised:
        resolve_deepspeed(validate({**BASE, "deepspeed": str(tmp_path / "ds.json")}), 1)
    assert raised.value.field.startswith("deepspeed") and len(str(raised.value)) < 400


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "~nouser/ds.json"])
def test_a_deepspeed_path_that_is_none(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^deepspeed = "):
        resolve_deepspeed(validate({**BASE, "deepspeed": path}), 1)
    (tmp_path / "a.yaml").write_text("run: {output_dir: x}\nmodel: {path: a}\ndeepspeed: " + "x" * 5000)
    with pytest.raises(UserError, match="^deepspeed = "):
        resolve_deepspeed(load_config(str(tmp_path / "a.yaml"), []), 1)
    with pytest.raises(UserError, match="^--config = "):
        load_config("x" * 5000, [])


def expert_parallel(section: dict | str, **others: object) -> dict:
    """The mapping resolved for 8 ranks."""
    zero = {"stage": 3, **{key: others.pop(key) for key in list(others) if key.startswith("zero_")}}
    settings = {"zero_optimization": zero, "expert_parallel": section, **others}
    return resolve_deepspeed(validate({**BASE, "deepspeed": settings}), 8)


def test_expert_parallel_section() -> None:
    on = expert_parallel({"enabled": True, "autoep_size": 4, "preset_model": "qwen3_moe"})
    assert on["expert_parallel"] == {"enabled": True, "autoep_size": 4, "preset_model": "qwen3_moe"}
    assert expert_parallel_size(on) == 4
    off = expert_parallel({"enabled": False, "autoep_size": 3})
    assert "expert_parallel" not in off and expert_parallel_size(off) is None
    check_experts(off, [])  # a dense model
    check_experts(on, [8, 128])
    with pytest.raises(UserError, match="autoep_size = 4: does not divide 6 experts a layer; use one of 1, 2, 3, 6"):
        check_experts(on, [8, 6])
    with pytest.raises(UserError, match="autoep_size = 4: the model has no routed experts; remove deepspeed"):
        check_experts(on, [])
    with pytest.raises(UserError, match="expert_parallel = layers.1.moe: has its experts in a list, but only"):
        check_experts(on, [1], ["layers.1.moe"])


@pytest.mark.parametrize(
    ("changes", "others", "words"),
    [
        (
            {"autoep_size": 3},
            {},
            "autoep_size = 3: does not divide 8 ranks; start a multiple of 3 .* 1, 2, 4, 8",
        ),
        ({"autoep_size": 0}, {}, "autoep_size = 0: is not a number above 0"),
        ({"autoep_size": True}, {}, "autoep_size = True: is not a number"),
        ({"autoep_size": "8"}, {}, "autoep_size = '8': is not a number"),
        ({"autoep_size": None}, {}, "autoep_size: is missing"),
        ({"enabled": "yes"}, {}, "expert_parallel.enabled = 'yes': must be true or false"),
        ({"ep_size": 2}, {}, "expert_parallel.ep_size = 2: is an unknown key; the nearest known one is autoep_size"),
        ({}, {"zero_hpz_partition_size": 2}, "zero_hpz_partition_size = 2: .*expert_parallel.enabled = true"),
        ({}, {"zero_quantized_gradients": True}, "zero_quantized_gradients = True: .*expert_parallel.enabled"),
        ({}, {"sequence_parallel_size": 2}, "sequence_parallel_size = 2: .*expert_parallel.enabled"),
        ({}, {"use_data_before_expert_parallelism": True}, "_expert_parallelism = True: .*expert_parallel.enabled"),
        ({"expert_tensor_parallel_size": 2}, {}, "expert_tensor_parallel_size = 2: .*expert_parallel.enabled"),
        ({"load_balance_coeff": 0.1}, {}, "load_balance_coeff = 0.1: .*expert_parallel.enabled"),
    ],
)
def test_expert_parallel_that_cannot_work(changes: dict, others: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        expert_parallel({"enabled": True, "autoep_size": 2, **changes}, **others)


def test_auto_is_filled_or_left_to_deepspeed() -> None:
    zero = {"stage": 3, "reduce_bucket_size": "auto", "offload_param": {"device": "cpu", "pin_memory": "auto"}}
    settings = {"bf16": "auto", "gradient_clipping": "auto", "train_batch_size": "auto", "zero_optimization": zero}
    assert resolve_deepspeed(validate({**BASE, "deepspeed": settings}), 2) == {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 16,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
    }


def test_settings_of_speed_that_are_ignored_are_told() -> None:
    for value, told in ((True, 2), (False, 0), ("auto", 0)):
        asked = {"activation_checkpointing": {"cpu_checkpointing": value}, "compile": {"deepcompile": value}}
        lines = ignored_sections(validate({**BASE, "deepspeed": {"zero_optimization": {"stage": 3}, **asked}}), "set")
        assert len(lines) == told and all("ignored; " in line for line in lines)


def test_an_offloaded_optimizer_is_spas_alone() -> None:
    """Its file may be that of all stages; SET has an optimizer, which stays where it is."""
    config = validate({**BASE, "deepspeed": "zero3_offload"})
    assert {stage: len(ignored_sections(config, stage)) for stage in ("esi", "set", "spa", "eval", "perturb")} == {
        **dict.fromkeys(("esi", "spa", "eval", "perturb"), 0),
        "set": 1,
    }
    (line,) = ignored_sections(config, "set")
    assert line.startswith("deepspeed.zero_optimization.offload_optimizer: ignored; SET")
    assert line.endswith("beside the weights")  # on CPUs too
    for offload in ("auto", {}, {"device": "none"}):
        none = {"zero_optimization": {"stage": 3, "offload_optimizer": offload}}
        assert ignored_sections(validate({**BASE, "deepspeed": none}), "set") == []


def test_auto_paths_of_monitors_are_the_runs() -> None:
    settings = {"zero_optimization": {"stage": 3}, "csv_monitor": {"enabled": True, "output_path": "auto"}}
    config = validate({**BASE, "deepspeed": settings})
    assert monitor_settings(config)["csv_monitor"]["output_path"] == config.run.output_dir


def test_a_key_does_not_stand_in_the_config() -> None:
    for key in (None, "auto"):
        validate({**BASE, "deepspeed": {"comet": {"enabled": True, "api_key": key}}})
    for enabled in (True, False):
        comet = {"enabled": enabled, "api_key": "secret"}
        with pytest.raises(UserError, match=r"deepspeed\.comet\.api_key: .*export COMET_API_KEY") as caught:
            validate({**BASE, "deepspeed": {"comet": comet}})
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "bf16", "fp16"), [("fp32", False, None), ("bf16", True, None), ("fp16", False, True)]
)
def test_a_sharded_judge_is_read_in_its_own_dtype(dtype: str, bf16: bool, fp16: bool | None) -> None:
    for model_dtype in ("bf16", "fp32"):
        raw = {**BASE, "model": {"path": "a", "dtype": model_dtype}, "deepspeed": {"zero_optimization": {"stage": 3}}}
        settings = with_precision(resolve_deepspeed(validate(raw), 2), dtype)
        assert settings["bf16"] == {"enabled": bf16} and settings.get("fp16", {}).get("enabled") == fp16


def test_a_run_folder_may_be_spelt_otherwise_or_have_moved() -> None:
    before = validate(BASE)
    for path in ("x/", "./x", "/moved/x"):
        assert differences(before, validate({**BASE, "run": {"output_dir": path}})) == []
