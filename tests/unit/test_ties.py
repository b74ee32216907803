"""Whether a head is tied: known from the checkpoint before any weight is loaded, and equal to transformers' own load.

How the loaded models compute is compared in tests/dist/test_families.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import HEADS, build_model, byte_bpe_tokenizer, claim_tied
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CamembertConfig,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    RobertaConfig,
    T5Config,
    XLMRobertaConfig,
    XmodConfig,
)

from esi_ds.config import validate
from esi_ds.core.stored import MODEL_DTYPES
from esi_ds.errors import UserError
from esi_ds.models import meta, ties
from esi_ds.models.folder import ModelSource, check_weights, load_model_config, max_positions
from esi_ds.models.meta import meta_model, meta_parameters
from esi_ds.models.roles import describe
from esi_ds.stages.esi.prepare import prepare_prompts

TIED = {"own": False, "same": True, "only": True, "none": True}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("head", HEADS)
def test_parameters_known_before_loading_are_those_of_the_loaded_model(tmp_path: Path, head: str, dtype: str) -> None:
    folder = claim_tied(build_model("llama", tmp_path / "model", byte_bpe_tokenizer()), head)
    source = ModelSource(str(folder))
    config = load_model_config(source)
    loaded = describe(AutoModelForCausalLM.from_pretrained(folder, dtype=MODEL_DTYPES[dtype]))
    assert meta_parameters(config, source, dtype=dtype) == loaded
    is_tied = TIED.get(head, dtype == "bf16")  # rounded: differs in fp32 only
    assert ("lm_head.weight" in {p.name for p in loaded if p.scored}) is not is_tied


def test_a_head_that_differs_in_its_last_element_is_untied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of many chunks is compared too."""
    monkeypatch.setattr(ties, "CHUNK", 100)
    folder = claim_tied(build_model("llama", tmp_path / "model", byte_bpe_tokenizer()), "same")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = ModelSource(str(folder))
    loaded = describe(AutoModelForCausalLM.from_pretrained(folder))
    assert "lm_head.weight" in {parameter.name for parameter in loaded}
    assert meta_parameters(load_model_config(source), source) == loaded


def test_a_head_in_another_file_is_compared_too(tmp_path: Path) -> None:
    folder = claim_tied(build_model("llama", tmp_path / "model", byte_bpe_tokenizer()), "own")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    source = ModelSource(str(tmp_path / "cut"))
    index = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())["weight_map"]
    assert index["lm_head.weight"] != index["model.embed_tokens.weight"]
    assert meta_parameters(load_model_config(source), source) == describe(model)


def test_a_checkpoint_of_the_base_model_is_tied(tmp_path: Path) -> None:
    """Its names lack the prefix, and it has no head."""
    folder = claim_tied(build_model("llama", tmp_path / "model", byte_bpe_tokenizer()), "none")
    AutoModelForCausalLM.from_pretrained(folder).model.save_pretrained(tmp_path / "base")
    source = ModelSource(str(tmp_path / "base"))
    loaded = describe(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    assert meta_parameters(load_model_config(source), source) == loaded


def test_a_classifier_ignores_a_stored_head(tmp_path: Path) -> None:
    """Its ``score`` takes the head's place; the config's word on ties is about a head that it does not have."""
    folder = claim_tied(build_model("llama", tmp_path / "model", byte_bpe_tokenizer()), "own")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    model.save_pretrained(tmp_path / "judge")
    source = ModelSource(str(tmp_path / "judge"))
    meta = meta_model(load_model_config(source), source, AutoModelForSequenceClassification)
    assert [name for name, _ in meta.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert "score.weight" in dict(meta.named_parameters())


def test_planning_without_weights_believes_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LlamaConfig(tie_word_embeddings=True).to_dict()))
    source = ModelSource(str(tmp_path))
    assert "lm_head.weight" not in {p.name for p in meta_parameters(load_model_config(source), source)}


def test_roles_of_an_untied_head_can_be_configured(tmp_path: Path) -> None:
    """``model.roles`` that name a head which only the checkpoint unties."""
    folder = claim_tied(build_model("llama", tmp_path / "model", byte_bpe_tokenizer()), "own")
    config = validate(
        {
            "run": {"output_dir": str(tmp_path / "run")},
            "model": {"path": str(folder), "dtype": "bf16", "roles": {"lm_head.weight": "embedding"}},
            "select": {"criterion": "random"},
        }
    )
    assert prepare_prompts(config) == []  # no judge is needed; the pattern matches
    claim_tied(folder, "same")
    with pytest.raises(UserError, match="matches no parameter"):
        prepare_prompts(config)


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "is_decoder": True,
}


@pytest.mark.parametrize(
    "config",
    [
        CamembertConfig(**SIZES),
        XLMRobertaConfig(**SIZES),
        RobertaConfig(**SIZES),
        XmodConfig(**SIZES, languages=["en"], default_language="en"),
        Gemma2Config(**(SIZES | {"num_key_value_heads": 1, "head_dim": 8})),
    ],
    ids=lambda config: config.model_type,
)
def test_a_tied_embedding_is_one_whatever_its_first_name(config: PretrainedConfig, tmp_path: Path) -> None:
    """CamemBERT and XLM-RoBERTa name it ``lm_head.decoder.weight`` first, and it was scored as a head."""
    config.tie_word_embeddings = True
    model = meta_model(config, ModelSource(str(tmp_path)))
    head = model.get_output_embeddings().weight
    assert head is model.get_input_embeddings().weight
    (name,) = (name for name, tensor in model.named_parameters() if tensor is head)
    assert {p.name: p.role for p in describe(model)}[name] == "embedding"


def test_no_limit_of_positions(tmp_path: Path) -> None:
    """XLNet's -1 is no length that a prompt could exceed."""
    assert max_positions(LlamaConfig(max_position_embeddings=7)) == 7
    assert max_positions(LlamaConfig(max_position_embeddings=-1)) is None
    assert max_positions(T5Config()) is None


def test_a_torn_file_is_refused_before_the_ties_are_read(tmp_path: Path) -> None:
    folder = claim_tied(build_model("llama", tmp_path / "model", byte_bpe_tokenizer()), "own")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    source = ModelSource(str(folder), field="judge.path")
    for read in (lambda: check_weights(source), lambda: meta_parameters(load_model_config(source), source)):
        with pytest.raises(UserError, match="^judge.path = .* is not a complete safetensors file"):
            read()


def test_a_parameter_without_elements_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 would fail on it once the model is loaded, and name another one."""
    sizes = {"vocab_size": 9, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    monkeypatch.setattr(meta, "meta_model", lambda *arguments, **options: model)
    assert meta_parameters(model.config, ModelSource("m"))
    model.marker = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(UserError, match=r"model\.path = m: has a parameter without elements \(marker\)"):
        meta_parameters(model.config, ModelSource("m"))
