"""The Slurm scripts with Slurm's commands replaced by small ones that write down what they were asked for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from esi_ds.config.yaml import apply_override

ARRAY = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >srun
for word; do [[ $word = --output=* ]] && logs=${word#--output=}; done
printf '%b' "$SAYS" >"${logs/\\%t/1}"
exit "$CODE"
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A checkout of its own with an empty env.sh, and ``bin`` with the commands."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm", ignore=shutil.ignore_patterns("logs"))
    (tmp_path / "slurm/env.sh").write_text("export ESI_DS_TASKS_PER_NODE=2\n")
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/esi.py").touch()
    (tmp_path / "bin").mkdir()
    commands = {"scontrol": '#!/bin/sh\necho "$@" >>requeued\n', "srun": SRUN, "sbatch": "#!/bin/sh\necho 7\n"}
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def call(site: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "ESI_DS_"))}
    whole = {**inherited, "PATH": f"{site}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}", **environment}
    return subprocess.run(command, cwd=site, env=whole, capture_output=True, text=True, timeout=60)


def step(site: Path) -> dict[str, str]:
    """What Slurm sets for a batch script."""
    variables = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "a"}
    return {**variables, "SLURM_SUBMIT_DIR": str(site)}


def job(site: Path, code: int, says: str = "", **more: str) -> tuple[int, str]:
    """(exit code of the batch script, what it had requeued) where srun ends so and its ranks say this."""
    done = call(site, "bash", "slurm/esi.sbatch", **{**step(site), "CODE": str(code), "SAYS": says, **more})
    requeued = site / "requeued"
    return done.returncode, requeued.read_text() if requeued.is_file() else ""


def test_what_srun_is_asked_for(site: Path) -> None:
    """Whatever the site and the job's own variables would have srun do by default."""
    assert job(site, 0, SLURM_JOB_NUM_NODES="2", SLURM_NTASKS="2")[0] == 0
    words = (site / "srun").read_text().splitlines()
    options = words[: words.index("python")]
    assert {"--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpu-bind=none"} < set(options)
    assert {"--kill-on-bad-exit=1", "--wait=0", "--export=ALL"} < set(options)


def test_a_pipeline_passes_its_sets_of_prompts_as_an_argument(site: Path) -> None:
    """sbatch --export=NONE, which some sites ask for, keeps the environment from the job."""
    (site / "bin/sbatch").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\" >submitted\necho 7\n")
    (site / "e.yaml").touch()
    words = ["slurm/pipeline.sh", "--runs", "runs", "--esi", "e.yaml", "--prompts", "a.jsonl  b.jsonl"]
    assert call(site, *words, "--", "--export=NONE").returncode == 0
    submitted = (site / "submitted").read_text().splitlines()
    arguments = submitted[submitted.index("slurm/esi.sbatch") + 1 :]
    (site / "bin/srun").write_text("#!/bin/bash\nprintf '%s\\n' \"$@\" >said\n")
    task = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"}
    assert call(site, "bash", "slurm/esi.sbatch", *arguments, **step(site), **task).returncode == 0
    assert "data.prompts.path=b.jsonl" in (site / "said").read_text().splitlines()


def test_a_failure_without_a_message_shows_what_rank_0_said_last(site: Path) -> None:
    srun = "#!/bin/bash\nfor word; do [[ $word = --output=* ]] && logs=${word#--output=}; done\n"
    (site / "bin/srun").write_text(srun + 'echo "python: not found" >"${logs/\\%t/0}"\nexit 127\n')
    done = call(site, "bash", "slurm/esi.sbatch", **step(site))
    assert done.returncode == 127 and "start-0/rank-0.log" in done.stderr and "python: not found" in done.stderr


@pytest.mark.parametrize(("variables", "name"), [({}, "12"), (ARRAY, "12_3")])
def test_a_task_of_an_array_requeues_itself_alone(site: Path, variables: dict[str, str], name: str) -> None:
    """One task has the array's id as its job id, by which Slurm would take all tasks."""
    assert job(site, 75, **variables) == (75, f"requeue Incomplete {name}\n")


def test_a_task_of_an_array_has_its_own_set_of_prompts_whatever_its_name_holds(site: Path) -> None:
    (site / "bin/srun").write_text("#!/bin/bash\nprintf '%s\\n' \"${@: -2}\" >said\n")
    names = ["R&D.jsonl", "a\\&&'b\".jsonl", "c.jsonl"]
    for task, name in enumerate(names):
        array = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": str(task)}
        words = ["bash", "slurm/esi.sbatch", "--prompts", " ".join(names)]
        words += ["data.prompts.path=@prompts@", 'run.output_dir="r&/@task@/esi"']
        assert call(site, *words, **step(site), **array).returncode == 0
        assert (site / "said").read_text() == f'data.prompts.path={name}\nrun.output_dir="r&/{task}/esi"\n'


