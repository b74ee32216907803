"""``python -m esi_ds.mask`` in chunks: the same as whole tensors in memory, and no more memory for more shards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from mask_folders import write_mask, write_pair
from safetensors import SafetensorError
from torch import Tensor

from esi_ds import reselect
from esi_ds.core.mask import Mask, digest, identity, pack_bits
from esi_ds.mask import compare_with_scores, info, main
from esi_ds.models.weights import checkpoint_tensors
from esi_ds.ranks import Ranks
from esi_ds.zero import files

SHAPES = [(7, 9), (1, 3), (30, 17), (5, 8)]


def scores_of(folder: Path, name: str) -> Tensor:
    scores = reselect.ScoreFolder(folder)
    (numel,) = (last - first for other, _, first, last, _ in checkpoint_tensors(folder) if other == name)
    return scores.read(name, 0, numel // 4)


@pytest.mark.parametrize("scope", ["model", "matrix"])
@pytest.mark.parametrize("order", ["top", "bottom", "random"])
def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str, order: str) -> None:
    """Chunks of 16 weights cut rows, matrices and bytes; the mask comes from whole tensors."""
    write_pair(tmp_path, SHAPES, 0.2, scope, order, seed=3)
    monkeypatch.setattr(reselect, "CHUNK", 16)
    mask, scores = Mask.load(tmp_path / "mask"), tmp_path / "scores"
    assert compare_with_scores(mask, scores, Ranks()) == []
    reselected = reselect.write_selection(mask, scores, tmp_path / "again", 0.2, order, 3)
    assert reselected.counts == mask.counts
    selected = torch.cat([scores_of(scores, name)[reselected.bits(name)] for name in reselected.names])
    limits = {"top": repr(float(selected.min())), "bottom": repr(float(selected.max())), "random": "null"}
    assert reselected.metadata["threshold"] == (limits[order] if scope == "model" else "null")
    assert reselected.files == mask.files and all(reselected.bits(name).equal(mask.bits(name)) for name in mask.names)
    digests = [json.loads((tmp_path / folder / "digests.json").read_text()) for folder in ("mask", "again")]
    assert digests[0] == digests[1]
    assert main(["verify", str(tmp_path / "again"), "--scores", str(scores)]) == 0


def test_one_wrong_bit_is_found_in_its_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    write_pair(tmp_path, SHAPES, 0.2, "model", "top", seed=3)
    monkeypatch.setattr(reselect, "CHUNK", 16)
    file = tmp_path / "scores" / "model-00003-of-00004.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] = 0x7E  # the last score is larger than all others now, and finite
    file.write_bytes(content)
    assert main(["verify", str(tmp_path / "mask"), "--scores", str(tmp_path / "scores")]) == 2
    shown = capsys.readouterr().out
    assert "model.layers.2.fused: " in shown and "bits differ from the selection by its scores" in shown
    file.write_bytes(content[:-40])
    assert main(["verify", str(tmp_path / "mask"), "--scores", str(tmp_path / "scores")]) == 2
    assert "is not a complete safetensors file (it is shorter than its header says)" in capsys.readouterr().err


def test_what_another_host_has_made_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder to write into, and the index of the finished one."""
    write_pair(tmp_path, SHAPES, 0.2, "model", "top", seed=3)
    waited = []
    monkeypatch.setattr(reselect, "wait_until_visible", lambda path: waited.append(path) or path)
    mask = Mask.load(tmp_path / "mask")
    reselect.write_selection(mask, tmp_path / "scores", tmp_path / "again", 0.1, "top", 3)
    assert waited == [tmp_path / ".again.tmp"] * len(mask.files) + [tmp_path / "again/model.safetensors.index.json"]


