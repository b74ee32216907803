"""Patches in one process: both directions to the bit, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import build_model, byte_bpe_tokenizer, claim_tied
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, ProcessorMixin

from esi_ds import patch
from esi_ds.errors import UserError
from esi_ds.models.beside_weights import check_same_configuration
from esi_ds.models.fingerprint import tensor_digests
from esi_ds.models.folder import ModelSource, load_model_config
from esi_ds.patch import check_names, create, main, summary

sys.path.append(str(ROOT / "tests/sweep"))
import tiny  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base in bf16, and a tuned model with a few other weights: among them a zero whose sign turned, and a NaN."""
    build_model("qwen3_moe", tmp_path / "base", byte_bpe_tokenizer(), dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.view(-1)[:3] = torch.tensor([1.5, torch.nan, -0.0]).bfloat16()
        model.model.layers[1].mlp.experts.down_proj.view(-1)[7] += 1
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_both_ways(folder: Path, capsys) -> None:
    assert run("create", folder / "base", folder / "tuned", folder / "patch") == 0
    assert run("apply", folder / "base", folder / "patch", folder / "again") == 0
    assert run("revert", folder / "tuned", folder / "patch", folder / "back") == 0
    assert tensor_digests(folder / "again") == tensor_digests(folder / "tuned")
    assert tensor_digests(folder / "back") == tensor_digests(folder / "base")
    assert (folder / "back/model.safetensors").read_bytes() == (folder / "base/model.safetensors").read_bytes()
    assert summary(folder / "patch")["changed"] == 4
    assert "q_proj" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(folder / "again", dtype=torch.bfloat16) is not None


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_configuration_names_the_dtype_that_is_written(folder: Path, key: str) -> None:
    """Plain transformers loads in it: bf16 would round the tuning of fp32 away."""
    fine = AutoModelForCausalLM.from_pretrained(folder / "tuned", dtype=torch.float32)
    with torch.no_grad():
        fine.model.layers[0].self_attn.k_proj.weight.mul_(1 + 1e-4)
    fine.save_pretrained(folder / "fine")
    for name in ("base", "fine"):
        file = folder / name / "config.json"
        content = json.loads(file.read_text())
        content[key] = content.pop("dtype")
        file.write_text(json.dumps(content))
    assert run("create", folder / "base", folder / "fine", folder / "patch") == 0
    assert run("apply", folder / "base", folder / "patch", folder / "again") == 0
    assert run("revert", folder / "fine", folder / "patch", folder / "back") == 0
    for name, origin in (("again", "fine"), ("back", "base")):
        one, other = (AutoModelForCausalLM.from_pretrained(folder / which) for which in (name, origin))
        assert one.dtype == other.dtype == {"again": torch.float32, "back": torch.bfloat16}[name]
        differs = [n for n, values in one.state_dict().items() if not torch.equal(values, other.state_dict()[n])]
        assert differs == (["model.layers.0.self_attn.q_proj.weight"] if name == "again" else [])  # the tuned NaN
        assert json.loads((folder / name / "config.json").read_text())[key] == str(other.dtype)[6:]


def test_files_are_for_whom_the_users_mask_says(folder: Path) -> None:
    """safetensors itself writes files that only their owner may read."""
    before = os.umask(0o027)
    try:
        assert run("create", folder / "base", folder / "tuned", folder / "patch") == 0
        assert run("apply", folder / "base", folder / "patch", folder / "again") == 0
    finally:
        os.umask(before)
    files = [*(folder / "patch").rglob("*.safetensors"), *(folder / "again").rglob("*.safetensors")]
    assert len(files) == 2 and {file.stat().st_mode & 0o777 for file in files} == {0o640}


def test_a_model_is_not_written_into_itself(folder: Path, capsys) -> None:
    assert run("create", folder / "base", folder / "tuned", folder / "patch") == 0
    before = sorted(folder.rglob("*"))
    assert run("apply", folder / "base", folder / "patch", folder / "base/sub") == 2
    assert "lies in the model's folder" in capsys.readouterr().err and sorted(folder.rglob("*")) == before


def test_a_finer_base_can_be_patched_but_not_brought_back(folder: Path, capsys) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter *= 1.0001
    base.save_pretrained(folder / "fine")
    assert run("create", folder / "fine", folder / "tuned", folder / "patch") == 0
    assert run("apply", folder / "fine", folder / "patch", folder / "again") == 0
    assert tensor_digests(folder / "again") == tensor_digests(folder / "tuned")
    assert run("revert", folder / "tuned", folder / "patch", folder / "back") == 2
    assert "keep the base model" in capsys.readouterr().err and not (folder / "back").exists()


def test_a_coarser_base_comes_back(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder / "tuned", dtype=torch.float32).save_pretrained(folder / "fine")
    assert run("create", folder / "base", folder / "fine", folder / "patch") == 0
    assert run("revert", folder / "fine", folder / "patch", folder / "back") == 0
    assert tensor_digests(folder / "back") == tensor_digests(folder / "base")


@pytest.mark.parametrize("what", ["other model", "damaged", "no patch", "other format", "exists", "no model"])
def test_refusals_leave_nothing_behind(folder: Path, capsys, what: str) -> None:
    assert run("create", folder / "base", folder / "tuned", folder / "patch") == 0
    source = folder / "base"
    if what == "other model":
        source = build_model("qwen3_moe", folder / "other", byte_bpe_tokenizer(), seed=3, dtype=torch.bfloat16)
    elif what == "damaged":
        file = folder / "patch/model.safetensors"
        tensors = load_file(file)
        name = next(key for key in tensors if key.endswith(".new"))
        tensors[name] = tensors[name] * 2
        save_file(tensors, file)
    elif what == "no patch":
        (folder / "patch/patch.json").unlink()
    elif what == "other format":
        (folder / "patch/patch.json").write_text(json.dumps({"format": "esi-patch/9"}))
    elif what == "exists":
        (folder / "out").mkdir()
    elif what == "no model":
        source = folder / "nowhere"
    capsys.readouterr()
    assert run("apply", source, folder / "patch", folder / "out") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert what == "exists" or not (folder / "out").exists()
    assert not any(path.name.startswith(".out") for path in folder.iterdir())


def test_a_folder_that_cannot_be_made_is_told(folder: Path, capsys) -> None:
    assert run("create", folder / "base", folder / "tuned", folder / "patch") == 0
    (folder / "file").touch()
    (folder / "link").symlink_to(folder / "nowhere")
    capsys.readouterr()
    for out, problem in (("file/x", "cannot be created"), ("link", "exists already"), ("file", "exists already")):
        for name, words in (
            ("OUT", ("apply", folder / "base", folder / "patch", folder / out)),
            ("OUT", ("revert", folder / "tuned", folder / "patch", folder / out)),
            ("PATCH", ("create", folder / "base", folder / "tuned", folder / out)),
        ):
            assert run(*words) == 2
            assert f"error: {name} = {folder / out}: {problem}" in capsys.readouterr().err
    assert not (folder / "nowhere").exists()


def test_models_of_other_shapes_have_no_patch(folder: Path) -> None:
    build_model("llama", folder / "llama", byte_bpe_tokenizer())
    assert run("create", folder / "base", folder / "llama", folder / "patch") == 2
    assert not (folder / "patch").exists()


@pytest.mark.parametrize("own_code", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_models_that_compute_differently_have_no_patch(folder: Path, own_code: bool, nested: bool, capsys) -> None:
    """A patch holds no configuration: applying it would give the tuned weights with the base's rotary embedding."""

    def configure(name: str, **changes: object) -> None:
        file = folder / name / "config.json"
        content = json.loads(file.read_text())
        changed = content.setdefault("text_config", {}) if nested else content
        changed.update(changes)
        content |= {"auto_map": {"AutoConfig": "own.Config"}, "model_type": "own"} if own_code else {}
        file.write_text(json.dumps(content))

    if nested and not own_code:
        pytest.skip("Qwen3-MoE has no text model of its own")
    configure("base", rms_norm_eps=1e-6)
    configure("tuned", rms_norm_eps=0.5)
    assert run("create", folder / "base", folder / "tuned", folder / "patch") == 2
    said = "has rms_norm_eps 0.5 in config.json, and the base 1e-06"
    assert said in capsys.readouterr().err and not (folder / "patch").exists()
    configure("tuned", rms_norm_eps=1e-6, use_cache=False, transformers_version="4.0", bos_token_id=3)
    assert run("create", folder / "base", folder / "tuned", folder / "patch") == 0


SMALL = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
            {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
        ),
        (
            {"hidden_dropout_prob": 0.1, "dropout_rate": 0.1, "layerdrop": 0.1},
            dict.fromkeys(("hidden_dropout_prob", "dropout_rate", "layerdrop"), 0),
        ),
        ({"aux_loss_alpha": 0.1, "use_mamba_kernels": True}, {"aux_loss_alpha": 0.2, "use_mamba_kernels": False}),
        ({"id2label": {"0": "a"}, "label2id": {"a": 0}}, {"id2label": {"0": "b"}, "label2id": {"b": 0}}),
        ({"problem_type": None, "finetuning_task": "a"}, {"problem_type": "regression", "finetuning_task": "b"}),
        ({"task_specific_params": {}}, {"task_specific_params": {"a": 1}}),
        ({"model_type": "mixtral"}, {"model_type": "mixtral", "router_jitter_noise": 0.1}),
        ({}, {"max_position_embeddings": 128}),
    ],
)
def test_what_no_logit_depends_on_may_differ(tmp_path: Path, old: dict, new: dict) -> None:
    compare_configurations(tmp_path, old, new)


