"""Masks and scores that are damaged, foreign or false: every tool says so and writes nothing (docs/design.md §7)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mask_folders import units_of, write_mask
from safetensors.torch import load_file, save_file
from torch import nn

import esi_ds
from esi_ds.core.mask import FIELD, INDEX_NAME, Mask, load_mask
from esi_ds.core.mask_metadata import MaskMetadata, mask_texts
from esi_ds.core.score_folder import ScoreFolder
from esi_ds.core.select import Order, ScoreRun, first_invalid, key_to_score, median, model_k, select
from esi_ds.core.units import Parameter, Shard, whole
from esi_ds.errors import UserError
from esi_ds.mask import main
from esi_ds.stages.perturb.prepare import _scores_folder
from esi_ds.stages.perturb.work import PerturbRun
from esi_ds.tensor_files import read_tensor_folder
from esi_ds.zero import files
from esi_ds.zero.files import read_scores, write_scores
from esi_ds.zero.score import check_scores

FILE = "model-00001-of-00001.safetensors"
RATIO = 0.2


def parameters() -> tuple[Parameter, ...]:
    """An embedding that is not scored, and two fused matrices."""
    names = [f"model.layers.{layer}.fused" for layer in (0, 1)]
    units = [units_of(name, layer, 6, 8) for layer, name in enumerate(names)]
    return (
        Parameter("embed.weight", (5, 8), 0, "embedding", ()),
        Parameter(names[0], (6, 8), 40, "mlp.up", tuple(units[0])),
        Parameter(names[1], (6, 8), 88, "mlp.up", tuple(units[1])),
    )


def write_run(folder: Path, scope: str = "model", order: str = "top", fingerprint: str = "a:b", seed: int = 3) -> Path:
    """``mask/`` and ``scores/`` as a run of ESI writes them."""
    model = parameters()
    scored = model[1:]
    shards = [whole(parameter) for parameter in scored]
    generator = torch.Generator().manual_seed(seed)
    scores = {p.name: torch.randint(0, 90, (p.numel,), generator=generator) / 8 for p in scored}
    ordering, last = Order(order, seed), sum(p.numel for p in model) - 1
    bits = {p.name: torch.zeros(p.numel, dtype=torch.bool) for p in scored}
    cut = None
    if scope == "model":
        runs = [ScoreRun(scores[p.name], p.offset) for p in scored]
        (cut,) = select([runs], [model_k(model, RATIO, "all")], ordering, last, lambda counts: counts)
        for run, parameter in zip(runs, scored, strict=True):
            bits[parameter.name] = cut.selects(ordering.keys(run.scores, run.position), run.position)
    else:
        for parameter in scored:
            for unit, position in parameter.unit_offsets():
                where = unit.elements(torch.arange(parameter.numel))
                run = ScoreRun(scores[parameter.name][where], position)
                (one,) = select([[run]], [int(RATIO * unit.numel)], ordering, last, lambda counts: counts)
                bits[parameter.name][where] = one.selects(ordering.keys(run.scores, position), position)
    counts = {name: int(part.sum()) for name, part in bits.items()}
    header = MaskMetadata(
        k=sum(counts.values()),
        ratio=RATIO,
        total_numel=last + 1,
        threshold=None if cut is None else key_to_score(cut, order),
        criterion="esi",
        contrastive=False,
        order=order,
        of="all",
        scope=scope,
        seed=seed,
        fingerprint=fingerprint,
        shapes={p.name: p.shape for p in scored},
        counts=counts,
        offsets={p.name: p.offset for p in scored},
    )
    texts = mask_texts(header)
    about = {key: texts[key] for key in ("criterion", "contrastive", "total_numel", "fingerprint", "seed")}
    write_scores(folder / "scores", scored, shards, scores, {"format": "esi-scores/1", **about})
    units = [{"parameter": p.name, **asdict(unit)} for p in scored for unit in p.units]
    files.write_mask(folder / "mask", scored, shards, bits, texts, units)
    return folder


def forget_digests(mask: Path) -> None:
    """As a mask from another tool, which has no digests."""
    index = json.loads((mask / INDEX_NAME).read_text())
    (mask / INDEX_NAME).write_text(json.dumps({**index, "metadata": {}}))


def state(mask: Path, **texts: str) -> None:
    """Have the mask's file state something else."""
    file = mask / FILE
    metadata = {**Mask.load(mask).metadata, **texts}
    tensors = load_file(file)
    save_file(tensors, file, metadata=metadata)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command says that ends with 2."""
    assert main([str(argument) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return shown.err + shown.out


def select_from(folder: Path) -> list[str]:
    options = ["--scores", str(folder / "scores"), "--ratio", "0.1"]
    return ["select", str(folder / "mask"), str(folder / "new"), *options]


@pytest.mark.parametrize("scope", ["model", "matrix"])
@pytest.mark.parametrize("order", ["top", "bottom", "random"])
def test_what_a_run_writes_is_sound(tmp_path: Path, scope: str, order: str) -> None:
    write_run(tmp_path, scope, order)
    assert main(["verify", str(tmp_path / "mask"), "--scores", str(tmp_path / "scores")]) == 0
    assert main(select_from(tmp_path)) == 0
    assert main(["verify", str(tmp_path / "new"), "--scores", str(tmp_path / "scores")]) == 0
    esi_ds.Mask.load(tmp_path / "new").check_bits()
    assert {INDEX_NAME, "units.json", "digests.json"} < {file.name for file in (tmp_path / "new").iterdir()}


# What the file states → what is said about it, without digests and without scores.
FALSE_BY_ITSELF = {
    "total too small": ({"total_numel": "95"}, "total_numel is 95"),
    "total too large": ({"total_numel": "1000000"}, "ratio 0.2"),
    "total negative": ({"total_numel": "-136"}, "total_numel"),
    "total of 5,000 digits": ({"total_numel": "9" * 5000}, "total_numel"),
    "k": ({"k": "26"}, "k is 26"),
    "ratio": ({"ratio": "0.4"}, "ratio 0.4"),
    "ratio above 1": ({"ratio": "1.5"}, "ratio"),
    "ratio not a number": ({"ratio": "nan"}, "ratio"),
    "of": ({"of": "scored"}, "(scored)"),
    "of unknown": ({"of": "some"}, "of = 'some'"),
    "scope": ({"scope": "matrix", "threshold": "null"}, "weights selected"),
    "scope unknown": ({"scope": "layer"}, "scope"),
    "order unknown": ({"order": "middle"}, "order"),
    "criterion empty": ({"criterion": " "}, "criterion"),
    "contrastive": ({"contrastive": "maybe"}, "contrastive"),
    "threshold missing": ({"threshold": "null"}, "threshold is null"),
    "threshold negative": ({"threshold": "-1.0"}, "threshold"),
    "threshold infinite": ({"threshold": "inf"}, "threshold"),
    "seed": ({"seed": "x"}, "seed"),
    "fingerprint": ({"fingerprint": ""}, "fingerprint"),
    "counts": ({"counts": '{"model.layers.0.fused": 49, "model.layers.1.fused": -22}'}, "counts"),
    "counts of a string": ({"counts": '{"model.layers.0.fused": "9"}'}, "counts"),
    "counts of others": ({"counts": '{"model.layers.0.fused": 27}'}, "different parameters"),
    "offsets": ({"offsets": '{"model.layers.0.fused": 60, "model.layers.1.fused": 40}'}, "offset 60"),
    "offsets beyond": ({"offsets": '{"model.layers.0.fused": 40, "model.layers.1.fused": 100}'}, "ends at 148"),
    "shapes of 1e15": ({"shapes": '{"model.layers.0.fused": [1000000000000000], "model.layers.1.fused": [6, 8]}'}, ""),
    "shapes of 1e30": ({"shapes": f'{{"model.layers.0.fused": [{10**30}], "model.layers.1.fused": [6, 8]}}'}, "shape"),
    "shapes negative": ({"shapes": '{"model.layers.0.fused": [-6, -8], "model.layers.1.fused": [6, 8]}'}, "shape"),
    "shapes of nothing": ({"shapes": '{"model.layers.0.fused": [0, 8], "model.layers.1.fused": [6, 8]}'}, "shape"),
    "shapes torn": ({"shapes": '{"model.layers.0.fused": [6'}, "shapes"),
    "shapes nested": ({"shapes": "[" * 100_000}, "shapes"),
    "shapes twice": ({"shapes": '{"model.layers.0.fused": [6, 8], "model.layers.0.fused": [6, 8]}'}, "twice"),
}


@pytest.mark.parametrize("case", FALSE_BY_ITSELF)
def test_what_a_mask_states_contradicts_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    texts, problem = FALSE_BY_ITSELF[case]
    mask = write_run(tmp_path) / "mask"
    forget_digests(mask)
    state(mask, **texts)
    assert problem in refused(capsys, "verify", mask)
    for arguments in (["info", mask], select_from(tmp_path)) if case != "scope" else ():
        refused(capsys, *arguments)
    assert not (tmp_path / "new").exists() and not (tmp_path / ".new.tmp").exists()


# True by itself, but not what was written, nor what the scores say.
FALSE_BY_SCORES = {
    "total": ({"total_numel": "137"}, "total_numel"),
    "criterion": ({"criterion": "grad"}, "criterion"),
    "contrastive": ({"contrastive": "true"}, "contrastive"),
    "fingerprint": ({"fingerprint": "a:c"}, "fingerprint"),
    "seed": ({"seed": "4"}, "seed"),
    "order": ({"order": "bottom"}, "bits differ"),
    "random order": ({"order": "random", "threshold": "null"}, "bits differ"),
    "threshold": ({"threshold": "9.0"}, "threshold is 9.0"),
    "offsets": ({"offsets": '{"model.layers.0.fused": 39, "model.layers.1.fused": 87}'}, "metadata"),
    "shapes transposed": ({"shapes": '{"model.layers.0.fused": [8, 6], "model.layers.1.fused": [6, 8]}'}, "[8, 6]"),
    "ratio": ({"ratio": "0.2000001"}, "metadata"),
}


@pytest.mark.parametrize("case", FALSE_BY_SCORES)
def test_what_a_mask_states_is_not_what_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    """The digest in the index says so without the scores; without the digest the scores do, where they can."""
    texts, problem = FALSE_BY_SCORES[case]
    mask = write_run(tmp_path) / "mask"
    state(mask, **texts)
    for command in (["verify", mask], ["info", mask], ["compare", mask, mask], select_from(tmp_path)):
        assert "metadata differ from those that were written" in refused(capsys, *command)
    if problem != "metadata":
        forget_digests(mask)
        assert problem in refused(capsys, "verify", mask, "--scores", tmp_path / "scores")


def test_a_seed_that_is_not_the_random_orders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = write_run(tmp_path, order="random") / "mask"
    forget_digests(mask)
    state(mask, seed="4")
    assert "bits differ" in refused(capsys, "verify", mask, "--scores", tmp_path / "scores")


Rows = list[dict]
UNITS: dict[str, Callable[[Rows], object]] = {
    "an unknown role": lambda rows: rows[0].update(role="attention.x"),
    "an unscored role": lambda rows: rows[0].update(role="norm"),
    "another parameter": lambda rows: rows[0].update(parameter="model.layers.1.fused"),
    "no parameter": lambda rows: rows[0].update(parameter="model.layers.7.fused"),
    "another layer": lambda rows: rows[0].update(layer=1),
    "one too few": lambda rows: rows.pop(),
    "one twice": lambda rows: rows.append(dict(rows[0])),
    "overlap": lambda rows: rows[2].update(start=24),
    "a length of 1e15": lambda rows: rows[0].update(length=10**15),
    "a count of 1e15": lambda rows: rows[1].update(count=10**15),
    "a stride below the length": lambda rows: rows[1].update(stride=1),
    "a negative start": lambda rows: rows[0].update(start=-1),
    "a fraction": lambda rows: rows[0].update(start=0.5),
    "a string": lambda rows: rows[0].update(start="0"),
    "a key too few": lambda rows: rows[0].pop("stride"),
    "nothing": lambda rows: rows.clear(),
}


@pytest.mark.parametrize("case", UNITS)
def test_damaged_units(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    mask = write_run(tmp_path, scope="matrix") / "mask"
    forget_digests(mask)
    rows = json.loads((mask / "units.json").read_text())
    UNITS[case](rows)
    (mask / "units.json").write_text(json.dumps(rows))
    for command in (["verify", mask], ["info", mask], ["compare", mask, mask], select_from(tmp_path)):
        assert "units.json: does not hold the matrices of this mask" in refused(capsys, *command)
    assert not (tmp_path / "new").exists()


def test_units_that_are_not_those_that_were_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = write_run(tmp_path) / "mask"
    rows = json.loads((mask / "units.json").read_text())
    rows[0]["role"] = "attention.k"
    (mask / "units.json").write_text(json.dumps(rows))
    assert "units_sha256" in refused(capsys, "info", mask)
    (mask / "units.json").unlink()
    assert "units.json" in refused(capsys, "verify", mask)


def flip_bits(mask: Path) -> None:
    """One weight more and one less: the counts stay."""
    tensors = load_file(mask / FILE)
    bits = tensors["model.layers.0.fused"]
    first = int((bits != bits[0]).nonzero()[0])
    bits[0], bits[first] = bits[first].clone(), bits[0].clone()
    save_file(tensors, mask / FILE, metadata=Mask.load(mask).metadata)


def test_damaged_bits_are_read_by_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = (write_run(tmp_path / name) / "mask" for name in ("good", "bad"))
    flip_bits(bad)
    for command in (["verify", bad], ["info", bad], ["compare", good, bad], ["compare", bad, good]):
        assert "differ from those that were written" in refused(capsys, *command)
    model = nn.Module()
    model.embed = nn.Embedding(5, 8)
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.Module(), nn.Module()])
    for layer in model.model.layers:
        layer.fused = nn.Parameter(torch.randn(6, 8))
    esi_ds.MaskedAdamW(model, good)
    for damaged in (bad, esi_ds.Mask.load(bad)):
        with pytest.raises(UserError, match="differ from those that were written"):
            esi_ds.MaskedAdamW(model, damaged)


def test_reports_refuse_damaged_bits(tmp_path: Path) -> None:
    from esi_ds.launch.report import overlaps

    good, bad = (write_run(tmp_path / name) for name in ("good", "bad"))
    assert len(overlaps({"good": good, "bad": bad})) == 1
    flip_bits(bad / "mask")
    with pytest.raises(UserError, match="differ from those that were written"):
        overlaps({"good": good, "bad": bad})


def set_score(scores: Path, value: float) -> None:
    tensors = load_file(scores / FILE)
    tensors["model.layers.1.fused"].view(-1)[17] = value
    save_file(tensors, scores / FILE, metadata=read_tensor_folder(scores, "", "").metadata)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1.0, -1e-45, -0.0])
@pytest.mark.parametrize("order", ["top", "random"])
def test_scores_that_have_no_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, order: str) -> None:
    write_run(tmp_path)
    set_score(tmp_path / "scores", value)
    for command in (
        [*select_from(tmp_path), "--order", order],
        ["verify", tmp_path / "mask", "--scores", tmp_path / "scores"],
    ):
        assert "the score of model.layers.1.fused, flat index 17, is" in refused(capsys, *command)
    assert not (tmp_path / "new").exists()
    scores = torch.tensor([0.5, 0.0, value, 1.0])
    assert first_invalid(scores) == 2 and first_invalid(scores[:2]) is None
    with pytest.raises(ValueError, match="global position 12 is"):
        select([[ScoreRun(scores, 10)]], [1], Order(order), 20, lambda counts: counts)
    with pytest.raises(ValueError):
        median([scores], 4, lambda counts: counts)


def test_a_run_whose_scores_have_no_rank() -> None:
    """The second shard of an expert's parameter holds the score: its flat index is named, not that in the shard."""
    parameter = parameters()[2]
    shard = Shard(parameter, ((0, 4), (30, 40)), parameter.name)
    scores = torch.zeros(14)
    scores[6] = torch.inf
    with pytest.raises(UserError, match=r"select.criterion: the score of model.layers.1.fused, flat index 32, is inf"):
        check_scores(SimpleNamespace(scored=[shard]), {shard.name: scores}, "select.criterion")


