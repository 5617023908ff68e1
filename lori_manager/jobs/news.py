"""What a job tells while it runs, through two files in the folder of its run.

Workers and whoever waits for them share that folder already, so nothing else has to reach
from one machine to the other. The files are of no use after the run: nothing is synced.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lori_manager.store.files import storing

if TYPE_CHECKING:
    from lori_manager.training import Progress

PAUSE = 0.5  # seconds between two states of a job's progress


def _progress_file(folder: Path, stage: int) -> Path:
    return folder / f"job-{stage}.json"


def _messages_file(folder: Path, stage: int) -> Path:
    return folder / f"job-{stage}.log"


class Writer:
    """The job's side."""

    def __init__(self, folder: Path, stage: int) -> None:
        self._progress = _progress_file(folder, stage)
        self._messages = _messages_file(folder, stage)
        self._last = (-PAUSE, "")

    def progress(self, state: Progress) -> None:
        """Where it is; told at most every `PAUSE` seconds."""
        now = time.monotonic()
        if now - self._last[0] < PAUSE and state.phase == self._last[1]:
            return
        self._last = now, state.phase
        aside = self._progress.with_suffix(".new")
        with storing(self._progress):
            aside.write_text(json.dumps(asdict(state) | {"process": os.getpid()}), "utf-8")
            aside.replace(self._progress)

    def message(self, text: str) -> None:
        """A line that stays."""
        with storing(self._messages), self._messages.open("a", encoding="utf-8") as f:
            f.write(json.dumps(text) + "\n")


class Reader:
    """The side of whoever waits for the job: each call tells what is new."""

    def __init__(self, folder: Path, stage: int) -> None:
        self._progress = _progress_file(folder, stage)
        self._messages = _messages_file(folder, stage)
        self._known = ""
        self._read = self._messages.stat().st_size if self._messages.is_file() else 0

    def tell(
        self, on_progress: Callable[[Progress], None], on_message: Callable[[str], None]
    ) -> None:
        """Hand on what was written since the last call."""
        from lori_manager.training import Progress

        for line in self._lines():
            try:
                text = json.loads(line)
            except ValueError:  # cut short by a full disk or a kill
                continue
            on_message(str(text))
        try:
            text = self._progress.read_text("utf-8")
            if text == self._known:
                return
            state = json.loads(text)
            del state["process"]
            progress = Progress(**state)
        except (OSError, ValueError, KeyError, TypeError):
            return  # not there yet, cut short, or just being replaced on a network's disk
        self._known = text
        on_progress(progress)

    def _lines(self) -> list[bytes]:
        """Whole lines, once each."""
        try:
            with self._messages.open("rb") as f:
                f.seek(self._read)
                new = f.read()
        except OSError:
            return []
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.splitlines()
