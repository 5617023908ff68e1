"""The rows that changed between two versions: what was lost and what was gained, readable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lori_manager.reporting.contents import Change, ChangedRow, ChangedRows
from lori_manager.reporting.source import Pair, Source, TaskAudit

LONGEST = 600  # characters of a prompt or an answer that are kept


@dataclass(frozen=True)
class RowAsked:
    """Which row's answers are wanted."""

    task: str  # "safety#2"
    index: int  # among its eval rows, from 0
    before: str  # the two versions' refs
    after: str


# The answers of both versions, where they are stored.
Answers = Callable[[RowAsked], tuple[str, str] | None]


def shortened(text: str, longest: int = LONGEST) -> str:
    """`text`, without its middle where it is too long: an answer often hangs on the end."""
    if len(text) <= longest:
        return text
    head, tail = longest * 2 // 3, longest // 3
    return (
        f"{text[:head]}\n[... {len(text) - head - tail:,} characters left out ...]\n{text[-tail:]}"
    )


def paired_change(pair: Pair, against: str) -> Change:
    """The comparison of two versions as a Change whose verdict is still of it alone."""
    d = pair.difference
    verdict = ("worse" if d.worse else "better") if d.real else ""
    note = "" if d.rows else "no row was measured in both"
    return Change(
        against, d.change, d.low, d.high, d.p, d.rows, d.rows_only_before, d.rows_only_after,
        d.gained, d.lost, verdict, note,
    )  # fmt: skip


def changed_rows(
    source: Source,
    task: TaskAudit,
    pair: Pair,
    change: Change,
    after: str,
    purpose: str,
    most: int,
    answers: Answers | None,
) -> ChangedRows:
    """At most `most` rows that worsened and as many that improved, the most changed first.

    Args:
        pair: the outcomes of `change.against` and of `after` on the task.
        purpose: what the comparison is for, such as "parent".
        answers: tells both versions' answers to a row, or None.
    Raises:
        DamagedObject: the stored rows are not what was written.
    """
    higher = task.higher_is_better is not False
    gain = (pair.after - pair.before).astype(np.float64) * (1 if higher else -1)
    order = np.argsort(-np.abs(np.nan_to_num(gain)), kind="stable")
    worsened = [int(i) for i in order if gain[i] < 0]
    improved = [int(i) for i in order if gain[i] > 0]
    told = [*worsened[:most], *improved[:most]]
    rows = source.rows(task) if told else []

    def row(i: int) -> ChangedRow:
        asked = RowAsked(task.ref, i, change.against, after)
        said = answers(asked) if answers is not None else None
        before, now = (None, None) if said is None else (shortened(said[0]), shortened(said[1]))
        return ChangedRow(
            i,
            bool(gain[i] > 0),
            shortened(rows[i].prompt),
            shortened(rows[i].completion),
            float(pair.before[i]),
            float(pair.after[i]),
            before,
            now,
        )

    return ChangedRows(
        purpose,
        task.ref,
        change.against,
        after,
        change,
        len(worsened),
        len(improved),
        tuple(row(i) for i in told),
    )


def weight(found: ChangedRows) -> tuple[int, float]:
    """A sort key: what is really worse first, then by rows lost."""
    p = found.change.p
    return (
        0 if found.change.verdict == "worse" else 1,
        -found.worsened + (0.0 if math.isnan(p) else p),
    )
