"""Checkpoints of an interrupted run: restored to the bit, or refused where anything in them was altered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from esi_ds.artifacts import RunFolder
from esi_ds.errors import UserError
from esi_ds.stages.esi.score import PassState, ScoringPass
from esi_ds.zero import checkpoint, runtime

STATE = {"scores": [[0, 0.5], [3, -1.25]], "excluded": [[1, "the response is empty"]]}


def parts(*sizes: int) -> dict[str, list[tuple[int, torch.Tensor]]]:
    return {f"w{n}": [(0, torch.zeros(size))] for n, size in enumerate(sizes)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tensors = parts(5, 3)
    for [(_, values)] in tensors.values():
        values.copy_(torch.arange(len(values)) + 0.1)
    checkpoint.save(tmp_path, 4, STATE, tensors)
    return tmp_path / "position-4"


def restore(folder: Path) -> tuple[dict[str, Any], dict[str, list[tuple[int, torch.Tensor]]]]:
    tensors = parts(5, 3)
    newest = checkpoint.latest(folder)
    checkpoint.restore(newest, tensors)
    return checkpoint.read_state(newest), tensors


def test_what_was_saved_is_restored(saved: Path) -> None:
    state, tensors = restore(saved.parent)
    assert PassState.from_json(state) == PassState(4, {0: 0.5, 3: -1.25}, {1: "the response is empty"})
    assert tensors["w0"][0][1].equal(torch.arange(5) + 0.1)
    assert state["files"].keys() == {"rank-0.safetensors"}


def edit(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "state.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def flip(folder: Path) -> None:
    file = folder / "rank-0.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def rename(folder: Path) -> None:
    folder.rename(folder.with_name("position-6"))


def without_digests(folder: Path) -> dict[str, Any]:
    state = json.loads((folder / "state.json").read_text())
    return {key: value for key, value in state.items() if key not in ("files", "sha256")}


ALTERED: dict[str, Callable[[Path], object]] = {
    "one flipped bit": flip,
    "another position": edit(position=2),
    "another world size": edit(world_size=2),
    "a row excluded": edit(excluded=[[1, "x"], [2, "x"]]),
    "no row excluded": edit(excluded=[]),
    "another score": edit(scores=[[0, 0.25], [3, -1.25]]),
    "another digest": edit(files={"rank-0.safetensors": "0" * 64}),
    "no digests": edit(files={}),
    "a further file": edit(files={"rank-0.safetensors": "0" * 64, "../x": "0"}),
    "another name": rename,
    "no file": lambda folder: (folder / "rank-0.safetensors").unlink(),
    "half a file": lambda folder: (folder / "rank-0.safetensors").write_bytes(b"x" * 20),
    "torn": lambda folder: (folder / "state.json").write_text('{"position": 4'),
    "foreign": lambda folder: (folder / "state.json").write_text("[4]"),
    "deep": lambda folder: (folder / "state.json").write_text("[" * 100_000),
}


@pytest.mark.parametrize("case", ALTERED)
def test_what_was_altered_is_refused(case: str, saved: Path) -> None:
    ALTERED[case](saved)
    with pytest.raises(UserError, match=r"run\.output_dir = .*position-.*delete this checkpoint"):
        restore(saved.parent)


def test_a_checkpoint_of_an_earlier_version_is_taken(saved: Path) -> None:
    (saved / "state.json").write_text(json.dumps(without_digests(saved)))
    state, tensors = restore(saved.parent)
    assert "files" not in state and tensors["w1"][0][1].equal(torch.arange(3) + 0.1)
    for change in (edit(world_size=3), edit(world_size="1"), edit(position=5)):
        other = saved.parent / "other" / saved.name
        shutil.copytree(saved, other)
        change(other)
        with pytest.raises(UserError, match="delete this checkpoint"):
            restore(other.parent)
        shutil.rmtree(other)


@pytest.mark.parametrize(
    "state", [{}, {"scores": 1}, {"scores": [[1]], "excluded": []}, {"scores": {}, "excluded": []}]
)
def test_a_state_without_what_a_pass_needs(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        PassState.from_json({"position": 1, **state})


def test_ranks_tell_each_other_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """All scores of all ranks, in every rank's message, would be gigabytes for a large set of prompts."""
    told: list[Any] = []
    others: list[Any] = []
    monkeypatch.setattr(runtime, "gather_objects", lambda own: told.append(own) or [own, *others])
    state = PassState.from_json({"position": 4, "scores": [[0, 0.5], [3, 1.5]], "excluded": [[1, "empty"]]})
    state.scores[8], state.excluded[9] = 2.5, "empty"
    others[:] = [[{10: 3.5}, {}]]
    state.share()
    state.scores[12] = 4.5
    others[:] = [[{}, {14: "long"}]]
    state.share()
    state.share()
    assert told == [[{8: 2.5}, {9: "empty"}], [{12: 4.5}, {}], [{}, {}]]
    assert state.scores == {0: 0.5, 3: 1.5, 8: 2.5, 10: 3.5, 12: 4.5}
    assert state.excluded == {1: "empty", 9: "empty", 14: "long"}
    fresh = PassState()
    fresh.scores[2] = 1.0
    fresh.share()
    assert told[-1] == [{2: 1.0}, {}]


