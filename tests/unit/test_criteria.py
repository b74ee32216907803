"""Criteria with a second objective, one process: formulas, signs, zeros, the median; what the config refuses."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import build_model, byte_bpe_tokenizer
from reference import load, loss_gradients, row_token_losses

from esi_ds.cli import main
from esi_ds.config import validate
from esi_ds.config.needs import require_esi
from esi_ds.core import score
from esi_ds.core.control import MeanScores, excess, exclusive, specific
from esi_ds.core.criteria import AGAINST_CONTROL, GRADIENTS, num_held, objectives, overwrites_gradient
from esi_ds.core.loss import row_losses
from esi_ds.core.score import contrast, score_shard
from esi_ds.core.select import median
from esi_ds.core.units import Parameter, Unit, whole
from esi_ds.errors import UserError
from esi_ds.zero import control

BASE = {"run": {"output_dir": "x"}, "model": {"path": "a"}}
JUDGED = {"judge": {"path": "b"}, "data": {"responses": "r.jsonl"}}
ROWS = {"path": "rows.jsonl"}


def shard_scores(criterion: str, safety: list[float], tuning: list[float]) -> list[float]:
    """Two units of one parameter, σ 2 and 3; the shard begins inside the first."""
    units = (Unit("a", "x", None, None, 0, 3), Unit("b", "x", None, None, 3, 9))
    parameter = Parameter("p", (12,), 0, "x", units)
    shard = whole(parameter).cut(1, 1 + len(safety))
    sigma = dict(zip(units, (2.0, 3.0), strict=True))
    gradients = (torch.tensor(values) for values in (safety, tuning))
    scores = score_shard(criterion, shard, next(gradients), torch.ones(len(safety)), sigma, 0, next(gradients))
    assert scores.dtype == torch.float32 and bool((scores >= 0).all()) and not bool(torch.signbit(scores).any())
    return scores.tolist()


def test_signs_of_directed_and_conflict() -> None:
    """S is climbed and a loss descended: opposite signs agree. A zero on either side is no agreement at all."""
    safety = [4.0, -4.0, 4.0, -4.0, 0.0, -0.0, 9.0, 0.0]
    tuning = [-1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 0.0, 0.0]
    assert shard_scores("directed", safety, tuning) == [4.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert shard_scores("conflict", safety, tuning) == [0.0, 0.0, 6.0, 6.0, 0.0, 0.0, 0.0, 0.0]
    assert shard_scores("tuning_grad", safety, tuning) == [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_a_random_score_is_one_of_its_position_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever chunks they are made in, and wherever the shard begins."""
    parameter = Parameter("p", (60,), 7, "x", (Unit("a", "x", None, None, 0, 60),))
    shards = [whole(parameter).cut(low, high) for low, high in ((0, 60), (0, 60), (23, 60))]
    scores = []
    for shard, chunk in zip(shards, (1 << 20, 16, 16), strict=True):
        monkeypatch.setattr(score, "CHUNK", chunk)
        scores.append(score_shard("random", shard, None, torch.ones(shard.numel), {}, seed=3))
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0][23:], scores[2])
    assert len(set(scores[0].tolist())) == 60
    other = score_shard("random", shards[0], None, torch.ones(60), {}, seed=4)
    assert not bool((other == scores[0]).any())


def against_control(criterion: str, safety: list[float], control: list[float]) -> list[float]:
    """Two units of one parameter, of which the second begins at 4. Means over all 8 weights: 2 for s, 4 for |c|."""
    units = (Unit("a", "x", None, None, 0, 4), Unit("b", "x", None, None, 4, 4))
    shard = whole(Parameter("p", (8,), 0, "x", units))
    by_unit = {unit: sum(map(abs, control[unit.start : unit.end])) / 4 for unit in units}
    means = MeanScores(sum(safety) / 8, sum(by_unit.values()) / 2, by_unit)
    scores, others = torch.tensor(safety), torch.tensor(control)
    if criterion == "specific":
        specific(shard, scores, others, means)
    else:
        excess(scores, others, means)
    assert others.tolist() == control, "the next criterion reads it again"
    assert bool((scores >= 0).all()) and not bool(torch.signbit(scores).any())
    return scores.tolist()


