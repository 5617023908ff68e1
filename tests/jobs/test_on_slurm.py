"""`lori train --slurm`: a Slurm of four small programs in PATH, and submitit's own processes."""

import json
import os
import shutil
import signal
import sys

import pytest

from lori_manager.cli.app import app
from lori_manager.errors import DamagedObject, InvalidInput
from lori_manager.jobs import on_slurm
from lori_manager.jobs.driving import train_jobs
from lori_manager.jobs.on_slurm import SlurmWorkers, slurm_options

LACKING = 'tests of --slurm need submitit: pip install "lori-manager[slurm]"'
submitit = pytest.importorskip("submitit", reason=LACKING)
TASKS = ["size", "colour"]
ARGS = "--partition=gpu --gres=gpu:1 --time=4:00:00 --cpus-per-task=1"
# Each job's processes are a session, whose leader's number is the job's.
SBATCH = """#!{python}
import os, pathlib, subprocess, sys
state = pathlib.Path(r"{state}")
script = sys.argv[-1]
(state / "handed_in").open("a").write(pathlib.Path(script).read_text())
if (state / "refuse").exists():
    sys.exit("sbatch: error: invalid partition specified: gpu")
job = subprocess.Popen(
    ["sh", "-c", 'SLURM_JOB_ID=$$ exec bash "$0"', script], start_new_session=True,
    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    env=os.environ | dict(SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1", SLURM_NODEID="0",
                          SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_JOB_NODELIST="here"),
)
print("Submitted batch job", job.pid)
"""
SRUN = """#!{python}
import os, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words = words[1:] if words[0] == "--unbuffered" else words[2:]
os.execvp(words[0], words)
"""
SACCT = """#!{python}
import os, pathlib, sys
print("JobID|State|NodeList")
for job in [b for a, b in zip(sys.argv, sys.argv[1:]) if a == "-j"]:
    try:
        stat = pathlib.Path("/proc", job, "stat").read_text()
        print(f"{{job}}|{{'FAILED' if stat.split()[2] == 'Z' else 'RUNNING'}}|here")
    except FileNotFoundError:
        print(f"{{job}}|NODE_FAIL|here")
"""
SCANCEL = """#!{python}
import os, pathlib, sys
(pathlib.Path(r"{state}") / "cancelled").open("a").write(sys.argv[-1] + "\\n")
os.killpg(int(sys.argv[-1]), 9)
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch, one_thread):
    """A folder in which the cluster says what it was asked."""
    state, tools = tmp_path / "state", tmp_path / "tools"
    state.mkdir()
    tools.mkdir()
    programs = {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT, "scancel": SCANCEL}
    for name, text in programs.items():
        (tools / name).write_text(text.format(python=sys.executable, state=state))
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(on_slurm, "CHECK", 0.5)
    submitit.SlurmJob.watcher.clear()
    return state


def digests(trained):
    return [(one.adapter.ref, one.adapter.digest, one.scores[0].value) for one in trained]


def test_each_task_is_a_job_and_a_killed_one_is_handed_in_again(ws, other, slurm):
    told, killed = [], []

    def progress(state):
        if not killed and state.job == "size" and state.phase.startswith("training"):
            (note,) = ws.store.runs.glob("*/job-0.json")
            killed.append(json.loads(note.read_text())["process"])
            os.kill(killed[0], signal.SIGKILL)

    ws.on_message, ws.on_progress = told.append, progress
    config = ws.settings.config.replace(steps=150)
    trained = ws.train_jobs(TASKS, config, slurm=ARGS)
    assert digests(trained) == digests(other.train(TASKS, config))
    assert killed
    assert sum("its worker was lost (Slurm's state of job" in line for line in told) == 1
    script = (slurm / "handed_in").read_text()
    assert script.count("#!/bin/bash") == 3
    for option in ARGS.split():
        assert script.count(f"#SBATCH {option}\n") == 3
    assert not list(ws.store.runs.iterdir())


def test_an_interruption_cancels_every_job(ws, slurm):
    def interrupt(state):
        raise KeyboardInterrupt

    ws.on_progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        ws.train_jobs(TASKS, ws.settings.config.replace(steps=2000), slurm=ARGS)
    assert len((slurm / "cancelled").read_text().split()) == 2


def test_what_sbatch_refuses_is_told_in_its_words(ws, slurm):
    (slurm / "refuse").touch()
    with pytest.raises(InvalidInput, match=r"sbatch refuses the job: .*invalid partition"):
        ws.train_jobs(TASKS, slurm=ARGS)
    assert ws.store.open_runs() == []


def test_the_same_through_submitit_s_processes_on_this_machine(ws, other, one_thread):
    def crew(_, folder):
        return SlurmWorkers(slurm_options("--time=5"), folder, cluster="local")

    trained = train_jobs(ws, TASKS, None, None, 2, crew)
    assert digests(trained) == digests(other.train(TASKS))


def test_a_failing_task_is_told_in_its_own_class(ws, one_thread, monkeypatch):
    task = ws.store.task("colour")
    rows = ws.store.objects.path(task.splits["train"].digest)
    rows.chmod(0o600)
    rows.write_bytes(b"damaged")

    def crew(_, folder):
        return SlurmWorkers(slurm_options("--time=5"), folder, cluster="local")

    with pytest.raises(DamagedObject, match=r"^colour: .*; 1 trained, which the same"):
        train_jobs(ws, TASKS, None, None, 1, crew)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--time=5 gpu", "takes options such as --partition=gpu, got 'gpu'"),
        ("--time=5 --partition=a;reboot", "got '--partition=a;reboot'"),
        ("--time=5 '--partition=a b'", "got '--partition=a b'"),
        ("--time=5 --comment=$(id)", "got '--comment=$(id)'"),
        ("--time=5 '--partition=a\n#SBATCH --wrap=x'", "takes options such as"),
        ("--time=5 --wrap=x", "does not take --wrap; there are: account"),
        ("--time=5 --output=x", "does not take --output"),
        ("--time=5 --array=1-9", "does not take --array"),
        ("--time=5 --time=6", "has --time twice"),
        ("--time=5 --partition", "needs a value for --partition"),
        ("--partition=gpu", "needs the time that one task may take"),
        ("", "needs the time that one task may take"),
        ("--time='5", "cannot be read: No closing quotation"),
    ],
)
def test_only_plain_options_of_sbatch_are_taken(given, said):
    with pytest.raises(InvalidInput) as told:
        slurm_options(given)
    assert said in str(told.value)


def test_options_are_read_with_their_values():
    assert slurm_options("--time=1-04:00:00 --gres=gpu:h100:2 --exclusive '--mem=64G'") == {
        "time": "1-04:00:00", "gres": "gpu:h100:2", "exclusive": True, "mem": "64G",
    }  # fmt: skip


def test_without_slurm_one_sentence_says_so(ws):
    from typer.testing import CliRunner

    assert shutil.which("sbatch") is None
    run = CliRunner().invoke(app, ["-C", str(ws.root), "-q", "train", *TASKS, "--slurm", ARGS])
    assert run.exit_code == 2
    assert run.stderr == (
        "lori: --slurm needs a Slurm cluster, and there is no `sbatch` here: run it on a login "
        "node, or use --jobs\n"
    )
    assert ws.store.open_runs() == []
