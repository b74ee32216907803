"""Commands and configs that pages show: their files, flags, commands, make targets and keys exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from esi_ds import ask, mask, shipped
from esi_ds.cli import make_parser
from esi_ds.command import STAGES, TOOLS
from esi_ds.config import Config, validate
from esi_ds.config.yaml import apply_override, parse_yaml
from esi_ds.errors import UserError

PAGES = sorted([ROOT / "README.md", ROOT / "slurm/README.md", *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```(bash|yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MODULES = {f"esi_ds.launch.{stage}" for stage in STAGES}
TOOL_MODULES = {module for module, _ in TOOLS.values()}
PLACEHOLDER = re.compile(r"^([A-Z_]+|[a-z]\.yaml|my\.yaml|(esi|set|spa|eval)\.yaml)$")  # files that a reader has
SECTIONS = {"run": {"output_dir": "x"}, "model": {"path": "x"}}


def blocks(kind: str) -> list[tuple[str, str]]:
    """(page, text) of every code block of a language."""
    return [
        (str(page.relative_to(ROOT)), text)
        for page in PAGES
        for language, text in BLOCK.findall(page.read_text())
        if language == kind
    ]


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line of the bash blocks, continued lines joined, comments and environment left out."""
    found = []
    for page, text in blocks("bash"):
        for line in text.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                words = shlex.split(part, comments=True)
                if words:
                    found.append((page, shlex.join(words)))
    return found


def stage_and_arguments(words: list[str]) -> tuple[str, list[str]] | None:
    """The stage that a command runs, whatever launches it, and what comes after; None for other commands."""
    for number, word in enumerate(words):
        script = re.fullmatch(r"(?:launch|slurm)/(\w+)\.(?:py|sbatch)", word)
        if script and script[1] in STAGES:
            return script[1], words[number + 1 :]
        if word in MODULES:
            return word.rsplit(".", 1)[-1], words[number + 1 :]
        if word == "esi-ds" and words[number + 1] in STAGES:
            return words[number + 1], words[number + 2 :]
    return None


def check(words: list[str]) -> None:
    """Raise for what a command names and the project does not have."""
    for word in words:
        if re.fullmatch(r"(launch|slurm|examples|configs|ds_configs|tests)/[\w./-]+", word):
            assert (ROOT / word).exists(), word
    if "esi-ds" in words:
        command = words[words.index("esi-ds") + 1]
        assert command in {*STAGES, *TOOLS} or command.startswith(("COMMAND", "-", "esi|")), command
    if "-m" in words and (module := words[words.index("-m") + 1]).startswith("esi_ds"):
        assert module in MODULES | TOOL_MODULES or (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert targets >= {word for word in words[1:] if re.fullmatch(r"[a-z][\w-]*", word)}, words
    run = stage_and_arguments(words)
    if run is None:
        return
    stage, arguments = run
    arguments = [word for word in arguments if word not in ("...", "[key.path=value", "[key.path=value ...]")]
    if "--config" not in arguments:
        return
    options = make_parser(stage).parse_intermixed_args(arguments)  # exits for an unknown flag
    raw: dict = {}
    if not PLACEHOLDER.match(options.config):
        file = Path(ROOT / options.config)
        raw = parse_yaml((file if file.is_file() else shipped.recipe(options.config)).read_text())
    for override in options.overrides:
        if not override.startswith("-"):
            apply_override(raw, override)
    validate({**SECTIONS, **raw})


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_name_what_exists(page: str, command: str) -> None:
    words = shlex.split(command)
    try:
        check(words)
    except (UserError, SystemExit) as problem:
        pytest.fail(f"{page}: {command}: {problem}")


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_configs_are_valid(page: str, text: str) -> None:
    """A block shows a whole config, or sections of one."""
    raw = yaml.safe_load(text)
    if "<" in text or not isinstance(raw, dict) or not set(raw) <= set(Config.model_fields):
        pytest.skip("a schema, or part of a section")
    if "tune" in raw:
        raw["tune"] = {"mask": "x", "data": {"path": "x"}, **raw["tune"]}
    validate({**SECTIONS, **raw})


def comment_commands(text: str) -> list[list[str]]:
    """The words of every ``esi-ds`` command in a recipe's comments, continued lines joined."""
    joined = re.sub(r"\\\n *# +", "", text)
    return [shlex.split(command) for command in re.findall(r"^ *# (esi-ds .+)$", joined, re.MULTILINE)]


def test_commands_in_the_comments_of_recipes_make_what_the_recipes_read() -> None:
    """``esi-ds mask select`` starts from the mask that SPA freezes, ``esi-ds ask`` writes the responses of ESI."""
    found = {"mask": 0, "ask": 0}
    for name, file in shipped.recipes().items():
        config = parse_yaml(file.read_text())
        for _, command, *arguments in comment_commands(file.read_text()):
            found[command] += 1
            if command == "mask":
                options = mask._parser().parse_args(arguments)
                run = Path(options.mask).parent
                assert options.mask == config["tune"]["mask"] and options.scores == run / "scores", name
                assert options.ratio == 0.1 and options.output.parent == run, name
            else:
                assert str(ask._parser().parse_args(arguments).output) == config["data"]["responses"], name
    assert found == {"mask": 18, "ask": 2}


def test_the_checks_can_fail() -> None:
    for wrong in (
        "deepspeed launch/esi.py --config configs/dense/missing.yaml",
        "deepspeed launch/esi.py --config llama3-8b --unknown",
        "deepspeed --module esi_ds.launch.esi --config llama3-8b select.ration=0.1",
        "esi-ds frobnicate",
        "make frobnicate",
        "python -m esi_ds.frobnicate",
    ):
        with pytest.raises((AssertionError, UserError, SystemExit)):
            check(shlex.split(wrong))
