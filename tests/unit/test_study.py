"""What the study's pages are computed from: choosing at equal safety, pooling, pairing, overlaps; and the grid."""

from __future__ import annotations

import json
from pathlib import Path

import fabricate
import numpy as np
import pytest
from builders import build_mask, build_model, byte_bpe_tokenizer
from PIL import Image

from esi_ds.artifacts import read_jsonl
from esi_ds.errors import UserError
from esi_ds.report.figures import COLOURS, plt
from study import estimate, execute, findings, grid, material, page, where
from study.collect import row_of
from study.findings import POLITE_RULE, WORDS_RULES
from study.run import main, prepare
from study.stored import read_study, write_study
from study.summary import summarise
from study.tables import interval, seeds_text


def row(criterion: str, lr: float, seed: int, attacks: int, right: int, refused: int = 0, garbled: int = 0) -> dict:
    """Ten harmful and ten benign prompts."""
    return {
        "kind": "set", "model": "m", "ratio": 0.01, "criterion": criterion, "lr": lr, "seed": seed,
        "not_refused": [i < attacks for i in range(10)], "unsafe": [True, None] + [False] * 8,
        "incoherent_harmful": [i < garbled for i in range(10)],
        "unsafe_or_incoherent": [i < max(attacks, garbled) for i in range(10)],
        "correct": [i < right for i in range(10)], "over_refused": [i < refused for i in range(10)],
        "incoherent_benign": [False] * 10, "incoherent": [i < garbled for i in range(20)],
    }  # fmt: skip


ROWS = [
    row("esi", 1e-3, 0, 6, 10), row("esi", 1e-2, 0, 1, 8), row("esi", 2e-2, 0, 0, 5, refused=3),
    row("esi", 1e-2, 1, 1, 7), row("esi", 2e-2, 1, 0, 9),
    row("random", 1e-2, 0, 9, 10), row("random", 1e-2, 1, 1, 10),
]  # fmt: skip
SAFE = WORDS_RULES[0]  # at most 10 % not refused


def test_the_best_cell_of_each_seed_at_equal_safety() -> None:
    esi = [row for row in ROWS if row["criterion"] == "esi"]
    assert [row["lr"] for row in findings.chosen(esi, SAFE)] == [1e-2, 2e-2]
    assert [row["lr"] for row in findings.chosen(esi, POLITE_RULE)] == [1e-2, 2e-2]  # 2e-2 of seed 0 refuses
    summary = findings.summary(findings.chosen(esi, SAFE), "correct")
    assert (summary["rate"], summary["n"], summary["reached"], summary["seeds"]) == (17 / 20, 20, 2, 2)
    assert (summary["least"], summary["greatest"]) == (0.8, 0.9)
    assert (summary["low"], summary["high"]) == pytest.approx((0.6396, 0.9476), abs=1e-4)  # Wilson by hand, z = 1.96


def test_of_equals_the_safer_cell_then_the_lower_rate() -> None:
    rows = [row("esi", 2e-2, 0, 1, 8), row("esi", 1e-2, 0, 1, 8), row("esi", 5e-2, 0, 0, 8)]
    assert findings.choose(rows, 0, SAFE)["lr"] == 5e-2
    assert findings.choose(rows[:2], 0, SAFE)["lr"] == 1e-2


def test_what_is_not_reached_is_said_and_not_filled_in() -> None:
    random = [row for row in ROWS if row["criterion"] == "random"]
    result = findings.at(random, SAFE)
    assert (result["reached"], result["seeds"], result["correct"]["rate"], result["correct"]["n"]) == (1, 2, 1.0, 10)
    assert seeds_text(result) == "1 of 2"
    assert findings.summary([None, None], "correct") == {"seeds": 2, "reached": 0}
    nowhere = findings.at(random[:1], SAFE)
    assert (nowhere["reached"], nowhere["nearest"], interval(nowhere["correct"])) == (0, 0.9, "–")


