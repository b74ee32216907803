"""Readers of masks and scores: a damaged folder is refused, or gives what the sound one gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import damaged_folder, fuzz, outcome, replace
from hypothesis import event, given
from hypothesis import strategies as st
from mask_folders import write_pair

from esi_ds.core.mask import Mask
from esi_ds.core.score_folder import ScoreFolder
from esi_ds.errors import UserError
from esi_ds.mask import info, load_sound, verify
from esi_ds.ranks import Ranks
from esi_ds.reselect import read_units, write_selection
from esi_ds.tensor_files import DIGESTS_NAME, read_tensor_folder, tensor_sha256

ALONE = Ranks()


def same_or_refused(read: Callable[[Path], Any], sound: Any, folder: Path, words: str) -> None:
    result = outcome(lambda: read(folder))
    event(f"{words.partition(' ')[0]}: {'refused' if isinstance(result, UserError) else 'read'}")
    assert isinstance(result, UserError) or result == sound, words


def read_mask(folder: Path) -> Any:
    """All that a mask says, once it is verified; a problem counts as a refusal."""
    mask = load_sound(folder, ALONE)
    if problems := verify(mask, None, ALONE):
        raise UserError("mask", str(folder), problems[0], "make it again")
    bits = {name: mask.tensor(name).tolist() for name in mask.names}
    return mask.metadata, bits, read_units(mask), info(mask, ALONE)


def read_scores(folder: Path) -> Any:
    scores = ScoreFolder(folder)
    scores.refuse(scores.problems())
    shapes = {name: tensor.description for name, tensor in read_tensor_folder(folder, "--scores", "-").tensors.items()}
    return sorted(scores.names), shapes, scores.metadata


def select_again(mask: Mask, scores: Path) -> Any:
    """Another mask from the same scores; nothing is left behind."""
    output = scores.with_name("again")
    try:
        new = write_selection(mask, scores, output, 0.1, "bottom", 0)
        return new.metadata, {name: new.tensor(name).tolist() for name in new.names}
    finally:
        shutil.rmtree(output, ignore_errors=True)


@pytest.fixture(scope="module")
def mask_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with scores/ and a mask/ that the product's own writer has made from them."""
    folder = tmp_path_factory.mktemp("mask")
    write_pair(folder / "plain", [(7, 9), (5, 8)], 0.3, "model", "top", seed=1)
    write_selection(Mask.load(folder / "plain/mask"), folder / "plain/scores", folder / "run/mask", 0.2, "top", 0)
    (folder / "plain/scores").rename(folder / "run/scores")
    tensors = read_tensor_folder(folder / "run/scores", "scores", "-").tensors
    digests = {name: tensor_sha256(tensor) for name, tensor in tensors.items()}
    (folder / "run/scores" / DIGESTS_NAME).write_text(json.dumps(digests))
    return folder / "run"


@fuzz(250)
@given(data=st.data())
def test_masks(mask_run: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    words, damage = data.draw(damaged_folder(mask_run / "mask"))
    folder = replace(tmp_path_factory.getbasetemp() / "mask", mask_run / "mask")
    damage(folder)
    same_or_refused(read_mask, read_mask(mask_run / "mask"), folder, words)


@fuzz(120)
@given(data=st.data())
def test_scores(mask_run: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """The headers say what is in the folder, the digests what the values were: no damage gives another mask."""
    words, damage = data.draw(damaged_folder(mask_run / "scores"))
    folder = replace(tmp_path_factory.getbasetemp() / "scores", mask_run / "scores")
    damage(folder)
    same_or_refused(read_scores, read_scores(mask_run / "scores"), folder, words)
    mask = Mask.load(mask_run / "mask")
    verdict = outcome(lambda: verify(mask, folder, ALONE))
    assert isinstance(verdict, UserError) or verdict == [], words
    same_or_refused(lambda folder: select_again(mask, folder), select_again(mask, mask_run / "scores"), folder, words)