SCALED = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (SCALED, {**SCALED, "max_position_embeddings": 128}),
        ({"model_type": "phimoe"}, {"model_type": "phimoe", "router_jitter_noise": 0.1}),  # a tolerance of its routers
    ],
)
def test_what_logits_depend_on_may_not(tmp_path: Path, old: dict, new: dict) -> None:
    with pytest.raises(UserError, match=f"has {list(new)[-1]} "):
        compare_configurations(tmp_path, old, new)


def compare_configurations(folder: Path, old: dict, new: dict) -> None:
    for name, changes in (("base", old), ("tuned", new)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**SMALL, **changes}))
    check_same_configuration(folder / "base", folder / "tuned")


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(3, 20).view(1, -1)).logits


@pytest.mark.parametrize("shards", [None, "30KB"])
@pytest.mark.parametrize("head", ["own", "same", "none"])
def test_a_tied_head_that_the_base_stores_too(tmp_path: Path, head: str, shards: str | None) -> None:
    """The tuned model stores the weight once: base + patch is that model, and reverting brings the second name back."""
    base = claim_tied(build_model("llama", tmp_path / "base", byte_bpe_tokenizer()), head)
    if shards is not None:  # the two names in two files
        tensors = load_file(base / "model.safetensors")
        (base / "model.safetensors").unlink()
        for file in ("a", "b"):
            part = {name: t for name, t in tensors.items() if (name == "lm_head.weight") == (file == "b")}
            save_file(part, base / f"{file}.safetensors", metadata={"format": "pt"})
        names = {name: "b.safetensors" if name == "lm_head.weight" else "a.safetensors" for name in tensors}
        (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.5
    model.save_pretrained(tmp_path / "tuned")
    assert run("create", base, tmp_path / "tuned", tmp_path / "patch") == 0
    assert run("apply", base, tmp_path / "patch", tmp_path / "again") == 0
    assert tensor_digests(tmp_path / "again") == tensor_digests(tmp_path / "tuned")
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "tuned"))
    if shards is not None:
        listed = json.loads((tmp_path / "again" / INDEX).read_text())["weight_map"]
        assert set(listed) == set(tensor_digests(tmp_path / "tuned"))
    for tuned in ("tuned", "again"):
        assert run("revert", tmp_path / tuned, tmp_path / "patch", tmp_path / f"{tuned}-back") == 0
        assert tensor_digests(tmp_path / f"{tuned}-back") == tensor_digests(base)


