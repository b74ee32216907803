"""Routers' choices under ZeRO-3 against each family's own experts: which rows they were given, on 1 and 2 ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from builders import FAMILIES, build_model, byte_bpe_tokenizer
from conftest import ROOT, run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.zaya.modeling_zaya import ZayaRouter

from esi_ds.zero.routing import chosen_experts, frequencies

sys.path.append(str(ROOT / "tests/sweep"))
import tiny  # noqa: E402

KINDS = (*FAMILIES, "mixtral", "qwen3_moe")
ROWS = [list(range(5, 5 + length)) for length in (7, 3, 11, 4, 6)]  # two ranks: three rows and two


@pytest.fixture(scope="module", params=[1, 2])
def routed(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("routing")
    for kind in KINDS:
        build_model(kind, folder / kind, byte_bpe_tokenizer())
    (folder / "rows.json").write_text(json.dumps({"kinds": KINDS, "rows": ROWS}))
    done = run_ranks(request.param, str(ROOT / "tests/dist/routing_worker.py"), str(folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def rows_of_experts(model, row: list[int]) -> list[torch.Tensor]:
    """bool [tokens, experts] of every layer with experts: who gets which token, read off at the experts' own
    entrance."""
    choices: list[torch.Tensor] = []

    def watch(module, arguments, keywords):
        inputs = [*arguments, *keywords.values()]
        num_experts = module.gate_up_proj.shape[0]
        chosen = next((tensor for tensor in inputs if not tensor.is_floating_point()), None)
        if chosen is not None:  # hidden states, indices [tokens, k], weights
            marks = torch.zeros(len(chosen), num_experts, dtype=torch.bool)
            choices.append(marks.scatter(1, chosen, True))
        else:  # Llama-4: every token for every expert, times its score, which is 0 where it is not chosen
            choices.append(inputs[0].view(num_experts, len(row), -1).abs().sum(-1).T > 0)

    modules = [module for module in model.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj")]
    experts = [module for module in modules if isinstance(module.gate_up_proj, torch.nn.Parameter)]
    handles = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in experts]
    with torch.no_grad():
        model(input_ids=torch.tensor([row]))
    for handle in handles:
        handle.remove()
    return choices


@pytest.mark.parametrize("kind", KINDS)
def test_choices_are_what_the_experts_are_given(routed: Path, kind: str) -> None:
    """Rows alone in one process; on the ranks they were padded and shared out."""
    model = AutoModelForCausalLM.from_pretrained(routed / kind, dtype=torch.float32).eval()
    per_row = [rows_of_experts(model, row) for row in ROWS]
    choices = list(load_file(routed / f"{kind}.safetensors").items())
    layers = [name for name, _ in sorted(choices, key=lambda item: int(item[0].split(".layers.")[1].split(".")[0]))]
    assert len(layers) == len(per_row[0]) > 0
    for position, name in enumerate(layers):
        expected = torch.cat([marks[position] for marks in per_row])
        chosen = dict(choices)[name].long()
        assert torch.equal(torch.zeros_like(expected).scatter(1, chosen, True), expected)
        counts = json.loads((routed / f"{kind}.json").read_text())
        assert counts["frequencies"][name] == expected.sum(0).tolist()
        assert counts["drift"][name] == [0, sum(map(len, ROWS))]


def test_a_gate_that_returns_none_too() -> None:
    """As DeepSeek's own code does."""
    indices = torch.tensor([[3, 1], [0, 2]])
    assert torch.equal(chosen_experts((indices, torch.rand(2, 2) + 1, None), 2), indices)


def test_a_token_that_skips_all_experts_is_no_experts() -> None:
    """ZAYA's router gives it expert 0 with a weight of 0."""
    torch.manual_seed(0)
    router = ZayaRouter(tiny.tiny_config("zaya", 60), layer_idx=0)
    router.balancing_biases.zero_()
    with torch.no_grad():
        output = router(torch.randn(1, 99, tiny.HIDDEN) * 9)
    skips = output[0].argmax(-1) == tiny.NUM_EXPERTS
    counts = torch.bincount(output[0].argmax(-1)[~skips], minlength=tiny.NUM_EXPERTS)
    assert 0 < int(skips.sum()) < 99 and counts[0] > 0
    chosen = chosen_experts(output, 1)
    assert torch.equal(chosen[:, 0] == -1, skips)
    assert frequencies({"router": chosen}, tiny.NUM_EXPERTS) == {"router": counts.tolist()}