def test_masks_of_one_metadata_are_told_apart_by_their_bits(tmp_path: Path) -> None:
    """With a scope of matrix two runs of one criterion have the same counts, and no threshold."""
    masks = []
    for number, bits in enumerate(([True, False, False, True], [False, True, True, False])):
        folder = write_mask(tmp_path / str(number), {"a": torch.tensor(bits)})
        digests = {"a": digest(pack_bits(torch.tensor(bits)))}
        (folder / "digests.json").write_text(json.dumps(digests))
        masks.append(Mask.load(folder))
    one, other = map(identity, masks)
    assert masks[0].metadata == masks[1].metadata
    assert one["mask_sha256"] == other["mask_sha256"] and one["mask_bits_sha256"] != other["mask_bits_sha256"]
    shown = [info(mask, Ranks()) for mask in masks]
    assert f"bits sha256  {one['mask_bits_sha256']}" in shown[0] and shown[0] != shown[1]
    assert f"made from    {masks[0].fingerprint}" in shown[0] and f"made from    {masks[0].fingerprint}" in shown[1]
    (tmp_path / "0/digests.json").unlink()
    without = Mask.load(tmp_path / "0")
    assert identity(without) == {"mask_sha256": one["mask_sha256"]} and without.problems() == []
    assert identity(without) == one  # once its bits are read


def test_masks_of_other_roles_are_compared_by_those_of_the_first(tmp_path: Path, capsys) -> None:
    for name in ("first", "second"):
        write_pair(tmp_path / name, SHAPES, 0.2, "model", "top", seed=3)
    folders = [str(tmp_path / name / "mask") for name in ("first", "second")]
    told = "the matrices and roles are the first mask's"
    assert main(["compare", *folders]) == 0 and told not in capsys.readouterr().out
    units = tmp_path / "second/mask/units.json"
    units.write_text(units.read_text().replace('"attention.v"', '"attention.o"'))
    assert main(["compare", *folders]) == 0 and capsys.readouterr().out.startswith(told)


def test_masks_that_were_made_otherwise_are_told_apart_first(tmp_path: Path, capsys) -> None:
    """Equal bits do not make them one mask: those of two models overlap by chance, or because both are near a base."""
    bits = {"w": torch.tensor([[True, False], [False, False]])}
    for name, facts in (("one", {}), ("weights", {"fingerprint": "c:d"}), ("order", {"order": "bottom"})):
        write_mask(tmp_path / name, bits, **facts)
    first = Mask.load(tmp_path / "one").fingerprint
    told = {
        "one": "",
        "weights": f"the masks were made differently: from other weights (fingerprints {first} and c:d)\n",
        "order": "the masks were made differently: order top and bottom\n",
    }
    for name, line in told.items():
        assert main(["compare", str(tmp_path / "one"), str(tmp_path / name)]) == 0
        output = capsys.readouterr().out
        assert output.startswith(line) and ("made differently" in output) == bool(line), output


def test_what_cannot_be_read_or_made_is_told(tmp_path: Path, capsys) -> None:
    write_pair(tmp_path, SHAPES, 0.2, "matrix", "top", seed=3)
    options = ["--scores", str(tmp_path / "scores"), "--ratio", "0.1"]
    (tmp_path / "file").touch()
    assert main(["select", str(tmp_path / "mask"), str(tmp_path / "file/new"), *options]) == 2
    assert f"error: OUTPUT = {tmp_path}/file/new: cannot be created" in capsys.readouterr().err
    for seed in ("-1", str(2**32), "one"):
        with pytest.raises(SystemExit):
            main(
                ["select", str(tmp_path / "mask"), str(tmp_path / "new"), *options, "--order", "random", "--seed", seed]
            )
        assert "argument --seed: " in capsys.readouterr().err and not (tmp_path / "new").exists()
    for order in ([], ["--order", "bottom"]):
        assert main(["select", str(tmp_path / "mask"), str(tmp_path / "new"), *options, *order, "--seed", "3"]) == 2
        assert "error: --seed = 3: has no effect on the order " in capsys.readouterr().err
    for content in ('[{"parameter": "x"', '[{"parameter": "of another model"}]', "[3]"):
        (tmp_path / "mask/units.json").write_text(content)
        assert main(["select", str(tmp_path / "mask"), str(tmp_path / "new"), *options]) == 2
        assert "units.json: does not hold the matrices of this mask" in capsys.readouterr().err
    assert not list(tmp_path.glob("*new*"))


def test_a_full_disk_is_told_with_the_masks_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    write_pair(tmp_path, SHAPES, 0.2, "model", "top", seed=3)

    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", fail)
    arguments = ["select", "mask", "again", "--scores", "scores", "--ratio", "0.1"]
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert "No space left on device: '.again.tmp/model-00001-of-00004.safetensors'" in capsys.readouterr().err