def test_what_specific_and_excess_are_by_hand() -> None:
    """Mean s 2 and mean c 4. The mean c of the first matrix is 8, of the second 0: the control reaches none of it."""
    safety, control = [4.0, 4.0, 2.0, 0.0, 2.0, 4.0, 0.0, 0.0], [-16.0, 8.0, -0.5, 7.5, 0.0, 0.0, 0.0, -0.0]
    # The third weight's c is below its matrix's mean and counts as 8; where there is none it counts as 4.
    assert against_control("specific", safety, control) == [0.5, 1.0, 0.5, 0.0, 1.0, 2.0, 0.0, 0.0]
    assert against_control("excess", safety, control) == [0.0, 0.0, 0.875, 0.0, 1.0, 2.0, 0.0, 0.0]
    nothing = [0.0] * 8
    assert against_control("specific", nothing, control) == against_control("excess", nothing, control) == nothing


def test_the_scale_of_judge_and_loss_does_not_matter() -> None:
    """Not even where float32 holds neither product nor quotient of the two."""
    safety, control = [3.0, 1.0, 2.0, 5.0, 1.0, 4.0, 0.5, 7.0], [1.0, -2.0, 0.25, 3.0, -1.0, 2.0, 5.0, 0.125]
    for criterion in ("specific", "excess"):
        expected = against_control(criterion, safety, control)
        tiny = torch.tensor([value * 1e-30 for value in safety]).tolist()
        scaled = against_control(criterion, tiny, torch.tensor([value * 1e30 for value in control]).tolist())
        assert scaled == pytest.approx(expected, rel=1e-5, abs=1e-6), criterion


def test_exclusive_keeps_what_the_control_does_not_gain_from() -> None:
    """The step goes against g_T. A control that is 0 gains nothing; g_T of either zero has a score of 0 already."""
    scores = torch.tensor([4.0, 4.0, 4.0, 4.0, 4.0, 0.0, 0.0])
    control = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 1.0, -1.0])
    tuning = torch.tensor([-1.0, -1.0, 1.0, 1.0, -1.0, 0.0, -0.0])
    exclusive(scores, control, tuning)
    assert scores.tolist() == [0.0, 4.0, 4.0, 0.0, 4.0, 0.0, 0.0]


def test_products_that_leave_float32_keep_their_root() -> None:
    """1e-25 · 1e-25 would be 0 and 1e25 · 1e25 infinite; their roots are ordinary numbers."""
    scores = shard_scores("directed", [1e-25, 1e25, -1e-30], [-1e-25, -1e25, 1e-20])
    assert scores == pytest.approx([2e-25, 2e25, 3e-25], rel=1e-6)


def test_what_each_criterion_needs() -> None:
    assert objectives(["directed"], True) == ("safety", "tuning", "benign")
    assert objectives(["tuning_grad"], False) == ("tuning",) and objectives(["random"], True) == ("benign",)
    assert objectives(["esi"], False) == ("safety",) and objectives(["magnitude"], False) == ()
    for criterion in GRADIENTS:  # the config knows them all
        assert validate({**BASE, "select": {"criterion": criterion}}).select.criterion == criterion


def test_criteria_share_passes_and_the_last_reader_takes_a_gradients_place() -> None:
    both = ["snip", "tuning_grad", "esi", "random"]
    assert objectives(both, True) == ("safety", "tuning", "benign") and objectives(both[::-1], False) == (
        "safety",
        "tuning",
    )
    assert [overwrites_gradient(both, number) for number in range(4)] == [False, True, True, False]
    assert [overwrites_gradient(["directed", "tuning_grad"], number) for number in (0, 1)] == [True, True]
    assert [overwrites_gradient(["tuning_grad", "directed"], number) for number in (0, 1)] == [False, True]
    assert [num_held(["esi"], False), num_held(["directed"], True), num_held(["magnitude"], False)] == [1, 3, 1]
    assert [num_held(["esi", "snip"], False), num_held(["snip", "magnitude"], True)] == [2, 3]
    assert objectives(["magnitude"], False, control=True) == ("control",)
    assert objectives(["exclusive"], True) == ("safety", "control", "tuning", "benign")
    assert [num_held(["esi"], False, control=True), num_held(["magnitude"], False, control=True)] == [2, 2]
    for name, base in AGAINST_CONTROL.items():  # the base's scores take the place of the same gradient
        assert GRADIENTS[name][:1] == GRADIENTS[base][:1] and {*GRADIENTS[base], "control"} == {*GRADIENTS[name]}
    for name in GRADIENTS:  # alone, scores take the place of a gradient wherever there is one
        assert num_held([name], False) == max(1, len(GRADIENTS[name]))


