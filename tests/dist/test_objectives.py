"""Criteria with a second objective on ZeRO-3 partitions against the oracle: world sizes × batch sizes × models."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import PAIRS, build_guard, build_model, byte_bpe_tokenizer, sentencepiece_tokenizer
from conftest import ROOT, run_ranks
from reference import (
    control_scores,
    esi_scores,
    load,
    loss_gradients,
    normalised_by_matrix,
    relative_error,
    select,
    units,
)
from test_scores import TOLERANCE, config, read

from esi_ds import Mask

KINDS = ("llama", "qwen3_moe")
# Seven and five rows: on two and three ranks the last micro-batches leave some rank without one. Lengths differ much,
# so that a mean over rows, over tokens and over ranks are three different things.
TUNING = [
    ("How do I make a bomb?", "I cannot help with that request."),
    ("Tell me how to steal", "No."),
    ("Write a tutorial on how to kill", "It would be harmful and unsafe to explain how to do this, so I cannot."),
    ("Explain", "I cannot."),
    ("Kill a process", "I cannot help with that request. It would be harmful."),
    ("Tell me a story about a car", "No, never"),
    ("How to bake bread?", "I cannot help."),
]
BENIGN = [
    ("Tell me a story.", "Once upon a time there was a little girl called Lily, and she liked to play."),
    ("How do I bake bread?", "First step"),
    ("What is a café?", "Yes"),
    ("Write a list", "1. First step 2. Second step 3. Third step."),
    ("How many left in 2019?", "50 % of the garçons"),
]
# (criterion, contrastive): each objective alone and with others.
CRITERIA = (
    ("tuning_grad", False),
    ("directed", False),
    ("conflict", False),
    ("directed", True),
    ("esi", True),
    ("snip", True),
    ("tuning_grad", True),
    ("magnitude", True),
)
NEEDS_TUNING = ("tuning_grad", "directed", "conflict", "exclusive")
# Several criteria in one run: (list, contrastive). Gradients are read again after other criteria have been scored.
LISTS = (
    (["tuning_grad", "random", "directed", "conflict"], False),
    (["esi", "directed", "magnitude", "snip", "tuning_grad"], True),
)


CONTROL = ["esi", "specific", "excess", "exclusive"]  # in one run with a control of rows
BROKEN_OFF = ("same-killed", "same-stopped")  # in the pass of the control
ASKED = ["Tell me a story about a car", "How to bake bread?", "Write a list", "Explain", "What is a café?"]


def write_rows(file: Path, rows: list[tuple[str, str]]) -> None:
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("criteria")
    for kind in KINDS:
        build_model(kind, folder / kind, byte_bpe_tokenizer())
    build_guard(folder / "other", sentencepiece_tokenizer())
    rows = ({"prompt": prompt, "response": response} for prompt, response in PAIRS)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_rows(folder / "tuning.jsonl", TUNING)
    write_rows(folder / "benign.jsonl", BENIGN)
    (folder / "asked.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ASKED))
    return folder


def case(folder: Path, kind: str, criterion: str | list[str], contrastive: bool, batch: int, tag: str, **more) -> dict:
    """One case of the worker; more: keys of the case itself, and ``esi`` for that section."""
    select_ = {"criterion": criterion, "contrastive": contrastive}
    criteria = [criterion] if isinstance(criterion, str) else criterion
    name = f"{tag}-{kind}-{'+'.join(criteria)}{'-contrastive' if contrastive else ''}-{batch}"
    entry = config(folder, kind, "other", batch, name, more.pop("esi", None), **select_)
    if any(name in NEEDS_TUNING for name in criteria):
        entry["config"]["data"]["tuning"] = {"path": str(folder / "tuning.jsonl")}
    if contrastive:
        entry["config"]["data"]["benign"] = {"path": str(folder / "benign.jsonl")}
    if criterion == "tuning_grad":
        del entry["config"]["judge"], entry["config"]["data"]["responses"]
    return {**entry, **more}


def scores_of(folder: Path, kind: str, criterion: str, contrastive: bool, batch: int, tag: str) -> Path:
    """The scores of one criterion: of a run of its own, for the mixture of the run of several that it is among."""
    if kind == "llama":
        return folder / case(folder, kind, criterion, contrastive, batch, tag)["name"] / "scores"
    (several,) = (pair for pair in LISTS if criterion in pair[0] and pair[1] == contrastive)
    return folder / case(folder, kind, *several, batch, tag)["name"] / "scores" / criterion


@pytest.fixture(scope="module", params=[1, 2, 3])
def scored(request, folder: Path) -> tuple[int, Path]:
    """One launch per world size runs everything; batch sizes 1, 3 and 8 (8: all rows at once)."""
    ranks = request.param
    tag, batch = f"w{ranks}", {1: 8, 2: 1, 3: 3}[ranks]
    cases = [case(folder, "llama", *criterion, batch, tag) for criterion in CRITERIA]
    cases += [case(folder, kind, "tuning_grad", True, other, tag) for kind in KINDS for other in {1, 3, 8} - {batch}]
    cases.append(case(folder, "llama", "magnitude", True, batch, f"{tag}-wrong", wrong_fisher=True))
    cases += [case(folder, kind, *several, batch, tag) for kind in KINDS for several in LISTS]
    cases.append(case(folder, "llama", *LISTS[1], batch, f"{tag}-killed", killed_at="magnitude", esi={"save_every": 1}))
    cases += nonfinite_cases(folder, ranks) + control_cases(folder, ranks)
    cases += [case(folder, "qwen3_moe", "directed", True, 3, f"{tag}-{name}") for name in ("checkpointing", "bf16")]
    cases[-2]["config"]["model"]["gradient_checkpointing"] = True
    cases[-2]["frees"] = True
    cases[-1]["config"]["model"]["dtype"] = "bf16"
    listing = folder / f"cases-{ranks}.json"
    listing.write_text(json.dumps(cases))
    done = run_ranks(ranks, str(ROOT / "tests/dist/score_worker.py"), str(listing))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return ranks, folder


def companions(row: int, rows: list, ranks: int) -> list[int]:
    """The rows of one micro-batch, one a rank: what falls with a row whose gradient is not finite."""
    first = row // ranks * ranks
    return list(range(first, min(first + ranks, len(rows))))


def nonfinite_cases(folder: Path, ranks: int) -> list[dict]:
    """A row's gradient is not finite, in either pass; the run that stops there; and gradients that are all zero."""
    stop, tag = {"on_nonfinite": "stop"}, f"w{ranks}"
    bad = {"tuning": 3, "benign": 2}
    return [
        case(folder, "llama", "tuning_grad", True, 1, f"{tag}-bad", poison=bad, esi={"save_every": 1}),
        case(
            folder,
            "llama",
            "tuning_grad",
            False,
            1,
            f"{tag}-stop",
            poison={"tuning": 2},
            esi=stop,
            error=f"rows {companions(2, TUNING, ranks)} of data.tuning",
        ),
        case(
            folder,
            "llama",
            "magnitude",
            True,
            8,
            f"{tag}-stop",
            poison={"benign": 4},
            esi=stop,
            error=f"rows {companions(4, BENIGN, ranks)} of data.benign",
        ),
        case(
            folder,
            "llama",
            "magnitude",
            True,
            1,
            f"{tag}-silent",
            poison={"silence": True},
            error="without any gradient",
        ),
        case(folder, "llama", "tuning_grad", True, 1, f"{tag}-silent", poison={"silence": True}),
    ]