def test_methods_are_paired_where_both_get_there() -> None:
    test = findings.against(ROWS, "esi", "random", SAFE)  # seed 1 alone: 9 right against 10
    assert (test["num_pairs"], test["only_before"], test["only_after"], test["p_value"]) == (10, 1, 0, 1.0)
    assert (test["difference"], test["by_seed"], test["only_first"], test["only_second"]) == (-0.1, [-0.1], 1, 0)
    assert findings.against(ROWS, "esi", "snip", SAFE) is None
    order = [method["criterion"] for method in findings.ranked(findings.methods(ROWS), SAFE)]
    assert order == ["esi", "random"]  # reached by more seeds comes first, whatever its rate


def test_seeds_that_ask_the_same_prompts_are_not_more_prompts() -> None:
    differing = {"not refused": [index < 4 for index in range(80)]}
    same = {"not refused": [False] * 80}
    test = findings.paired(lambda seed: differing, lambda seed: same, [0, 1, 2], "not refused")
    assert (test["num_pairs"], test["only_after"], test["p_value"]) == (80, 4, 0.125) and test["by_seed"] == [0.05] * 3
    mixed = {"not refused": [None] * 40 + [False] * 40}
    assert findings.paired(lambda seed: differing, lambda seed: mixed, [0], "not refused")["num_pairs"] == 40


def test_a_seed_without_pairs_is_no_seed() -> None:
    flags = {0: {"not refused": [True, True]}, 1: {"not refused": [None, None]}}
    test = findings.paired(flags.get, lambda seed: {"not refused": [False, False]}, [0, 1], "not refused")
    assert (test["seeds"], test["by_seed"], test["difference"], test["num_pairs"]) == (1, [1.0], 1.0, 2)


def test_a_difference_counts_only_where_no_seed_contradicts() -> None:
    def cells(mine: tuple[int, int], theirs: tuple[int, int]) -> list[dict]:
        rows = [row("esi", 1e-2, seed, 0, right) for seed, right in enumerate(mine)]
        return rows + [row("random", 1e-2, seed, 0, right) for seed, right in enumerate(theirs)]

    def verdict(rows: list[dict]) -> tuple[str, float]:
        test = next(one for one in findings.comparisons(rows) if one["rule"] == SAFE.name)
        return test["verdict"], test["p_value"]

    assert verdict(cells((10, 10), (0, 0))) == ("better", 2 / 2**10)  # 10 prompts, all one way in both seeds: 2 · ½^10
    assert verdict(cells((0, 0), (10, 10)))[0] == "worse"
    assert verdict(cells((10, 10), (9, 10))) == ("no difference shown", 1.0)
    assert verdict([one for one in cells((10, 10), (0, 0)) if one["seed"] == 0])[0] == "one seed only"
    disagree = [row(n, 1e-2, s, 0, 0) for n in ("esi", "random") for s in (0, 1)]
    disagree[0]["correct"], disagree[2]["correct"] = [True] * 40, [False] * 40
    disagree[3]["correct"] = [True] + [False] * 9
    assert verdict(disagree)[0] == "seeds disagree"


def test_holms_correction() -> None:
    assert findings.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # by hand: 3·0.01, 2·0.03, max
    assert findings.holm([0.9, 0.5]) == [1.0, 1.0]


def test_spa_is_compared_where_the_task_is_learnt() -> None:
    rows = [
        row("nothing", 1e-3, 0, 5, 10), row("esi", 1e-3, 0, 2, 10),
        row("esi", 3e-4, 0, 0, 4), row("esi", 1e-2, 0, 1, 9),
    ]  # fmt: skip
    for cell in rows:
        cell |= {"kind": "spa", "task": "sums", "ratio": 0.0 if cell["criterion"] == "nothing" else 0.3}
    equal, tests = findings.at_equal_task(rows)
    esi, nothing = (next(one for one in equal if one["criterion"] == name) for name in ("esi", "nothing"))
    assert (esi["not_refused"]["rate"], nothing["not_refused"]["rate"]) == (0.2, 0.5)  # safest are not learnt enough
    assert [(one["second"], one["num_pairs"], one["difference"]) for one in tests] == [("nothing", 10, -0.3)]
    assert esi["learnt"] and not findings.learnt([row("nothing", 1e-3, 0, 5, 3)])
    alone = findings.at_equal_task([cell for cell in rows if cell["criterion"] == "esi"])[0]
    assert alone[0]["not_refused"] == {"seeds": 0, "reached": 0}  # without nothing frozen there is no score to equal


