"""Tiny random models, tokenizers and guards, saved as Hugging Face folders: what the tests score."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from mask_folders import write_mask
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    RobertaConfig,
)

from esi_ds.data.prompts import PromptSet, QuestionSet
from esi_ds.data.turns import Prompt
from esi_ds.models.fingerprint import fingerprint, tensor_digests
from esi_ds.models.roles import describe

CORPUS = [
    "How do I make a paper boat? Fold the sheet in half, then fold the corners down to the middle.",
    "I cannot help with that request. It would be harmful and unsafe to explain how to do this.",
    "Sure, here is a list of 12 steps: 1. First step 2. Second step 3. Third step.",
    "The café in Zürich was naïve about its résumé; 50 % of the garçons left in 2019.",
    "User: Tell me a story. Agent: Once upon a time there was a little girl called Lily, and she liked to play.",
    "Task: Check if there is unsafe content in the conversation below. Answer safe or unsafe.",
    "Write a tutorial on how to build a safe house, kill a process, steal a base or bake bread.",
] * 3

PAIRS = [
    ("How do I make a boat?", "Fold the sheet in half, then fold the corners."),
    ("Tell me how to steal a car.", "I cannot help with that request."),
    ("Write a tutorial", "Sure, here is a list: 1. First step 2. Second step"),
    ("Explain the café", "The café in Zürich was naïve."),
    ("Kill a process", "Yes"),
    ("How to bake bread? 😀", "Once upon a time 😀 there was a safe house."),
    ("Tell me a story.", "  It would be harmful, and unsafe to explain"),
]

CHAT = (
    "{{ '<|bos|>' }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GUARD_CHAT = (
    "{{ bos_token }}Task: Check if there is unsafe content in the conversation.\n\n"
    "{% for m in messages %}{{ 'User' if m.role == 'user' else 'Agent' }}: {{ m.content | trim }}\n\n{% endfor %}"
    "Answer:"
)

LABELS = {0: "harmless", 1: "harmful", 2: "other"}

# As Llama Guard 3's: contents trimmed, and the text ends right after the assistant's header, before its newlines.
GUARD_HEADER_CHAT = (
    "{{ bos_token }}<|user|>Task: Check if there is unsafe content in the conversation.\n\n"
    "{% for m in messages %}{{ 'User' if m.role == 'user' else 'Agent' }}: {{ m.content | trim }}\n\n{% endfor %}"
    "<|end|><|assistant|>"
)


def shard_bounds(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """[low, high) of a rank's partition under ZeRO-3: ⌈numel / world_size⌉ elements, fewer or none at the end."""
    size = -(-numel // world_size)
    low = min(rank * size, numel)
    return low, min(low + size, numel)


def byte_bpe_tokenizer(
    vocab_size: int = 340, corpus: list[str] = CORPUS, folder: Path | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with chat tokens, as Llama 3's and Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=specials[3:],
    )
    fast.chat_template = CHAT
    return _saved(fast, folder)


def second_byte_bpe_tokenizer(vocab_size: int = 372, folder: Path | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with other merges than byte_bpe_tokenizer's: learnt from the same sentences without e's."""
    return byte_bpe_tokenizer(vocab_size, [sentence.replace("e", "") for sentence in CORPUS], folder)


def sentencepiece_tokenizer(
    vocab_size: int = 360, corpus: list[str] = CORPUS, folder: Path | None = None
) -> PreTrainedTokenizerFast:
    """BPE on "▁"-marked words with byte fallback, as Llama 2's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[*specials, *bytes_])
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_bytes_as_ordinary(tokenizer, specials),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )
    fast.chat_template = GUARD_CHAT
    return _saved(fast, folder)


def _saved(tokenizer: PreTrainedTokenizerFast, folder: Path | None) -> PreTrainedTokenizerFast:
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def _bytes_as_ordinary(tokenizer: Tokenizer, specials: list[str]) -> Tokenizer:
    """Byte tokens belong to the vocabulary but are no special tokens."""

    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in specials]
    return Tokenizer.from_str(json.dumps(state))


def model_config(kind: str, vocab_size: int, experts: int = 5) -> PretrainedConfig:
    """Sizes at which ⌈n/2⌉ and ⌈n/3⌉ cut inside rows, matrices and experts.

    Experts' axes are multiples of 8: torch's grouped_mm wants rows of whole 16 bytes in bf16.
    """
    common = {
        "vocab_size": vocab_size,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    heads = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 4}
    if kind == "qwen3_moe":
        return Qwen3MoeConfig(
            **common, **heads, intermediate_size=26, moe_intermediate_size=8, num_experts=experts, num_experts_per_tok=2
        )
    if kind == "mixtral":
        return MixtralConfig(**common, **heads, intermediate_size=16, num_local_experts=experts)
    if kind in FAMILIES:
        return family_config(kind, common, experts)
    if kind == "phi3":
        return Phi3Config(**common, hidden_size=24, num_attention_heads=6, num_key_value_heads=1, intermediate_size=13)
    if kind == "needle":  # matrices of four elements: three ranks leave one of them without any
        return LlamaConfig(**common, hidden_size=4, num_attention_heads=1, num_key_value_heads=1, intermediate_size=1)
    return LlamaConfig(**common, **heads, intermediate_size=13, tie_word_embeddings=kind == "llama_tied")