def test_a_head_that_is_the_embedding_in_the_tuned_dtype_only(tmp_path: Path, capsys) -> None:
    """In bf16 it is tied: the stale one must not stay. In fp32 the base cannot be brought back."""
    base = claim_tied(build_model("llama", tmp_path / "base", byte_bpe_tokenizer()), "rounded")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.5
    model.save_pretrained(tmp_path / "tuned")
    assert run("create", base, tmp_path / "tuned", tmp_path / "patch") == 0
    assert run("apply", base, tmp_path / "patch", tmp_path / "again") == 0
    assert tensor_digests(tmp_path / "again") == tensor_digests(tmp_path / "tuned")
    assert run("revert", tmp_path / "tuned", tmp_path / "patch", tmp_path / "back") == 2
    assert "keep the base model" in capsys.readouterr().err and not (tmp_path / "back").exists()


def test_tensors_that_no_model_loads_stay_where_they_are(tmp_path: Path, capsys) -> None:
    """A layer for speculative decoding: the export lacks it, so that only an applied patch can be reverted."""
    base = build_model("llama", tmp_path / "base", byte_bpe_tokenizer())
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "tuned")
    tensors = load_file(base / "model.safetensors")
    extra = {"model.layers.2.eh_proj.weight": torch.randn(3, 3), "model.layers.2.norm.weight": torch.zeros(())}
    save_file(tensors | extra, base / "model.safetensors", metadata={"format": "pt"})
    assert run("create", base, tmp_path / "tuned", tmp_path / "patch") == 0
    assert run("apply", base, tmp_path / "patch", tmp_path / "again") == 0
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "tuned"))
    assert run("revert", tmp_path / "again", tmp_path / "patch", tmp_path / "back") == 0
    assert tensor_digests(tmp_path / "back") == tensor_digests(base)
    assert run("revert", tmp_path / "tuned", tmp_path / "patch", tmp_path / "other") == 2
    assert "does not hold model.layers.2" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_the_weights_that_are_loaded_are_patched(folder: Path) -> None:
    """Not those that a stale index beside them names."""
    AutoModelForCausalLM.from_pretrained(folder / "tuned").save_pretrained(folder / "cut", max_shard_size="20KB")
    for file in (folder / "cut").glob("model*"):
        os.rename(file, folder / "base" / file.name)
    assert run("create", folder / "base", folder / "tuned", folder / "patch") == 0
    assert summary(folder / "patch")["changed"] == 4
    assert run("apply", folder / "base", folder / "patch", folder / "again") == 0
    assert tensor_digests(folder / "again") == tensor_digests(folder / "tuned")
    assert [file.name for file in (folder / "again").glob("*.safetensors*")] == ["model.safetensors"]


