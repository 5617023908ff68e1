"""A harness task -> rows: its documents, and for each what the harness would ask a model."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from lori_manager.errors import BadData, InvalidInput
from lori_manager.extras import load_extra
from lori_manager.harness.definitions import (
    EXTRA,
    SHARES,
    SUMMED,
    definition,
    failed,
    manager_for,
    quiet,
    unit_of,
    version_of,
)
from lori_manager.tasks.rows import Row, bad_row, rows_from_jsonl, rows_to_jsonl

FIELD = "lm_eval"  # of a row
# What `simple_evaluate` sets before it loads a task and draws its examples.
_PYTHON_SEED, _OTHER_SEED = 0, 1234


@dataclass(frozen=True)
class Frozen:
    """A harness task as rows.

    Attributes:
        rows: one a document, in the harness's order.
        scorer: a name for how they are scored, `lm_eval:acc_norm`.
        version: of that; see `version_of`.
        options: what `request_scorer` needs, to be kept with the task.
    """

    rows: list[Row]
    scorer: str
    version: str
    options: dict[str, Any]


def freeze(
    name: str,
    include: str | None = None,
    *,
    metric: str | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
) -> Frozen:
    """Load a harness task as `lm_eval.simple_evaluate` does and keep what it would ask.

    Args:
        name: of one task. include: a folder of YAML that is looked in first.
        metric: one of its metrics, or `METRIC,FILTER` where answers go through several
            filters; its first by default.
        fewshot: examples before each question; the task's own number by default.
        limit: only its first documents.
    Raises:
        NotFound: no such task or metric. InvalidInput: one that cannot be frozen.
        BadData: its documents cannot be loaded or kept.
    """
    for value, what, least in ((fewshot, "--lm-eval-fewshot", 0), (limit, "--lm-eval-limit", 1)):
        if value is not None and value < least:
            raise InvalidInput(f"{what} must be at least {least}, got {value}")
    told = definition(name, include)
    _check_kind(name, told)
    with quiet(), _seeded(), contextlib.redirect_stderr(io.StringIO()):
        try:
            task = manager_for(name, include).load([name])["tasks"][name]
            own = task.get_config("num_fewshot")
            if fewshot is not None and own != 0:
                task.set_config(key="num_fewshot", value=fewshot)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_OTHER_SEED)
            chosen, filter = _choose(name, task, metric)
            task.build_all_requests(limit=limit, rank=0, world_size=1)
            asked = groupby(task.instances, key=lambda i: i.doc_id)
            rows = [_row(name, task, list(own)) for _, own in asked]
        except (BadData, InvalidInput):
            raise
        except Exception as e:
            raise failed(name, "cannot be read", e) from e
    harness = load_extra("lm_eval", EXTRA, "lm-evaluation-harness")
    better = chosen not in SUMMED and bool(task.higher_is_better().get(chosen, True))
    options = {
        "task": name,
        "include": include,
        "metric": chosen,
        "filter": filter,
        "higher_is_better": better,
        "unit": unit_of(chosen),
        "binary": chosen in SHARES,
        "fewshot": task.get_config("num_fewshot"),
        "limit": limit,
        "harness": harness.__version__,
    }
    scorer = f"lm_eval:{chosen}" + ("" if filter == "none" else f",{filter}")
    return Frozen(rows, scorer, version_of(told), options)


def requests_of(row: Row) -> tuple[dict[str, Any], list[tuple[str, tuple[Any, ...]]]]:
    """A row's document, and (kind, arguments) of all that is asked about it.

    Raises:
        BadData: a row that was not made by `freeze`.
    """
    kept = row.extra.get(FIELD)
    if not isinstance(kept, Mapping):
        problem = "it holds no request of lm-evaluation-harness"
        raise bad_row(row.where or "a row", problem, "score it by another scorer")
    asked = [
        (kind, (row.prompt if context is None else context, *rest))
        for kind, context, *rest in kept["requests"]
    ]
    return kept["doc"], asked


def _check_kind(name: str, told: Mapping[str, Any]) -> None:
    if told.get("unsafe_code"):
        raise InvalidInput(
            f"the harness task {name!r} runs programs that the model writes, without a sandbox: "
            "add its rows with `--scorer pass_at_1` instead"
        )
    if told.get("doc_to_image") or told.get("doc_to_audio"):
        raise InvalidInput(
            f"the harness task {name!r} shows pictures or sounds; lori has text only"
        )
    asked = told.get("generation_kwargs") or {}
    if asked.get("do_sample") or float(asked.get("temperature") or 0) > 0:
        raise InvalidInput(
            f"the harness task {name!r} samples its answers, so that no two scores of it are "
            "alike: use a greedy one (`do_sample: false` in a YAML of your own)"
        )


def _choose(name: str, task: Any, metric: str | None) -> tuple[str, str]:
    """(metric, filter); NotFound-like errors list what there is."""
    known, filters = list(task.aggregation()), [f.name for f in task._filters]
    wanted, _, filter = (metric or known[0]).partition(",")
    filter = filter or filters[0]
    if wanted not in known or filter not in filters:
        raise InvalidInput(
            f"the harness task {name!r} has no metric {metric!r}; it has {', '.join(known)}"
            + (f", each after one of the filters {', '.join(filters)}" if len(filters) > 1 else "")
        )
    mean = load_extra("lm_eval.api.metrics", EXTRA, "lm-evaluation-harness").mean
    if wanted not in SUMMED and task.aggregation()[wanted] is not mean:
        means = [m for m in known if m in SUMMED or task.aggregation()[m] is mean]
        raise InvalidInput(
            f"{wanted!r} of the harness task {name!r} is no mean over rows, and outcomes are kept "
            f"row by row; choose one that is: {', '.join(means) or 'there is none'}"
        )
    return wanted, filter


def _row(name: str, task: Any, instances: Sequence[Any]) -> Row:
    """The document with what is asked; prompt and completion are for people to read."""
    doc = dict(instances[0].doc)
    first = instances[_right(task, doc, len(instances))]
    prompt, completion = "", str(first.args[0])
    if first.request_type == "loglikelihood":
        prompt, completion = first.args
    elif first.request_type == "generate_until":
        prompt, completion = first.args[0], _text(task, doc)
    requests = [
        [i.request_type, None if i.args[0] == prompt else i.args[0], *i.args[1:]] for i in instances
    ]
    where = f"{name}, document {instances[0].doc_id + 1}"
    row = Row(prompt, completion, (), {FIELD: {"doc": doc, "requests": requests}}, where)
    try:
        same = rows_from_jsonl(rows_to_jsonl([row])) == [row]
    except (ValueError, TypeError, RecursionError) as e:
        raise bad_row(where, f"JSON cannot carry it: {e}", "the task cannot be frozen") from e
    if not same:
        raise bad_row(where, "it does not come back from JSON as it was", "it cannot be frozen")
    return row


def _right(task: Any, doc: Mapping[str, Any], count: int) -> int:
    """The request about the right choice, 0 where there is no one choice."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0
    target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(target, list) and target:
        target = target[0]
    if isinstance(target, str) and target in (choices := task.doc_to_choice(doc)):
        target = choices.index(target)
    return target if isinstance(target, int) and 0 <= target < count else 0


def _text(task: Any, doc: Mapping[str, Any]) -> str:
    target = task.doc_to_target(doc)
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        target = task.doc_to_choice(doc)[target]
    if isinstance(target, list) and target:
        target = target[0]
    return str(target)


@contextmanager
def _seeded() -> Iterator[None]:
    """The global seeds that the harness sets, and afterwards the states that they had."""
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(_PYTHON_SEED)
    np.random.seed(_OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)
