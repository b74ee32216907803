"""A run with several criteria has a folder of each in mask/ and scores/: what reads them, and what shows them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from mask_folders import write_pair
from test_report import DENSE, report, unit

from esi_ds.core.mask import Mask, load_mask
from esi_ds.core.score_folder import ScoreFolder
from esi_ds.core.select import Cut
from esi_ds.errors import UserError
from esi_ds.report import overview
from esi_ds.report.html import render, render_overview
from esi_ds.report.overview import FinishedRun
from esi_ds.report.publish import closing_table, publish
from esi_ds.report.tables import overlap
from esi_ds.stages.esi.masks import selected_without_score
from esi_ds.stages.perturb.prepare import _scores_folder
from esi_ds.tracking import Tracker
from esi_ds.zero.score import Selection

OTHERS = [{**row, "selected": 5 * (index + 1)} for index, row in enumerate(DENSE)]


def run_of_two(folder: Path) -> Path:
    """A run folder whose masks of esi and snip come from the same scores."""
    write_pair(folder / "one", [(7, 9), (6, 8)], 0.2, "model", "top", 3)
    for kind in ("mask", "scores"):
        for criterion in ("esi", "snip"):
            shutil.copytree(folder / "one" / kind, folder / "run" / kind / criterion)
        (folder / "run" / kind / ".snip.tmp").mkdir()  # what a kill leaves is no mask
        shutil.copy(folder / "one" / kind / "model.safetensors.index.json", folder / "run" / kind / ".snip.tmp")
    return folder / "run"


def test_a_folder_of_several_names_them_and_one_of_them_is_read(tmp_path: Path) -> None:
    run = run_of_two(tmp_path)
    with pytest.raises(UserError) as caught:
        load_mask(str(run / "mask"))
    assert str(caught.value) == (
        f"tune.mask = {run / 'mask'}: holds a folder for each of esi, snip; name one of them, such as {run}/mask/esi"
    )
    with pytest.raises(UserError, match="--scores = .*: holds a folder for each of esi, snip; name one"):
        ScoreFolder(run / "scores")
    assert load_mask(str(run / "mask/snip")).k > 0 and len(ScoreFolder(run / "scores/snip").names) == 2
    with pytest.raises(UserError, match="holds no model.safetensors.index.json"):
        load_mask(str(run))  # its mask/ is no mask of several


def test_perturbation_takes_the_scores_of_the_masks_criterion(tmp_path: Path) -> None:
    run = run_of_two(tmp_path)
    assert _scores_folder(None, Mask.load(run / "mask/snip"), []) == run / "scores/snip"
    assert _scores_folder(None, Mask.load(tmp_path / "one/mask"), []) == tmp_path / "one/scores"
    # A mask that somebody has put into a folder called mask/, with its scores beside it.
    for kind in ("mask", "scores"):
        shutil.copytree(tmp_path / "one" / kind, tmp_path / "mask" / kind)
    assert _scores_folder(None, Mask.load(tmp_path / "mask/mask"), []) == tmp_path / "mask/scores"
    shutil.rmtree(run / "scores/snip")
    assert _scores_folder(None, Mask.load(run / "mask/snip"), []) is None


def two_masks() -> dict:
    """A report of two criteria; their masks have 50 weights each."""
    page = report(DENSE)
    further = report(OTHERS)
    further["selection"] = {**further["selection"], "criterion": "snip", "threshold": 0.125}
    mask = {key: further[key] for key in ("selection", "units", "score_histogram", "score_histograms_by_role")}
    return {**page, "further_masks": [mask], "overlaps": [overlap(("esi", "snip"), (50, 50), 20, 900)]}


def test_page_and_closing_table_show_each_mask(tmp_path: Path) -> None:
    page = render(two_masks())
    for words in ("Where the mask is: esi", "Where the mask is: snip", "Scores: snip", "Do the masks agree?", "0.2500"):
        assert words in page, words
    assert page.count("<svg ") == 2 + 2 and page.count("<figure") == 2 * 3
    for criterion in ("esi", "snip"):
        assert f"RUN/mask/{criterion} --scores RUN/scores/{criterion}</pre>" in page
    assert "0.125" in page and page.count("mean judge score of") == 1
    text = closing_table(two_masks())
    assert "mask by esi" in text and "mask by snip" in text and text.count("judge score: mean 2") == 1
    assert "esi and snip share 20 weights, Jaccard 0.2500" in text
    assert "attention.q              15    30.00%" in text and "attention.q              40    80.00%" in text

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(tmp_path, enabled=True, tensorboard=True, stage="esi") as tracker:
        publish(tracker, two_masks())
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shares = [events.Scalars(f"{name}/mask_share/attention.q")[0].value for name in ("esi", "snip")]
    assert shares == [80.0, 30.0] and len(events.Images("snip/roles/share_of_mask")) == 1


def test_a_list_of_one_criterion_has_a_folder_too() -> None:
    page = render({**report(DENSE), "further_masks": [], "overlaps": []})
    assert "RUN/mask/esi --scores RUN/scores/esi</pre>" in page and "Where the mask is</h2>" in page
    assert "RUN/mask --scores RUN/scores</pre>" in render(report(DENSE))


def test_several_runs_side_by_side_show_every_mask(tmp_path: Path) -> None:
    from esi_ds.launch.report import overlaps

    run = run_of_two(tmp_path)
    runs = [FinishedRun("a", "a.html", report(DENSE), {}), FinishedRun("b", "b.html", two_masks(), {})]
    names = [mask.name for mask in overview.masks(runs)]
    assert names == ["a", "b: esi", "b: snip"]
    assert overview.role_shares(overview.masks(runs))[0] == ("attention.q", [0.8, 0.8, 0.3])
    assert overview.key_fact(runs[1]).startswith("50 of 1,000 weights each by esi, snip, mean judge score 2")
    assert overview.key_fact(runs[0]).startswith("50 of 1,000 weights by esi, mean judge score 2")
    rows = overlaps({"a": tmp_path / "one", "b": run})
    assert [(row["first"], row["second"]) for row in rows] == [("a", names[1]), ("a", names[2]), (names[1], names[2])]
    page = render_overview(runs, rows)
    assert "b: snip" in page and page.count("<figure") == 3


def test_a_mask_within_the_mask_of_one_criterion_does_not_stand_for_it(tmp_path: Path) -> None:
    """``mask select RUN/mask RUN/mask/top5`` puts another one there."""
    from esi_ds.launch.report import mask_folders

    write_pair(tmp_path, [(7, 9), (6, 8)], 0.2, "model", "top", 3)
    shutil.copytree(tmp_path / "mask", tmp_path / "top5")
    shutil.move(tmp_path / "top5", tmp_path / "mask/top5")
    assert mask_folders("a", tmp_path) == {"a": tmp_path / "mask"}


def test_a_mixture_of_two_masks_is_drawn_with_one_map_of_its_routers() -> None:
    units = [unit(f"e{e}", "expert.up", 3, e, 10, e + 1, float(e)) for e in range(2)]
    page = {**two_masks(), "units": units, "routing": [{"set": "harmful", "layer": 3, "tokens": [2, 3]}]}
    page["further_masks"][0]["units"] = units
    assert render(page).count("Where routers send harmful prompts") == 1


def test_a_mask_with_weights_that_have_no_score_says_so() -> None:
    """Criteria that look at signs leave many weights at 0; a ratio may ask for more than are left."""
    bits, scores = {"w": torch.arange(120) < 100}, {"w": (torch.arange(120) < 60).float()}
    selection = Selection(bits, {}, 100, Cut(0, 40, 100))
    note = selected_without_score("exclusive", scores, selection, "top", "model")
    assert note is not None and note.startswith("exclusive: only 60 weights have a score above 0; the other 40 of")
    ones = {"w": torch.ones(120)}
    assert selected_without_score("exclusive", ones, selection, "top", "model") is None
    assert selected_without_score("exclusive", scores, selection, "bottom", "model") is None
    by_matrix = Selection(bits, {}, 100, None)
    note = selected_without_score("exclusive", scores, by_matrix, "top", "matrix")
    assert note is not None and note.startswith("exclusive: 40 of the mask's 100 weights have a score of 0; they are")
    assert selected_without_score("exclusive", ones, by_matrix, "top", "matrix") is None
