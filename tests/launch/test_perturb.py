"""The perturbation command: every world size, kills, what is refused, and curves that a stranger counts again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, LaunchedJob, num_lines, whole_lines

from esi_ds import Mask
from esi_ds.cli import main
from esi_ds.journal import NOTHING, content_of, write_record

MODEL = str(ROOT / "examples/models/llama-aligned")
NUM_CELLS, NUM_PROMPTS = 3 * 2 * 2 * 2, 8


def config(folder: Path, **perturb) -> dict:
    return {
        "model": {"path": MODEL, "dtype": "fp32"},
        "perturb": {"mask": str(folder / "scored/mask"), "noise": [1.0, 4.0], "ratios": [0.05, 0.02], "seeds": [0, 1]}
        | perturb,
        "eval": {
            "judges": [{"kind": "words", "words": "examples"}],
            "prompts": {"path": "examples/harmful", "limit": NUM_PROMPTS},
            "max_new_tokens": 12,
            "batch_size": 3,
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A mask and its scores: by magnitude, which needs no judge."""
    folder = tmp_path_factory.mktemp("perturb")
    sections = {"model": {"path": MODEL, "dtype": "fp32"}, "select": {"criterion": "magnitude", "ratio": 0.05}}
    LaunchedJob("launch/esi.py", folder, "scored", 1, sections, launcher="fork").finish()
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    job = LaunchedJob("launch/perturb.py", folder, "undisturbed", 1, config(folder), launcher="fork")
    assert f"all weights restored after {NUM_CELLS} cells" in job.finish()
    return job.run


def test_killed_and_on_two_ranks_the_same(folder: Path, undisturbed: Path) -> None:
    job = LaunchedJob("launch/perturb.py", folder, "killed", 2, config(folder), launcher="fork")
    job.kill_when(lambda: num_lines(job.run / "answers.jsonl") >= 60)
    kept = whole_lines(job.run / "answers.jsonl")
    assert 60 <= len(kept) < (NUM_CELLS + 1) * NUM_PROMPTS
    # As if killed between a cell's last answer and the look at the weights: every cell is looked at all the same.
    restored, first = job.run / "restored.jsonl", whole_lines(job.run / "restored.jsonl")[0]
    restored.write_text(first)
    write_record(restored, NOTHING, content_of(first.encode()))
    LaunchedJob("launch/perturb.py", folder, "killed", 2, config(folder), launcher="deepspeed").finish()
    text = (job.run / "answers.jsonl").read_text()
    assert text == (undisturbed / "answers.jsonl").read_text()
    assert set(kept) <= set(text.splitlines(keepends=True))
    reports = [json.loads((run / "report.json").read_text()) for run in (undisturbed, job.run)]
    assert reports[0]["curves"] == reports[1]["curves"] and reports[0]["cells"] == reports[1]["cells"]
    looked_at = [json.loads(line)["cell"] for line in (job.run / "restored.jsonl").read_text().splitlines()]
    assert (
        looked_at == [cell["name"] for cell in reports[1]["cells"]] and reports[1]["restored"]["checked"] == NUM_CELLS
    )


def test_curves_pool_the_seeds_of_equal_k(folder: Path, undisturbed: Path) -> None:
    report = json.loads((undisturbed / "report.json").read_text())
    total = Mask.load(folder / "scored/mask").total_numel
    assert {(cell["ratio"], cell["k"]) for cell in report["cells"]} == {(r, int(r * total)) for r in (0.05, 0.02)}
    verdicts = [json.loads(line) for line in (undisturbed / "verdicts.jsonl").read_text().splitlines()]
    rows = [row for row in report["curves"] if row["measure"] == "attack_success"]
    assert len(rows) == 3 * 2 * 3  # orders × ratios × (no noise, two noises)
    for row in rows:
        name = f"{row['order']} {row['ratio']:g}, noise {row['noise']:g}, seed "
        flags = [
            v["unsafe"] for v in verdicts if v["model"].startswith(name) or (not row["noise"] and v["model"] == "clean")
        ]
        assert (row["count"], row["n"]) == (sum(flags), len(flags))
        assert row["n"] == (2 if row["noise"] else 1) * NUM_PROMPTS
    answers = [json.loads(line) for line in (undisturbed / "answers.jsonl").read_text().splitlines()]
    said = {
        name: [row["response"] for row in answers if row["model"] == name] for name in {r["model"] for r in answers}
    }
    assert said["top 0.05, noise 4, seed 0"] != said["clean"] != said["top 0.05, noise 4, seed 1"]
    page = (undisturbed / "report.html").read_text()
    assert report["restored"]["digest"][:16] in page and "bottom 5 %" in page


def bad_scores(folder: Path) -> str:
    """Scores whose selection is not the mask, of a version that wrote no digests: some of their values changed."""
    target = folder / "bad-scores"
    shutil.copytree(folder / "scored/scores", target)
    (file,) = target.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-400_000:-200_000] = bytes(200_000)
    file.write_bytes(content)
    (target / "digests.json").unlink()
    return str(target)


CASES = {
    "no section": (None, ["perturb:", "is missing"]),
    "no mask": ({"mask": "{}/none"}, ["perturb.mask", "none"]),
    "order": ({"orders": ["topp"]}, ["perturb.orders.0", "topp"]),
    "twice": ({"seeds": [1, 1]}, ["perturb.seeds", "twice"]),
    "noise": ({"noise": -1.0}, ["perturb.noise", "-1.0"]),
    "ratio": ({"ratios": [1.5]}, ["perturb.ratios", "1.5"]),
    "no scores": (
        {"mask": "{}/alone/mask"},
        ["perturb.scores", "top weights at ratio 0.02", "set it to the folder of the mask's scores"],
    ),
    "scores nowhere": ({"scores": "{}/none"}, ["perturb.scores", "none"]),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_named(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if case == "no scores":
        shutil.copytree(folder / "scored/mask", folder / "alone/mask")
    changes, words = CASES[case]
    raw = {"run": {"output_dir": str(folder / "run")}, **config(folder)}
    if changes is None:
        del raw["perturb"]
    else:
        raw["perturb"] |= json.loads(json.dumps(changes).replace("{}/", f"{folder}/"))
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    assert main("perturb", ["--config", str(folder / "config.yaml")]) == 2
    shown = capsys.readouterr().err
    assert shown.count("error:") == 1 and len(shown.strip().splitlines()) == 1, shown
    assert all(word in shown for word in words), shown
    assert not (folder / "run").exists()


def test_scores_must_be_the_masks_own(folder: Path) -> None:
    for name, scores, words in (
        ("other", bad_scores(folder), "select other weights than the mask holds"),
        ("none", str(folder / "scored/mask"), "holds no scores"),
    ):
        job = LaunchedJob("launch/perturb.py", folder, name, 1, config(folder, scores=scores), launcher="fork")
        output, _ = job.process.communicate(timeout=200)
        assert job.process.returncode == 2 and "perturb.scores" in output and words in output, output[-2000:]


def test_dry_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = {"run": {"output_dir": str(folder / "run")}, **config(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    assert main("perturb", ["--config", str(folder / "config.yaml"), "--dry-run"]) == 0
    assert f"{NUM_CELLS}, and the model without noise" in capsys.readouterr().out
