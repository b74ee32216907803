"""What pages show of commands, configs and Python exists: files, programs, options, make targets, keys and names."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from importlib.util import find_spec
from itertools import dropwhile, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

import esi_ds
from esi_ds import ask, mask, shipped
from esi_ds.cli import make_parser
from esi_ds.command import STAGES, TOOLS
from esi_ds.config import Config, validate
from esi_ds.config.needs import require_esi, require_eval, require_perturb, require_tune
from esi_ds.config.yaml import apply_override, parse_yaml
from esi_ds.errors import UserError

PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "slurm/README.md", "tiny_models/README.md")),
        *(page for page in ROOT.glob("docs/*.md") if page.name != "log.md"),  # which names what there was on its day
    ]
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OPTIONAL = re.compile(r"(?<= )\[([^\]\n]*)\](?=\s)")  # of a command: [--seeds 0-4], [launcher options]
VARIABLE = re.compile(r"[A-Z_]+=")
EXTRAS = re.compile(r"(?:\besi_ds|[\s'\"]\.)\[([\w,]+)\]")  # pip install 'esi_ds[mpi]', pip install '.[eval]'
PLACEHOLDER = re.compile(r"^([A-Z_]+(\.yaml)?|[a-z]\.yaml|my\.yaml|(esi|set|spa|eval)\.yaml)$")  # files of the reader's
SECTIONS = {"run": {"output_dir": "x"}, "model": {"path": "x"}}
PROGRAMS = {
    *("make", "pip", "python", "esi-ds", "hf", "tensorboard", "source", "export", "slurm/pipeline.sh", "$EDITOR"),
    *("deepspeed", "torchrun", "srun", "sbatch", "mpirun"),
}
STAGE_MODULES = {f"esi_ds.launch.{stage}" for stage in STAGES}
NEEDS: dict[str, Callable[[Config], Any]] = {
    "esi": require_esi,
    "set": require_tune,
    "spa": require_tune,
    "perturb": require_perturb,
    "eval": require_eval,
}


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every code block of a language."""
    return [
        (str(page.relative_to(ROOT)), text)
        for page in PAGES
        for found, text in BLOCK.findall(page.read_text())
        if found == language
    ]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return BLOCK.sub("", page.read_text())


def commands_of(text: str) -> Iterator[str]:
    """The commands of a bash block: continued lines joined, without comments, without variables set before a command,
    and without the brackets that mark what may be left out."""
    text = OPTIONAL.sub(lambda match: match[1] if match[1].startswith("-") else "", text.replace("\\\n", " "))
    for line in text.splitlines():
        for part in line.split(" && "):
            words = list(dropwhile(VARIABLE.match, shlex.split(part, comments=True)))
            if words:
                yield shlex.join(words)


def commands() -> list[tuple[str, str]]:
    """(page, command) of all bash blocks."""
    return [(page, command) for page, text in blocks("bash") for command in commands_of(text)]


def inline_commands() -> list[tuple[str, str]]:
    """(page, command) of every command within a sentence, which may be the beginning of one."""
    found = []
    for page in PAGES:
        for code in re.findall(r"`([^`]+)`", prose(page)):
            if " " in code and code.split()[0] in PROGRAMS:
                found.append((str(page.relative_to(ROOT)), " ".join(code.split())))
    return found


def is_placeholder(name: str) -> bool:
    """Whether a module or command stands for one that the reader puts there: STAGE, COMMAND."""
    return name.rpartition(".")[2].isupper()


def module_and_arguments(words: list[str]) -> tuple[str, list[str]] | None:
    """The module that a command runs with -m or --module, and what comes after it."""
    for option in ("-m", "--module"):
        if option in words[:-1]:
            number = words.index(option) + 1
            return words[number], words[number + 1 :]
    return None