def test_the_other_models_card_and_weights_of_other_formats_are_left_out(folder: Path) -> None:
    """transformers with use_safetensors=False, llama.cpp and others would read the base's weights as the tuned ones."""
    others = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model-q4.gguf", "README.md")
    for name in (*others, "original/consolidated.00.pth", "original/params.json", "LICENSE"):
        (folder / "base" / name).parent.mkdir(exist_ok=True)
        (folder / "base" / name).write_text("{}")
    assert run("create", folder / "base", folder / "tuned", folder / "patch") == 0
    assert run("apply", folder / "base", folder / "patch", folder / "again") == 0
    assert not [name for name in others if (folder / "again" / name).exists()]
    assert [file.name for file in (folder / "again/original").iterdir()] == ["params.json"]
    assert (folder / "again/LICENSE").is_file()


def template_of(folder: Path) -> str | dict[str, str] | None:
    return AutoTokenizer.from_pretrained(folder).chat_template


def processors_template(folder: Path) -> str | None:
    """What transformers gives a processor, which is not only the tokenizer's."""
    return ProcessorMixin.get_processor_dict(folder)[0].get("chat_template")


@pytest.mark.parametrize("old", ["OLD {{ messages }}", None])
@pytest.mark.parametrize("held_by", ["chat_template.json", "processor_config.json"])
def test_the_other_models_chat_template_comes_along(folder: Path, capsys, old: str | None, held_by: str) -> None:
    """SET and SPA export ``model.chat_template``: the weights alone would be asked as the base is."""
    base, tuned, new = folder / "base", folder / "tuned", "NEW {{ messages }}"
    for model, template in ((base, old), (tuned, new)):
        tokenizer = byte_bpe_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(model)
    if old is None:
        (base / "chat_template.jinja").unlink(missing_ok=True)
    (base / held_by).write_text(json.dumps({"chat_template": "IMAGES {{ messages }}"}))
    assert run("create", base, tuned, folder / "patch") == 0
    assert "chat template      changed, too" in capsys.readouterr().out
    assert run("apply", base, folder / "patch", folder / "again") == 0
    assert template_of(folder / "again") == processors_template(folder / "again") == new
    for name in ("again", "tuned"):
        assert run("revert", folder / name, folder / "patch", folder / f"{name}-back") == 0
        assert template_of(folder / f"{name}-back") == template_of(base) == old
        assert processors_template(folder / f"{name}-back") == "IMAGES {{ messages }}"


