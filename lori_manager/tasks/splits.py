"""From the files of a task to its splits: nothing learned may be in what is scored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from lori_manager.errors import BadData, InvalidInput
from lori_manager.tasks.rows import Row, one_line, shorten


@dataclass(frozen=True)
class PreparedSplits:
    """The rows of each split, and what the user should know about them.

    `splits` holds `eval` always; `train`, `calibration` and `probe` where there are
    such rows, in the order of `records.SPLITS`.
    """

    splits: dict[str, list[Row]]
    notes: list[str]


def make_splits(
    train: Sequence[Row] | None,
    eval: Sequence[Row] | None,
    calibration: Sequence[Row] | None = None,
    probe: Sequence[Row] | None = None,
    *,
    probe_rows: int = 256,
    allow_overlap: bool = False,
    asked: Callable[[Row], str] = attrgetter("prompt"),
) -> PreparedSplits:
    """Check the files of a task against each other and set probe rows aside.

    A row learned from may not share its prompt with an eval row, whatever its
    completion; rows without a prompt are compared by their completion. Without a probe
    file, at most `probe_rows` rows and at most a tenth of the training rows (rounded
    up, never the last one) leave training: those with the smallest keys, so that the
    choice does not depend on the file's order. Copies of one row go together, or a
    probe row would still be trained on. The rest keeps the file's order.

    Args:
        train: None makes a task that is only scored.
        eval: required.
        calibration: None leaves the choice among the training rows to the trainer.
        probe: None takes them from `train`.
        probe_rows: 0 takes none.
        allow_overlap: note shared prompts and go on.
        asked: what counts as a row's prompt.
    Raises:
        InvalidInput: no eval rows, calibration without training rows, bad `probe_rows`.
        BadData: shared prompts, counted, the first one named.
    """
    if not eval:
        raise InvalidInput("a task needs rows to be scored on: give `--eval FILE`")
    if calibration and not train:
        raise InvalidInput("calibration rows without training rows: give `--train FILE` too")
    if isinstance(probe_rows, bool) or not isinstance(probe_rows, int) or probe_rows < 0:
        raise InvalidInput(f"`probe_rows` must be 0 or more, got {probe_rows!r}")
    files = {"train": train, "eval": eval, "calibration": calibration, "probe": probe}
    splits = {name: list(rows) for name, rows in files.items() if rows}
    notes: list[str] = []
    learned = {name: rows for name, rows in splits.items() if name != "eval"}
    found = [_overlap(name, rows, eval, asked) for name, rows in learned.items()]
    overlaps = [text for text in found if text]
    if overlaps and not allow_overlap:
        raise BadData(
            f"{'; '.join(overlaps)}. What is learned must not be scored: remove them on one "
            "side, or pass `--allow-overlap`"
        )
    notes += [f"{text}; allowed" for text in overlaps]
    for name, rows in splits.items():
        notes += _copies(name, rows)
    if train and probe:
        kept = {row.key for row in probe}
        shared = sum(row.key in kept for row in splits["train"])
        if shared:
            notes.append(f"{shared} of {len(splits['train'])} train rows are probe rows too")
    elif train and probe_rows:
        splits["train"], aside = _set_aside(splits["train"], probe_rows)
        total = len(splits["train"]) + len(aside)
        if aside:
            splits["probe"] = aside
            notes.append(f"{len(aside)} of {total} train rows set aside as probe rows")
        else:
            notes.append(f"no probe rows: {total} train rows are too few, or are all alike")
    return PreparedSplits(splits, notes)


def hold_out(
    rows: Sequence[Row], share: float, seed: int, alike: Callable[[Row], str]
) -> tuple[list[Row], list[Row]]:
    """Rows to learn and rows to be scored on, by a seeded draw that no order changes.

    Args:
        rows: of one source.
        share: of the rows that are scored on, at least one.
        seed: of the draw.
        alike: what rows have in common that must stay on one side.
    Returns:
        (train, eval), each in the order of `rows`.
    Raises:
        InvalidInput: a share outside (0, 1). BadData: fewer than two kinds of rows.
    """
    if not 0 < share < 1:
        raise InvalidInput(f"the share of eval rows must be above 0 and below 1, got {share}")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(alike(row), []).append(row)
    drawn = sorted(groups, key=lambda g: hashlib.sha256(f"{seed}|{g}".encode()).digest())
    if len(drawn) < 2:
        raise BadData(f"{len(rows)} rows, all alike: expected one to learn and one to score on")
    held: set[str] = set()
    count = 0
    for group in drawn[:-1]:
        if count >= max(1, round(share * len(rows))):
            break
        held.add(group)
        count += len(groups[group])
    return [row for row in rows if alike(row) not in held], [r for r in rows if alike(r) in held]


def _set_aside(rows: list[Row], limit: int) -> tuple[list[Row], list[Row]]:
    """(the rest in its order, rows set aside in the order of their keys)."""
    room = min(limit, -(-len(rows) // 10), len(rows) - 1)
    aside: list[Row] = []
    for _, group in groupby(sorted(rows, key=_key), key=_key):
        if len(aside) == room:
            break
        copies = list(group)
        if len(aside) + len(copies) <= room:
            aside += copies
    taken = {row.key for row in aside}
    return [row for row in rows if row.key not in taken], aside


def _key(row: Row) -> bytes:
    return row.key


def _overlap(
    name: str, rows: Iterable[Row], eval_rows: Sequence[Row], asked: Callable[[Row], str]
) -> str | None:
    def content(row: Row) -> tuple[bool, str]:
        """What two rows must not share: the prompt, or without one the completion."""
        return (True, prompt) if (prompt := asked(row)).strip() else (False, row.completion)

    seen: dict[tuple[bool, str], int] = {}
    rows = list(rows)
    for i, row in enumerate(rows):
        seen.setdefault(content(row), i)
    shared = [(j, seen[c]) for j, row in enumerate(eval_rows) if (c := content(row)) in seen]
    if not shared:
        return None
    j, i = shared[0]
    return (
        f"{len(shared)} of {len(eval_rows)} eval rows share their prompt with {name} rows, "
        f"the first: {_place('eval', eval_rows[j], j)} and {_place(name, rows[i], i)}, "
        f"{shorten(content(eval_rows[j])[1], 60)}"
    )


def _copies(name: str, rows: list[Row]) -> list[str]:
    first: dict[bytes, int] = {}
    copies = [(i, at) for i, row in enumerate(rows) if (at := first.setdefault(row.key, i)) != i]
    if not copies:
        return []
    i, at = copies[0]
    return [
        f"{len(copies)} of {len(rows)} {name} rows are exact copies of earlier ones, the first: "
        f"{_place(name, rows[i], i)} of {_place(name, rows[at], at)}; kept"
    ]


def _place(name: str, row: Row, index: int) -> str:
    return one_line(row.where) or f"{name} row {index + 1}"
