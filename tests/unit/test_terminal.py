"""Control characters of texts that others wrote do not reach the terminal, the log or the model card."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from esi_ds import status
from esi_ds.artifacts import RunFolder
from esi_ds.config import validate
from esi_ds.config.yaml import parse_yaml
from esi_ds.core.trained import Trained
from esi_ds.data.conversations import TuningSet
from esi_ds.errors import UserError
from esi_ds.report.card import model_card
from esi_ds.terminal import clean_output, printable
from esi_ds.tracking import Tracker

HOSTILE = "a\x1b]0;title\x07b\x1b[2Jc\x9b31m\x7f\u202ed\ud800\r\x08"


@pytest.mark.parametrize("character", [*"\x00\x07\x08\r\x1b\x7f\x85\x9b\x9d\u202e\u2066", "\ud83d"])
def test_control_characters_are_written_out(character: str) -> None:
    shown = printable(f"a{character}b")
    assert character not in shown and shown.startswith("a\\") and shown.endswith("b")
    assert shown.isascii()


def test_what_people_write_stays() -> None:
    text = "two\nlines\tünïcode 漢字 \N{WINKING FACE} العربية \\x1b"
    assert printable(text) == text


def test_errors_and_everything_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(str(UserError(HOSTILE, HOSTILE, HOSTILE, HOSTILE))) == str(UserError(*[HOSTILE] * 4))
    before = sys.stdout, sys.stderr
    with clean_output():
        print(HOSTILE)
        print(HOSTILE, file=sys.stderr)
        sys.stdout.writelines([HOSTILE])
        sys.stdout.flush()
        assert sys.stdout.isatty() is False
    assert (sys.stdout, sys.stderr) == before
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert "\x1b" not in text and "\\x1b[2J" in text and "\r" in text  # progress bars are made of returns


def test_log_and_progress_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(tmp_path, enabled=True, tensorboard=False, stage="eval") as tracker:
        tracker.log(HOSTILE)
        with tracker.progress(total=1, initial=0, unit="x", description=HOSTILE) as bar:
            bar.update(1)
    said = capsys.readouterr()
    for text in (said.out, said.err, (tmp_path / "log.txt").read_text()):
        assert "\\x1b[2J" in text and "\x1b" not in text and "\x07" not in text


def test_the_status_of_a_hostile_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "a\x1b[2Jb"
    run.mkdir()
    (run / "config.yaml").touch()
    assert status.main([str(run), str(tmp_path / "\x1b[2J")]) == 2
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and "\\x1b[2Jb: not started" in said.out


@pytest.mark.parametrize("path", ["org/model", "a: b #c", 'x\ntags: [evil]\n---\n"', "- &a", "\x1b[2J|<b>`", "yes"])
def test_the_front_matter_of_a_model_card_holds_the_path_and_nothing_else(path: str) -> None:
    config = validate(
        {"run": {"output_dir": "x"}, "model": {"path": path}, "tune": {"mask": "m", "data": {"path": "a|b\nc"}}}
    )
    header = SimpleNamespace(criterion="esi\x1b[2J", order="top", ratio=0.5)
    mask = SimpleNamespace(fingerprint="f", bits_sha256="b", k=1, total_numel=2, header=header, shapes={})
    card = model_card(
        config,
        config.tune,
        stage="set",
        fingerprint="f",
        trained=Trained(mask, "selected", "freeze", {}),
        ranks=2,
        rows=TuningSet((), "", (), 0, 90, "s", broken_up="<|sql|> in 2 rows", last_only="1 row"),
        benign=None,
        num_benign=0,
        dequantised_from=None,
        rounded_from=None,
        remarks={"remarks": "from step 3 on"},
    )
    matter, body = card.removeprefix("---\n").split("\n---\n\n", 1)
    assert parse_yaml(matter) == {"base_model": path, "tags": ["esi_ds", "set"]}
    assert "\x1b" not in card
    lines = {"| rows | a\\|b c, sha256 s |", "| remarks | from step 3 on |"}
    lines.add("| special tokens broken up in rows | \\<\\|sql\\|\\> in 2 rows |")
    lines.add("| only the last answer learnt in rows | 1 row |")
    assert lines <= set(body.splitlines())


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"kind": "x"}', "[" * 100_000], ids=range(6))
def test_pages_of_a_torn_or_foreign_report(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from esi_ds.launch.report import main

    (tmp_path / "report.json").write_text(content)
    assert main([str(tmp_path)]) == 2
    assert f"error: RUN = {tmp_path}/report.json" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("share", "mode"), [(None, 0o700), ("private", 0o700), ("group", 0o750), ("all", 0o755)])
def test_who_may_read_a_run_folder(share: str | None, mode: int, tmp_path: Path) -> None:
    """Also one that was there before, as an empty folder or as that of an earlier version."""
    run = {"output_dir": "x"} | ({"share": share} if share else {})
    (tmp_path / "old").mkdir(mode=0o755)
    for name in ("new/run", "old"):
        RunFolder(str(tmp_path / name)).open(validate({"run": run, "model": {"path": "a"}}))
        assert (tmp_path / name).stat().st_mode & 0o777 == mode
    again = validate({"run": {"output_dir": "x", "share": "all"}, "model": {"path": "a"}})
    RunFolder(str(tmp_path / "old")).open(again)
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o755


def test_a_run_folder_keeps_the_group_of_its_project(tmp_path: Path) -> None:
    """Folders of projects are set-group-ID, so that access and quota are the group's."""
    project = tmp_path / "project"
    project.mkdir()
    project.chmod(0o2770)
    RunFolder(str(project / "run")).create("group")
    assert (project / "run").stat().st_mode & 0o7777 == 0o2750
