"""A stored merge made again in memory, without a member or with half of it, and scored.

The adapters are not kept; their outcomes are, by all that the adapters were made of, so that
the same is never merged or scored twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray

from lori_manager.combining import check_general, method_of
from lori_manager.config import Config
from lori_manager.context import Context, library_versions
from lori_manager.evaluation import run_weights, score_missing
from lori_manager.plain import counted
from lori_manager.records import Adapter, Score, Task
from lori_manager.store.tables import canonical

PROBE_ROWS = 32  # of each task, where a merge does not say how many it read
DROPPED, HALVED = "dropped", "halved"
Outcomes = tuple[NDArray[Any], NDArray[Any] | None]  # by row, and the rows' weights


@dataclass(frozen=True)
class Trial:
    """What is merged: some of the members by their places, each with a weight."""

    how: str  # "dropped", "halved", or "" for all members as they are
    members: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Tried:
    """The digest of a trial's weights, and its outcomes."""

    digest: str
    outcomes: Outcomes


@dataclass
class Remade:
    """A merge, and what is asked of it on one task."""

    ws: Context
    adapter: Adapter
    members: Sequence[Adapter]
    task: Task
    config: Config
    general: str | Path | None = None

    def __post_init__(self) -> None:
        check_general(self.adapter, self.general)

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """The members' own in the merge."""
        return tuple(float(parent.weight or 0.0) for parent in self.adapter.parents)

    def again(self) -> Trial:
        """The merge as it is."""
        return Trial("", tuple(range(len(self.members))), self.weights)

    def without(self, number: int) -> Trial:
        """All but that member; where all weights were 1/T, they are that of those left."""
        left = tuple(n for n in range(len(self.members)) if n != number)
        if all(weight == 1 / len(self.members) for weight in self.weights):
            return Trial(DROPPED, left, (1 / len(left),) * len(left))
        return Trial(DROPPED, left, tuple(self.weights[n] for n in left))

    def halved(self, number: int) -> Trial:
        """All members, that one at half its weight."""
        shares = tuple(w / 2 if n == number else w for n, w in enumerate(self.weights))
        return Trial(HALVED, self.again().members, shares)

    @cached_property
    def stale(self) -> str:
        """What has changed since the merge was made, in words; empty where nothing has."""
        old = self.adapter.versions
        changed = [name for name, v in library_versions().items() if old.get(name) != v]
        changed += [
            f"rows of {task.name}"
            for task in self._read
            if task.created_at > self.adapter.created_at
        ]
        return f"{', '.join(changed)} changed" if changed else ""

    def outcomes(
        self, refs: Sequence[str], trials: Sequence[Trial]
    ) -> tuple[dict[str, Score], dict[Trial, Tried]]:
        """Scores of adapters or `base`, and what comes of trials; only what is not known is run."""
        scores = {ref: score_missing(self.ws, ref, [self.task], self.config)[0] for ref in refs}
        found = self._known(trials)
        missing = [trial for trial in trials if trial not in found]
        if not missing:
            return scores, found
        made, rows = counted(len(missing), "merge"), self.task.splits["eval"].rows
        self.ws.on_message(f"{made} to make and score on {rows} rows of {self.task.ref}")
        # All are merged before any is scored: what scores may be another base.
        with TemporaryDirectory() as folder:
            files = [Path(folder, str(n)) for n in range(len(missing))]
            self._make(missing, files)
            for trial, file in zip(missing, files, strict=True):
                found[trial] = self._measure(trial, file.read_bytes())
        return scores, found

    @cached_property
    def _read(self) -> list[Task]:
        """The tasks whose probe rows the merge was fitted to."""
        if "probe_rows" not in self.adapter.config:
            return []
        names = dict.fromkeys(n for member in self.members for n in self.ws.tasks_of(member))
        return [self.ws.store.task(name) for name in names]

    @cached_property
    def _settings(self) -> Mapping[str, Any]:
        """What the method was told."""
        kept = self.adapter.config
        found: Mapping[str, Any] = kept.get("settings", kept.get("options", {}))
        return found

    @cached_property
    def _common(self) -> Mapping[str, Any]:
        """Whatever decides a trial's outcomes, but members and weights."""
        kept = self.adapter.config
        return {
            "base": self.ws.store.base().fingerprint,
            "method": self.adapter.method,
            "settings": self._settings,
            "probe_rows": kept.get("probe_rows"),
            "probes": {t.ref: t.splits["probe"].digest for t in self._read if "probe" in t.splits},
            "general_text": kept.get("general_text"),
            "encoding": self.ws.encoding,
            "versions": library_versions(),
        }

    def _recipe(self, trial: Trial) -> str:
        """SHA-256 of all that a trial is made of."""
        pairs = zip(trial.members, trial.weights, strict=True)
        parts = [[self.members[n].digest, weight] for n, weight in pairs]
        return hashlib.sha256(canonical({**self._common, "members": parts}).encode()).hexdigest()

    def _find(self, digest: str) -> Score | None:
        return self.ws.store.find_score(
            digest=digest,
            task=self.task,
            scorer=self.task.scorer,
            scorer_version=self._scorer_version,
            precision=self._precision,
            encoding=self.ws.encoding,
        )

    @cached_property
    def _precision(self) -> str:
        return self.ws.score_precision(self.config)

    @property
    def _scorer_version(self) -> str:
        return str(self.ws.scorer(self.task).version)

    def _known(self, trials: Sequence[Trial]) -> dict[Trial, Tried]:
        found = {}
        for trial in trials:
            stored = self.ws.store.trial(
                recipe=self._recipe(trial),
                task=self.task,
                scorer_version=self._scorer_version,
                precision=self._precision,
            )
            if stored is not None:
                found[trial] = Tried(stored[0], stored[1:])
        return found

    def _make(self, trials: Sequence[Trial], files: Sequence[Path]) -> None:
        """Merge, and write each adapter to its file as it would be stored."""
        from lori_manager.engine.codec import encode_adapter
        from lori_manager.merge_inputs import MergeInputs
        from lori_manager.merging.methods import MergeOptions

        entry, options = method_of(self.adapter.method), MergeOptions(**self._settings)
        rows = int(self.adapter.config.get("probe_rows", PROBE_ROWS))
        text = None if self.general is None else Path(self.general)
        inputs = MergeInputs(self.ws, self.members, self.config, rows, text)
        for trial, file in zip(trials, files, strict=True):
            self.ws.on_message(f"merging {self._names(trial)} by {entry.name}")
            merged = inputs.of(trial.members).merged(entry, trial.weights, options)
            meta = {"base": self.ws.store.base().fingerprint}
            file.write_bytes(encode_adapter(merged, meta))

    def _measure(self, trial: Trial, blob: bytes) -> Tried:
        """Score an adapter, unless its like was, and keep the outcomes."""
        from lori_manager.engine.codec import decode_adapter

        digest = hashlib.sha256(blob).hexdigest()
        score = self._find(digest)
        if score is not None:
            outcomes = self.ws.store.outcomes(score)
        else:
            label = f"{self.adapter.ref} with {self._names(trial)}"
            weights = decode_adapter(blob)[0]
            ((_, found, weighed),) = run_weights(self.ws, label, weights, [self.task], self.config)
            outcomes = (found, weighed)
        self.ws.store.add_trial(
            recipe=self._recipe(trial),
            digest=digest,
            task=self.task,
            scorer_version=self._scorer_version,
            precision=self._precision,
            outcomes=outcomes[0],
            weights=outcomes[1],
        )
        return Tried(digest, outcomes)

    def _names(self, trial: Trial) -> str:
        refs = [self.members[n].ref for n in trial.members]
        return " + ".join(f"{w:.3g} {r}" for r, w in zip(refs, trial.weights, strict=True))