def make_targets() -> dict[str, str]:
    """Target of the Makefile → its recipe."""
    rules = re.findall(r"^([\w-]+):.*\n((?:\t.*\n)*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return dict(rules)


def check_names(words: list[str]) -> None:
    """Raise for a program, file, command, module or make target that does not exist."""
    program = words[0]
    assert program in PROGRAMS, program
    for word in words:
        value = word.rpartition("=")[2]
        if re.fullmatch(r"(launch|slurm|examples|configs|ds_configs|tests|study)/[\w./-]+", value):
            assert (ROOT / value).exists(), value
    for option, file in zip(words, words[1:], strict=False):
        assert program != "pip" or option not in ("-c", "-r", "--constraint") or (ROOT / file).is_file(), file
    if "esi-ds" in words[:-1]:
        command = words[words.index("esi-ds") + 1]
        assert command in {*STAGES, *TOOLS} or is_placeholder(command) or command.startswith("-"), command
    module = module_and_arguments(words)
    if module is not None and not is_placeholder(module[0]):
        assert find_spec(module[0]) is not None, module[0]  # raises ImportError where its package does not exist
    if program == "make":
        assert {word for word in words[1:] if "=" not in word} <= set(make_targets()), words


def check_arguments(words: list[str]) -> None:
    """Raise for arguments that the program that a command runs would refuse. Nothing is run."""
    if words[0] == "make":
        check_make(words[1:])
    if words[0] == "slurm/pipeline.sh":
        check_pipeline(words[1:])
    for number, word in enumerate(words):
        script = re.fullmatch(r"(?:launch|slurm)/(\w+)\.(?:py|sbatch)", word)
        if script:
            return check_command(script[1], words[number + 1 :])
        if word == "esi-ds":
            return check_command(words[number + 1], words[number + 2 :])
    module = module_and_arguments(words)
    if module is not None:
        check_module(*module)


def check_command(command: str, arguments: list[str]) -> None:
    """Arguments of a stage or a tool."""
    if command in TOOLS:
        check_module(TOOLS[command][0], arguments)
    elif command in STAGES:
        check_stage(command, arguments)


def check_module(name: str, arguments: list[str]) -> None:
    """Arguments of a module, by its own parser, if it has one."""
    if name in STAGE_MODULES:
        return check_stage(name.rpartition(".")[2], arguments)
    if name == "esi_ds":
        return check_command(arguments[0], arguments[1:])
    is_package = (ROOT / name.replace(".", "/")).is_dir()
    module = importlib.import_module(f"{name}.__main__" if is_package else name)
    if hasattr(module, "make_parser"):
        module.make_parser().parse_args(arguments)
    elif hasattr(module, "parse"):
        module.parse(arguments)


def check_stage(stage: str, arguments: list[str]) -> None:
    """Options, the config and its overrides, and what the stage needs of them."""
    options = make_parser(stage).parse_intermixed_args(arguments)
    raw = raw_config(options.config)
    for override in options.overrides:
        apply_override(raw, override)
    config = validate({**SECTIONS, **raw})
    if not PLACEHOLDER.match(options.config):
        NEEDS[stage](config)


def raw_config(name: str) -> dict[str, Any]:
    """A config as it is written, by file or recipe; empty for a file that the reader has. Raises UserError."""
    if PLACEHOLDER.match(name):
        return {}
    file = ROOT / name
    raw: dict[str, Any] = parse_yaml((file if file.is_file() else shipped.recipe(name)).read_text())
    return raw


def check_make(words: list[str]) -> None:
    """Variables that a target's recipe uses; what it hands over to a module is checked by that module's parser."""
    targets = [word for word in words if "=" not in word]
    for name, _, value in (word.partition("=") for word in words if "=" in word):
        recipe = "".join(make_targets()[target] for target in targets)
        module = re.search(rf"-m ([\w.]+) \$\({name}\)", recipe)
        assert module, f"{' '.join(targets)} does not read {name}"
        check_module(module[1], shlex.split(value))


def check_pipeline(words: list[str]) -> None:
    """Options of slurm/pipeline.sh, each with a value, and its configs; sbatch's come after ``--``."""
    script = (ROOT / "slurm/pipeline.sh").read_text()
    cases = re.findall(r"^    (--\w[\w| -]*)\)", script.partition("case $1 in")[2].partition("esac")[0], re.MULTILINE)
    known = {option for case in cases for option in case.split(" | ")}
    own = words[: words.index("--")] if "--" in words else words
    options, values = own[::2], own[1::2]
    assert len(options) == len(values) and set(options) <= known, own
    assert {"--runs", "--esi"} <= set(options), own
    for option, value in zip(options, values, strict=True):
        stage = option.removeprefix("--")
        if stage in STAGES and not PLACEHOLDER.match(value):
            NEEDS[stage](validate({**SECTIONS, **raw_config(value)}))


def check_extras(text: str) -> None:
    """``esi_ds[EXTRA]`` and ``.[EXTRA]`` against setup.cfg."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for names in EXTRAS.findall(text):
        assert set(names.split(",")) <= set(setup["options.extras_require"]), names


def check_python(text: str) -> None:
    """A block compiles; names of esi_ds exist, and calls of them have arguments that they take."""
    tree = ast.parse(text)
    imported: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "esi_ds":
            module = importlib.import_module(node.module)
            names = {alias.name for alias in node.names}
            assert names <= set(getattr(module, "__all__", dir(module))), (node.module, names)
            imported |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "esi_ds":
                    importlib.import_module(alias.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "esi_ds":
                assert node.attr in esi_ds.__all__ or find_spec(f"esi_ds.{node.attr}"), node.attr
            elif node.value.id in imported:
                assert hasattr(imported[node.value.id], node.attr), ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(imported[node.func.id]).bind(*node.args, **keywords)


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_are_accepted(page: str, command: str) -> None:
    words = shlex.split(command)
    try:
        check_names(words)
        check_arguments(words)
    except (UserError, SystemExit, ImportError) as problem:
        pytest.fail(f"{page}: {command}: {problem}")


@pytest.mark.parametrize(("page", "command"), inline_commands())
def test_commands_in_sentences_name_what_exists(page: str, command: str) -> None:
    check_names(shlex.split(command))


def test_commands_stand_in_code_blocks() -> None:
    """An indented line is read by no other check."""
    for page in PAGES:
        for line in re.findall(r"^ {4,}(\S.*)", prose(page), re.MULTILINE):
            words = dropwhile(VARIABLE.match, line.split())
            assert next(words, "") not in PROGRAMS, f"{page.relative_to(ROOT)}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_extras_exist(page: Path) -> None:
    check_extras(page.read_text())


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_compiles_and_names_what_exists(page: str, text: str) -> None:
    check_python(text)


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
    """``esi-ds mask select`` makes the mask that SPA freezes, ``esi-ds ask`` writes the responses of ESI."""
    found = {"mask": 0, "ask": 0}
    for name, file in shipped.recipes().items():
        config = parse_yaml(file.read_text())
        for _, command, *arguments in comment_commands(file.read_text()):
            found[command] += 1
            if command == "mask":
                options = mask.make_parser().parse_args(arguments)
                run = Path(options.mask).parent
                assert str(options.output) == config["tune"]["mask"] and options.scores == run / "scores", name
                assert options.ratio == 0.1 and options.output.parent == run, name
            else:
                assert str(ask.make_parser().parse_args(arguments).output) == config["data"]["responses"], name
    assert found == {"mask": 18, "ask": 2}


def differences(shown: Any, written: Any, key: str = "") -> Iterator[str]:
    """Keys of a config on a page that the recipe does not have, or has with other values."""
    if isinstance(shown, dict) and isinstance(written, dict):
        for name, value in shown.items():
            yield from differences(value, written.get(name), f"{key}.{name}".lstrip("."))
    elif shown != written and not (key == "deepspeed" and Path(shown).stem == Path(written).stem):
        yield f"{key} = {shown}, not {written}"


def resolved(words: list[str]) -> dict[str, Any]:
    """The config of a stage's command, with its overrides."""
    number = words.index("--config")
    raw = raw_config(words[number + 1])
    for word in words[number + 2 :]:
        if re.match(r"\w+(\.\w+)+=", word):
            apply_override(raw, word)
    return raw


def refused(listed: list[str]) -> list[str]:
    """Of commands that are given one after the other, those that find another run's results in their folder."""
    demo = [raw_config(name) for name in shipped.recipes() if name.startswith("demo/")]  # `make demo` has run them
    runs = {raw["run"]["output_dir"]: raw for raw in demo}
    found = []
    for command in listed:
        words = shlex.split(command)
        raw = resolved(words) if "--config" in words else {}
        if "run" in raw and runs.setdefault(raw["run"]["output_dir"], raw) != raw:
            found.append(command)
    return found


def test_no_command_writes_into_the_folder_of_another_run() -> None:
    for page, listed in groupby(commands(), key=itemgetter(0)):
        assert not refused([command for _, command in listed]), page
    demo = "deepspeed launch/perturb.py --config configs/demo/perturb.yaml"
    paper = "esi-ds esi --config paper/esi"
    assert refused([demo, f"{demo} perturb.noise=1"]) == [f"{demo} perturb.noise=1"]
    assert refused([paper, paper, f"{paper} select.ratio=0.1"]) == [f"{paper} select.ratio=0.1"]
    assert not refused([f"{demo} perturb.noise=1 run.output_dir=runs/other"])


def shown_recipes() -> list[tuple[str, Any, dict[str, Any]]]:
    """(page, config, recipe) of every block that shows the run of a recipe."""
    recipes = [raw_config(name) for name in shipped.recipes()]
    configs = [(page, yaml.safe_load(text)) for page, text in blocks("yaml")]
    runs = [
        (page, config) for page, config in configs if isinstance(config, dict) and isinstance(config.get("run"), dict)
    ]
    return [
        (page, config, recipe)
        for page, config in runs
        for recipe in recipes
        if config["run"].get("output_dir") == recipe["run"]["output_dir"]
    ]


def test_a_config_that_a_page_shows_is_the_recipe_of_that_run() -> None:
    """A page may leave keys out."""
    shown = shown_recipes()
    assert {page for page, _, _ in shown} == {"README.md", "docs/running.md"}
    for page, config, recipe in shown:
        assert not list(differences(config, recipe)), page
    _, config, recipe = shown[0]
    assert list(differences({**config, "select": {"ratio": 0.5}}, recipe)) == ["select.ratio = 0.5, not 0.01"]


@pytest.mark.parametrize(
    "wrong",
    [
        "deepspeed launch/esi.py --config configs/dense/missing.yaml",
        "deepspeed launch/esi.py --config llama3-8b --unknown",
        "deepspeed --module esi_ds.launch.esi --config llama3-8b select.ration=0.1",
        "deepspeed launch/set.py --config llama3-8b",
        "deepspeed launch/perturb.py",
        "python launch/esi.py --config llama3-8b model.path=configs/frobnicate",
        "torchrun -m esi_ds.launch.frobnicate --config llama3-8b",
        "frobnicate runs/demo",
        "esi-ds frobnicate",
        "esi-ds esi --nope --config llama3-8b",
        "esi-ds mask frobnicate",
        "esi-ds mask info",
        "esi-ds mask select MASK OUTPUT --scores SCORES --ratio 5",
        "esi-ds report RUN --nope",
        "esi-ds patch aply BASE PATCH OUT",
        "esi-ds ask --base-url URL --model NAME --prompts FILE --output FILE --nope",
        "esi-ds status",
        "esi-ds recipes copi NAME",
        "esi-ds slurm copy DIR --nope",
        "esi-ds doctor DIR",
        "python -m esi_ds.mask frobnicate",
        "python -m esi_ds.frobnicate",
        "python -m esi_ds mask frobnicate",
        "python -m benchmarks.gpu --nope",
        "python -m benchmarks.frobnicate",
        "slurm/pipeline.sh --runs DIR --esi llama3-8b --sedes 0-2",
        "slurm/pipeline.sh --runs DIR --esi llama3-8b --spa",
        "slurm/pipeline.sh --runs DIR --esi llama3-8",
        "slurm/pipeline.sh --runs DIR --esi llama3-8b --spa llama3-8b-eval",
        "slurm/pipeline.sh --esi llama3-8b -- --nodes=2",
        "make frobnicate",
        "make Test",
        'make real-models REAL="--nope"',
        'make real-models REAL="--hours 2"',
        'make test REAL="--hours 2"',
        'FUZZ_SCALE=9 make fuzz REAL="--hours 2"',
        "pip install -c frobnicate.txt torch",
        "pip install '.[evla]'",
        "pip install 'esi_ds[mpi,evla]'",
    ],
)
def test_a_wrong_command_is_noticed(wrong: str) -> None:
    (command,) = commands_of(wrong)
    with pytest.raises((AssertionError, UserError, SystemExit, ImportError)):
        check_names(shlex.split(command))
        check_arguments(shlex.split(command))
        check_extras(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        "from esi_ds import Msk",
        "from esi_ds.core.mask import Msk",
        "from esi_ds.frobnicate import Mask",
        "import esi_ds.frobnicate",
        "import esi_ds\nesi_ds.frobnicate(model)",
        "from esi_ds import Mask\nMask.lode('runs/demo/mask')",
        "from esi_ds import MaskedAdamW\nMaskedAdamW(model, 'runs/demo/mask', trian='complement')",
        "...clip by the norm...",
    ],
)
def test_wrong_python_is_noticed(wrong: str) -> None:
    with pytest.raises((AssertionError, ImportError, TypeError, SyntaxError)):
        check_python(wrong)
