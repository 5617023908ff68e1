"""A harness task by its name: its YAML, which of its metrics are means, and its digest."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lori_manager.errors import BadData, InvalidInput, NotFound, first_line
from lori_manager.extras import load_extra
from lori_manager.tasks.rows import one_line
from lori_manager.tasks.scorers import RequestScorer

EXTRA = "lm-eval"
_MEMBERS = 8  # of a group that are named in an error
# 0 or 1 of a document.
SHARES = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"})


@dataclass(frozen=True)
class Summed:
    """A metric that the harness takes over all rows at once, as a mean over rows.

    Attributes:
        unit: of the mean. row: what the harness says of a row -> (outcome, weight), such
            that the harness's figure follows from the weighted mean: it is exp of it, or
            for bits per byte the mean itself.
    """

    unit: str
    row: Callable[[Any], tuple[float, float]]


def _per_token(pair: tuple[float, float]) -> tuple[float, float]:
    likelihood, count = pair
    return -float(likelihood) / float(count), float(count)


SUMMED: Mapping[str, Summed] = {
    "perplexity": Summed("nats per row", lambda x: (-float(x), 1.0)),
    "word_perplexity": Summed("nats per word", _per_token),
    "byte_perplexity": Summed("nats per byte", _per_token),
    "bits_per_byte": Summed(
        "bits per byte", lambda x: (_per_token(x)[0] / math.log(2), float(x[1]))
    ),
}


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the harness logs about ordinary things."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def manager_for(name: str, include: str | None) -> Any:
    """A `TaskManager` that knows the task; a folder of the user's own comes first.

    Args:
        include: a folder with YAML.
    Raises:
        InvalidInput: the extra is not installed, or the name is a group's, or a task of a
            kind that cannot be frozen.
        NotFound: no such task or folder.
    """
    if include is not None and not Path(include).is_dir():
        raise NotFound(f"{include}: no such folder; --lm-eval-include names one with YAML of tasks")
    tasks = load_extra("lm_eval.tasks", EXTRA, f"the lm-evaluation-harness task {name!r}")
    with quiet():
        manager = None
        if include is not None:
            manager = tasks.TaskManager(include_path=[include], include_defaults=False)
        if manager is None or name not in manager.task_index:
            manager = tasks.TaskManager(include_path=[include] if include else None)
    entry = manager.task_index.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, manager.all_subtasks, _MEMBERS)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise NotFound(f"lm-evaluation-harness has no task {name!r}{hint}")
    if entry.kind.name in ("GROUP", "TAG"):
        with quiet():
            members = sorted(entry.tags) or _members(entry)
        shown = ", ".join(members[:_MEMBERS]) + (", ..." if len(members) > _MEMBERS else "")
        raise InvalidInput(f"{name!r} is a group of harness tasks, add one by one: {shown}")
    if entry.kind.name != "TASK":
        raise InvalidInput(
            f"{name!r} is a Python class in lm-evaluation-harness: only tasks written in YAML "
            "can be frozen"
        )
    return manager


def _members(entry: Any) -> list[str]:
    told = (entry.cfg or {}).get("task", [])
    named = told if isinstance(told, list) else [told]
    return [m if isinstance(m, str) else str(m.get("task", m.get("group"))) for m in named]


def definition(name: str, include: str | None) -> dict[str, Any]:
    """The task's YAML, what it includes filled in and its functions loaded.

    Raises:
        As `manager_for`; BadData: YAML or functions that cannot be loaded.
    """
    manager = manager_for(name, include)
    loader = load_extra("lm_eval.tasks._yaml_loader", EXTRA, "lm-evaluation-harness")
    try:
        told: dict[str, Any] = loader.load_yaml(manager.task_index[name].yaml_path)
    except Exception as e:
        raise failed(name, "cannot be loaded", e) from e
    return {k: v for k, v in told.items() if k not in ("tag", "group", "task_list")}


def version_of(told: Mapping[str, Any]) -> str:
    """64 bits of the SHA-256 of a definition, of its functions' files and the harness's version.

    Where its documents come from does not count: the rows are frozen.
    """
    harness = load_extra("lm_eval", EXTRA, "lm-evaluation-harness")
    kept = {key: value for key, value in told.items() if not key.startswith("dataset_")}
    text = json.dumps({"harness": harness.__version__, "task": _plain(kept)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """JSON of a definition: a function is its name and the digest of its file."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if callable(value):
        module = sys.modules.get(getattr(value, "__module__", None) or "")
        file = inspect.getsourcefile(module) if module else None
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
        return [getattr(value, "__qualname__", type(value).__qualname__), digest]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def check_unchanged(scorer: RequestScorer) -> None:
    """Refuse to score by another definition than the rows were frozen with.

    Raises:
        InvalidInput: the YAML, its functions or the harness have changed.
    """
    if version_of(definition(scorer.task, scorer.include)) != scorer.version:
        raise InvalidInput(
            f"the harness task {scorer.task!r} is not what it was when its rows were frozen (its "
            "YAML, its functions or the installed lm-eval changed): add it again, which makes a "
            "new revision"
        )


def unit_of(metric: str) -> str:
    """What a mean of the metric counts in."""
    if metric in SUMMED:
        return SUMMED[metric].unit
    return "share" if metric in SHARES else metric


def failed(name: str, what: str, error: BaseException) -> BadData:
    """One line about what the harness or a task's own code raised."""
    kind = type(error).__name__
    return BadData(one_line(f"the harness task {name!r} {what}: {kind}: {first_line(error)}"[:500]))