@pytest.mark.parametrize("key", ["fingerprint", "criterion", "contrastive", "total_numel", "seed"])
def test_scores_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    write_run(tmp_path)
    other = {"fingerprint": "c:d", "criterion": "grad", "contrastive": "true", "total_numel": "137", "seed": "9"}[key]
    tensors = load_file(tmp_path / "scores" / FILE)
    metadata = read_tensor_folder(tmp_path / "scores", "", "").metadata
    save_file(tensors, tmp_path / "scores" / FILE, metadata={**metadata, key: other})
    for command in (select_from(tmp_path), ["verify", tmp_path / "mask", "--scores", tmp_path / "scores"]):
        assert f"are not those of the mask: {key} is" in refused(capsys, *command)
    assert not (tmp_path / "new").exists()


def flip_score(scores: Path) -> None:
    """Flip one bit of the lowest score, which no mask of the highest ones shows."""
    file = read_tensor_folder(scores, "", "").tensors["model.layers.1.fused"]
    content = bytearray(file.file.read_bytes())
    content[file.first + 4 * 17] ^= 1
    file.file.write_bytes(content)


def double_score(scores: Path) -> None:
    values = load_file(scores / FILE)["model.layers.1.fused"].view(-1)
    set_score(scores, 2 * float(values[17]) + 1)