@pytest.mark.parametrize(
    ("says", "code"),
    [
        ("error: model.path = x: is not a folder; give one\\n", 2),
        ("bar 3/7\\nrank 1 failed: writing x: no space left on device\\n", 1),
        ("rank 1 failed: lost another rank (closed)\\nrank 0 failed: \\nTraceback\\n", 1),
        ("Fatal Python error: Aborted\\n", 1),
    ],
)
def test_a_failure_that_had_others_stop_is_not_requeued(site: Path, says: str, code: int) -> None:
    """srun reports the greatest code: 75, of ranks that it ended while they started, hides 1 and 2."""
    assert job(site, 75, says) == (code, "")
    assert job(site, 143, says) == (code, "")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_rank_that_a_signal_ends_before_it_handles_signals_is_requeued(site: Path, number: int) -> None:
    assert job(site, 128 + number) == (75, "requeue Incomplete 12\n")


def test_a_rank_that_lost_the_others_to_a_signal_is_requeued(site: Path) -> None:
    assert job(site, 75, "rank 1 failed: lost another rank (closed): it failed\\n") == (75, "requeue Incomplete 12\n")


IN_VAIN = "interrupted: stopped by a signal before anything was done; start again\\n"
IN_TASK = "interrupted: stopped by a signal in task a; start again to run it; this start has kept nothing\\n"
KEPT = "interrupted: stopped by a signal with 3 tasks run; start again to continue\\n"


@pytest.mark.parametrize(
    ("says", "left_s", "code"),
    [
        ((IN_VAIN, IN_VAIN), 250, 2),
        ((IN_TASK, IN_VAIN), 250, 2),
        ((IN_TASK, IN_TASK), 4000, 75),  # preempted: the next start may have longer
        ((KEPT, IN_TASK), 250, 75),
        ((IN_TASK, KEPT), 250, 75),
        ((IN_TASK, IN_TASK), None, 75),  # a Slurm before 22.05 does not say when the job ends
    ],
)
def test_a_time_limit_within_which_nothing_is_kept(
    site: Path, says: tuple[str, str], left_s: int | None, code: int
) -> None:
    end = {} if left_s is None else {"SLURM_JOB_END_TIME": str(int(time.time()) + left_s)}
    assert job(site, 75, says[0], **end)[0] == 75
    (site / "requeued").unlink()
    ended = job(site, 75, says[1], SLURM_RESTART_COUNT="1", **end)
    assert ended == (code, "requeue Incomplete 12\n" if code == 75 else "")


@pytest.mark.parametrize("code", [0, 1, 2, 137])
def test_other_ends_are_passed_on(site: Path, code: int) -> None:
    assert job(site, code) == (code, "")


@pytest.mark.parametrize(
    ("more", "folders"), [((), "runs/*"), (("--seeds", "0-2"), "runs/*/*"), (("--prompts", "a b"), "runs/*/*")]
)
def test_a_pipeline_tells_where_its_runs_are(site: Path, more: tuple[str, ...], folders: str) -> None:
    (site / "e.yaml").touch()
    done = call(site, "slurm/pipeline.sh", "--runs", "runs", "--esi", "e.yaml", *more)
    assert done.stdout.splitlines()[-1] == f"watch: tensorboard --logdir runs; esi-ds status {folders}"


