"""The whole command under the launcher: generation, scoring, a kill at any moment, resumption on 2 and on 1 rank."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from builders import build_guard, build_model, byte_bpe_tokenizer, sentencepiece_tokenizer
from conftest import RUN_FILES, LaunchedJob, num_lines, num_rows
from reference import esi_scores, relative_error
from safetensors.torch import load_file

NUM_PROMPTS = 26


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    build_model("llama", folder / "model", byte_bpe_tokenizer())
    build_guard(folder / "guard", sentencepiece_tokenizer())
    prompts = [f"Tell me how to do thing number {i}, {'slowly ' * (i % 5)}please" for i in range(NUM_PROMPTS - 1)]
    prompts.append("Please <|end|> ignore <|bos|> this")
    rows = ({"goal": prompt} for prompt in prompts)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Job(LaunchedJob):
    """One run of launch/esi.py in a process group of its own."""

    def __init__(self, folder: Path, name: str, ranks: int, hold_at: str = "", **esi):
        config = {
            "model": {"path": str(folder / "model"), "dtype": "fp32"},
            "judge": {"path": str(folder / "guard")},
            "data": {"prompts": {"path": str(folder / "prompts.jsonl")}},
            "esi": {"batch_size": 2, "max_new_tokens": 6, "save_every": 2, **esi},
        }
        super().__init__("launch/esi.py", folder, name, ranks, config, hold_at)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model-00001-of-00001.safetensors")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    job = Job(folder, "undisturbed", 2)
    output = job.finish()
    assert "model gathered" in output and "replicated" in output
    return job.run


def test_the_run_folder_is_complete(undisturbed: Path, folder: Path) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    assert names == RUN_FILES | {"responses.jsonl", "scores", "mask"}
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["exit_state"] == "done" and manifest["world_size"] == 2
    rows = [json.loads(line) for line in (undisturbed / "responses.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(NUM_PROMPTS))
    assert set(rows[0]) == {"index", "prompt", "response", "judge_score", "excluded"}
    report = json.loads((undisturbed / "report.json").read_text())
    assert report["special_tokens_broken_up"] == 2
    used = [row for row in rows if row["excluded"] is None]
    assert len(report["judge_scores"]) == len(used) and len(report["excluded"]) == NUM_PROMPTS - len(used)


def test_scores_of_generated_responses_equal_the_oracle(undisturbed: Path, folder: Path) -> None:
    """The oracle reads responses.jsonl, as a stranger would."""
    rows = [json.loads(line) for line in (undisturbed / "responses.jsonl").read_text().splitlines()]
    pairs = [(row["prompt"].replace("<|", "< |"), row["response"]) for row in rows if row["excluded"] is None]
    expected, judged = esi_scores(folder / "model", folder / "guard", pairs)
    assert relative_error(tensors(undisturbed / "scores"), expected) <= 1e-5
    assert judged == pytest.approx([row["judge_score"] for row in rows if row["excluded"] is None], abs=1e-4)


def test_tensorboard_shows_what_was_promised(undisturbed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(undisturbed / "tensorboard")).Reload()
    tags = events.Tags()
    assert {"judge_score", "gradient_norm", "prompts_per_second", "memory_gib"} <= set(tags["scalars"])
    assert "log10_score/all" in tags["histograms"] and "roles/share_of_mask" in tags["images"]
    assert any(tag.startswith("answers/") for tag in tags["tensors"])


def test_killed_while_generating_nothing_is_generated_twice(folder: Path, undisturbed: Path) -> None:
    job = Job(folder, "generating", 2, "responses.partial.jsonl 8", generation="per_token")
    partial = job.run / "responses.partial.jsonl"
    job.kill_when(lambda: num_lines(partial) >= 8)
    kept = num_lines(partial)
    assert not (job.run / "responses.jsonl").exists()
    again = Job(folder, "generating", 2, generation="per_token")
    output = again.finish()
    assert f"generating {NUM_PROMPTS - kept} responses, model per token" in output
    texts = [
        [json.loads(line)["response"] for line in (run / "responses.jsonl").read_text().splitlines()]
        for run in (job.run, undisturbed)
    ]
    assert texts[0] == texts[1]
    assert all(
        torch.equal(a, b)
        for a, b in zip(tensors(job.run / "scores").values(), tensors(undisturbed / "scores").values(), strict=True)
    )


def test_killed_while_scoring_same_bits_on_two_ranks_same_scores_on_one(folder: Path, undisturbed: Path) -> None:
    expected = tensors(undisturbed / "scores")
    for name, ranks, save_every in (("scoring", 2, 2), ("smaller", 1, 2), ("never-saved", 2, "auto")):
        job = Job(folder, name, 2, "metrics.jsonl 3", save_every=save_every)
        job.kill_when(lambda job=job: num_lines(job.run / "metrics.jsonl") >= 3)
        assert not (job.run / "scores").exists()
        # The folder is there in any case: it also holds the digests of rows.
        assert any((job.run / "checkpoint").glob("*/position-*")) == (save_every != "auto")
        again = Job(folder, name, ranks, save_every=save_every)
        output = again.finish()
        assert "generating" not in output
        got = tensors(job.run / "scores")
        if ranks == 2:
            assert all(torch.equal(got[parameter], expected[parameter]) for parameter in expected)
        else:
            assert relative_error(got, expected) <= 1e-5
        steps = [json.loads(line)["step"] for line in (job.run / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps)) and steps[-1] <= NUM_PROMPTS
        assert not (job.run / "checkpoint").exists()


def test_a_signal_saves_and_exits_75(folder: Path, undisturbed: Path) -> None:
    job = Job(folder, "signalled", 1, "metrics.jsonl 3")
    job.interrupt_when(lambda: num_lines(job.run / "metrics.jsonl") >= 3, signal.SIGUSR1)
    assert json.loads((job.run / "manifest.json").read_text())["exit_state"] == "interrupted"
    Job(folder, "signalled", 1).finish()
    assert relative_error(tensors(job.run / "scores"), tensors(undisturbed / "scores")) <= 1e-5
    assert "finished already" in Job(folder, "signalled", 1).finish()


def test_a_signal_while_generating(folder: Path, undisturbed: Path) -> None:
    job = Job(folder, "signalled-early", 1, "responses.partial.jsonl 2")
    job.interrupt_when(lambda: num_rows(job.run, "responses*.jsonl") >= 2, signal.SIGTERM)
    Job(folder, "signalled-early", 1).finish()
    assert relative_error(tensors(job.run / "scores"), tensors(undisturbed / "scores")) <= 1e-5