def test_names_that_are_no_position_are_passed_over(saved: Path) -> None:
    for name in ("position-x", "position--1", "position-9", "position-" + "9" * 5000):
        if len(name) < 255:
            (saved.parent / name).mkdir()
    assert checkpoint.latest(saved.parent) == saved


@pytest.mark.parametrize("below", ["checkpoint", "checkpoint/safety"])
def test_a_checkpoint_of_another_run_is_refused(below: str, tmp_path: Path) -> None:
    """Copied whole, with its own record, from a run of the same model."""
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        RunFolder(str(tmp_path / name)).identify()
        checkpoint.save(tmp_path / name / below, 4, STATE, parts(5, 3))
        restore(tmp_path / name / below)
    shutil.rmtree(tmp_path / "mine/checkpoint")
    shutil.copytree(tmp_path / "other/checkpoint", tmp_path / "mine/checkpoint")
    with pytest.raises(
        UserError, match=r"run\.output_dir = .*position-4: belongs to another run; delete this checkpoint"
    ):
        restore(tmp_path / "mine" / below)
    restore(tmp_path / "other" / below)
    newest = tmp_path / "mine" / below / "position-4"
    (newest / "state.json").write_text(json.dumps(without_digests(newest) | {"run": None}))
    restore(tmp_path / "mine" / below)  # of an earlier version, which names no run


def test_a_run_goes_on_from_its_own_checkpoint_in_a_folder_of_an_earlier_version(saved: Path) -> None:
    RunFolder(str(saved.parent)).identify()  # this version goes on with it
    restore(saved.parent)
    checkpoint.save(saved.parent, 8, STATE, parts(5, 3))
    RunFolder(str(saved.parent)).identify()  # another start
    assert restore(saved.parent)[0]["position"] == 8


def test_sums_of_other_responses_are_not_gone_on_with(tmp_path: Path) -> None:
    """Who deletes the responses of ESI has others generated, whose gradients are not in the saved sums."""

    def scoring(ids: list[int]) -> ScoringPass:
        gradients = SimpleNamespace(saved=lambda: {"sums": [(0, torch.ones(3))]})
        examples = [SimpleNamespace(index=4, ids=ids)]
        objective = SimpleNamespace(
            name="safety",
            unit="prompt",
            examples=examples,
            gradients=gradients,
            index=lambda example: example.index,
            tokens=lambda example: example.ids,
        )
        return ScoringPass(None, None, objective, tmp_path / "checkpoint/safety", None, None)  # type: ignore[arg-type]

    first = scoring([1, 2])
    first.state.position, first._steps_since_save = 1, 1
    first._save_rest()
    again = scoring([1, 2])
    again._restore()
    assert again.state.position == 1
    with pytest.raises(UserError, match="sums of other prompts or responses.*delete checkpoint/"):
        scoring([1, 3])._restore()