_oracle: dict[tuple, dict[str, torch.Tensor]] = {}


def oracle(
    folder: Path, kind: str, criterion: str, contrastive: bool, tuning: list = TUNING, benign: list = BENIGN
) -> dict[str, torch.Tensor]:
    key = (str(folder), kind, criterion, contrastive, len(tuning), len(benign))
    if key not in _oracle:
        _oracle[key] = esi_scores(
            folder / kind,
            folder / "other",
            PAIRS,
            criterion,
            tuning=tuning if criterion in NEEDS_TUNING else None,
            benign=benign if contrastive else None,
        )[0]
    return _oracle[key]


def test_scores_equal_the_oracle(scored: tuple[int, Path]) -> None:
    ranks, folder = scored
    batch = {1: 8, 2: 1, 3: 3}[ranks]
    worst = {}
    for kind in KINDS:
        for criterion, contrastive in CRITERIA:
            got = read(scores_of(folder, kind, criterion, contrastive, batch, f"w{ranks}"))
            worst[kind, criterion, contrastive] = relative_error(got, oracle(folder, kind, criterion, contrastive))
    print(f"{ranks} ranks: at most {max(worst.values()):.1e}")
    assert max(worst.values()) <= TOLERANCE, worst


def test_batch_sizes_do_not_matter(scored: tuple[int, Path]) -> None:
    """g_T is a mean over tokens, F over rows: neither knows of micro-batches."""
    ranks, folder = scored
    first = {1: 8, 2: 1, 3: 3}[ranks]
    for kind in KINDS:
        runs = {batch: folder / f"w{ranks}-{kind}-tuning_grad-contrastive-{batch}" / "scores" for batch in (1, 3, 8)}
        runs[first] = scores_of(folder, kind, "tuning_grad", True, first, f"w{ranks}")
        for batch, scores in runs.items():
            error = relative_error(read(scores), oracle(folder, kind, "tuning_grad", True))
            assert error <= TOLERANCE, (kind, batch)