def swap_scores(scores: Path) -> None:
    """Two rows of one matrix: the header, the sum and every statistic stay."""
    tensors = load_file(scores / FILE)
    tensors["model.layers.1.fused"] = tensors["model.layers.1.fused"].flip(0).contiguous()
    save_file(tensors, scores / FILE, metadata=read_tensor_folder(scores, "", "").metadata)


@pytest.mark.parametrize("damage", [flip_score, double_score, swap_scores])
def test_scores_that_are_not_those_that_were_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    """All finite, ≥ 0 and in the right shape: only the digests tell."""
    write_run(tmp_path)
    mask, scores = tmp_path / "mask", tmp_path / "scores"
    expected = "the scores of model.layers.1.fused differ from those that were written (digests.json)"
    damage(scores)
    for command in (select_from(tmp_path), ["verify", mask, "--scores", scores]):
        assert expected in refused(capsys, *command)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"perturb\.scores .*differ from those that were written"):
        read_scores(scores, [], "perturb.scores")
    (scores / "digests.json").unlink()  # as a version without digests wrote them
    assert main([str(argument) for argument in select_from(tmp_path)]) == 0
    assert read_scores(scores, [], "perturb.scores")[0] == {}


def test_ranks_share_the_digests_of_scores(tmp_path: Path) -> None:
    write_run(tmp_path)
    flip_score(tmp_path / "scores")
    scores = ScoreFolder(tmp_path / "scores")
    parts = [scores.problems(rank, 3) for rank in range(3)]
    assert sum(parts, []) == scores.problems() and [len(part) for part in parts].count(1) == 1