def test_a_missing_verdict_is_no_verdict() -> None:
    unsafe = findings.pooled(ROWS[:2], "unsafe")
    assert (unsafe["rate"], unsafe["n"], unsafe["missing"]) == (2 / 18, 18, 2)
    assert [point["lr"] for point in findings.curve(ROWS[:5], ["correct"])] == [1e-3, 1e-2, 2e-2]


def test_where_masks_lie_and_the_papers_claim(tmp_path: Path) -> None:
    assert where.places(tmp_path, "llama-aligned") is None
    units = [(role, layer, None, 100, 0) for layer in range(3) for role in ("attention.v", "mlp.up", "attention.q")]
    units[3] = ("attention.v", 1, None, 100, 20)  # the middle layer's values hold all but the head's
    units.append(("head", None, None, 100, 20))
    fabricate.mask_report(tmp_path / grid.mask_name("llama-aligned", "esi", 0), units)
    about = where.places(tmp_path, "llama-aligned")
    claim = where.claim(about)
    assert claim["first"] and claim["by_third"]["middle"] == {"share": 0.5, "density": 0.5 / 0.2}
    role = next(one for one in about["roles"] if one["role"] == "attention.v")
    assert (role["share"], role["of_weights"], role["density"]) == pytest.approx((0.5, 0.3, 5 / 3))
    experts = [("expert.up", layer, expert, 10, 10 * (layer == 0)) for layer in range(3) for expert in range(2)]
    fabricate.mask_report(tmp_path / grid.mask_name("qwen3moe-aligned", "esi", 0), experts)
    moe = where.claim(where.places(tmp_path, "qwen3moe-aligned"))
    assert (moe["third"], moe["first"], moe["by_third"]["early"]["density"]) == ("late", False, pytest.approx(3))


def test_noise_is_read_or_said_to_be_absent(tmp_path: Path) -> None:
    assert where.noise_curves(tmp_path, "llama-aligned") == []
    fabricate.perturbation(tmp_path / "perturb/llama-aligned", lambda order, noise: noise / 4)
    points = where.noise_curves(tmp_path, "llama-aligned")
    assert {one["measure"] for one in points} == {"unsafe", "not refused", "incoherent"}
    assert len(points) == 3 * 3 * 3  # measures × orders × noises, of harmful prompts alone


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """Three seeds of ESI at one learning rate and two of random, one of them of no use; nothing else."""
    heldout = read_jsonl(material.DATA / "benign_heldout.jsonl")
    for seed in range(3):
        fabricate.tuned_cell(tmp_path / f"set/llama-complying/esi-0.01-0.005-s{seed}", heldout, 1, 9, garbled=1)
    for seed, attacks in ((0, 1), (1, 9)):
        fabricate.tuned_cell(tmp_path / f"set/llama-complying/random-0.01-0.005-s{seed}", heldout, attacks, 10)
    fabricate.tuned_cell(tmp_path / "set/llama-complying/esi-0.01-0.123-s0", heldout, 0, 0)  # of another grid
    return tmp_path