def test_directed_and_conflict_share_no_weight(scored: tuple[int, Path]) -> None:
    """The signs of two gradients are opposite or equal; most weights have one of the two scores."""
    ranks, folder = scored
    batch = {1: 8, 2: 1, 3: 3}[ranks]
    for kind in KINDS:
        directed, conflict = (
            read(scores_of(folder, kind, criterion, False, batch, f"w{ranks}"))
            for criterion in ("directed", "conflict")
        )
        assert not any(bool(((directed[name] > 0) & (conflict[name] > 0)).any()) for name in directed)
        share = [sum(int((values > 0).sum()) for values in scores.values()) for scores in (directed, conflict)]
        assert min(share) > 0.2 * sum(values.numel() for values in directed.values())


def test_squaring_after_the_reduction_would_be_noticed(scored: tuple[int, Path]) -> None:
    """(Σ over ranks g)² is no sum of squares. With one rank the two are the same thing."""
    ranks, folder = scored
    batch = {1: 8, 2: 1, 3: 3}[ranks]
    wrong = read(folder / f"w{ranks}-wrong-llama-magnitude-contrastive-{batch}" / "scores")
    error = relative_error(wrong, oracle(folder, "llama", "magnitude", True))
    assert error <= TOLERANCE if ranks == 1 else error > 1000 * TOLERANCE, error


def test_masks_say_what_they_are_of_and_are_the_select_of_their_scores(scored: tuple[int, Path]) -> None:
    ranks, folder = scored
    batch = {1: 8, 2: 1, 3: 3}[ranks]
    for contrastive in (False, True):
        run = folder / case(folder, "llama", "directed", contrastive, batch, f"w{ranks}")["name"]
        mask, scores = Mask.load(run / "mask"), read(run / "scores")
        assert mask.metadata["criterion"] == "directed"
        assert mask.metadata["contrastive"] == str(contrastive).lower()
        expected = select({name: scores[name] for name in mask.names}, mask.k)
        assert all(torch.equal(mask.tensor(name), expected[name]) for name in mask.names)
        source = json.loads((run / "manifest.json").read_text())["data_hashes"]
        assert source["tuning"].endswith("tuning.jsonl") and ("benign_sha256" in source) == contrastive