def test_scores_of_another_model_or_without_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, fingerprint in (("one", "a:b"), ("two", "c:d")):
        write_run(tmp_path / name, fingerprint=fingerprint)
    os.rename(tmp_path / "two/scores", tmp_path / "one/others")
    mask, others = tmp_path / "one/mask", tmp_path / "one/others"
    shown = refused(capsys, "select", mask, tmp_path / "new", "--scores", others, "--ratio", "0.1")
    assert "fingerprint" in shown and not (tmp_path / "new").exists()
    save_file(load_file(others / FILE), others / FILE, metadata={"format": "esi-mask/1"})
    assert "format" in refused(capsys, "select", mask, tmp_path / "new", "--scores", others, "--ratio", "0.1")
    with pytest.raises(UserError, match="perturb.scores"):
        read_scores(others, [], "perturb.scores")


@pytest.mark.parametrize("form", [{}, {"format": "pt"}])
def test_scores_that_lost_their_format_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str], form) -> None:
    for name, fingerprint in (("one", "a:b"), ("two", "c:d")):
        file = write_run(tmp_path / name, fingerprint=fingerprint) / "scores" / FILE
        kept = read_tensor_folder(file.parent, "--scores", "").metadata
        save_file(load_file(file), file, metadata={**{key: kept[key] for key in kept if key != "format"}, **form})
    assert main([str(argument) for argument in select_from(tmp_path / "one")]) == 0
    assert "taken as the mask's" not in capsys.readouterr().out
    assert "fingerprint" in refused(capsys, "verify", tmp_path / "one/mask", "--scores", tmp_path / "two/scores")


