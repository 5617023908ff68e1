"""Jobs as jobs of a Slurm cluster, handed in through submitit.

submitit writes what is to be done, and what came of it, as pickles into the run's folder, which
lies where only its owner may enter; they go with the run.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from lori_manager.errors import InvalidInput, first_line, shortened
from lori_manager.extras import load_extra
from lori_manager.jobs.driving import Lost
from lori_manager.jobs.job import Failed, Job, work
from lori_manager.teaching import Trained

logger = logging.getLogger(__name__)

CHECK = 30.0  # seconds between two questions to Slurm about a job without a result
UNKNOWN = 20  # questions in a row about a job that Slurm does not know
# States in which a job waits or goes on, and which submitit takes for an end. Those that are
# held wait for somebody, as a pending job that is held does.
STILL_THERE = frozenset({
    "CONFIGURING", "REQUEUE_FED", "REQUEUE_HOLD", "RESIZING", "RESV_DEL_HOLD", "SIGNALING",
    "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "SUSPENDED",
})  # fmt: skip
TOOLS = ("sbatch", "srun", "sacct", "scancel")
# Without `clusters`: submitit asks `sacct` and `scancel` about this one alone.
OPTIONS = frozenset({
    "account", "constraint", "cpus-per-gpu", "cpus-per-task", "exclude", "exclusive", "gpus",
    "gpus-per-node", "gpus-per-task", "gres", "licenses", "mail-type", "mail-user", "mem",
    "mem-per-cpu", "mem-per-gpu", "nice", "nodelist", "partition", "qos", "reservation", "time",
    "tmp",
})  # fmt: skip
_OPTION = re.compile(r"--([a-z][a-z-]*)(?:=([A-Za-z0-9_.,:/@%+*\[\]=-]+))?")


def slurm_options(given: str) -> dict[str, str | bool]:
    """The options of `sbatch` in a line such as `--partition=gpu --time=4:00:00`.

    No shell reads them: a word that is not one of `OPTIONS` with a plain value is refused.
    Raises:
        InvalidInput: names the word.
    """
    try:
        words = shlex.split(given)
    except ValueError as e:
        raise InvalidInput(f"--slurm cannot be read: {e}; got {given!r}") from e
    found: dict[str, str | bool] = {}
    for word in words:
        match = _OPTION.fullmatch(word)
        if match is None:
            raise InvalidInput(f"--slurm takes options such as --partition=gpu, got {word!r}")
        name, value = match.groups()
        if name not in OPTIONS:
            raise InvalidInput(
                f"--slurm does not take --{name}; there are: {', '.join(sorted(OPTIONS))}"
            )
        if name in found:
            raise InvalidInput(f"--slurm has --{name} twice")
        if value is None and name != "exclusive":
            raise InvalidInput(f"--slurm needs a value for --{name}, such as --{name}=VALUE")
        if name == "cpus-per-task" and not re.fullmatch("[1-9][0-9]*", value or ""):
            raise InvalidInput(f"--slurm needs at least one of --cpus-per-task, got {value!r}")
        found[name] = True if value is None else value
    if "time" not in found:
        raise InvalidInput("--slurm needs the time that one task may take, such as --time=4:00:00")
    return found


class SlurmWorkers:
    """A job of the cluster for each task.

    Args:
        options: see `slurm_options`.
        folder: the run's; submitit's files are put into `slurm/` in it.
        cluster: submitit's name for where to run: "slurm", or "local" for processes here.
    Raises:
        InvalidInput: there is no Slurm here, or submitit is not installed.
    """

    def __init__(
        self, options: dict[str, str | bool], folder: Path, cluster: str = "slurm"
    ) -> None:
        self._submitit = load_extra("submitit", "slurm", "--slurm")
        lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
        if cluster == "slurm" and lacking:
            raise InvalidInput(
                f"--slurm needs a Slurm cluster, and there is no `{lacking[0]}` here: run it on a "
                "login node, or use --jobs"
            )
        told = options.get("cpus-per-task") or os.environ.get("OMP_NUM_THREADS") or "1"
        self.threads = max(int(told), 1) if str(told).isdecimal() else 1
        self._executor = self._submitit.AutoExecutor(folder / "slurm", cluster=cluster)
        # A lost job is handed in again from here, so not by Slurm as well.
        more = {**options, "no-requeue": True}
        self._executor.update_parameters(
            name="lori", slurm_additional_parameters=more, slurm_stderr_to_stdout=True
        )
        self._started: list[Any] = []
        self._checked: dict[str, float] = {}
        self._unknown: dict[str, int] = {}

    def start(self, job: Job) -> Any:
        """Hand in the job.

        Raises:
            InvalidInput: Slurm does not take it; says why.
        """
        try:
            started = self._executor.submit(work, job)
        except (self._submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as e:
            raise InvalidInput(f"sbatch refuses the job: {first_line(e)}") from e
        self._started.append(started)
        self._checked[started.job_id], self._unknown[started.job_id] = time.monotonic(), 0
        return started

    def answer(self, started: Any) -> Trained | Failed | Lost | None:
        """What came of it; None while it waits or runs."""
        now = time.monotonic()
        ask = now - self._checked[started.job_id] >= CHECK
        if ask:
            self._checked[started.job_id] = now
        over = _over(started, ask)
        if not started.paths.result_pickle.exists():
            if over or started.state == "PREEMPTED":  # which to submitit is not the end
                return Lost(_why(started))
            return self._unheard_of(started) if ask else None
        try:
            answer: Trained | Failed = started.result()
        except self._submitit.core.utils.FailedJobError as e:
            return Failed("LoriError", _reason(str(e)))
        return answer

    def _unheard_of(self, started: Any) -> Failed | None:
        """That Slurm, asked often enough, does not know the job: it might never be heard of."""
        known = started.state != "UNKNOWN"
        self._unknown[started.job_id] = 0 if known else self._unknown[started.job_id] + 1
        if self._unknown[started.job_id] < UNKNOWN:
            return None
        return Failed(
            "InvalidInput",
            f"`sacct` does not know job {started.job_id}, asked {UNKNOWN} times: --slurm needs "
            "Slurm's accounting to see what becomes of a job",
        )

    def stop(self) -> None:
        """Cancel what is not done."""
        for started in self._started:
            try:
                if not _over(started):
                    started.cancel(check=False)  # where it fails, scancel says so itself
            except OSError as e:
                logger.warning("job %s was not cancelled: %s", started.job_id, first_line(e))


def _over(started: Any, ask: bool = False) -> bool:
    """Whether the job has a result, or has ended without.

    Args:
        ask: ask Slurm now; else submitit does when it deems it time.
    """
    done: bool = started.done(force_check=ask)
    if started.paths.result_pickle.exists():
        return True
    if started.state in STILL_THERE:
        # submitit never asks again about a job that it has seen to end
        started.watcher._finished.discard(started.job_id)
        return False
    return done


def _why(started: Any) -> str:
    """Slurm's state of a job without a result, and the last line that it wrote."""
    state = f"Slurm's state of job {started.job_id} is {started.state}"
    try:
        lines = (started.stdout() or "").split("\n")
    except (OSError, UnicodeDecodeError):
        return state
    last = next((line.strip() for line in reversed(lines) if line.strip()), None)
    return state if last is None else f"{state}; its last line is: {shortened(last)}"


def _reason(told: str) -> str:
    """The exception's line out of submitit's words: its trace stands between lines of dashes."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    dashes = [n for n, line in enumerate(lines) if not line.strip("-")]
    said = lines[: dashes[-1]] if dashes else lines
    return shortened(said[-1]) if said else "it says nothing"