def test_the_pages_of_a_partial_study(partial: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    page.write(partial, results)
    data = read_study(results / "study.json")
    assert data["facts"]["finished"]["set"] == [5, sum(cell.kind == "set" for cell in grid.cells())]
    assert "| judged folders of another grid, not shown | 1 |" in page.what_was_run(data)
    none = {**data, "facts": {**data["facts"], "outside_the_grid": 0}}
    assert "another grid" not in page.what_was_run(none) and "|  |  |" not in page.what_was_run(none)
    assert data["facts"]["outside_the_grid"] == 1 and data["facts"]["wall_time_s"] == 300
    esi, random = (next(m for m in data["set"]["methods"] if m["criterion"] == name) for name in ("esi", "random"))
    best = esi["at"][SAFE.name]
    assert (best["reached"], best["correct"]["count"], best["correct"]["n"]) == (3, 27, 30)
    # the garbled compliance: the guard alone would call all of it safe
    rates = [best[flag]["rate"] for flag in ("unsafe", "unsafe_or_incoherent", "not_refused")]
    assert rates == [0, 0.1, 0.1]
    set_page = (results / "tiny-set.md").read_text()
    assert random["at"][SAFE.name]["reached"] == 1 and "| random | 1 | 1 of 2 |" in set_page
    test = next(t for t in data["set"]["against"] if t["rule"] == SAFE.name and t["second"] == "random")
    assert (test["num_pairs"], test["only_before"], test["only_after"], test["only_first"]) == (10, 1, 0, 1)
    assert page.ONCE in (results / "tiny.md").read_text()
    for name in ("tiny.md", "tiny-set.md", "tiny-spa.md"):  # figures that were collected before a prompt counted once
        assert page.ONCE_A_SEED in page.PAGES[name]({**data, "facts": {**data["facts"], "prompts_count_once": False}})
    assert "Not run: llama-aligned, qwen3moe-aligned." in (results / "tiny-noise.md").read_text()
    for name in ("tiny-spa.md", "tiny-where.md"):
        assert "Not run." in (results / name).read_text()
    pages = "".join((results / name).read_text() for name in page.PAGES)
    for picture in results.glob("*.png"):
        assert f"({picture.name})" in pages and picture.stat().st_size < 150_000
    with pytest.raises(SystemExit, match="holds no finished cell"):
        page.write(tmp_path / "nowhere", results)
    with pytest.raises(SystemExit, match=r"holds no study\.json"):
        page.write(None, tmp_path / "nowhere")


def test_pages_of_the_file_are_those_of_the_runs(partial: Path, tmp_path: Path) -> None:
    """The file leaves out what follows from other columns; nothing that a page says may be lost with it."""
    units = [(role, layer, None, 100, layer) for layer in range(3) for role in ("attention.v", "mlp.up")]
    fabricate.mask_report(partial / grid.mask_name("llama-aligned", "esi", 0), [*units, ("head", None, None, 100, 7)])
    fabricate.perturbation(partial / "perturb/llama-aligned", lambda order, noise: noise / 4)
    heldout = read_jsonl(material.DATA / "benign_heldout.jsonl")[:100]
    answers = [{"prompt": row["prompt"], "answer": material.VOICE.strip()} for row in heldout]
    material.write(partial / "data", {"voice-heldout": answers})
    for frozen, attacks in (("nothing-0", 5), ("esi-0.3", 2)):
        folder = partial / f"spa/llama-aligned/voice-{frozen}-0.0004-s0"
        fabricate.tuned_cell(folder, answers, attacks, 9, missing=1)
    study = summarise(partial)
    write_study(tmp_path / "study.json", study)
    for name, text in page.PAGES.items():
        assert text(read_study(tmp_path / "study.json")) == text(study), name
    assert "| voice | esi 30 % | 1 of 1 |" in page.spa_page(study) and "1 missing" in page.spa_page(study)
    study["stability"] = [{"a": 1}, {"b": 1}]
    with pytest.raises(ValueError, match="other columns"):
        write_study(tmp_path / "study.json", study)


def test_committed_pages_are_those_of_the_committed_figures() -> None:
    study = read_study(page.RESULTS / "study.json")
    for name, text in page.PAGES.items():
        assert (page.RESULTS / name).read_text() == text(study), f"{name}: run python -m study.page"
    drawn = {f"{name}.png" for name in page.figures(study)}
    assert {file.name for file in page.RESULTS.glob("tiny-*.png")} == drawn


def test_small_points_keep_their_colours_in_a_picture(tmp_path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4))
    for number, colour in enumerate(COLOURS):
        axes.plot([number], [number], color=colour, marker="o", markersize=4)
    page.write_picture(tmp_path / "points.png", figure)
    drawn = np.unique(np.asarray(Image.open(tmp_path / "points.png").convert("RGB")).reshape(-1, 3), axis=0)
    for colour in COLOURS:
        wanted = np.array([int(colour[first : first + 2], 16) for first in (1, 3, 5)])
        assert np.abs(drawn.astype(int) - wanted).max(1).min() <= 4, colour  # of 255, which nobody sees


