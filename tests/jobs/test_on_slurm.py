"""`lori train --slurm`: a Slurm of four small programs in PATH, and submitit's own processes."""

import json
import os
import shutil
import signal
import sys
import time

import pytest

from lori_manager.cli.app import app
from lori_manager.errors import DamagedObject, InvalidInput
from lori_manager.jobs import on_slurm
from lori_manager.jobs.driving import Lost, train_jobs
from lori_manager.jobs.job import Failed
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
    if words[0] == "--output":
        log = words[1].replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", "0")
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    words = words[1:] if words[0] == "--unbuffered" else words[2:]
os.execvp(words[0], words)
"""
SACCT = """#!{python}
import os, pathlib, sys
print("JobID|State|NodeList")
for job in [b for a, b in zip(sys.argv, sys.argv[1:]) if a == "-j"]:
    if (pathlib.Path(r"{state}") / "forgotten").exists():
        break
    ended = pathlib.Path(r"{state}") / "ended"
    end = ended.read_text() if ended.exists() else "FAILED"
    try:
        stat = pathlib.Path("/proc", job, "stat").read_text()
        alive = pathlib.Path(r"{state}") / "alive"
        now = alive.read_text() if alive.exists() else "RUNNING"
        print(f"{{job}}|{{end if stat.split()[2] == 'Z' else now}}|here")
    except FileNotFoundError:
        print(f"{{job}}|{{end}}|here")
"""
SCANCEL = """#!{python}
import os, pathlib, sys
cancelled = pathlib.Path(r"{state}") / "cancelled"
first = not cancelled.exists()
cancelled.open("a").write(sys.argv[-1] + "\\n")
if first and (pathlib.Path(r"{state}") / "unreachable").exists():
    sys.exit("scancel: error: Unable to contact slurm controller")
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
    for option in [*ARGS.split(), "--no-requeue"]:
        assert script.count(f"#SBATCH {option}\n") == 3
    assert not list(ws.store.runs.iterdir())


def test_an_interruption_cancels_every_job(ws, slurm):
    def interrupt(state):
        raise KeyboardInterrupt

    ws.on_progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        ws.train_jobs(TASKS, ws.settings.config.replace(steps=2000), slurm=ARGS)
    assert len((slurm / "cancelled").read_text().split()) == 2


def test_one_job_that_cannot_be_cancelled_leaves_no_other_running(ws, slurm):
    def interrupt(state):
        raise KeyboardInterrupt

    (slurm / "unreachable").touch()
    ws.on_progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        ws.train_jobs(TASKS, ws.settings.config.replace(steps=2000), slurm=ARGS)
    first, *others = (slurm / "cancelled").read_text().split()
    os.killpg(int(first), signal.SIGKILL)
    assert len(others) == 1


def test_without_scancel_the_jobs_that_it_cannot_reach_are_told(tmp_path, slurm, caplog):
    crew = SlurmWorkers(slurm_options(ARGS), tmp_path / "run")
    jobs = [crew._executor.submit(time.sleep, 60) for _ in TASKS]
    crew._started += jobs
    (tmp_path / "tools" / "scancel").unlink()
    crew.stop()
    assert caplog.text.count("was not cancelled") == len(jobs)
    for job in jobs:
        os.killpg(int(job.job_id), signal.SIGKILL)


def crew_of(slurm, tmp_path, does):
    """A crew, and what it handed in to do `does`."""
    crew = SlurmWorkers(slurm_options(ARGS), tmp_path / "run")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(on_slurm, "work", lambda _: does())
        return crew, crew.start(None)


def answer_of(crew, started):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        answer = crew.answer(started)
        if answer is not None:
            return answer
        time.sleep(0.1)
    raise AssertionError("no answer in a minute")