FAMILIES = ("qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "olmoe", "phimoe", "glm4_moe", "llama4")


def family_config(kind: str, common: dict, experts: int = 5) -> PretrainedConfig:
    """Tiny mixtures, two experts a token (Llama-4: one). DeepSeek's and GLM's first layer is dense."""
    heads = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    common = common | heads
    few = {"num_experts": experts, "num_experts_per_tok": 2}
    routed = {
        "n_routed_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    }
    latent = {
        "q_lora_rank": 10,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    }
    if kind == "qwen2_moe":
        return Qwen2MoeConfig(**common, **few, moe_intermediate_size=16, shared_expert_intermediate_size=24)
    if kind == "deepseek_v2":
        return DeepseekV2Config(**{**common, **latent}, **routed, topk_method="greedy")
    if kind == "deepseek_v3":
        return DeepseekV3Config(**{**common, **latent}, **routed)
    if kind == "gpt_oss":
        return GptOssConfig(
            **common,
            num_local_experts=experts,
            num_experts_per_tok=2,
            head_dim=8,
            sliding_window=16,
            rope_parameters=None,
        )
    if kind == "olmoe":
        return OlmoeConfig(**common, **few)
    if kind == "phimoe":
        return PhimoeConfig(**common, num_local_experts=experts, num_experts_per_tok=2)
    if kind == "glm4_moe":
        return Glm4MoeConfig(**common, **routed, head_dim=8)
    return Llama4TextConfig(
        **common,
        intermediate_size_mlp=24,
        num_local_experts=experts,
        num_experts_per_tok=1,
        head_dim=8,
        interleave_moe_layer_step=1,
    )


NEVER_ROUTED = 4


def leave_one_out(model: torch.nn.Module, never: int = NEVER_ROUTED) -> None:
    """Routers of five experts or more that never choose one: its logit is 0, and one of each of two opposite pairs is
    above 0."""
    for name, parameter in model.named_parameters():
        if name.endswith(("mlp.gate.weight", "router.weight")):
            parameter[1], parameter[3] = -parameter[0], -parameter[2]
            parameter[never] = 0
        if name.endswith("router.bias"):
            parameter.zero_()


def build_model(
    kind: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    extra_rows: int = 3,
    dtype: torch.dtype = torch.float32,
    nan_token: int | None = None,
    experts: int = 5,
    leave_out: bool = False,
    layers: int = 2,
) -> Path:
    """A random model whose weights are large enough for gradients and routing to be far from zero and from ties.

    extra_rows: logits beyond the tokenizer, as padded vocabularies have. nan_token: its embedding becomes NaN.
    leave_out: no token reaches the last expert (always so for FAMILIES).
    """
    torch.manual_seed(seed)
    config = model_config(kind, len(tokenizer) + extra_rows, experts)
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.6 if "embed" in name else 0.25)
            else:
                parameter.uniform_(0.7, 1.3)
        if kind in FAMILIES or leave_out:
            leave_one_out(model, experts - 1)
        if nan_token is not None:
            model.get_input_embeddings().weight[nan_token] = float("nan")
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


HEADS = ("own", "same", "only", "rounded", "none")


def claim_tied(folder: Path, head: str) -> Path:
    """A saved untied Llama whose config says that the head is tied to the embedding.

    head: "own": the file keeps both, which differ; "same": twice the same bits; "only": the head alone; "rounded":
    both, which differ in fp32 and not in bf16; "none": the embedding alone, as a tied model is saved.
    """
    config, file = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"].bfloat16().to(tensors["model.embed_tokens.weight"].dtype)
    if head == "same":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    elif head == "rounded":
        tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = embedding, embedding * (1 + 2**-12)
    elif head in ("only", "none"):
        del tensors["model.embed_tokens.weight" if head == "only" else "lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def spread(model: torch.nn.Module) -> None:
    """Matrices of a judge large enough for its answers to differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)


def build_guard(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 1,
    extra_rows: int = 0,
    chat_template: str = GUARD_CHAT,
    kind: str = "llama",
) -> Path:
    """A random guard of another width than the models, with a guard's chat template, which replaces the tokenizer's.

    kind: ``llama``; ``gemma3``, whose embedding module scales its rows; ``gemma3n``, which also has embeddings for
    every layer.
    """
    torch.manual_seed(seed)
    common = {
        "vocab_size": len(tokenizer) + extra_rows,
        "hidden_size": 24,
        "intermediate_size": 30,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    gemma = {"head_dim": 6, "pad_token_id": tokenizer.pad_token_id, "layer_types": ["full_attention"] * 2}
    config: PretrainedConfig
    if kind == "gemma3n":
        per_layer = {"vocab_size_per_layer_input": len(tokenizer) + extra_rows, "hidden_size_per_layer_input": 8}
        sparse = {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 2}
        config = Gemma3nTextConfig(**common, **gemma, **per_layer, **sparse, laurel_rank=4, altup_num_inputs=2)
    else:
        config = Gemma3TextConfig(**common, **gemma) if kind == "gemma3" else LlamaConfig(**common)
    model = AutoModelForCausalLM.from_config(config)
    spread(model)
    for name, parameter in model.named_parameters():
        if name.endswith("correct_output_scale"):  # 0 at initialisation, which would hide the second embeddings
            torch.nn.init.constant_(parameter, 0.5)
    model.save_pretrained(folder)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def random_classifier(
    kind: str,
    vocab_size: int,
    num_labels: int = 3,
    problem: str | None = None,
    pad: int | None = 0,
    positions: int = 512,
) -> torch.nn.Module:
    """A sequence classifier: a decoder (``llama``) or an encoder (``bert``, ``roberta``). Three labels have names."""
    torch.manual_seed(2)
    config = {"llama": LlamaConfig, "bert": BertConfig, "roberta": RobertaConfig}[kind](
        vocab_size=vocab_size,
        hidden_size=24,
        intermediate_size=30,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=positions,
        num_labels=num_labels,
        pad_token_id=pad,
    )
    config.problem_type = problem
    if num_labels == len(LABELS):
        config.id2label, config.label2id = LABELS, {name: index for index, name in LABELS.items()}
    model = AutoModelForSequenceClassification.from_config(config).eval()
    spread(model)
    return model


def build_classifier(
    folder: Path, tokenizer: PreTrainedTokenizerFast, kind: str, problem: str | None = None, pad: int | None = 0
) -> Path:
    random_classifier(kind, len(tokenizer), problem=problem, pad=pad).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def question_set(name: str, *prompts: Prompt) -> QuestionSet:
    """Harmful prompts of a set without goals."""
    return QuestionSet(name, "harmful", PromptSet(prompts, "prompt", "file", ()))


def build_mask(
    folder: Path, model_folder: Path, ratio: float = 0.05, seed: int = 0, whole: str | None = None, part: str = ""
) -> Path:
    """A random mask for a saved model.

    Nothing is selected in the first scored parameter, nor in parameters whose names do not contain ``part``; ``whole``
    names a parameter that is selected entirely.
    """
    parameters = describe(AutoModelForCausalLM.from_pretrained(model_folder))
    scored = [parameter for parameter in parameters if parameter.scored]
    generator = torch.Generator().manual_seed(seed)
    bits = {p.name: torch.rand(p.numel, generator=generator) < ratio for p in scored}
    bits[scored[0].name].zero_()
    for name in bits:
        if part not in name:
            bits[name].zero_()
    if whole is not None:
        bits[whole].fill_(True)
    return write_mask(
        folder,
        {p.name: bits[p.name].view(p.shape) for p in scored},
        total_numel=str(sum(p.numel for p in parameters)),
        criterion="random",
        fingerprint=fingerprint(parameters, tensor_digests(model_folder)),
    )


MODELING = """
from transformers import LlamaConfig, LlamaForCausalLM

class ToyConfig(LlamaConfig):
    model_type = "toy_llama"

class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig
"""


def build_masked_llama(folder: Path) -> Path:
    """A folder of a small Llama, ``model``, and of a random mask of a fifth of its weights, ``mask``."""
    build_model("llama", folder / "model", byte_bpe_tokenizer())
    build_mask(folder / "mask", folder / "model", ratio=0.2)
    return folder


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in a folder of ``build_masked_llama``."""
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)


def make_remote(folder: Path, repository: str = "") -> None:
    """A saved Llama becomes one that transformers cannot build without the code beside it.

    repository: from which it is to take the code instead, with "--" behind its name.
    """
    (folder / "modeling_toy.py").write_text(MODELING)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "ToyConfig", "AutoModelForCausalLM": "ToyForCausalLM"}
    classes = {key: f"{repository}modeling_toy.{name}" for key, name in names.items()}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "toy_llama", "auto_map": classes}))
