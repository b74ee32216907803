"""KL(base ‖ model): the numbers against SciPy, what is read, what has no number, and the tables."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import byte_bpe_tokenizer, second_byte_bpe_tokenizer, sentencepiece_tokenizer
from conftest import ROOT
from scipy.special import rel_entr

from esi_ds.config import validate
from esi_ds.config.needs import require_tune
from esi_ds.core import divergence as rule
from esi_ds.core.divergence import kl_divergence
from esi_ds.data.thoughts import MARKS
from esi_ds.errors import UserError
from esi_ds.eval.clusters import cluster_bootstrap, cluster_mean
from esi_ds.eval.divergence import encode_answers
from esi_ds.eval.refusals import REFUSAL_LISTS
from esi_ds.eval.rows import ANSWER_KEY, AnswerRow, DivergenceRow
from esi_ds.eval.tables import DIVERGENCE, Measure, answer_measures
from esi_ds.report.evaluation import interval
from esi_ds.stages.evaluate import divergence as stage
from esi_ds.stages.evaluate.prepare import prepare_eval
from esi_ds.stages.ledger import Ledger
from esi_ds.stages.perturb.prepare import prepare_perturb


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divergence_is_scipys(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many positions are in memory at a time; the whole vocabulary counts."""
    generator = torch.Generator().manual_seed(0)
    first, second = (5 * torch.randn(23, 1009, generator=generator).to(dtype) for _ in range(2))
    whole = kl_divergence(first, second)
    p, q = (np.exp(x - x.max(1, keepdims=True)) for x in (first.double().numpy(), second.double().numpy()))
    p, q = (x / x.sum(1, keepdims=True) for x in (p, q))
    assert whole.dtype == torch.float64
    np.testing.assert_allclose(whole.numpy(), rel_entr(p, q).sum(1), rtol=1e-11)
    for size in (1, 1009 * 3, 1009 * 22 + 5):
        monkeypatch.setattr(rule, "CHUNK", size)
        assert torch.equal(kl_divergence(first, second), whole)


def test_small_divergences_keep_their_digits() -> None:
    """In float32 a divergence of 1e-9 would be rounding."""
    first = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(1))
    second = first.double() + 1e-5 * torch.randn(4, 50_000, generator=torch.Generator().manual_seed(2)).double()
    p, q = (x.double().softmax(-1).numpy() for x in (first, second))
    np.testing.assert_allclose(kl_divergence(first, second).numpy(), rel_entr(p, q).sum(1), rtol=1e-4)
    assert torch.equal(kl_divergence(first, first.clone()), torch.zeros(4, dtype=torch.float64))


def test_tokens_that_cannot_come() -> None:
    first = torch.tensor([[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0], [math.nan, 0.0, 0.0]])
    second = torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]])
    among, infinite, not_a_number = kl_divergence(first, second)
    assert among == pytest.approx(math.log((2 + math.exp(5)) / 2)) and infinite == math.inf and not_a_number.isnan()
    with pytest.raises(ValueError, match="no divergence"):
        kl_divergence(first, second[:, :2])