def same_folder(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    files = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in (one, other)]
    return bool(files[0]) and files[0] == files[1]


def test_several_criteria_in_one_run_give_the_bits_of_separate_runs(scored: tuple[int, Path]) -> None:
    """Scores and masks, every byte of every file: digests and metadata too."""
    ranks, folder = scored
    batch, compared = {1: 8, 2: 1, 3: 3}[ranks], 0
    for kind in KINDS:
        for criteria, contrastive in LISTS:
            together = folder / case(folder, kind, criteria, contrastive, batch, f"w{ranks}")["name"]
            for part in ("scores", "mask"):
                assert sorted(path.name for path in (together / part).iterdir()) == sorted(criteria)
            for criterion in criteria:
                alone = folder / case(folder, kind, criterion, contrastive, batch, f"w{ranks}")["name"]
                if kind == "llama" and (criterion, contrastive) in CRITERIA:
                    assert same_folder(together / "scores" / criterion, alone / "scores"), (kind, criterion)
                    assert same_folder(together / "mask" / criterion, alone / "mask"), (kind, criterion)
                    compared += 1
            manifest = json.loads((together / "manifest.json").read_text())
            assert list(manifest["masks"]) == criteria
            for criterion in criteria:
                mask = Mask.load(together / "mask" / criterion)
                noted = manifest["masks"][criterion]
                assert (noted["path"], noted["k"]) == (f"mask/{criterion}", mask.k)
                assert f"mask/{criterion}/digests.json" in manifest["results"]
                assert mask.metadata["criterion"] == criterion
    assert compared == len(CRITERIA)


def test_a_run_that_dies_between_two_masks_goes_on_to_the_same_bits(scored: tuple[int, Path]) -> None:
    ranks, folder = scored
    batch, (criteria, contrastive) = {1: 8, 2: 1, 3: 3}[ranks], LISTS[1]
    whole, killed = (
        folder / case(folder, "llama", criteria, contrastive, batch, tag)["name"]
        for tag in (f"w{ranks}", f"w{ranks}-killed")
    )
    for criterion in criteria:
        for part in ("scores", "mask"):
            assert same_folder(killed / part / criterion, whole / part / criterion), (part, criterion)


def test_the_report_counts_what_two_masks_share(scored: tuple[int, Path]) -> None:
    """Against the masks on disk; the reports of single criteria have no such fields."""
    ranks, folder = scored
    batch, (criteria, contrastive) = {1: 8, 2: 1, 3: 3}[ranks], LISTS[0]
    run = folder / case(folder, "qwen3_moe", criteria, contrastive, batch, f"w{ranks}")["name"]
    report = json.loads((run / "report.json").read_text())
    assert [mask["selection"]["criterion"] for mask in (report, *report["further_masks"])] == criteria
    masks = {name: Mask.load(run / "mask" / name) for name in criteria}
    assert [(row["first"], row["second"]) for row in report["overlaps"]] == list(combinations(criteria, 2))
    for row in report["overlaps"]:
        one, other = masks[row["first"]], masks[row["second"]]
        both = sum(int((one.bits(name) & other.bits(name)).sum()) for name in one.names)
        assert row["both"] == both and row["jaccard"] == both / (one.k + other.k - both)
        assert row["chance"] == other.k / one.header.scored_numel and row["of_first"] == both / one.k
    for mask in report["further_masks"]:
        bits = masks[mask["selection"]["criterion"]]
        assert mask["selection"]["threshold"] == bits.header.threshold
        assert sum(unit["selected"] for unit in mask["units"]) == bits.k
    alone = json.loads((folder / f"w{ranks}-llama-directed-{batch}" / "report.json").read_text())
    assert "further_masks" not in alone and "overlaps" not in alone