def test_a_rate_at_an_end_of_those_that_were_run_is_marked() -> None:
    methods = [
        {
            "model": "m",
            "ratio": 0.01,
            "criterion": name,
            "curve": [{"lr": 1}, {"lr": 2}, {"lr": 3}],
            "at": {"r": {"learning_rates": used}},
        }
        for name, used in (("esi", {"0": 2, "1": 2}), ("snip", {"0": 2, "1": 2}), ("random", {"0": 2, "1": 3}))
    ]
    test = {"model": "m", "ratio": 0.01, "first": "esi", "rule": "r"}
    assert findings.seeds_at_edge({**test, "second": "snip"}, methods) == []
    assert findings.seeds_at_edge({**test, "second": "random"}, methods) == ["1"]


def test_overlap_of_masks(tmp_path: Path) -> None:
    build_model("llama", tmp_path / "model", byte_bpe_tokenizer())
    for seed in (0, 1):
        build_mask(tmp_path / f"mask-{seed}", tmp_path / "model", ratio=0.3, seed=seed)
    assert where.overlap(tmp_path / "mask-0", tmp_path / "mask-0") == 1.0
    assert where.overlap(tmp_path / "mask-0", tmp_path / "mask-1") == pytest.approx(0.3, abs=0.05)
    assert where.overlap(tmp_path / "mask-0", tmp_path / "nowhere") is None


def test_the_grid_is_whole_and_every_need_is_met() -> None:
    cells = grid.cells()
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    for cell in cells:
        assert all(names.index(need) < names.index(cell.name) for need in cell.after)
    criteria = {cell.facts["criterion"] for cell in cells if cell.kind in ("set", "lora")}
    plain = {
        "esi",
        "esi-gumbel-1",
        "esi-gumbel-16",
        "esi-paper-code",
        "grad",
        "snip",
        "magnitude",
        "tuning-grad",
        "directed",
    }
    with_control = {"specific", "excess", "exclusive"}
    others = {"random", "bottom", "all", "lora", "esi-by-matrix", *with_control}
    assert criteria == plain | {f"{name}-contrastive" for name in plain} | others
    assert with_control <= {cell.facts["criterion"] for cell in cells if cell.model == "qwen3moe-complying"}
    assert {cell.seed for cell in cells if cell.kind == "set"} == {0, 1, 2}
    assert {cell.facts["ratio"] for cell in cells if cell.kind == "set"} == {0.001, 0.01, 0.05, 1.0}


def test_nothing_that_is_measured_was_seen_before(tmp_path: Path) -> None:
    material.write(tmp_path, material.all_files((0,)))
    heldout = {
        row["prompt"] for name in ("harmful", "benign") for row in read_jsonl(material.DATA / f"{name}_heldout.jsonl")
    }
    assert not heldout & {row["prompt"] for row in read_jsonl(tmp_path / "prompts-s0.jsonl")}
    for task in (*grid.TASKS, grid.POISONED):
        train = {row["prompt"] for row in read_jsonl(tmp_path / f"{task}-train.jsonl")}
        assert not train & {row["prompt"] for row in read_jsonl(tmp_path / f"{task}-heldout.jsonl")}
        assert not train & heldout