def test_equal_chat_templates_stay_where_they_are(folder: Path) -> None:
    """In the tokenizer's configuration or a file of their own, one or several."""
    for model in ("base", "tuned"):
        tokenizer = byte_bpe_tokenizer()
        tokenizer.chat_template = {"default": "A {{ messages }}", "tool_use": "B {{ messages }}"}
        tokenizer.save_pretrained(folder / model, save_jinja_files=model == "tuned")
    (folder / "base/chat_template.jinja").unlink()  # of the fixture
    assert template_of(folder / "base") == template_of(folder / "tuned") == tokenizer.chat_template
    assert run("create", folder / "base", folder / "tuned", folder / "patch") == 0
    assert "chat_templates" not in summary(folder / "patch")


def without_row(content: dict) -> None:
    del content["tensors"][CHANGED]


def without_an_unchanged_row(content: dict) -> None:
    """Its sums are adapted, so that nothing but the model itself says that it is missing."""
    row = content["tensors"].pop("lm_head.weight")
    content["numel"] -= row["numel"]


def put(*path: object) -> Callable[[dict], None]:
    """The change that sets the value, the last of ``path``, at the keys before it."""
    *keys, last, value = path

    def change(content: dict) -> None:
        for key in keys:
            content = content[key]
        content[last] = value

    return change