def test_a_pipeline_takes_recipes_by_name_and_the_mask_of_one_criterion(site: Path) -> None:
    (site / "bin/sbatch").write_text('#!/bin/sh\necho "$@" >>submitted\necho 7\n')
    # No link: an environment's python finds its packages by the path that it is called by.
    (site / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (site / "bin/python").chmod(0o755)
    words = ["slurm/pipeline.sh", "--runs", "runs", "--spa", "llama3-8b-spa", "--criterion", "snip", "--ratio", "0.1"]
    done = call(site, *words, "--esi", "llama3-8b", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    esi, spa = (site / "submitted").read_text().splitlines()
    assert "--config llama3-8b " in esi and esi.endswith(" select.ratio=0.1") and "ratio" not in spa
    assert 'tune.mask="runs/esi/mask/snip"' in spa
    (site / "submitted").unlink()
    done = call(site, *words, "--esi", "nowhere", PYTHONPATH=str(ROOT))
    assert done.returncode == 2 and not (site / "submitted").exists()
    assert done.stderr.startswith("error: --esi = nowhere: is neither a file nor the name of a recipe; give a YAML")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("gpus", "tasks"), [("8", "8"), ("h100:4", "4")])
def test_the_site_s_settings(gpus: str, tasks: str, tmp_path: Path) -> None:
    """As many tasks as GPUs; the line for nodes without a network is of jobs, as a login shell downloads."""
    text = (ROOT / "slurm/env.sh").read_text().replace("GPUS_PER_NODE=8", f"GPUS_PER_NODE={gpus}")
    (tmp_path / "env.sh").write_text(text.replace("#[[", "[["))
    shown = [". ./env.sh", 'echo "$ESI_DS_TASKS_PER_NODE offline=$HF_HUB_OFFLINE"']
    assert call(tmp_path, "bash", "-c", "\n".join(shown), HF_HUB_OFFLINE="").stdout == f"{tasks} offline=\n"
    job = call(tmp_path, "bash", "-c", "\n".join(shown), HF_HUB_OFFLINE="", SLURM_JOB_ID="7")
    assert job.stdout == f"{tasks} offline=1\n"


def test_a_pipeline_that_is_called_wrongly_says_how(site: Path) -> None:
    done = call(site, "slurm/pipeline.sh")
    assert done.returncode == 2
    assert done.stderr.startswith("Submit ESI") and done.stderr.endswith("name the same model in all configs.\n")
    assert call(site, "slurm/pipeline.sh", "--help").stdout == done.stderr
    (site / "bin/sbatch").write_text("#!/bin/sh\ntouch submitted\necho 7\n")
    (site / "e.yaml").write_text("model: {path: tune}  # eval: none, tune: none\n")
    usual = ["--runs", "runs", "--esi", "e.yaml"]
    for more, said in (
        (["--bogus", "1"], "--bogus: is not an option of this script"),
        (["--nodes=2"], "--nodes=2: is not an option of this script; see --help, and give options of sbatch after --"),
        (["--set"], "--set: has no value"),
        (["--seeds", ""], "--seeds: has no value; give one, or leave --seeds out"),
        (["--prompts", ""], "--prompts: has no value"),
        (["--prompts", " \n"], "--prompts: has no value; give files or names"),
        (["--set", "e.yaml"], "--set = e.yaml: has no section tune; give a config of this stage"),
        (["--eval", "e.yaml"], "--eval = e.yaml: has no section eval"),
        (["--seeds", "0-1", "--prompts", "a b"], "--seeds and --prompts: give one of them"),
    ):
        done = call(site, "slurm/pipeline.sh", *usual, *more)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
    (site / "bin/python").write_text("#!/bin/sh\nexit 1\n")
    (site / "bin/python").chmod(0o755)
    done = call(site, "slurm/pipeline.sh", *usual)
    assert done.returncode == 2 and f"python = {site}/bin/python: has no esi_ds; name the environment" in done.stderr
    (site / "slurm/env.sh").unlink()
    done = call(site, "slurm/pipeline.sh", *usual)
    assert done.returncode == 2 and "holds no slurm/env.sh; start from" in done.stderr
    assert not (site / "submitted").exists()


def test_a_site_of_several_clusters_names_them_behind_the_job(site: Path) -> None:
    (site / "bin/sbatch").write_text('#!/bin/sh\necho "$@" >>submitted\necho "7;cluster"\n')
    for stage in ("esi", "set"):
        (site / f"{stage}.yaml").write_text("tune: {}\n")
    done = call(site, "slurm/pipeline.sh", "--runs", "r x", "--esi", "esi.yaml", "--set", "set.yaml")
    assert done.stdout.splitlines()[:2] == ["esi: job 7", "set: job 7 after 7"]
    assert done.stdout.splitlines()[-1] == r"watch: tensorboard --logdir r\ x; esi-ds status r\ x/*"
    assert "--dependency=afterok:7 " in (site / "submitted").read_text()
    (site / "bin/sbatch").write_text("#!/bin/sh\nexit 3\n")
    assert call(site, "slurm/pipeline.sh", "--runs", "r", "--esi", "esi.yaml").returncode != 0


@pytest.mark.parametrize("runs", ["runs", "a, b: c #d", 'it\'s "x" [1]', "back\\slash"])
def test_a_folder_reaches_the_stages_whatever_its_name_holds(site: Path, runs: str) -> None:
    (site / "bin/sbatch").write_text("#!/bin/sh\nfor word; do printf '%s\\0' \"$word\"; done >>submitted\necho 7\n")
    files = []
    for stage in ("esi", "set", "spa", "eval"):
        (site / f"{stage}.yaml").write_text("tune: {}\neval: {}\n")
        files += [f"--{stage}", f"{stage}.yaml"]
    assert call(site, "slurm/pipeline.sh", "--runs", runs, *files).returncode == 0
    raw: dict = {}
    for word in (site / "submitted").read_text().split("\0"):
        if "=" in word:
            apply_override(raw, word)
    assert raw["run"]["output_dir"] == f"{runs}/eval" and raw["tune"]["mask"] == f"{runs}/esi/mask"
    assert raw["eval"]["models"] == [{"name": name.upper(), "path": f"{runs}/{name}/model"} for name in ("set", "spa")]


def test_the_environment_that_is_active_serves_where_no_other_is_named(site: Path) -> None:
    """A wheel's user has the scripts of ``esi-ds slurm copy`` and no .venv beside them."""
    shutil.copy(ROOT / "slurm/env.sh", site / "slurm/env.sh")
    (site / "e.yaml").write_text("model: {path: a}\n")
    assert call(site, "slurm/pipeline.sh", "--runs", "runs", "--esi", "e.yaml").stdout.startswith("esi: job 7")
    named = call(site, "slurm/pipeline.sh", "--runs", "runs", "--esi", "e.yaml", ESI_DS_VENV="nowhere")
    assert named.returncode != 0 and "nowhere/bin/activate" in named.stderr