def test_the_mean_is_over_tokens_and_its_interval_over_prompts() -> None:
    """As the bootstrap of whole clusters of one value a token."""
    generator = np.random.default_rng(3)
    sizes = generator.integers(1, 20, 40)
    values = [generator.gamma(1.0, 0.1, size) for size in sizes]
    clusters = [number // 2 for number in range(40)]
    mean, low, high = cluster_mean([float(v.sum()) for v in values], sizes.tolist(), clusters, seed=5)
    tokens = np.concatenate(values)
    of_tokens = [cluster for cluster, size in zip(clusters, sizes, strict=True) for _ in range(size)]
    expected = cluster_bootstrap([0.0] * len(tokens), tokens.tolist(), of_tokens, seed=5)
    assert (mean, low, high) == pytest.approx((expected.difference, expected.low, expected.high))
    assert cluster_mean([0.5, 1.0], [2, 4], [0, 0], seed=0) == (0.25, None, None)
    assert cluster_mean([], [], [], seed=0) == (None, None, None)


def test_an_answer_is_read_as_it_was_written() -> None:
    """Marks of thoughts stay whole, special-token strings that are data do not."""
    tokenizer = byte_bpe_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    (answer,) = encode_answers(tokenizer, [([7, 8], f"<think>hm</think>Yes {tokenizer.eos_token}")], MARKS)
    marks = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert answer.prompt == [7, 8] and answer.num_read == 2 + len(answer.answer) - 1
    assert [token for token in answer.answer if token in marks] == marks
    assert tokenizer.eos_token_id not in answer.answer


def test_a_mark_that_the_prompt_ends_with_is_not_read_twice() -> None:
    """Rows of answers whose thoughts speak of marks begin with it."""
    tokenizer = byte_bpe_tokenizer()
    prompt, thought = tokenizer("Why?<think>\n")["input_ids"], "<reasoning> is harm.</think>No."
    plain, marked = encode_answers(tokenizer, [(prompt, thought), (prompt, f"<think>{thought}")], MARKS)
    assert plain == marked and tokenizer.decode(plain.answer) == thought


def test_an_answer_is_read_behind_its_prompt() -> None:
    """SentencePiece would begin it with a space that the model did not write."""
    tokenizer = sentencepiece_tokenizer()
    prompt, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a:\n", "a:\nSee it"))
    (answer,) = encode_answers(tokenizer, [(prompt, "See it")], MARKS)
    assert [*answer.prompt, *answer.answer] == both


def answers(*models: str) -> list[AnswerRow]:
    return [
        {"model": model, "set": "good", "index": index, "prompt": "p", "response": "Fine.", "excluded": None}
        for model in models
        for index in range(3)
    ]


def divergence(index: int, value: float | None, tokens: int, reason: str | None = None) -> DivergenceRow:
    return {
        "model": "tuned", "set": "good", "index": index, "divergence": value, "tokens": tokens, "reason": reason
    }  # fmt: skip


def measured(rows: list[DivergenceRow], *models: str) -> dict[str, Measure]:
    by_key = {(row["model"], row["set"], row["index"]): row for row in rows}
    words = REFUSAL_LISTS["xstest"]
    measures = answer_measures(answers("base", "tuned", *models), {}, {}, {"good": "benign"}, [], words, by_key)
    return {measure.model: measure for measure in measures if measure.measure == DIVERGENCE}


def test_the_table_counts_what_is_missing() -> None:
    """A divergence of 0.03 is no 3 %, and a model without weights is not measured."""
    rows = [divergence(0, 0.02, 2), divergence(1, 0.1, 2), divergence(2, None, 9, "it is not finite")]
    measures = measured(rows, "served")
    assert set(measures) == {"base", "tuned"}
    row = measures["tuned"].as_row()
    assert row["rate"] == pytest.approx(0.03) and (row["n"], row["missing"]) == (2, 1)
    assert row["reasons"] == {"it is not finite": 1}
    assert interval(row).startswith("0.03 [0.01, 0.05] (n 2, 1 missing)")
    assert measures["base"].as_row()["rate"] == 0
    nothing = measured([divergence(0, None, 0, "it has no tokens")])["tuned"].as_row()
    assert nothing["rate"] is None and interval(nothing) == "– (n 0, 1 missing)"
    assert measured([]) == {}


def test_prompts_of_one_goal_are_one_cluster() -> None:
    rows = {("tuned", "good", index): divergence(index, 0.1 * index, 1) for index in range(3)}
    given = [{**row, "goal": "the same"} for row in answers("base", "tuned")]
    measures = answer_measures(given, {}, {}, {"good": "benign"}, [], REFUSAL_LISTS["xstest"], rows)
    (measure,) = (m.as_row() for m in measures if m.measure == DIVERGENCE and m.model == "tuned")
    assert measure["rate"] == pytest.approx(0.1) and measure["low"] is None


def evaluation(tmp_path: Path, **changes) -> dict:
    models = ROOT / "examples/models"
    return {
        "model": {"path": str(models / "llama-aligned"), "dtype": "fp32"},
        "run": {"output_dir": str(tmp_path / "run")},
        "eval": {
            "models": [{"path": str(models / "llama-complying"), "name": "complying"}],
            "benign": [{"path": "examples/benign", "limit": 2}],
            "divergence": True,
            **changes,
        },
    }


def test_models_that_read_other_tokens_are_not_compared(tmp_path: Path) -> None:
    inputs = prepare_eval(validate(evaluation(tmp_path)))
    base, other = inputs.candidates
    sets = [question_set.name for question_set in inputs.sets]
    assert stage.comparable(base, other, sets) is None
    assert "vocabulary differs" in stage.comparable(base, replace(other, tokenizer=second_byte_bpe_tokenizer()), sets)
    wider = type(other.config)(**{**other.config.to_dict(), "vocab_size": 999})
    assert "it has 999 logits" in stage.comparable(base, replace(other, config=wider), sets)
    prompts = {key: [*ids, 5] for key, ids in other.prompt_ids.items()}
    assert "chat template" in stage.comparable(base, replace(other, prompt_ids=prompts), sets)
    assert stage.comparable(base, replace(other, prompt_ids=prompts), ["another set"]) is None


def test_a_second_model_that_does_not_fit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = validate(evaluation(tmp_path))
    inputs = prepare_eval(config)
    monkeypatch.setattr(stage, "tightest_free_bytes", lambda: 1 << 40)
    assert stage.room_problem(inputs.candidates[1], config, 100) is None
    monkeypatch.setattr(stage, "tightest_free_bytes", lambda: 1 << 20)
    assert "0.0 GiB are free" in stage.room_problem(inputs.candidates[1], config, 100)
    remarks: list[str] = []
    tracker = SimpleNamespace(remark=remarks.append, log=lambda text: None)
    ledger = SimpleNamespace(rows={("base", "examples/benign", 0): {**answers("base")[0], "set": "examples/benign"}})
    divergences = Ledger(tmp_path / "divergences.jsonl", ANSWER_KEY, DivergenceRow)
    divergences.add([{**divergence(1, 0.1, 2), "model": "complying"}])  # by an earlier start, which had room
    stage.compare_all(None, inputs, ledger, divergences, config, {}, tracker)
    assert len(remarks) == 1 and "the divergence of complying is not measured: it takes" in remarks[0]
    assert divergences.rows == {}


def test_where_there_is_nothing_to_compare_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="eval.divergence.*nothing to compare"):
        prepare_eval(validate(evaluation(tmp_path, models=[])))
    config = evaluation(tmp_path, models=[])
    with pytest.raises(UserError, match="eval.divergence.*launch/eval.py only"):
        prepare_perturb(validate({**config, "perturb": {"mask": "m"}}))
    with pytest.raises(UserError, match="eval.divergence.*launch/eval.py only"):
        require_tune(validate({**config, "tune": {"mask": "m", "data": {"path": "rows.jsonl"}}}))