CHANGED = "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"
EDITS: dict[str, Callable[[dict], None]] = {
    "a row is missing": without_row,
    "an unchanged row is missing": without_an_unchanged_row,
    "no tensors": put("tensors", {}),
    "no tensors and no sums": lambda content: content.update(tensors={}, numel=0, changed=0),
    "a list of tensors": put("tensors", []),
    "another row": lambda content: put("tensors", CHANGED, content["tensors"]["lm_head.weight"])(content),
    "no digest": lambda content: content["tensors"][CHANGED].pop("tuned_sha256"),
    "another digest": put("tensors", CHANGED, "tuned_sha256", "0" * 64),
    "nothing has changed": put("tensors", CHANGED, "changed", 0),
    "a negative number": put("tensors", CHANGED, "changed", -1),
    "a number as a text": put("tensors", CHANGED, "changed", "3"),
    "too large a number": put("tensors", CHANGED, "numel", 10**40),
    "another sum": put("changed", 5),
    "no dtype": put("tensors", CHANGED, "dtype", "bfloat17"),
    "a function for a dtype": put("tensors", CHANGED, "dtype", "load"),
    "another dtype": put("tensors", CHANGED, "dtype", "float32"),
    "a file outside": put("tensors", CHANGED, "file", "../base/model.safetensors"),
    "no file": put("tensors", CHANGED, "file", "other.safetensors"),
    "an unknown twin": put("left_out", {"x": {"sha256": "", "twin": "y"}}),
    "a left-out tensor that the base lacks": put("left_out", {"x": {"sha256": "", "twin": None}}),
    "a template outside": put("chat_templates", {"old": {}, "new": {"../chat_template.jinja": ""}}),
    "a stored tensor is left out": put("left_out", {CHANGED: {"sha256": "", "twin": None}}),
}


def refused(folder: Path, capsys) -> str:
    """The one line of the refusal, after which nothing is left."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert run("apply", folder / "base", folder / "patch", folder / "out") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sorted(folder.rglob("*")) == before
    return line


def test_summaries_that_contradict_themselves_or_the_model(folder: Path, capsys) -> None:
    assert run("create", folder / "base", folder / "tuned", folder / "patch") == 0
    file = folder / "patch/patch.json"
    sound = file.read_text()
    for name, edit in EDITS.items():
        content = json.loads(sound)
        edit(content)
        file.write_text(json.dumps(content))
        assert refused(folder, capsys).startswith(("error: PATCH = ", "error: MODEL = ")), name
    for text in ("", "[]", "null", sound[:-40], "{" * 100_000, sound.replace('"format"', '"format": "", "format"')):
        file.write_text(text)
        assert refused(folder, capsys).startswith("error: PATCH = ")
        assert run("info", folder / "patch") == 2
    file.write_text(sound)
    assert run("apply", folder / "base", folder / "patch", folder / "out") == 0


@pytest.mark.parametrize("what", ["torn", "foreign", "missing", "pipe", "short", "other dtype", "model torn"])
def test_damaged_files_are_refused(folder: Path, capsys, what: str) -> None:
    assert run("create", folder / "base", folder / "tuned", folder / "patch") == 0
    file = folder / ("base" if what == "model torn" else "patch") / "model.safetensors"
    if what in ("short", "other dtype"):
        tensors = load_file(file)
        name = f"{CHANGED}.new" if what == "short" else f"{CHANGED}.bits"
        tensors[name] = tensors[name][1:].clone() if what == "short" else tensors[name].float()
        save_file(tensors, file)
    elif "torn" in what:
        file.write_bytes(file.read_bytes()[:-3])
    elif what == "foreign":
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        file.unlink()
        if what == "pipe":
            os.mkfifo(file)
    assert "model.safetensors" in refused(folder, capsys)


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt(), MemoryError()])
def test_nothing_is_left_behind_where_writing_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    assert run("create", folder / "base", folder / "tuned", folder / "patch") == 0
    before = sorted(folder.rglob("*"))

    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(patch, "save_tensors", fail)
    for command in (
        ("create", folder / "base", folder / "tuned", folder / "other"),
        ("apply", folder / "base", folder / "patch", folder / "out"),
        ("revert", folder / "tuned", folder / "patch", folder / "out"),
    ):
        with pytest.raises(type(error)):
            run(*command)
        assert sorted(folder.rglob("*")) == before


def rename(folder: Path, new_name: Callable[[str], str | None], index: bool = False) -> ModelSource:
    """The folder of a model with its tensors under these names, None for those that go; as one file, or an index."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {new: tensor for name, tensor in tensors.items() if (new := new_name(name)) is not None}
    if index:
        (folder / "model.safetensors").unlink()
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(renamed, "f.safetensors")}))
    save_file(renamed, folder / ("f.safetensors" if index else "model.safetensors"), {"format": "pt"})
    return ModelSource(str(folder))


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_names_that_differ_by_a_prefix_are_refused_before_training(tmp_path: Path, index: bool, wrapped: bool) -> None:
    """As the hub's Llama-4, of which the text model is loaded, and a model that was saved without its head."""
    base = build_model("llama4", tmp_path / "base", byte_bpe_tokenizer())
    config = load_model_config(ModelSource(str(base)))
    source = rename(base, lambda name: f"language_model.{name}" if wrapped else name.removeprefix("model."), index)
    first = "language_model.lm_head.weight" if wrapped else "embed_tokens.weight"
    with pytest.raises(UserError, match=rf"^tune.patch = True: .* calls {first}; set tune.patch: false"):
        check_names(source, config)