def some_values(case: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case)
    values = torch.rand(size, generator=generator)
    kind = case % 5
    if kind == 1:
        values = (values * 3).floor()  # many ties, many zeros
    elif kind == 2:
        values[torch.rand(size, generator=generator) < 0.6] = 0.0
    elif kind == 3:
        values = values * 1e-42  # denormal
    elif kind == 4:
        values = values * torch.tensor([1e-38, 1.0, 3e38])[torch.randint(0, 3, (size,), generator=generator)]
    return values


@pytest.mark.parametrize("size", [1, 2, 3, 4, 999, 1000])
@pytest.mark.parametrize("case", range(10))
def test_the_median_is_torchs_lower_middle(case: int, size: int) -> None:
    """Odd and even, in pieces of any length, empty ones too."""
    values = some_values(case, size)
    generator = torch.Generator().manual_seed(case)
    cuts = torch.randint(0, size + 1, (case % 4,), generator=generator).sort().values.tolist()
    pieces = [values[low:high] for low, high in itertools.pairwise([0, *cuts, size])]
    assert median(pieces, size, lambda counts: counts) == float(values.median())
    assert float(values.sort().values[(size - 1) // 2]) == float(values.median())


@pytest.mark.parametrize("size", [5, 6, 1000])
def test_the_median_over_ranks_needs_counts_only(size: int) -> None:
    """Three callers with a piece each, in lock-step: every one gets all callers' histograms added up."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    values, ranks = some_values(1, size), 3
    barrier, shared = Barrier(ranks), {}

    def reduce_for(rank: int):
        def reduce(counts: torch.Tensor) -> torch.Tensor:
            assert counts.numel() <= 2048
            shared[rank] = counts
            barrier.wait()
            total = torch.stack([shared[other] for other in range(ranks)]).sum(0)
            barrier.wait()
            return total

        return reduce

    parts = [values[: size // 5], values[size // 5 : size // 5], values[size // 5 :]]  # one rank has none
    with ThreadPoolExecutor(ranks) as pool:
        medians = list(pool.map(lambda rank: median([parts[rank]], size, reduce_for(rank)), range(ranks)))
    assert medians == [float(values.median())] * ranks


def test_a_control_without_any_gradient_is_refused_whatever_the_criterion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mask would be the model's first weights, and everything else safety's own."""
    means = {Unit("model.a.weight", "attention.q", 0, None, 0, 4): 0.0}
    monkeypatch.setattr(control, "unit_means", lambda *_: means)
    model = SimpleNamespace(scored=[])
    with pytest.raises(UserError, match="control.rows.path = rows.jsonl: gives no weight a gradient"):
        control.ControlGradients(model, {}, {}, True, "control.rows.path", "rows.jsonl")  # type: ignore[arg-type]


def test_contrast_divides_and_refuses_division_by_zero() -> None:
    scores, denominator = torch.tensor([6.0, 0.0, 2.0]), torch.tensor([2.0, 1.0, 4.0])
    assert contrast(scores, denominator) == 0
    assert scores.tolist() == [3.0, 0.0, 0.5]
    scores, denominator = torch.tensor([6.0, 0.0, 2.0, 5.0]), torch.tensor([0.0, 0.0, 4.0, 0.0])
    assert contrast(scores, denominator) == 2  # 6/0 and 5/0; 0/0 stays 0
    assert scores[1] == 0.0 and scores[2] == 0.5 and not bool(torch.signbit(scores[1]))
    assert denominator.tolist() == [0.0, 0.0, 4.0, 0.0], "the next criterion divides by the same"


def test_row_losses_are_each_rows_own() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 7, generator=generator, requires_grad=True)
    labels = torch.tensor([[-100, 1, -100, 2], [3, 4, 5, 6], [-100] * 4])
    losses = row_losses(logits, labels)
    log = logits.detach().log_softmax(-1)
    expected = [-sum(float(log[b, k, t]) for k, t in enumerate(row) if t >= 0) for b, row in enumerate(labels.tolist())]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6) and losses[2] == 0
    losses[0].backward()
    assert bool((logits.grad[1:] == 0).all()) and bool((logits.grad[0, [0, 2]] == 0).all())