def test_a_perturbation_says_that_scores_name_no_model(tmp_path: Path) -> None:
    scores = write_run(tmp_path) / "scores"
    save_file(load_file(scores / FILE), scores / FILE)
    lines: list[str] = []
    inputs = SimpleNamespace(scores=scores, mask=Mask.load(tmp_path / "mask"))
    stage: Any = SimpleNamespace(inputs=inputs, tracker=SimpleNamespace(log=lines.append))
    stage._select, stage._count = lambda *arguments: {}, sum
    assert PerturbRun._scores(stage, SimpleNamespace(scored=[])) == {}
    assert lines == [f"{scores} does not say whose scores it holds: taken as the mask's"]


def test_scores_from_another_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They may say nothing of themselves, and lie in one file without an index; what they select shows whose they are.
    Those of other weights select others than the mask holds."""
    for name, seed in (("one", 3), ("two", 4)):
        scores = write_run(tmp_path / name, seed=seed) / "scores"
        save_file(load_file(scores / FILE), scores / "model.safetensors", metadata={"format": "pt"})
        for file in (FILE, INDEX_NAME, "digests.json"):
            (scores / file).unlink()
    assert read_scores(scores, [], "perturb.scores") == ({}, None)
    assert main([str(argument) for argument in select_from(tmp_path / "one")]) == 0
    assert "does not say whose scores it holds: taken as the mask's" in capsys.readouterr().out
    assert Mask.load(tmp_path / "one/new").header.seed == 3
    for mask in ("mask", "new"):
        assert main(["verify", str(tmp_path / "one" / mask), "--scores", str(tmp_path / "one/scores")]) == 0
        assert "does not say whose scores it holds: taken as the mask's" in capsys.readouterr().out
    assert "bits differ" in refused(capsys, "verify", tmp_path / "one/mask", "--scores", scores)
    assert _scores_folder(str(scores), Mask.load(tmp_path / "two/mask"), []) == scores


NAMES = ["../other/" + FILE, "/tmp/" + FILE, "..", "units.json", INDEX_NAME, "a/b.safetensors", ""]


@pytest.mark.parametrize("kind", ["mask", "scores"])
@pytest.mark.parametrize("name", NAMES)
def test_an_index_names_files_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str
) -> None:
    write_run(tmp_path)
    other = write_run(tmp_path / "other") / "mask"
    before = {file.name: file.read_bytes() for file in other.iterdir()}
    index = tmp_path / kind / INDEX_NAME
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "weight_map": dict.fromkeys(content["weight_map"], name)}))
    assert INDEX_NAME in refused(capsys, *select_from(tmp_path))
    assert not (tmp_path / "new").exists() and not (tmp_path / ".new.tmp").exists()
    assert {file.name: file.read_bytes() for file in other.iterdir()} == before


def test_an_output_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A link that leads nowhere is something too."""
    write_run(tmp_path)
    (tmp_path / "new").symlink_to(tmp_path / "nowhere")
    assert "exists already" in refused(capsys, *select_from(tmp_path))
    assert (tmp_path / "new").is_symlink()