def test_a_single_name_that_the_base_lacks_is_refused_before_training(tmp_path: Path) -> None:
    base = build_model("llama", tmp_path / "base", byte_bpe_tokenizer())
    name = "model.layers.1.mlp.up_proj.weight"
    source = rename(base, lambda own: None if own == name else own)
    with pytest.raises(UserError, match=rf"^tune.patch = True: .* will hold {name}, which .* does not hold; set"):
        check_names(source, load_model_config(source))


def test_a_tied_weight_stored_under_its_other_name_is_refused_before_training(tmp_path: Path) -> None:
    """The file holds the head, the export would hold the embedding."""
    source = ModelSource(str(claim_tied(build_model("llama", tmp_path, byte_bpe_tokenizer()), "only")))
    with pytest.raises(UserError, match="will hold model.embed_tokens.weight, which .* calls lm_head.weight"):
        check_names(source, load_model_config(source))


@pytest.mark.parametrize("kind", ["llama4", "qwen3_moe", "llama_tied"])
def test_names_that_the_export_gives_back_are_no_reason(tmp_path: Path, kind: str) -> None:
    """The model's own, experts one by one, a head that is not stored; and a folder that holds nothing yet."""
    source = ModelSource(str(build_model(kind, tmp_path, byte_bpe_tokenizer())))
    config = load_model_config(source)
    check_names(source, config)
    (tmp_path / "model.safetensors").unlink()
    check_names(source, config)


@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
def test_names_of_a_multimodal_model_as_it_is_stored_are_no_reason(tmp_path: Path, kind: str) -> None:
    """Gemma 3 is stored under other names than its own, Gemma 4 under its own, though there are renamings for it. The
    other way round, a single name of theirs is enough to be refused."""
    tiny.build(kind, tmp_path, byte_bpe_tokenizer())
    source = ModelSource(str(tmp_path))
    config = load_model_config(source)
    check_names(source, config)
    first, *_ = load_file(tmp_path / "model.safetensors")
    rename(tmp_path, lambda name: f"other.{name}" if name == first else name)
    with pytest.raises(UserError, match=rf"will hold {first}, which .* calls other.{first}; set tune.patch: false"):
        check_names(source, config)


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_tuned_model_that_lacks_what_the_base_loads_is_refused(lost: str, tmp_path: Path) -> None:
    """A torn copy, or a head that another tool has tied: base and patch would be another model than the tuned one."""
    base = build_model("llama", tmp_path / "base", byte_bpe_tokenizer())
    shutil.copytree(base, tmp_path / "tuned")
    weights = {name: tensor + 0.01 for name, tensor in load_file(base / "model.safetensors").items() if name != lost}
    save_file(weights, tmp_path / "tuned/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"TUNED = .*: does not hold {lost}, which the base model loads"):
        create(base, tmp_path / "tuned", tmp_path / "patch")
    assert not (tmp_path / "patch").exists()