# --------------------------------------------------------------------------- the oracle's own


def test_the_oracles_gradients_are_those_of_its_loss(tmp_path: Path) -> None:
    """By finite differences; and the F of one row is its squared gradient."""
    build_model("qwen3_moe", tmp_path, byte_bpe_tokenizer())
    model, tokenizer = load(tmp_path)
    rows = [("How to bake?", "Once upon a time"), ("Tell me", "No")]
    gradient, _ = loss_gradients(model, tokenizer, rows)

    def mean_loss() -> float:
        with torch.no_grad():
            losses = torch.cat([row_token_losses(model, tokenizer, row, None, 1024) for row in rows])
        return float(losses.mean())

    for name in ("model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.experts.down_proj"):
        parameter = model.get_parameter(name)
        position = torch.unravel_index(gradient[name].abs().argmax(), gradient[name].shape)
        value, step, ends = float(parameter.detach()[position]), 1e-3, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[position] = value + sign * step
            ends.append(mean_loss())
        with torch.no_grad():
            parameter[position] = value
        # fp32 forward passes: 1e-6 of a loss of size one over a step of 1e-3
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient[name][position]), rel=2e-2), name
    one, square = loss_gradients(model, tokenizer, rows[:1])
    assert all(torch.allclose(square[name], one[name] ** 2, rtol=1e-12) for name in one)
    # Cut rows are shorter rows: nothing of the second answer is left within its prompt's length.
    cut = len(
        tokenizer(f"<|bos|><|user|>\n{rows[1][0]}<|end|>\n<|assistant|>\n", add_special_tokens=False)["input_ids"]
    )
    assert len(row_token_losses(model, tokenizer, rows[1], None, cut + 1)) == 1


# --------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"select": {"criterion": "tuning_grad"}}, "data.tuning: is missing; criterion tuning_grad needs"),
        ({**JUDGED, "select": {"criterion": "directed"}}, "data.tuning: is missing"),
        ({"data": {"tuning": ROWS}, "select": {"criterion": "directed"}}, "judge: is missing; criterion directed"),
        ({"judge": {"path": "b"}, "data": {"tuning": ROWS}, "select": {"criterion": "conflict"}}, "data.prompts: is m"),
        ({"select": {"criterion": "magnitude", "contrastive": True}}, "data.benign: is missing; select.contrastive"),
        ({**JUDGED, "data": {"responses": "r", "tuning": ROWS}}, "data.tuning.path = rows.jsonl: would never be read"),
        (
            {"data": {"benign": ROWS}, "select": {"criterion": "random"}},
            "data.benign.path = rows.jsonl: would never be read",
        ),
        ({"select": {"criterion": ["random", "tuning_grad"]}}, "data.tuning: is missing; criterion tuning_grad needs"),
        ({"select": {"criterion": ["random", "snip", "esi"]}}, "judge: is missing; criterion snip needs"),
        (
            {**JUDGED, "data": {"responses": "r", "tuning": ROWS}, "select": {"criterion": ["esi", "snip"]}},
            "data.tuning.path = rows.jsonl: would never be read",
        ),
        (
            {**JUDGED, "select": {"criterion": ["esi", "excess"]}},
            "control: is missing; criterion excess needs a control.prompts.path or control.rows.path",
        ),
        (
            {"select": {"criterion": "magnitude"}, "control": {"prompts": {"path": "alpaca.jsonl"}}},
            "judge: is missing; control.prompts needs a judge.path; control.rows needs none",
        ),
        (
            {**JUDGED, "select": {"criterion": "exclusive"}, "control": {"rows": ROWS}},
            "data.tuning: is missing; criterion exclusive needs",
        ),
        ({**JUDGED, "control": {}}, "control: names no data; give control.prompts.path or control.rows.path"),
        (
            {**JUDGED, "select": {"normalise": "matrix", "scope": "matrix"}},
            "select.normalise = matrix: changes nothing with select.scope = matrix",
        ),
        (
            {**JUDGED, "select": {"normalise": "matrix", "order": "random"}},
            "select.normalise = matrix: changes nothing with select.order = random",
        ),
        (
            {**JUDGED, "control": {"prompts": ROWS, "rows": ROWS}},
            "control.rows.path = rows.jsonl: is given together with control.prompts; give only one of them",
        ),
    ],
)
def test_what_is_missing_or_read_by_nothing(sections: dict, words: str) -> None:
    with pytest.raises(UserError) as caught:
        require_esi(validate({**BASE, **sections}))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("criterion", "words"),
    [
        ([], "select.criterion = []: names no criterion"),
        (["esi", "snip", "esi"], "select.criterion = esi, snip, esi: names a criterion twice"),
        (["esi", "spin"], "select.criterion.1 = 'spin'"),
        ("spin", "select.criterion = 'spin'"),
        ([["esi"]], "select.criterion"),
    ],
)
def test_lists_of_criteria_that_are_refused(criterion: object, words: str) -> None:
    with pytest.raises(UserError) as caught:
        validate({**BASE, "select": {"criterion": criterion}})
    assert words in str(caught.value)