TORN = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"weight_map": 3}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("name", [INDEX_NAME, FILE, "units.json", "digests.json"])
@pytest.mark.parametrize("content", [*TORN, "fifo", "folder"], ids=range(len(TORN) + 2))
def test_torn_and_foreign_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | str
) -> None:
    """One line that names the file; a pipe would be waited for without end."""
    write_run(tmp_path)
    for kind in ("mask",) if name == "units.json" else ("mask", "scores"):
        file = tmp_path / kind / name
        file.rename(tmp_path / "kept")
        if content == "fifo":
            os.mkfifo(file)
        elif content == "folder":
            file.mkdir()
        else:
            file.write_bytes(content)
        assert name in refused(capsys, "verify", tmp_path / "mask", "--scores", tmp_path / "scores")
        if name != "digests.json" or kind == "scores":
            assert name in refused(capsys, *select_from(tmp_path))
        file.rmdir() if content == "folder" else file.unlink()
        (tmp_path / "kept").rename(file)


def test_digests_of_other_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = write_run(tmp_path) / "mask"
    digests = json.loads((mask / "digests.json").read_text())
    for changed in ({}, {**digests, "x": "0"}, {"model.layers.0.fused": digests["model.layers.0.fused"]}):
        (mask / "digests.json").write_text(json.dumps(changed))
        assert "digests.json" in refused(capsys, "verify", mask)