def test_a_preempted_job_is_lost_and_tells_the_last_line_of_it(slurm, tmp_path):
    (slurm / "ended").write_text("PREEMPTED")

    def killed():
        print("slurmstepd: error: CANCELLED DUE TO PREEMPTION\n", flush=True)
        os.killpg(0, signal.SIGKILL)

    crew, started = crew_of(slurm, tmp_path, killed)
    answer = answer_of(crew, started)
    assert isinstance(answer, Lost)
    assert answer.why == (
        f"Slurm's state of job {started.job_id} is PREEMPTED; its last line is: "
        "slurmstepd: error: CANCELLED DUE TO PREEMPTION"
    )


@pytest.mark.parametrize("state", sorted(on_slurm.STILL_THERE | {"COMPLETING", "REQUEUED"}))
def test_a_job_that_waits_or_goes_on_is_not_lost(slurm, tmp_path, monkeypatch, state):
    monkeypatch.setattr(on_slurm, "CHECK", 0.0)
    (slurm / "alive").write_text(state)
    end = tmp_path / "end"

    def wait():
        until = time.monotonic() + 60
        while not end.exists() and time.monotonic() < until:
            time.sleep(0.05)
        raise ZeroDivisionError("it went on")

    crew, started = crew_of(slurm, tmp_path, wait)
    assert [crew.answer(started) for _ in range(3)] == [None] * 3
    assert started.state == state
    (slurm / "alive").write_text("RUNNING")
    time.sleep(0.01)  # submitit asks once in a millisecond at most
    assert crew.answer(started) is None
    assert started.state == "RUNNING"  # it is asked about again
    end.touch()
    assert answer_of(crew, started) == Failed("LoriError", "ZeroDivisionError: it went on")


def test_a_suspended_job_that_ends_is_lost(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(on_slurm, "CHECK", 0.0)
    (slurm / "alive").write_text("SUSPENDED")
    crew, started = crew_of(slurm, tmp_path, lambda: time.sleep(60))
    assert crew.answer(started) is None
    os.killpg(int(started.job_id), signal.SIGKILL)
    assert answer_of(crew, started) == Lost(f"Slurm's state of job {started.job_id} is FAILED")


def test_a_suspended_job_is_cancelled_as_well(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(on_slurm, "CHECK", 0.0)
    (slurm / "alive").write_text("SUSPENDED")
    crew, started = crew_of(slurm, tmp_path, lambda: time.sleep(60))
    assert crew.answer(started) is None
    crew.stop()
    assert (slurm / "cancelled").read_text() == f"{started.job_id}\n"


def test_a_job_that_sacct_does_not_know_is_given_up(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(on_slurm, "CHECK", 0.1)
    (slurm / "forgotten").touch()
    crew, started = crew_of(slurm, tmp_path, lambda: time.sleep(60))
    answer = answer_of(crew, started)
    crew.stop()
    assert isinstance(answer, Failed)
    assert answer.message.startswith(f"`sacct` does not know job {started.job_id}, asked 20 times")


def test_what_submitit_s_process_raises_is_told(slurm, tmp_path):
    def broken():
        raise ZeroDivisionError("this cannot be done")

    crew, started = crew_of(slurm, tmp_path, broken)
    answer = answer_of(crew, started)
    assert answer == Failed("LoriError", "ZeroDivisionError: this cannot be done")


@pytest.mark.parametrize("lacking", ["sacct", "scancel"])
def test_a_cluster_that_cannot_be_asked_is_refused(slurm, tmp_path, lacking):
    (tmp_path / "tools" / lacking).unlink()
    with pytest.raises(InvalidInput, match=f"there is no `{lacking}` here"):
        SlurmWorkers(slurm_options(ARGS), tmp_path / "run")


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
        ("--time=5 --clusters=far", "does not take --clusters"),
        ("--time=5 --cpus-per-task=0", "at least one of --cpus-per-task, got '0'"),
        ("--time=5 --cpus-per-task=many", "at least one of --cpus-per-task, got 'many'"),
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