def test_where_the_files_of_a_criterion_lie() -> None:
    several = validate({**BASE, "select": {"criterion": ["snip", "esi"]}}).select
    alone = validate({**BASE, "select": {"criterion": "snip"}}).select
    assert several.criteria == ("snip", "esi") and [several.subfolder(name) for name in several.criteria] == [
        "snip",
        "esi",
    ]
    assert alone.criteria == ("snip",) and alone.subfolder("snip") == ""
    assert validate({**BASE, "select": {"criterion": ["esi"]}}).select.subfolder("esi") == "esi"


def test_tuning_grad_needs_no_judge() -> None:
    require_esi(validate({**BASE, "data": {"tuning": ROWS}, "select": {"criterion": "tuning_grad"}}))
    both = {"tuning": ROWS, "benign": {**ROWS, "columns": "q,a", "limit": 3, "max_length": 64}}
    config = validate({**BASE, "data": both, "select": {"criterion": "tuning_grad", "contrastive": True}})
    require_esi(config)
    assert config.data.benign.max_length == 64 and config.data.tuning.max_length == 1024
    with pytest.raises(UserError, match="the nearest known one is data.tuning.max_length"):
        validate({**BASE, "data": {"tuning": {**ROWS, "max_lenght": 3}}})


def test_the_config_still_needs_no_torch() -> None:
    code = "import sys, esi_ds.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("criteria-commands")
    build_model("llama", folder / "model", byte_bpe_tokenizer())
    lines = "".join(json.dumps({"question": f"q{i}", "answer": f"a{i}"}) + "\n" for i in range(50))
    (folder / "rows.jsonl").write_text(lines)
    (folder / "a.yaml").write_text(f"run: {{output_dir: {folder / 'run'}}}\nmodel: {{path: {folder / 'model'}}}\n")
    return folder


def test_dry_run_shows_the_further_passes(inputs: Path, capsys) -> None:
    arguments = ["--config", str(inputs / "a.yaml"), "--dry-run", "--world-size", "4", "select.criterion=tuning_grad"]
    arguments += [f"data.tuning.path={inputs / 'rows.jsonl'}", "data.tuning.limit=40"]
    assert main("esi", arguments) == 0
    alone = capsys.readouterr().out
    assert "2 of 8 rows per rank (32 together)" in alone and "benign" not in alone.split("ranks", 1)[1]
    assert main("esi", [*arguments, "select.contrastive=true", f"data.benign.path={inputs / 'rows.jsonl'}"]) == 0
    both = capsys.readouterr().out
    assert "13 of 1 rows per rank (4 together)" in both and "2 sums: tuning, benign" in both

    def size(shown: str, what: str) -> float:
        line = next(line for line in shown.splitlines() if line.startswith(what))
        return float(line.removeprefix(what).split()[0])

    for what in ("gradient sums per rank", "checkpoint on disk"):
        assert math.isclose(size(both, what), 2 * size(alone, what), rel_tol=2e-3), what


