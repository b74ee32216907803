"""Greedy means greedy, whatever a model's defaults say; one answer to which tokens end a turn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from builders import PAIRS, build_model, byte_bpe_tokenizer, model_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel

from esi_ds.config import validate
from esi_ds.config.needs import require_tune
from esi_ds.core.batch import left_pad
from esi_ds.data.chat import encode_data_prompt, encode_prompt, special_strings
from esi_ds.data.end_tokens import end_tokens, template_end
from esi_ds.errors import UserError
from esi_ds.models import hub
from esi_ds.models.decoding import greedy_ids, without_defaults
from esi_ds.models.folder import ModelSource
from esi_ds.models.rows import generation_logits
from esi_ds.stages.learnt_rows import check_ends
from esi_ds.zero.loading import read_replicated

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("llama", tmp_path_factory.mktemp("greedy") / "model", byte_bpe_tokenizer())


def copy(folder: Path, target: Path, **files: dict) -> Path:
    """The model in another folder, its JSON files changed by these keys."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    for name, keys in files.items():
        file = target / f"{name}.json"
        content = json.loads(file.read_text()) if file.is_file() else {}
        merged = {key: value for key, value in {**content, **keys}.items() if value is not None}
        file.write_text(json.dumps(merged))
    return target


def most_probable(model: PreTrainedModel, ids: list[int], ends: set[int]) -> list[int]:
    """The oracle: one plain forward pass per token, no cache and no generate()."""
    written = list(ids)
    for _ in range(NUM_TOKENS):
        with torch.no_grad():
            token = int(model(torch.tensor([written]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
    return written[len(ids) :]


def rows(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [encode_prompt(tokenizer, prompt, None) for prompt, _ in PAIRS[:3]]


def answers(folder: Path, ends: set[int]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    batch = left_pad(rows(folder), 0, torch.device("cpu"))
    return greedy_ids(model, batch, end_ids=ends, pad_id=0, max_new_tokens=NUM_TOKENS)


def test_blocks_without_defaults_may_be_nested(folder: Path) -> None:
    """transformers' own switch of kernels stays off in the outer block, and comes back after it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    own, defaults = model._optimize_model_for_decode, model.generation_config
    with without_defaults(model, {1}, 0):
        with without_defaults(model, {2}, 0):
            assert model._optimize_model_for_decode is nullcontext
        assert model._optimize_model_for_decode is nullcontext
    assert model._optimize_model_for_decode == own and model.generation_config is defaults


DEFAULTS = {
    "repetition_penalty": 1.3,
    "encoder_repetition_penalty": 1.3,
    "no_repeat_ngram_size": 1,
    "num_beams": 3,
    "num_return_sequences": 2,
    "length_penalty": 2.0,
    "min_length": 40,
    "min_new_tokens": 9,
    "max_length": 3,
    "max_time": 1e-9,
    "stop_strings": ["a"],
    "suppress_tokens": list(range(5, 200)),
    "begin_suppress_tokens": list(range(5, 200)),
    "bad_words_ids": [[token] for token in range(5, 200)],
    "sequence_bias": [[[token], -99.0] for token in range(5, 200)],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "exponential_decay_length_penalty": [1, 9.0],
    "do_sample": True,
    "guidance_scale": 5.0,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "use_mtp": True,
    "cache_implementation": "static",
    "use_cache": False,
    "watermarking_config": {"greenlist_ratio": 0.1, "bias": 9.0},
    "token_healing": True,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "return_dict_in_generate": True,
    "output_scores": True,
    "constraints": [1],
    "num_beam_groups": 2,
    "prefill_chunk_size": 2,
    "an_entry_of_its_own": 1,
}


@pytest.mark.parametrize("field", DEFAULTS)
def test_no_default_of_the_model_reaches_greedy_decoding(folder: Path, tmp_path: Path, field: str) -> None:
    needed = {"penalty_alpha": {"top_k": 6}, "num_return_sequences": {"num_beams": 2}}  # else it cannot be loaded
    keys = {field: DEFAULTS[field], **needed.get(field, {})}
    changed = copy(folder, tmp_path / "model", generation_config=keys)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = [most_probable(model, ids, {2}) for ids in rows(folder)]
    assert answers(changed, {2}) == expected


@pytest.mark.parametrize("field", ["repetition_penalty", "num_beams", "min_length", "suppress_tokens", "do_sample"])
def test_old_generation_settings_in_config_json_do_not_either(folder: Path, tmp_path: Path, field: str) -> None:
    changed = copy(folder, tmp_path / "model", config={field: DEFAULTS[field]})
    (changed / "generation_config.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert answers(changed, {2}) == [most_probable(model, ids, {2}) for ids in rows(folder)]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_config_that_asks_for_the_load_balancing_loss(kind: str, tmp_path: Path) -> None:
    plain = build_model(kind, tmp_path / "plain", byte_bpe_tokenizer())
    asking = copy(plain, tmp_path / "asking", config={"output_router_logits": True})
    model = read_replicated(ModelSource(str(asking)), "fp32", AutoModelForCausalLM, torch.device("cpu"))
    batch = left_pad(rows(asking), 0, model.device)
    assert len(set(map(len, rows(asking)))) > 1
    settings = {"end_ids": set[int](), "pad_id": 0, "max_new_tokens": 3}
    assert greedy_ids(model, batch, **settings) == greedy_ids(
        AutoModelForCausalLM.from_pretrained(plain).eval(), batch, **settings
    )
    assert model(**batch).aux_loss is None and model(**batch, output_router_logits=True).aux_loss is not None
    assert model.config.output_router_logits  # as it is exported


def test_a_models_own_defaults_come_back(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.repetition_penalty = 1.3
    model.generate = len  # as remote code does
    defaults = model.generation_config
    with pytest.raises(ZeroDivisionError), without_defaults(model, {2}, 0):
        assert model.generation_config.repetition_penalty is None and model.generate is not len
        raise ZeroDivisionError
    assert model.generation_config is defaults and model.generate is len


def test_experts_keep_their_kernel_after_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs transformers switches to one that copies the experts of every row."""
    model = AutoModelForCausalLM.from_config(model_config("qwen3_moe", 60)).eval()
    switch, kernels = GenerationMixin._optimize_model_for_decode, list[str]()

    @contextmanager
    def on_a_gpu(model: PreTrainedModel) -> Iterator[None]:
        with ExitStack() as stack:
            with monkeypatch.context() as patch:
                patch.setattr(PreTrainedModel, "device", torch.device("cuda"), raising=False)
                stack.enter_context(switch(model))
            yield

    monkeypatch.setattr(GenerationMixin, "_optimize_model_for_decode", on_a_gpu)
    model.model.layers[0].mlp.register_forward_hook(
        lambda *_: kernels.extend(model.get_experts_implementation().values())
    )
    batch = left_pad([[5, 6, 7], [8, 9]], 0, model.device)
    model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert set(kernels) == {"grouped_mm", "batched_mm"}
    kernels.clear()
    greedy_ids(model, batch, end_ids=(), pad_id=0, max_new_tokens=3)
    generation_logits(model, [[5, 6, 7]], 0)
    assert kernels == ["grouped_mm"] * 5 and model._optimize_model_for_decode.__func__ is on_a_gpu


def test_answers_end_at_each_end_token_and_without_it(folder: Path) -> None:
    """Also where a neighbour goes on, and where the end token is an ordinary one, which a text would show."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    whole = answers(folder, set())
    assert all(len(row) == NUM_TOKENS for row in whole)
    ends = {whole[0][2], whole[1][4]}
    expected = [most_probable(model, ids, ends) for ids in rows(folder)]
    assert answers(folder, ends) == expected and len(expected[0]) <= 2 and len(expected[1]) <= 4


def ends(folder: Path, target: Path, generation: object, config: object, **files: dict) -> frozenset[int]:
    """End tokens where the two files name these."""
    changed = copy(folder, target, generation_config={"eos_token_id": generation}, config={"eos_token_id": config})
    for name, keys in files.items():
        file = changed / f"{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    tokenizer = AutoTokenizer.from_pretrained(changed)
    return end_tokens(ModelSource(str(changed)), tokenizer)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (9, 2, {2, 9}),  # another token than the tokenizer's: either ends an answer
        ([9, 11], 2, {2, 9, 11}),
        (None, [9], {2, 9}),  # generation_config.json names none
        (None, None, {2}),  # and no default of transformers' class steps in
        (-1, -1, {2}),
    ],
)
def test_end_tokens_are_those_of_all_files(folder: Path, tmp_path: Path, generation, config, expected) -> None:
    assert ends(folder, tmp_path / "model", generation, config) == expected


def test_the_text_model_of_a_larger_one_names_end_tokens(folder: Path, tmp_path: Path) -> None:
    changed = copy(folder, tmp_path / "model")
    config = {**json.loads((changed / "config.json").read_text()), "text_config": {"eos_token_id": [13]}}
    (changed / "config.json").write_text(json.dumps(config))
    assert 13 in end_tokens(ModelSource(str(changed)), AutoTokenizer.from_pretrained(folder))


def test_a_model_without_generation_config_has_end_tokens(folder: Path, tmp_path: Path) -> None:
    changed = copy(folder, tmp_path / "model")
    (changed / "generation_config.json").unlink()
    assert end_tokens(ModelSource(str(changed)), AutoTokenizer.from_pretrained(folder)) == {2}


@pytest.mark.parametrize("stored", ["2", 2.5, True, [2, None], {"id": 2}, [[2]]])
def test_end_tokens_that_are_no_numbers_are_refused(folder: Path, tmp_path: Path, stored: object) -> None:
    with pytest.raises(UserError, match=r"(?s)model.path.*generation_config.json.*eos_token_id"):
        ends(folder, tmp_path / "model", stored, 2)


@pytest.mark.parametrize("text", ["{", "[]", "null", "\x00", '{"eos_token_id": 2, "eos_token_id": 9}'])
def test_a_torn_generation_config_is_refused(folder: Path, tmp_path: Path, text: str) -> None:
    """transformers reads a torn one as if there were none."""
    changed = copy(folder, tmp_path / "model")
    (changed / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"model.path.*generation_config.json"):
        end_tokens(ModelSource(str(changed)), AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|im_end|>\n{% endfor %}", "<|im_end|>"),
        ("{% for m in messages %}{{ m.content }} <|eot_id|>{% endfor %}", "<|eot_id|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),  # ends without a token
        ("{% for m in messages %}{{ m.content }}[/a]{% endfor %}", None),  # text that is no token of its own
        ("{{ messages[0].content }}", None),  # leaves the answer out
        ("{{ raise_exception('only one turn') if messages[1] else '' }}", None),
        (
            "{% for m in messages %}{{ m.content }}{{ '<|eot_id|>' if loop.last else '<|im_end|>' }}{% endfor %}",
            "<|eot_id|>",
        ),
        # An earlier part of the answer ends otherwise.
        ("{% for m in messages %}{{ m.content }}<|im_end|>{{ m.content }}<|eot_id|>{% endfor %}", "<|eot_id|>"),
    ],
)
def test_the_template_names_an_end_token(folder: Path, template: str, expected: str | None) -> None:
    """Special or not: an <|im_end|> that was added as an ordinary token ends a turn too."""
    tokenizer = byte_bpe_tokenizer()
    tokenizer.add_tokens(["<|im_end|>"])
    tokenizer.add_tokens(["<|eot_id|>"], special_tokens=True)
    tokenizer.chat_template = template
    end = tokenizer.convert_tokens_to_ids(expected) if expected else None
    assert template_end(tokenizer) == end
    assert end_tokens(ModelSource(str(folder)), tokenizer) == {2, end} - {None}


def test_rows_must_not_teach_an_end_at_which_answers_do_not_stop(folder: Path, tmp_path: Path) -> None:
    tokenizer = byte_bpe_tokenizer()
    tokenizer.add_tokens(["<|im_end|>"])
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    model = {"path": str(folder)}
    tune = {"mask": "none", "data": {"path": "rows.jsonl", "chat_template": template}}

    def check() -> None:
        config = validate({"run": {"output_dir": "x"}, "model": model, "tune": tune})
        check_ends(config, require_tune(config).data, "tune.data", tokenizer)

    with pytest.raises(UserError, match=r"tune\.data\.chat_template.*ends an answer with <\|im_end\|>"):
        check()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model["path"] = str(copy(folder, tmp_path / "model", generation_config={"eos_token_id": [2, end]}))
    check()


def test_a_token_that_frames_turns_is_broken_up_in_data_though_it_is_not_special() -> None:
    tokenizer = byte_bpe_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "  ", "user", "<tool>"])
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}  {{ m.content }}<|im_end|>{% endfor %}"
    specials = special_strings(tokenizer)
    assert {"<|im_start|>", "<|im_end|>", "<|end|>"} <= set(specials) and not {"  ", "user", "<tool>"} & set(specials)
    ids = encode_data_prompt(tokenizer, "a<|im_end|><|im_start|>system", specials, None)
    assert [ids.count(tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")] == [1, 1]


def test_end_tokens_of_a_hub_model_are_those_of_its_revision(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Laid out as the hub's cache: two revisions of one model with different end tokens."""
    repository = tmp_path / "models--some--model"
    for number, revision in enumerate(("main", "other")):
        commit = str(number) * 40
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        content = {"eos_token_id": 20 + number}
        (repository / "snapshots" / commit / "generation_config.json").write_text(json.dumps(content))
        (repository / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "snapshot_download", partial(hub.snapshot_download, cache_dir=str(tmp_path)))
    monkeypatch.setattr(hub, "_resolved", {})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert end_tokens(ModelSource("some/model"), tokenizer) == {2, 20}
    assert end_tokens(ModelSource("some/model", "other"), tokenizer) == {2, 21}
    (repository / "snapshots" / ("1" * 40) / "generation_config.json").unlink()
    assert end_tokens(ModelSource("some/model", "other"), tokenizer) == {2}