def peak(*arguments: str) -> float:
    """Peak resident MiB of a separate process."""
    code = (
        "import resource, sys; from esi_ds.mask import main; code = main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return float(done.stderr.split()[-1])


def test_more_shards_need_no_more_memory(tmp_path: Path) -> None:
    """Two shards of 16 MiB of scores and half a MiB of mask each, against ten."""
    for name, shards in (("small", 2), ("large", 10)):
        write_pair(tmp_path / name, [(2048, 2048)] * shards, 0.1, "model", "top", seed=0)
    for command in (
        ["verify", "{}/mask", "--scores", "{}/scores"],
        ["compare", "{}/mask", "{}/mask"],
        ["info", "{}/mask"],
        ["select", "{}/mask", "{}/made", "--scores", "{}/scores", "--ratio", "0.05"],
    ):
        small, large = (
            peak(*(part.replace("{}", str(tmp_path / name)) for part in command)) for name in ("small", "large")
        )
        assert large < small + 24, (command, small, large)  # 8 shards more: 128 MiB of scores


@pytest.mark.parametrize("scope", ["model", "matrix"])
def test_a_ratio_that_selects_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scope: str
) -> None:
    write_pair(tmp_path, SHAPES, 0.2, scope, "top", seed=3)
    arguments = [str(tmp_path / "mask"), str(tmp_path / "new"), "--scores", str(tmp_path / "scores"), "--ratio"]
    assert main(["select", *arguments, "1e-6"]) == 2
    said = capsys.readouterr().err
    assert "--ratio = 1e-06: selects nothing" in said and not (tmp_path / "new").exists()
    least = said.split()[-1]
    assert main(["select", *arguments, least]) == 0
    assert Mask.load(tmp_path / "new").k >= 1


def test_a_top_mask_selected_from_a_random_one_has_the_seed_of_the_run(tmp_path: Path, capsys) -> None:
    """Or the next command would find it made by another run."""
    write_pair(tmp_path, SHAPES, 0.2, "model", "top", seed=3)
    scores = ["--scores", str(tmp_path / "scores")]
    random = [str(tmp_path / "mask"), str(tmp_path / "random"), "--ratio", "0.2", "--order", "random", "--seed", "7"]
    assert main(["select", *random, *scores]) == 0
    assert "random (order random, seed 7)" in capsys.readouterr().out
    assert main(["select", str(tmp_path / "random"), str(tmp_path / "top"), "--ratio", "0.1", *scores]) == 0
    assert [Mask.load(tmp_path / name).header.seed for name in ("random", "top")] == [7, 3]
    assert main(["verify", str(tmp_path / "top"), *scores]) == 0


@pytest.mark.parametrize(
    ("scope", "words"),
    [("model", "weights have a score above 0; the other"), ("matrix", "weights have a score of 0; they are the first")],
)
def test_a_selection_says_how_many_weights_have_no_score(tmp_path: Path, capsys, scope: str, words: str) -> None:
    write_pair(tmp_path, SHAPES, 0.2, scope, "top", seed=3)
    mask = Mask.load(tmp_path / "mask")
    for ratio, says in ((0.999, True), (0.05, False)):  # one score in forty is 0
        output = tmp_path / f"at-{ratio}"
        scores = ["--scores", str(tmp_path / "scores"), "--ratio", str(ratio)]
        assert main(["select", str(mask.path), str(output), *scores]) == 0
        said = capsys.readouterr().out
        assert (words in said) == says, said


@pytest.mark.parametrize(("low", "high"), [(-8, -1), (-100, None), (0, 10_000), (9, 8)])
def test_bits_of_what_is_no_range_are_refused(tmp_path: Path, low: int, high: int | None) -> None:
    write_pair(tmp_path, SHAPES, 0.2, "model", "top", seed=3)
    mask = Mask.load(tmp_path / "mask")
    with pytest.raises(ValueError, match="is not a range within the"):
        mask.bits(mask.names[0], low, high)


def test_another_thread_may_open_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(tmp_path, [(4, 8), (6, 8)], 0.2, "model", "top", 0)
    mask = Mask.load(tmp_path / "mask")
    (first, second), expected = mask.names, mask.data(mask.names[0])
    mask.data(second)
    opened = mask._opened
    monkeypatch.setattr(Mask, "_opened", property(lambda mask: opened, lambda mask, value: None), raising=False)
    assert torch.equal(mask.data(first), expected)
