"""The wheel, away from any checkout: what it holds, and every stage from an empty folder, each launched differently."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, free_port

from esi_ds import Mask
from esi_ds.command import STAGES, TOOLS

EXAMPLES = ROOT / "examples"
SOURCES = (
    "esi_ds",
    "configs",
    "ds_configs",
    "slurm",
    "setup.py",
    "setup.cfg",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, unpacked as pip does; what it depends on is this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in SOURCES:
        take = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        take(ROOT / name, sources / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", folder, sources], check=True, timeout=120)
    (wheel,) = folder.glob("esi_ds-*.whl")
    subprocess.run([*pip, "install", *options, "--target", folder / "site", wheel], check=True, timeout=120)
    return folder / "site"


def run(site: Path, folder: Path, *command: object) -> str:
    """A command in ``folder``, with the wheel's package before any other; its output."""
    environment = {**os.environ, "PYTHONPATH": str(site), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


HELP = """
import sys, esi_ds
from esi_ds.command import STAGES, TOOLS, main

print(esi_ds.__file__)
for command in [*STAGES, *TOOLS]:
    try:
        main([command, "--help"])
    except SystemExit as ended:
        print(command, ended.code)
"""


def test_an_editable_installation_is_found_from_the_checkout_s_parent_folder(site: Path, tmp_path: Path) -> None:
    """There the checkout itself, a folder without __init__.py, is named esi_ds too."""
    sources, hooks = tmp_path / "esi_ds", tmp_path / "hooks"
    shutil.copytree(site.parent / "sources", sources)
    build = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=sources, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("esi_ds-*.whl")
    shutil.unpack_archive(wheel, hooks, "zip")
    # This environment's own installation, which may be editable too, is put aside.
    code = (
        "import os, site, sys; "
        "sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, '__module__', '').startswith('__editable__')]; "
        "sys.path[:] = [p for p in sys.path if not os.path.isfile(os.path.join(p, 'esi_ds/__init__.py'))]; "
        "site.addsitedir(sys.argv[1]); from esi_ds import Mask; import esi_ds; print(esi_ds.__file__)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, str(hooks)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == str(sources / "esi_ds/__init__.py"), done.stderr


def test_every_command_says_how_it_is_used(site: Path, tmp_path: Path) -> None:
    lines = run(site, tmp_path, sys.executable, "-c", HELP).splitlines()
    assert lines[0].startswith(str(site))
    assert [line for line in lines if line.endswith(" 0")] == [f"{command} 0" for command in [*STAGES, *TOOLS]]


def test_recipes_deepspeed_configs_and_batch_scripts_come_with_it(site: Path, tmp_path: Path) -> None:
    esi_ds = (sys.executable, "-m", "esi_ds")
    listed = run(site, tmp_path, *esi_ds, "recipes").splitlines()
    assert len(listed) == len(list((ROOT / "configs").rglob("*.yaml")))
    run(site, tmp_path, *esi_ds, "recipes", "copy", "llama3-8b")
    assert (tmp_path / "llama3-8b.yaml").read_bytes() == (ROOT / "configs/dense/llama3-8b.yaml").read_bytes()
    run(site, tmp_path, *esi_ds, "slurm", "copy")
    job = (tmp_path / "slurm/job.sh").read_text()
    assert job == (ROOT / "slurm/job.sh").read_text() and os.access(tmp_path / "slurm/pipeline.sh", os.X_OK)
    plan = run(
        site, tmp_path, *esi_ds, "esi", "--config", "qwen3-235b-a22b", "--dry-run", "--nodes", 4,
        f"model.path={site}/esi_ds/shipped/configs/moe/architectures/qwen3-235b-a22b", "deepspeed=zero3_autoep",
    )  # fmt: skip
    assert "4 nodes of 8 GPUs" in plan, plan


def test_every_stage_from_an_empty_folder(site: Path, tmp_path: Path) -> None:
    few = f"path: {EXAMPLES}/data/harmful_heldout.jsonl, limit: 4"
    run(
        site, tmp_path, sys.executable, "-m", "esi_ds.launch.esi", "--config", "demo/esi", "run.output_dir=esi",
        f"model.path={EXAMPLES}/models/llama-complying", f"judge.path={EXAMPLES}/models/guard",
        f"data.prompts={{{few}}}", "esi.max_new_tokens=4", "deepspeed=zero3",
    )  # fmt: skip
    run(
        site, tmp_path, "deepspeed", "--num_accelerators", 1, "--master_port", free_port(), "--module",
        "esi_ds.launch.set", "--config", "demo/set", "run.output_dir=set", "tune.mask=esi/mask", "tune.max_steps=2",
        f"model.path={EXAMPLES}/models/llama-complying", "eval=null", "--allow-fingerprint-mismatch",
        f"tune.data={{path: {EXAMPLES}/data/refusals_train.jsonl}}", "deepspeed=ds_configs/zero3.json",
    )  # fmt: skip
    run(
        site, tmp_path, "torchrun", "--standalone", "--nproc_per_node", 1, "-m", "esi_ds.launch.spa",
        "--config", "demo/spa", "run.output_dir=spa", "tune.mask=esi/mask", "tune.max_steps=2",
        f"model.path={EXAMPLES}/models/llama-complying", "eval=null",
        f"tune.data={{path: {EXAMPLES}/data/benign_train.jsonl}}", "deepspeed=zero3",
    )  # fmt: skip
    run(
        site, tmp_path, site / "bin/esi-ds", "perturb", "--config", "demo/perturb", "run.output_dir=perturb",
        f"model.path={EXAMPLES}/models/llama-complying", "perturb.mask=esi/mask", "perturb.ratios=null",
        "perturb.orders=[top]", "perturb.noise=1", "eval.judges=[]", "eval.benign=null",
        f"eval.prompts={{{few}}}", "eval.max_new_tokens=4", "deepspeed=zero3",
    )  # fmt: skip
    run(
        site, tmp_path, sys.executable, "-m", "esi_ds", "eval", "--config", "demo/eval", "run.output_dir=eval",
        f"model.path={EXAMPLES}/models/llama-complying", "eval.models=[{name: SET, path: set/model}]",
        f"eval.prompts={{{few}}}", f"eval.benign={{path: {EXAMPLES}/data/benign_heldout.jsonl, limit: 4}}",
        "eval.judges=[]", "eval.tasks=[]", "eval.max_new_tokens=4",
    )  # fmt: skip
    assert Mask.load(tmp_path / "esi/mask").k > 0
    assert {path.name for path in tmp_path.iterdir()} == {"esi", "set", "spa", "perturb", "eval"}
    assert all((folder / "report.html").is_file() for folder in tmp_path.iterdir())