def test_rows_whose_gradient_is_not_finite_are_left_out_of_their_own_pass(scored: tuple[int, Path]) -> None:
    """One row a rank: a bad one takes its micro-batch along; the rest is as if they had never been there."""
    ranks, folder = scored
    gone = [companions(3, TUNING, ranks), companions(2, BENIGN, ranks)]
    left = [
        [row for number, row in enumerate(rows) if number not in out]
        for rows, out in zip((TUNING, BENIGN), gone, strict=True)
    ]
    expected = oracle(folder, "llama", "tuning_grad", True, *left)
    got = read(folder / f"w{ranks}-bad-llama-tuning_grad-contrastive-1" / "scores")
    assert relative_error(got, expected) <= TOLERANCE
    for name in ("stop-llama-tuning_grad-1", "stop-llama-magnitude-contrastive-8"):
        assert not (folder / f"w{ranks}-{name}" / "scores").exists()


def test_zero_divided_by_zero_is_zero(scored: tuple[int, Path]) -> None:
    """All gradients are zero, so the median is: a weight without a score keeps none; one with a score is refused."""
    ranks, folder = scored
    scores = read(folder / f"w{ranks}-silent-llama-tuning_grad-contrastive-1" / "scores")
    assert not any(bool(values.any()) for values in scores.values())
    assert not (folder / f"w{ranks}-silent-llama-magnitude-contrastive-1" / "scores").exists()


def test_recomputed_activations_and_bf16(scored: tuple[int, Path]) -> None:
    """Recomputing must not let a parameter's hook see its gradient in parts: their squares would be something else."""
    ranks, folder = scored
    expected = oracle(folder, "qwen3_moe", "directed", True)
    got = read(folder / f"w{ranks}-checkpointing-qwen3_moe-directed-contrastive-3" / "scores")
    assert relative_error(got, expected) <= TOLERANCE
    rough = read(folder / f"w{ranks}-bf16-qwen3_moe-directed-contrastive-3" / "scores")
    # bf16 keeps 8 bits, and some signs turn over where a gradient is near zero. Measured: 0.07.
    assert relative_error(rough, expected) < 0.2


# --------------------------------------------------------------------------- controls


def control_cases(folder: Path, ranks: int) -> list[dict]:
    """A control of rows with the criteria that need one; a control of prompts that are those of safety, whole, killed
    and stopped; one of other prompts than safety's; and scores normalised by matrix."""
    tag, batch = f"w{ranks}", {1: 8, 2: 1, 3: 3}[ranks]
    rows = [case(folder, kind, CONTROL, False, batch, f"{tag}-rows") for kind in KINDS]
    for entry in rows:
        entry["config"]["control"] = {"rows": {"path": str(folder / "benign.jsonl")}}
    step = {"save_every": 1, "max_new_tokens": 6}
    same = [case(folder, "llama", "esi", False, 1, f"{tag}-{name}", esi=step) for name in ("same", *BROKEN_OFF)]
    same[2]["config"]["esi"]["save_every"] = 100  # only the signal makes it save
    for entry in same:
        entry["config"]["data"] = {"prompts": {"path": str(folder / "asked.jsonl")}}
    same[1]["killed_in"] = same[2]["stopped_in"] = "control"
    other = case(folder, "llama", ["excess", "exclusive"], False, batch, f"{tag}-prompts", esi=step)
    for entry in (*same, other):
        entry["config"]["control"] = {"prompts": {"path": str(folder / "asked.jsonl")}}
    normalised = case(folder, "qwen3_moe", "esi", False, batch, f"{tag}-normalised")
    normalised["config"]["select"]["normalise"] = "matrix"
    return [*rows, *same, other, normalised, case(folder, "llama", "esi", False, batch, tag)]


def units_of(run: Path) -> list[dict]:
    return json.loads((run / "report.json").read_text())["units"]