def test_paths_that_are_no_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    for path in (tmp_path / "nowhere", tmp_path / "mask" / FILE, "x" * 5000, "\0", "~nouser/mask", ""):
        refused(capsys, "info", path)
        with pytest.raises(UserError, match=FIELD):
            load_mask(str(path), "tune.mask")


def test_a_mask_from_another_tool(tmp_path: Path) -> None:
    """Without digests, units, offsets and what has a default; its ratio may be the quotient itself, and its criterion
    another tool's."""
    mask = write_run(tmp_path) / "mask"
    forget_digests(mask)
    for name in ("units.json", "digests.json"):
        (mask / name).unlink()
    header = Mask.load(mask).header
    header = replace(header, criterion="wanda")
    texts = mask_texts(replace(header, offsets=None, ratio=header.k / header.total_numel))
    for key in ("seed", "of", "scope", "contrastive"):
        del texts[key]
    save_file(load_file(mask / FILE), mask / FILE, metadata=texts)
    assert main(["verify", str(mask)]) == 0
    assert Mask.load(mask).header == replace(header, offsets=None, ratio=header.k / header.total_numel, seed=0)


def test_a_mask_that_states_no_offsets_and_no_matrices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal scores go by the order of the shapes, layer and role by the names; a random order needs the positions."""
    modules = dict.fromkeys(("self_attn.v_proj", "mlp.experts.1.up_proj", "mlp.shared_expert.up_proj"), "weight")
    modules["mlp.experts"] = "down_proj"
    names = [f"model.layers.{layer}.{name}.{leaf}" for layer in (1, 0) for name, leaf in modules.items()]
    scores = {name: (torch.arange(24) % 3 + 1).reshape((2, 3, 4) if "down" in name else (4, 6)) / 2 for name in names}
    masks = {name: values == 1.5 for name, values in scores.items()}
    masks[names[-1]].view(-1)[-4:] = False  # the last two of many equal scores
    folder = write_mask(tmp_path / "mask", masks, total_numel="300", threshold="1.5")
    write_scores_alone(tmp_path / "scores", scores)
    assert main(["verify", str(folder), "--scores", str(tmp_path / "scores")]) == 0
    assert main([str(argument) for argument in select_from(tmp_path)]) == 0
    new = Mask.load(tmp_path / "new")
    assert torch.cat([new.bits(name) for name in new.names]).nonzero().flatten().tolist() == list(range(2, 90, 3))
    at_random = ["select", folder, tmp_path / "more", *select_from(tmp_path)[3:], "--order", "random"]
    assert "random order follows from" in refused(capsys, *at_random)
    assert main(["info", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert {line.split()[0] for line in shown.splitlines() if line} >= {
        *("attention.v", "expert.up", "shared.up", "other"),
        *("0", "1"),
    }


def write_scores_alone(folder: Path, scores: dict[str, torch.Tensor]) -> None:
    """In one file, without an index and metadata."""
    folder.mkdir()
    save_file(scores, folder / "model.safetensors")


@pytest.mark.parametrize("stating_first", [True, False])
def test_masks_are_compared_by_the_matrices_of_the_one_that_states_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stating_first: bool
) -> None:
    mask = write_run(tmp_path) / "mask"
    loaded = Mask.load(mask)
    bits = {name: loaded.tensor(name) for name in reversed(loaded.names)}
    other = write_mask(tmp_path / "other", bits, total_numel=str(loaded.total_numel))
    main(["compare", *map(str, (mask, other) if stating_first else (other, mask))])
    shown = capsys.readouterr().out
    assert "role attention.v" in shown and "layer 1" in shown and "role other" not in shown
    assert "made with others" not in shown
    assert all(line.split()[-2:] == ["100.00%", "1.0000"] for line in shown.splitlines() if line.startswith("role"))


@pytest.mark.parametrize("threshold", ["null", "0.0", "7.5", "nan", "none"])
def test_the_threshold_of_a_random_mask_says_nothing(tmp_path: Path, threshold: str) -> None:
    mask = write_run(tmp_path, order="random") / "mask"
    forget_digests(mask)
    state(mask, threshold=threshold)
    assert Mask.load(mask).header.threshold is None
    assert main(["verify", str(mask), "--scores", str(tmp_path / "scores")]) == 0


def test_a_threshold_is_a_number_of_fp32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its shortest text, as NumPy writes it, is another number of 64 bits."""
    scores = {"a": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    write_scores_alone(tmp_path / "scores", scores)
    for text, code in (("0.3", 0), (repr(float(scores["a"][2])), 0), ("0.30000004", 2), ("1e300", 2)):
        mask = write_mask(tmp_path / "mask", {"a": scores["a"] > 0.25}, threshold=text)
        assert main(["verify", str(mask), "--scores", str(tmp_path / "scores")]) == code, text
    assert "threshold is 1e+300, the scores have 0.30000001" in capsys.readouterr().out


def test_a_mask_in_one_file_without_an_index(tmp_path: Path) -> None:
    mask = write_mask(tmp_path / "mask", {"a": torch.tensor([True, False, True])})
    (mask / FILE).rename(mask / "model.safetensors")
    (mask / INDEX_NAME).unlink()
    assert Mask.load(mask).tensor("a").tolist() == [True, False, True] and main(["verify", str(mask)]) == 0
    (mask / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.safetensors: is missing or damaged"):
        Mask.load(mask)


def test_the_order_of_parameters_is_that_of_their_offsets(tmp_path: Path) -> None:
    mask = write_run(tmp_path) / "mask"
    forget_digests(mask)
    names, shapes = Mask.load(mask).names, Mask.load(mask).metadata["shapes"]
    state(mask, shapes=json.dumps(dict(reversed(json.loads(shapes).items()))))
    assert Mask.load(mask).names == names and main(["verify", str(mask), "--scores", str(tmp_path / "scores")]) == 0


def test_a_threshold_that_is_no_number_and_not_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = write_run(tmp_path) / "mask"
    state(mask, threshold="None")
    assert "threshold = 'None' is not a number, and not null" in refused(capsys, "info", mask)


def test_a_masks_own_ratio_selects_as_many_weights_as_it_holds(tmp_path: Path) -> None:
    """A quotient k / n, of which the product with n is below k."""
    header, total, k = Mask.load(write_run(tmp_path) / "mask").header, 2_189_376, 20_055
    assert int(k / total * total) == k - 1
    own = replace(header, k=k, total_numel=total, ratio=k / total, shapes={"a": (total - 8,)})
    assert (own.k_of(k / total), own.k_of(0.5), own.k_of(1.0)) == (k, total // 2, total - 8)
    assert replace(own, of="scored").k_of(0.5) == (total - 8) // 2
