"""Jobs as Ray tasks: on this machine's cores, or on the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import io
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from lori_manager.errors import InvalidInput, first_line
from lori_manager.extras import check_extra
from lori_manager.jobs.driving import Lost
from lori_manager.jobs.job import Failed, Job, work
from lori_manager.jobs.shares import cores, share
from lori_manager.teaching import Trained

logger = logging.getLogger(__name__)

OBJECTS = 80 * 2**20  # bytes of shared memory; what goes through it are settings and records
EVERYWHERE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A worker that asks for no GPU must not be shown all of them as if it had.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Ray on Linux listens on every network; with this, as on other systems, on the loopback.
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}


class RayWorkers:
    """A process for each job that runs, with an equal share of cores and GPUs.

    Without RAY_ADDRESS, Ray is started here for as long as this lives: it listens on the
    loopback alone, and to whoever has a token that is drawn anew each time.
    """

    def __init__(self, at_once: int, _: Path) -> None:
        """Start Ray or join a cluster.

        Raises:
            InvalidInput: ray is not installed, or cannot be started or reached.
        """
        check_extra("ray", "ray", "--jobs")
        self._started: list[Any] = []
        self._end = ExitStack()
        try:
            self._begin(os.environ.get("RAY_ADDRESS"))
        except BaseException:
            self._end.close()
            raise
        there = self._ray.cluster_resources()
        nodes = [node["Resources"].get("CPU", 0.0) for node in self._ray.nodes() if node["Alive"]]
        self._share = share(at_once, there.get("CPU", 1.0), there.get("GPU", 0.0), max(nodes))

    def _begin(self, address: str | None) -> None:
        own = {"RAY_AUTH_TOKEN": secrets.token_hex(32)} | ALONE
        self._end.enter_context(_environment(EVERYWHERE | ({} if address else own)))
        import ray

        self._ray: Any = ray
        if ray.is_initialized():
            return  # by whoever calls this, who also ends it
        self._end.enter_context(redirect_stdout(_Logged()))
        how: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if not address:
            folder = tempfile.mkdtemp(prefix="lori-ray-")
            self._end.callback(shutil.rmtree, Path(folder), ignore_errors=True)
            how |= {
                "num_cpus": cores(),
                "include_dashboard": False,
                "object_store_memory": OBJECTS,
                "_temp_dir": folder,
            }
        self._end.callback(ray.shutdown)
        try:
            ray.init(address=address or "local", **how)
        except (ConnectionError, RuntimeError, ValueError, OSError) as e:
            place = (
                f"the Ray cluster at {address} cannot be joined"
                if address
                else "Ray cannot be started here"
            )
            raise InvalidInput(f"{place}: {first_line(e)}; see to it, or leave --jobs out") from e

    @property
    def threads(self) -> int:
        """Of each job's process."""
        return self._share.threads

    def start(self, job: Job) -> Any:
        """Begin the job; a task's reference."""
        # Lost workers are told and replaced by whoever drives, so not by Ray.
        remote = self._ray.remote(work).options(
            num_cpus=self._share.cpus,
            num_gpus=self._share.gpus,
            max_retries=0,
            name=f"lori train {job.task}",
        )
        self._started.append(remote.remote(job))
        return self._started[-1]

    def answer(self, started: Any) -> Trained | Failed | Lost | None:
        """What came of it; None while it runs."""
        if not self._ray.wait([started], timeout=0)[0]:
            return None
        try:
            answer: Trained | Failed = self._ray.get(started)
        except self._ray.exceptions.RayTaskError as e:
            return Failed(type(e.cause).__name__, first_line(e.cause))
        except self._ray.exceptions.RayError as e:
            return Lost(_why(e))
        return answer

    def stop(self) -> None:
        """End whatever still runs, and a Ray that was started here."""
        with self._end:
            for started in self._started:
                if not self._ray.wait([started], timeout=0)[0]:
                    self._ray.cancel(started, force=True)


class _Logged(io.TextIOBase):
    """What Ray prints of its own accord on stdout, which is for results."""

    def write(self, text: str) -> int:
        """Log what there is to read in it."""
        if text.strip():
            logger.debug("%s", text.strip())
        return len(text)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that are not set yet, set until the end."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _why(error: BaseException) -> str:
    """A few words out of Ray's many."""
    name = type(error).__name__
    return {
        "OutOfMemoryError": "no memory was left",
        "NodeDiedError": "its machine went away",
        "WorkerCrashedError": "its process was killed",
        "LocalRayletDiedError": "its process was killed",
    }.get(name, name)
