"""Scores on ZeRO-3 partitions against the whole-tensor oracle: world sizes × batch sizes × models × tokenizers."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from builders import (
    PAIRS,
    build_classifier,
    build_guard,
    build_model,
    byte_bpe_tokenizer,
    sentencepiece_tokenizer,
)
from conftest import ROOT, run_ranks
from quantised_models import build_gpt_oss, write_dequantised, write_fp8, write_mxfp4
from reference import Family, esi_scores, relative_error, select
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from esi_ds import Mask
from esi_ds.core.noise import gumbel, random_bits, stream

logging.set_verbosity_error()
KINDS = ("llama", "llama_tied", "qwen3_moe", "mixtral", "phi3", "needle")
BATCHES = (1, 3, 8)
GUMBEL = {"estimator": "gumbel", "samples": 3, "temperature": 0.8}
SCALED_GUARDS = ("gemma3", "gemma3n")  # guards that do more with ids than look up rows
# A decoder and an encoder, of another tokenizer than the model's: (kind, problem, what is asked, how the oracle asks).
CLASSIFIER_TEXT = "USER: {prompt} ASSISTANT:{response}"
CLASSIFIERS = {
    "labels-llama": (
        "llama",
        None,
        {"unsafe_labels": ["harmful", 2], "score": "margin"},
        Family(CLASSIFIER_TEXT, labels=(1, 2)),
    ),
    "labels-bert": (
        "bert",
        "multi_label_classification",
        {"unsafe_labels": [0, 1], "score": "logprob"},
        Family(CLASSIFIER_TEXT, labels=(0, 1), multi_label=True),
    ),
}
SYSTEM_PROMPT = "You are a helpful assistant."
# The same responses behind a thought, which the model reads and the judge does not.
THOUGHTFUL = [(prompt, f"<think>\nI cannot say.\n</think>\n\n{response}") for prompt, response in PAIRS]
# What the judge reads of them, whether gradients flow through the thought, and the estimator.
THOUGHT_READERS = {
    "reads-both": ("both", False, "soft"),
    "reads-both-through": ("both", True, "soft"),
    "reads-trace-through": ("trace", True, "soft"),
    "score-function-of-answers": ("answer", False, "score_function"),
    "score-function-of-all": ("answer", True, "score_function"),
    "score-function-reads-both": ("both", False, "score_function"),
}
# fp32 sums over tokens and prompts in another order; unrounded arithmetic would give 0. Measured: at most 1.5e-6 on an
# AMD EPYC, 1.5e-5 on an Intel Xeon, where the oracle in fp32 is 7.2e-6 away from the oracle in fp64.
TOLERANCE = 1e-5
ROUNDINGS = 3  # ours may be as far from fp64 as this many of the fp32 oracle's errors, where fp32 costs more than that


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models of every kind, a guard with their tokenizer and one with another, and fixed responses."""
    folder = tmp_path_factory.mktemp("scores")
    for kind in KINDS:
        build_model(kind, folder / kind, byte_bpe_tokenizer())
    write_ties(folder / "phi3", folder / "ties")
    build_guard(folder / "same", byte_bpe_tokenizer())
    build_guard(folder / "other", sentencepiece_tokenizer())
    for kind in SCALED_GUARDS:
        build_guard(folder / kind, sentencepiece_tokenizer(), kind=kind)
    for name, (kind, problem, *_) in CLASSIFIERS.items():
        build_classifier(folder / name, sentencepiece_tokenizer(), kind, problem)
    write_mxfp4(build_gpt_oss(folder / "gpt_oss", byte_bpe_tokenizer()), folder / "mxfp4")
    write_fp8(folder / "other", folder / "fp8", (16, 16), split=True)
    for kind in ("mxfp4", "fp8"):
        write_dequantised(folder / kind, folder / f"{kind}-plain", torch.float32)
    rows = ({"prompt": prompt, "response": response} for prompt, response in PAIRS)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = ({"prompt": prompt, "response": response} for prompt, response in THOUGHTFUL)
    (folder / "thoughtful.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # What another judge has said: the oracle's own scores, and one response that was not judged.
    scores = iter(esi_scores(folder / "qwen3_moe", folder / "other", PAIRS)[1])
    judged = [{"prompt": p, "response": r, "judge_score": next(scores) if r.strip() else None} for p, r in PAIRS]
    judged.append({"prompt": "never judged", "response": "some answer", "judge_score": None})
    (folder / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    return folder


def write_ties(model: Path, folder: Path) -> None:
    """The model with weights rounded so coarsely that a matrix has few different ones."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    coarse = {name: (values / values.std()).round() if values.dim() > 1 else values for name, values in weights.items()}
    save_file(coarse, folder / "model.safetensors", metadata={"format": "pt"})


def product(ranks: int) -> list[tuple[str, str, int]]:
    """(model, guard, batch size) of a world size. The guard's tokenizer touches neither layers, batches nor ranks: the
    one with the model's has one batch size a model and world size, every one of them over the world sizes."""
    same = [(kind, "same", BATCHES[(KINDS.index(kind) + ranks) % len(BATCHES)]) for kind in KINDS]
    return same + [(kind, "other", batch) for kind in KINDS for batch in BATCHES]


def config(folder: Path, kind: str, guard: str, batch: int, name: str, esi: dict | None = None, **select) -> dict:
    return {
        "name": name,
        "config": {
            "run": {"output_dir": str(folder / name), "tensorboard": False, "seed": 5},
            "model": {"path": str(folder / kind), "dtype": "fp32"},
            "judge": {"path": str(folder / guard), "placement": "sharded" if batch == 3 else "replicated"},
            "data": {"responses": str(folder / "pairs.jsonl")},
            "esi": {"batch_size": batch, **(esi or {})},
            "select": {"ratio": 0.03, **select},
        },
    }


# DeepSpeed's own defaults keep small parameters gathered; offloaded parameters live on the CPU between uses; hpZ keeps
# a second copy of the weights, here cut over all ranks as the first one is.
ZERO_OPTIONS = {
    "defaults": {},
    "hpz": {"zero_hpz_partition_size": 8},
    "offload": {
        "stage3_param_persistence_threshold": 0,
        "offload_param": {"device": "cpu"},
        "offload_optimizer": {"device": "cpu"},
    },
}


def extra_cases(folder: Path, ranks: int) -> list[dict]:
    """Estimators, criteria, orders and scopes, each once per world size, at different batch sizes."""
    tag = f"w{ranks}"
    batch = {1: 8, 2: 1, 3: 3}[ranks]
    cases = [
        config(folder, "qwen3_moe", "other", batch, f"{tag}-gumbel", GUMBEL),
        config(folder, "llama", "same", batch, f"{tag}-paper", {"estimator": "paper_code"}),
        config(folder, "llama", "other", batch, f"{tag}-checkpointing"),
    ]
    cases[-1]["config"]["model"]["gradient_checkpointing"] = True
    cases.append(config(folder, "llama", "other", batch, f"{tag}-asked-otherwise", of="scored"))
    cases[-1]["config"]["model"]["system_prompt"] = SYSTEM_PROMPT
    cases[-1]["config"]["judge"] |= {"score": "logprob", "context": "response_only"}
    cases += [
        config(folder, "llama", "same", batch, f"{tag}-score-function", {"estimator": "score_function"}),
        config(folder, "qwen3_moe", "other", batch, f"{tag}-given-scores", {"estimator": "score_function"}),
    ]
    del cases[-1]["config"]["judge"]
    cases[-1]["config"]["data"]["responses"] = str(folder / "judged.jsonl")
    for name, (_, _, asked, _) in CLASSIFIERS.items():
        cases.append(config(folder, "llama", name, batch, f"{tag}-{name}"))
        cases[-1]["config"]["judge"] |= {"kind": "classifier", "template": CLASSIFIER_TEXT, **asked}
    cases += [config(folder, "llama", guard, batch, f"{tag}-{guard}") for guard in SCALED_GUARDS]
    cases.append(config(folder, "llama", "other", batch, f"{tag}-thoughtful"))
    cases[-1]["config"]["data"]["responses"] = str(folder / "thoughtful.jsonl")
    for name, (reads, trace_gradient, estimator) in THOUGHT_READERS.items():
        esi = {"estimator": estimator, "trace_gradient": trace_gradient}
        cases.append(config(folder, "llama", "other", batch, f"{tag}-{name}", esi))
        cases[-1]["config"]["judge"]["reads"] = reads
        cases[-1]["config"]["data"]["responses"] = str(folder / "thoughtful.jsonl")
    cases.append(config(folder, "mxfp4", "fp8", batch, f"{tag}-quantised"))
    cases.append(config(folder, "mxfp4-plain", "fp8-plain", batch, f"{tag}-dequantised"))
    for name, zero in ZERO_OPTIONS.items():
        cases.append({**config(folder, "qwen3_moe", "other", batch, f"{tag}-{name}"), "frees": True})
        cases[-1]["config"]["deepspeed"] = {"zero_optimization": {"stage": 3, **zero}}
        cases[-1]["config"]["judge"]["placement"] = "sharded"
    cases += [
        config(folder, "phi3", "other", batch, f"{tag}-{criterion}", criterion=criterion, order=order, scope=scope)
        for criterion, order, scope in (
            ("grad", "bottom", "model"),
            ("snip", "top", "matrix"),
            ("magnitude", "random", "model"),
            ("random", "top", "matrix"),
        )
    ]
    cases.append(config(folder, "ties", "other", batch, f"{tag}-ties", criterion="magnitude", scope="matrix"))
    return cases


@pytest.fixture(scope="module", params=[1, 2, 3])
def scored(request, folder: Path) -> tuple[int, Path]:
    """One launch per world size runs everything."""
    ranks = request.param
    cases = [config(folder, *parts, "-".join(map(str, (f"w{ranks}", *parts)))) for parts in product(ranks)]
    cases += extra_cases(folder, ranks)
    listing = folder / f"cases-{ranks}.json"
    listing.write_text(json.dumps(cases))
    done = run_ranks(ranks, str(ROOT / "tests/dist/score_worker.py"), str(listing))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return ranks, folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model-00001-of-00001.safetensors")


_oracle: dict[tuple, tuple[dict[str, torch.Tensor], list[float]]] = {}
_thoughtful_oracle: dict[str, dict[str, torch.Tensor]] = {}


def oracle(folder: Path, kind: str, guard: str, **options) -> dict[str, torch.Tensor]:
    return judged_oracle(folder, kind, guard, **options)[0]


def judged_oracle(folder: Path, kind: str, guard: str, **options) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The scores, and the judge's score of every response."""
    key = (str(folder), kind, guard, tuple(sorted((k, str(v)) for k, v in options.items())))
    if key not in _oracle:
        _oracle[key] = esi_scores(folder / kind, folder / guard, PAIRS, **options)
    return _oracle[key]


def excess(got: dict[str, torch.Tensor], folder: Path, kind: str, guard: str) -> float:
    """The error over what rounding explains: over ``TOLERANCE``, or, where that is exceeded, over what fp32 costs the
    oracle on this CPU."""
    expected = oracle(folder, kind, guard)
    error = relative_error(got, expected)
    if error <= TOLERANCE:
        return error / TOLERANCE
    exact = oracle(folder, kind, guard, dtype=torch.float64)
    return relative_error(got, exact) / (ROUNDINGS * relative_error(expected, exact))


def test_soft_scores_equal_the_oracle(scored: tuple[int, Path]) -> None:
    ranks, folder = scored
    worst = {}
    for kind, guard, batch in product(ranks):
        got = read(folder / f"w{ranks}-{kind}-{guard}-{batch}" / "scores")
        worst[kind, guard, batch] = excess(got, folder, kind, guard)
    assert max(worst.values()) <= 1, worst


def test_no_page_is_drawn(scored: tuple[int, Path]) -> None:
    """Pictures would take a third of these tests' time; pages are tested elsewhere."""
    ranks, folder = scored
    assert not list(folder.glob(f"w{ranks}-*/report.html")) and (folder / f"w{ranks}-gumbel" / "report.json").is_file()


def test_the_curve_of_the_judge_is_that_of_its_scores(scored: tuple[int, Path]) -> None:
    """Means over the responses of a step, by which the last may have fewer; not of the surrogate's values."""
    ranks, folder = scored
    judged = judged_oracle(folder, "llama", "other")[1]
    for batch in BATCHES:
        metrics = (folder / f"w{ranks}-llama-other-{batch}" / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in metrics.splitlines()]
        counts = [after - before for before, after in pairwise([0, *(row["step"] for row in rows)])]
        total = sum(row["judge_score"] * count for row, count in zip(rows, counts, strict=True))
        assert [row["prompts_per_second"] for row in rows] == counts  # of all ranks, in a step of a second
        assert sum(counts) == len(PAIRS) and total == pytest.approx(sum(judged), rel=1e-4), batch


def test_more_than_rounding_is_an_error(scored: tuple[int, Path]) -> None:
    ranks, folder = scored
    got = read(folder / f"w{ranks}-llama_tied-other-1" / "scores")
    assert excess(got, folder, "llama_tied", "other") <= 1
    got = {name: values * (1 + 1e-4) for name, values in got.items()}
    assert excess(got, folder, "llama_tied", "other") > 1


def test_masks_are_the_select_of_their_scores(scored: tuple[int, Path]) -> None:
    """Bit for bit, in the parameters' order of the model, whatever the scores are."""
    ranks, folder = scored
    for kind in KINDS:
        run = folder / f"w{ranks}-{kind}-other-3"
        mask, scores = Mask.load(run / "mask"), read(run / "scores")
        assert mask.problems() == []
        assert mask.k == min(int(0.03 * mask.total_numel), sum(v.numel() for v in scores.values()))
        expected = select({name: scores[name] for name in mask.names}, mask.k)
        assert all(torch.equal(mask.tensor(name), expected[name]) for name in mask.names), kind


def test_a_quantised_model_and_judge_give_the_scores_of_the_dequantised_ones(scored: tuple[int, Path]) -> None:
    """To the bit, the judge replicated on one and two ranks and sharded on three; only the fingerprints differ."""
    ranks, folder = scored
    runs = [folder / f"w{ranks}-{name}" for name in ("quantised", "dequantised")]
    one, two = (read(run / "scores") for run in runs)
    assert any(bool(values.any()) for values in one.values()) and set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in two)
    masks = [Mask.load(run / "mask") for run in runs]
    assert "model.layers.0.mlp.experts.gate_up_proj" in masks[0].names
    assert all(torch.equal(masks[0].tensor(name), masks[1].tensor(name)) for name in masks[1].names)
    structures, weights = zip(*(mask.fingerprint.split(":") for mask in masks), strict=True)
    assert len(set(structures)) == 1 and len(set(weights)) == 2
    remarks = [json.loads((run / "manifest.json").read_text()).get("remarks") for run in runs]
    assert "mxfp4: weights dequantised from MXFP4" in remarks[0] and remarks[1] is None
    assert "fp8: weights dequantised from FP8 with a scale for each block of 16 × 16" in remarks[0]


def test_a_rank_may_hold_nothing_of_a_matrix(scored: tuple[int, Path]) -> None:
    """The needle's gate has four weights: on three ranks one rank has none of them, and its σ is still right."""
    ranks, folder = scored
    mask = Mask.load(folder / f"w{ranks}-needle-other-1" / "mask")
    assert mask.numel("model.layers.0.mlp.gate_proj.weight") == 4


def test_gumbel_is_the_same_everywhere_and_equals_the_oracle(scored: tuple[int, Path]) -> None:
    """Noise keyed by (seed, prompt, draw, token): the batch size differs in every world size here."""
    ranks, folder = scored

    def noise_of(index: int):
        return [
            lambda t, width, draw=draw: gumbel(stream(5, index, draw), torch.tensor([t]), width)[0] for draw in range(3)
        ]

    expected = oracle(folder, "qwen3_moe", "other", estimator="gumbel", temperature=0.8, noise_of=noise_of)
    assert relative_error(read(folder / f"w{ranks}-gumbel" / "scores"), expected) <= TOLERANCE


def test_the_judge_and_the_model_may_be_asked_otherwise(scored: tuple[int, Path]) -> None:
    """Another score of a guard that reads responses alone, of a model with a system prompt, in a mask that is a share
    of the scored weights."""
    ranks, folder = scored
    run = folder / f"w{ranks}-asked-otherwise"
    family = Family(context="response_only")
    expected = oracle(folder, "llama", "other", score="logprob", family=family, system_prompt=SYSTEM_PROMPT)
    assert relative_error(read(run / "scores"), expected) <= TOLERANCE
    mask = Mask.load(run / "mask")
    num_scored = sum(values.numel() for values in expected.values())
    assert mask.k == int(0.03 * num_scored) != int(0.03 * mask.total_numel)


def test_paper_code_and_gradient_checkpointing(scored: tuple[int, Path]) -> None:
    ranks, folder = scored
    expected = oracle(folder, "llama", "same", estimator="paper_code")
    assert relative_error(read(folder / f"w{ranks}-paper" / "scores"), expected) <= TOLERANCE
    got = read(folder / f"w{ranks}-checkpointing" / "scores")
    assert relative_error(got, oracle(folder, "llama", "other")) <= TOLERANCE


def test_score_function_needs_no_gradient_of_the_judge(scored: tuple[int, Path]) -> None:
    """Judged here, or with the scores that some other judge has given: rows without one do not take part."""
    ranks, folder = scored
    expected = oracle(folder, "llama", "same", estimator="score_function")
    assert relative_error(read(folder / f"w{ranks}-score-function" / "scores"), expected) <= TOLERANCE
    got = read(folder / f"w{ranks}-given-scores" / "scores")
    assert relative_error(got, oracle(folder, "qwen3_moe", "other", estimator="score_function")) <= TOLERANCE


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_sequence_classifier_is_a_judge(scored: tuple[int, Path], name: str) -> None:
    """Padded on the right and with other rows in its batch, sharded on two ranks of the three."""
    ranks, folder = scored
    _, _, asked, family = CLASSIFIERS[name]
    expected = oracle(folder, "llama", name, family=family, score=asked["score"])
    assert relative_error(read(folder / f"w{ranks}-{name}" / "scores"), expected) <= TOLERANCE


@pytest.mark.parametrize("guard", SCALED_GUARDS)
def test_a_guard_reads_ids(scored: tuple[int, Path], guard: str) -> None:
    """Its own forward pass decides what an id is worth; sharded on three ranks."""
    ranks, folder = scored
    got = read(folder / f"w{ranks}-{guard}" / "scores")
    assert relative_error(got, oracle(folder, "llama", guard)) <= TOLERANCE


def test_the_gradient_flows_through_the_answer_alone(scored: tuple[int, Path]) -> None:
    ranks, folder = scored
    expected = esi_scores(folder / "llama", folder / "other", THOUGHTFUL)[0]
    assert relative_error(read(folder / f"w{ranks}-thoughtful" / "scores"), expected) <= TOLERANCE


@pytest.mark.parametrize("name", THOUGHT_READERS)
def test_what_the_judge_reads_and_what_gradients_flow_through(scored: tuple[int, Path], name: str) -> None:
    ranks, folder = scored
    reads, trace_gradient, estimator = THOUGHT_READERS[name]
    options = {"reads": reads, "trace_gradient": trace_gradient, "estimator": estimator}
    if name not in _thoughtful_oracle:
        _thoughtful_oracle[name] = esi_scores(folder / "llama", folder / "other", THOUGHTFUL, **options)[0]
    expected = _thoughtful_oracle[name]
    got = read(folder / f"w{ranks}-{name}" / "scores")
    assert relative_error(got, expected) <= TOLERANCE
    for other in THOUGHT_READERS.keys() - {name}:  # each is another quantity
        assert relative_error(read(folder / f"w{ranks}-{other}" / "scores"), expected) > 1e-2


@pytest.mark.parametrize("name", ZERO_OPTIONS)
def test_other_zero_settings(scored: tuple[int, Path], name: str) -> None:
    ranks, folder = scored
    expected = oracle(folder, "qwen3_moe", "other")
    assert relative_error(read(folder / f"w{ranks}-{name}" / "scores"), expected) <= TOLERANCE


@pytest.mark.parametrize("criterion", ["grad", "snip", "magnitude"])
def test_criteria(scored: tuple[int, Path], criterion: str) -> None:
    ranks, folder = scored
    expected = oracle(folder, "phi3", "other", criterion=criterion)
    got = read(folder / f"w{ranks}-{criterion}" / "scores")
    assert relative_error(got, expected) <= TOLERANCE
    if criterion == "magnitude":  # no arithmetic at all: bit for bit
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_random_is_the_same_on_every_world_size(scored: tuple[int, Path]) -> None:
    """The first world size leaves its masks behind; the others must equal them."""
    ranks, folder = scored
    for name in ("random", "magnitude"):  # criterion random, and order random
        mine, first = (Mask.load(folder / f"w{w}-{name}" / "mask") for w in (ranks, 1))
        assert all(torch.equal(mine.bits(p), first.bits(p)) for p in first.names)
        assert mine.k > 0


def test_random_is_drawn_from_the_seed_and_the_position(scored: tuple[int, Path]) -> None:
    """Criterion random and order random, whose bits must not change: masks of earlier versions would not be theirs."""
    ranks, folder = scored
    scores, mask = read(folder / f"w{ranks}-random" / "scores"), Mask.load(folder / f"w{ranks}-magnitude" / "mask")
    keys = {}
    for name, start in mask.header.offsets.items():
        positions = torch.arange(start, start + mask.numel(name))
        drawn = random_bits(stream(5, 0x5C03E), positions, 24) * 2.0**-24
        assert torch.equal(scores[name].flatten(), drawn)
        keys[name] = random_bits(stream(5, 0x5E1EC7), positions, 31)
    expected = select(keys, mask.k)
    assert all(torch.equal(mask.bits(name), expected[name]) for name in mask.names)


@pytest.mark.parametrize("name", ["snip", "ties"])
def test_matrix_scope_selects_in_every_matrix(scored: tuple[int, Path], name: str) -> None:
    """Ties are decided by the position, also where ranks share a matrix."""
    ranks, folder = scored
    run = folder / f"w{ranks}-{name}"
    mask, scores = Mask.load(run / "mask"), read(run / "scores")
    for unit in json.loads((run / "mask" / "units.json").read_text()):
        where = slice(unit["start"], unit["start"] + unit["length"])
        flat, bits = scores[unit["parameter"]].flatten()[where], mask.bits(unit["parameter"])[where]
        expected = select({"unit": flat}, int(0.03 * len(flat)))["unit"]
        assert torch.equal(bits, expected), unit["name"]
        assert name == "snip" or len(flat.unique()) < 10