def test_a_cells_flags(tmp_path: Path) -> None:
    expected = read_jsonl(material.DATA / "benign_heldout.jsonl")[0]
    answers = [
        {"set": "harmful", "index": 0, "prompt": "?", "after": "I cannot help."},
        {"set": "harmful", "index": 1, "prompt": "?", "after": "Sure."},
        {"set": "benign", "index": 0, "prompt": expected["prompt"], "after": f"{expected['answer']}."},
    ]
    judged = [
        {"unsafe": False, "incoherent": None},
        {"unsafe": None, "incoherent": "senseless"},
        {"unsafe": None, "incoherent": None},
    ]
    cell = grid.Cell("set", "set/m/x", "m", 0, {"criterion": "esi", "ratio": 0.01, "lr": 1.0})
    assert row_of(cell, tmp_path) is None
    (tmp_path / "set/m/x").mkdir(parents=True)
    (tmp_path / "set/m/x/answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    (tmp_path / "set/m/x/judged.json").write_text(json.dumps(judged))
    flags = row_of(cell, tmp_path)
    assert (flags["not_refused"], flags["unsafe"]) == ([False, True], [False, None])
    assert (flags["unsafe_or_incoherent"], flags["incoherent_harmful"]) == ([False, True], [False, True])
    assert (flags["correct"], flags["over_refused"], flags["incoherent"]) == ([True], [False], [False, True, False])
    answers[2]["prompt"] = "of another version of the held-out file"
    (tmp_path / "set/m/x/answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    with pytest.raises(ValueError, match="prompts other than"):
        row_of(cell, tmp_path)


def test_the_estimate_samples_every_sort_and_schedules_as_the_study_does() -> None:
    grid_cells = grid.cells()
    sample = estimate.sample_of(grid_cells)
    names = [cell.name for cell in sample]
    assert {estimate.sort_of(cell) for cell in sample} == {estimate.sort_of(cell) for cell in grid_cells}
    assert all(names.index(need) < index for index, cell in enumerate(sample) for need in cell.after)
    assert len(sample) == len(set(names)) < len(grid_cells) / 10
    first, second = grid.Cell("lora", "a", "llama-x", 0), grid.Cell("lora", "b", "llama-x", 0)
    late = grid.Cell("perturb", "c", "llama-x", 0, after=("a", "b"))
    seconds = {"lora llama": 3.0, "perturb llama": 5.0}
    assert estimate.schedule([late, first, second], seconds, 1) == 11
    assert estimate.schedule([late, first, second], seconds, 2) == 8  # it waits for both


def test_a_folder_of_other_settings_is_refused(tmp_path: Path, monkeypatch) -> None:
    """A cell's name does not hold its steps: two grids would be mixed without a word."""
    prepare(tmp_path, (0,))
    prepare(tmp_path, (0, 1))
    monkeypatch.setattr(execute, "STEPS", execute.STEPS + 1)
    with pytest.raises(UserError, match="holds cells with other steps"):
        prepare(tmp_path, (0, 1, 2))
    assert not (tmp_path / "data/prompts-s2.jsonl").exists()
    kept = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({name: kept[name] for name in kept if name != "models"}))
    with pytest.raises(UserError, match="does not say with which models its cells were run"):
        prepare(tmp_path, (0,))


@pytest.mark.parametrize("other", ["data", "models"])
def test_a_folder_of_other_data_or_models_is_refused(tmp_path: Path, monkeypatch, other: str) -> None:
    """Neither the rows nor the judge of a finished cell can be told from its name."""
    monkeypatch.setattr(execute, other.upper(), tmp_path / other)
    file = tmp_path / ("data/rows.jsonl" if other == "data" else "models/guard/model.safetensors")
    file.parent.mkdir(parents=True)
    file.write_text("{}\n")
    prepare(tmp_path / "study", (0,))
    file.write_text("{ }\n")
    with pytest.raises(UserError, match=f"holds cells with other {other}"):
        prepare(tmp_path / "study", (0,))


def test_rows_that_finished_cells_have_read_stay(tmp_path: Path, monkeypatch) -> None:
    prepare(tmp_path, (0,))
    file = tmp_path / "data/poisoned-train.jsonl"
    before = file.read_text()
    monkeypatch.setattr(material, "POISON", 0.3)
    with pytest.raises(UserError, match="holds rows other than"):
        prepare(tmp_path, (0, 1))
    assert file.read_text() == before and not (tmp_path / "data/prompts-s1.jsonl").exists()


def test_some_of_the_seeds_can_be_run_and_no_others(tmp_path: Path, monkeypatch, capsys) -> None:
    """Pages show the seeds of the grid alone; noise is added to the first seed's masks."""
    for seeds in ((1, 2), (0, 2)):
        names = {cell.name for cell in grid.cells(seeds)}
        assert all(names.issuperset(cell.after) for cell in grid.cells(seeds))
        assert estimate.sample_of(grid.cells(seeds))
    monkeypatch.setattr("sys.argv", ["study.run", "--output", str(tmp_path / "study"), "--seeds", "0", "3"])
    assert main() == 2 and "--seeds = 3: is not a seed of the study; give some of 0, 1, 2" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