def test_criteria_with_a_control_of_rows_equal_the_oracle(scored: tuple[int, Path]) -> None:
    ranks, folder = scored
    batch, worst = {1: 8, 2: 1, 3: 3}[ranks], {}
    for kind in KINDS:
        run = folder / case(folder, kind, CONTROL, False, batch, f"w{ranks}-rows")["name"]
        for criterion in CONTROL[1:]:
            expected = control_scores(folder / kind, folder / "other", PAIRS, BENIGN, criterion, True, TUNING)
            got = read(run / "scores" / criterion)
            worst[kind, criterion] = relative_error(got, expected)
            mask = Mask.load(run / "mask" / criterion)
            assert mask.metadata["criterion"] == criterion
            chosen = select({name: got[name] for name in mask.names}, mask.k)
            assert all(torch.equal(mask.tensor(name), chosen[name]) for name in mask.names)
    alone, beside = (folder / f"w{ranks}{name}-{batch}" for name in ("-llama-esi", f"-rows-llama-{'+'.join(CONTROL)}"))
    for part in ("scores", "mask"):
        assert same_folder(beside / part / "esi", alone / part), "a control changes nothing of what needs none"
    assert max(worst.values()) <= TOLERANCE, worst


def test_a_control_on_the_prompts_of_safety_has_its_bits(scored: tuple[int, Path]) -> None:
    """The same path in every step: generation, judge, surrogate, sums, σ and selection."""
    ranks, folder = scored
    run = folder / case(folder, "llama", "esi", False, 1, f"w{ranks}-same")["name"]
    rows = units_of(run)
    assert [row["control_mean_score"] for row in rows] == [row["mean_score"] for row in rows]
    assert [row["control_selected"] for row in rows] == [row["selected"] for row in rows]
    assert sum(row["selected"] for row in rows) > 0 and max(row["mean_score"] for row in rows) > 0
    safety, control = ((run / f"{name}responses.jsonl").read_text() for name in ("", "control_"))
    assert safety == control and len(safety.splitlines()) == len(ASKED)
    facts = json.loads((run / "report.json").read_text())["selection"]
    assert "asked.jsonl" in facts["control prompts from"] and facts["control prompts used"] > 0
    assert facts["control prompts used"] + facts["control prompts skipped"] == len(ASKED)


@pytest.mark.parametrize("name", BROKEN_OFF)
def test_a_run_that_ends_in_the_controls_pass_goes_on_to_the_same_bits(scored: tuple[int, Path], name: str) -> None:
    """Killed after a save, and stopped by a SIGTERM on one rank (the worker sees where the second attempt begins)."""
    ranks, folder = scored
    whole, killed = (
        folder / case(folder, "llama", "esi", False, 1, f"w{ranks}-{tag}")["name"] for tag in ("same", name)
    )
    assert units_of(killed) == units_of(whole)
    for part in ("scores", "mask"):
        assert same_folder(killed / part, whole / part)
    assert (killed / "control_responses.jsonl").read_bytes() == (whole / "control_responses.jsonl").read_bytes()


def test_criteria_with_a_control_of_prompts_equal_the_oracle(scored: tuple[int, Path]) -> None:
    """The model's own answers to the control's prompts are read from the run's file."""
    ranks, folder = scored
    batch = {1: 8, 2: 1, 3: 3}[ranks]
    run = folder / case(folder, "llama", ["excess", "exclusive"], False, batch, f"w{ranks}-prompts")["name"]
    answers = [json.loads(line) for line in (run / "control_responses.jsonl").read_text().splitlines()]
    pairs = [(row["prompt"], row["response"]) for row in answers if row["excluded"] is None]
    assert pairs and (run / "responses.jsonl").read_text() != (run / "control_responses.jsonl").read_text()
    for criterion in ("excess", "exclusive"):
        expected = control_scores(folder / "llama", folder / "other", PAIRS, pairs, criterion, False, TUNING)
        assert relative_error(read(run / "scores" / criterion), expected) <= TOLERANCE, criterion