def test_dry_run_of_a_control(inputs: Path, capsys) -> None:
    """One more pass and one more sum; a control of prompts is answered and judged as well."""
    (inputs / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(20)))
    start = ["--config", str(inputs / "a.yaml"), "--dry-run", "--world-size", "2", "esi.batch_size=4"]
    tuning = [f"data.tuning.path={inputs / 'rows.jsonl'}", "select.criterion=tuning_grad"]
    judged = [f"judge.path={inputs / 'model'}", f"data.prompts.path={inputs / 'prompts.jsonl'}"]
    shown = {}
    for name, options in (
        ("alone", tuning),
        ("rows", [*tuning, f"control.rows.path={inputs / 'rows.jsonl'}", "control.rows.limit=10"]),
        ("prompts", [*judged, f"control.prompts.path={inputs / 'prompts.jsonl'}", "control.prompts.limit=9"]),
    ):
        assert main("esi", [*start, *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        shown[name] = {key: value for key, _, value in (line.partition("  ") for line in lines)}
    assert not any("control " in key for key in shown["alone"])
    assert shown["rows"]["control rows"].strip() == "10"
    assert "2 of 4 rows per rank (8 together)" in shown["rows"]["control passes"]
    assert "2 sums: control, tuning" in shown["rows"]["sums of gradients"]
    assert shown["prompts"]["prompts"].strip() == "20" and shown["prompts"]["control prompts"].strip() == "9"
    assert "2 of 4 prompts per rank (8 together)" in shown["prompts"]["control passes"]
    assert "2 sums: safety, control" in shown["prompts"]["sums of gradients"]

    def mebibytes(name: str, label: str) -> float:
        return float(shown[name][label].split()[0])

    for label in ("checkpoint on disk", "gradient sums per rank"):
        assert math.isclose(mebibytes("rows", label), 2 * mebibytes("alone", label), rel_tol=2e-3), label


def test_dry_run_of_several_criteria(inputs: Path, capsys) -> None:
    """Passes are those of all criteria together; scores and masks lie on disk for each."""
    rows = [f"data.tuning.path={inputs / 'rows.jsonl'}"]

    def plan(criterion: str) -> str:
        assert (
            main("esi", ["--config", str(inputs / "a.yaml"), "--dry-run", f"select.criterion={criterion}", *rows]) == 0
        )
        return capsys.readouterr().out

    def size(shown: str, what: str) -> float:
        line = next(line for line in shown.splitlines() if line.startswith(what))
        return float(line.removeprefix(what).split()[0])

    alone, several = plan("tuning_grad"), plan("[tuning_grad,magnitude,random]")
    assert "masks   " not in alone
    assert "3, from shared passes: tuning_grad (tuning), magnitude (none), random (none)" in several
    passes = [[line for line in shown.splitlines() if line.startswith("tuning passes")] for shown in (alone, several)]
    assert passes[0] == passes[1] and len(passes[0]) == 1
    for what, times in (("scores on disk", 3), ("mask on disk", 3), ("checkpoint on disk", 1)):
        assert math.isclose(size(several, what), times * size(alone, what), rel_tol=2e-3), what
    assert math.isclose(
        size(several, "gradient sums per rank"), 2 * size(alone, "gradient sums per rank"), rel_tol=2e-3
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "data.tuning: is missing"),
        (["data.tuning.path=nowhere.jsonl"], "data.tuning.path = nowhere.jsonl: there is no such file"),
        (
            ["data.tuning.path={rows}", "data.tuning.columns=x"],
            "data.tuning.columns = x: is not among the columns",
        ),
        (["data.tuning.path={rows}", "data.tuning.max_length=2"], "has no row that can be learnt"),
    ],
)
def test_one_message_and_exit_code_2(inputs: Path, overrides: list[str], words: str, capsys) -> None:
    options = [override.format(rows=inputs / "rows.jsonl") for override in overrides]
    assert main("esi", ["--config", str(inputs / "a.yaml"), "select.criterion=tuning_grad", *options]) == 2
    shown = capsys.readouterr().err
    assert words in shown and shown.count("error:") == 1
    assert not (inputs / "run").exists()