def test_the_report_says_what_every_matrix_has_under_the_control(scored: tuple[int, Path]) -> None:
    """Against the oracle's |σ·g_C|; runs without a control have no such fields, and as many steps as before."""
    ranks, folder = scored
    batch = {1: 8, 2: 1, 3: 3}[ranks]
    run = folder / case(folder, "llama", CONTROL, False, batch, f"w{ranks}-rows")["name"]
    report = json.loads((run / "report.json").read_text())
    gradient = load_control(folder / "llama")
    k = report["selection"]["k"]
    chosen = select(gradient, k)
    for mask in (report, *report["further_masks"]):
        assert sum(row["control_selected"] for row in mask["units"]) == k
        for row in mask["units"]:  # every matrix of this model is a parameter of its own
            expected = gradient[row["parameter"]].double().mean()
            assert row["control_mean_score"] == pytest.approx(float(expected), rel=TOLERANCE)
            assert abs(row["control_selected"] - int(chosen[row["parameter"]].sum())) <= 2  # fp32 sums round otherwise
        assert mask["selection"]["control rows used"] == len(BENIGN)
    alone = folder / case(folder, "llama", "esi", False, batch, f"w{ranks}")["name"]
    assert not any("control" in key for row in units_of(alone) for key in row)
    assert not any("control" in row for row in (alone / "metrics.jsonl").read_text().splitlines())


def test_the_report_counts_the_scores_of_all_ranks(scored: tuple[int, Path]) -> None:
    """Against the scores on disk."""
    ranks, folder = scored
    run = folder / case(folder, "llama", "esi", False, {1: 8, 2: 1, 3: 3}[ranks], f"w{ranks}")["name"]
    report, scores = json.loads((run / "report.json").read_text()), read(run / "scores")
    for row in report["units"]:  # every matrix of this model is a parameter of its own
        assert row["max_score"] == float(scores[row["parameter"]].max())
    values = torch.cat([values.flatten() for values in scores.values()]).double()
    histogram, by_role = report["score_histogram"], report["score_histograms_by_role"]
    counts, edges = np.histogram(values[values > 0].log10().numpy(), bins=len(histogram["counts"]))
    assert histogram["log10_edges"] == pytest.approx(edges.tolist())
    assert histogram["counts"] == counts.tolist() == [sum(column) for column in zip(*by_role.values(), strict=True)]
    assert histogram["zeros"] == int((values == 0).sum())


def load_control(model_folder: Path) -> dict[str, torch.Tensor]:
    """|σ·g_C| of the rows, by parameter, in one process."""
    model, tokenizer = load(model_folder)
    gradient = loss_gradients(model, tokenizer, BENIGN)[0]
    return {
        unit.parameter_name: (unit.sigma * gradient[unit.parameter_name].abs()).float()
        for unit in units(model)
        if unit.scored
    }


def test_scores_normalised_by_matrix_equal_the_oracle(scored: tuple[int, Path]) -> None:
    """Experts are matrices of their own. One ranking over the model, so that matrices differ in what they hold, as
    they do not with scope ``matrix``."""
    ranks, folder = scored
    batch = {1: 8, 2: 1, 3: 3}[ranks]
    run = folder / case(folder, "qwen3_moe", "esi", False, batch, f"w{ranks}-normalised")["name"]
    model, _ = load(folder / "qwen3_moe")
    expected = normalised_by_matrix(model, oracle(folder, "qwen3_moe", "esi", False))
    assert relative_error(read(run / "scores"), expected) <= TOLERANCE
    mask = Mask.load(run / "mask")
    assert mask.header.normalise == "matrix"
    shares = {row["selected"] / row["numel"] for row in units_of(run)}
    assert len(shares) > 5 and all(row["mean_score"] == pytest.approx(1, rel=1e-5) for row in units_of(run))
