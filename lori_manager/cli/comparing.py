"""`lori diff` and `lori blame`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from json import dumps
from typing import TYPE_CHECKING, Annotated

import typer

from lori_manager.cli import complete, output
from lori_manager.cli.output import Json
from lori_manager.cli.session import workspace
from lori_manager.cli.settings import SCORING, Changes, configured, with_settings

if TYPE_CHECKING:
    from lori_manager.blaming import Blame, Suspect
    from lori_manager.changes import Change
    from lori_manager.comparing import Difference
    from lori_manager.differing import Diff, TaskDiff
    from lori_manager.records import Score

LONGEST = 160  # characters of a prompt's end, where it is not unfolded
TITLES = {
    "adapter": "adapter",
    "member": "made from",
    "data": "data",
    "config": "settings",
    "code": "made with",
}


@with_settings(*SCORING)
def diff(
    ctx: typer.Context,
    before: Annotated[
        str,
        typer.Argument(metavar="REF", help="The one version, or base.",
                       autocompletion=complete.refs, show_default=False),
    ],
    after: Annotated[
        str,
        typer.Argument(metavar="REF", help="The other.", autocompletion=complete.refs,
                       show_default=False),
    ],
    task: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="Only this task.", autocompletion=complete.tasks),
    ] = None,
    rows: Annotated[
        int, typer.Option(metavar="N", help="How many flipped rows of each task to show.")
    ] = 20,
    answers: Annotated[
        bool | None,
        typer.Option("--answers/--no-answers", show_default="where the base is at hand",
                     help="Run the model for answers to shown rows that are not known yet."),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Show whole prompts.")] = False,
    json: Json = False,
    *,
    changes: Changes,
) -> None:  # fmt: skip
    """Show what differs between two versions, and the rows that flipped.

    What they are made of and how they score comes from the store. What each answers to a
    flipped row is asked of the model once and kept.
    """
    with workspace(ctx) as ws:
        config = configured(ws.settings.config, changes)
        found = ws.diff(before, after, task, rows=rows, answers=answers, config=config)
    if json:
        output.print_json(found.to_json())
    else:
        _show_diff(found, full)


def _show_diff(found: Diff, full: bool) -> None:
    typer.echo(f"{found.before} -> {found.after}")
    for note in filter(None, (found.relation, *found.notes)):
        typer.echo(f"note: {note}")
    for (of, kind), own in groupby(found.changes, lambda c: (c.of, c.kind)):
        output.title(TITLES[kind] + (f" of {of}" if of else ""))
        output.table(["", found.before, found.after, ""], [_change(c) for c in own])
    if not found.changes:
        typer.echo("made alike")
    if found.tasks:
        output.title("scores")
        output.table(
            ["task", f">{found.before}", f">{found.after}", ">difference", ">95%", ">p",
             ">better", ">worse", ""],
            [_scores(task) for task in found.tasks],
        )  # fmt: skip
    for task in found.tasks:
        for note in task.notes:
            typer.echo(f"note: {task.task}: {note}")
    for task in found.tasks:
        if task.flips:
            _show_flips(found, task, full)


def _change(change: Change) -> list[object]:
    told = [change.before, change.after]
    if change.name == "bytes":
        told = [output.size(value) for value in told]
    if change.name in ("digest", "A"):
        told = [value and value[:12] for value in told]
    return [change.name, *(_value(value) for value in told), change.note]


def _value(value: object) -> object:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else value


def _scores(task: TaskDiff) -> list[object]:
    d = task.difference
    return [
        task.task,
        *(output.with_error(s.value, s.error) if s else None for s in (task.before, task.after)),
        *_difference(d),
        output.count(task.gained) if d else None,
        output.count(task.lost) if d else None,
        _verdict(d),
    ]


def _difference(d: Difference | None) -> list[str | None]:
    """The change, its interval and p."""
    if d is None:
        return [None, None, None]
    return [output.signed(d.change), _interval(d), _p(d.p)]


def _interval(d: Difference) -> str | None:
    low, high = output.signed(d.low), output.signed(d.high)
    return None if output.NONE in (low, high) else f"{low} to {high}"


def _p(p: float) -> str:
    return output.NONE if p != p else f"{p:.2g}"


def _verdict(d: Difference | None) -> str:
    if d is None or not d.real:
        return ""
    return "worse" if d.worse else "better"


def _show_flips(found: Diff, task: TaskDiff, full: bool) -> None:
    binary = task.difference is not None and task.difference.gained is not None
    changed = task.gained + task.lost
    what = "rows that flipped" if binary else "rows that changed most"
    shown = "" if len(task.flips) == changed else f", {len(task.flips)} of {changed}"
    output.title(f"{task.task}: {what}{shown}")
    for flip in task.flips:
        how = "better" if flip.better else "worse"
        if not binary:
            how += f", {flip.before:.3f} -> {flip.after:.3f}"
        typer.echo(f"\nrow {flip.row}  {flip.key[:12]}  {how}")
        told = {"prompt": _prompt(flip.prompt, full), "expected": [_quoted(flip.expected)]}
        answers = {found.before: flip.answer_before, found.after: flip.answer_after}
        if any(answer is not None for answer in answers.values()):
            told |= {ref: [_quoted(answer)] for ref, answer in answers.items()}
        width = max(map(len, told))
        for name, lines in told.items():
            for number, line in enumerate(lines):
                typer.echo(f"  {'' if number else name:<{width}}  {output.one_line(line)}".rstrip())


def _prompt(prompt: str, full: bool) -> list[str]:
    if full:
        return prompt.splitlines() or [""]
    text = output.one_line(prompt)
    return [text if len(text) <= LONGEST else "..." + text[-LONGEST:]]


def _quoted(text: str | None) -> str:
    """In quotes, since white space counts; `-` where it is not known."""
    return output.NONE if text is None else dumps(text, ensure_ascii=False)


@with_settings(*SCORING)
def blame(
    ctx: typer.Context,
    ref: Annotated[
        str,
        typer.Argument(metavar="REF", help="A merge, or an adapter continued from another.",
                       autocompletion=complete.refs, show_default=False),
    ],
    task: Annotated[
        str, typer.Option(metavar="TASK", help="Whose loss.", autocompletion=complete.tasks)
    ],
    halve: Annotated[
        bool, typer.Option("--halve", help="Try each member at half its weight, too.")
    ] = False,
    general_text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The general text, where the merge had its own."),
    ] = None,
    json: Json = False,
    *,
    changes: Changes,
) -> None:  # fmt: skip
    """Find the member, or the stage, that a task's loss is owed to.

    Of a merge, one member at a time is left out and the rest merged anew, by the same method
    and options; nothing of that becomes a version. Of a continued adapter, its stages' stored
    scores are compared. What was tried once is known.
    """
    with workspace(ctx) as ws:
        config = configured(ws.settings.config, changes)
        found = ws.blame(ref, task, halve=halve, general=general_text, config=config)
    if json:
        output.print_json(found.to_json())
    else:
        _show_blame(found)


def _show_blame(found: Blame) -> None:
    output.table(
        ["task", "against", ">score", f">{found.ref}", ">difference", ">95%", ">p", ""],
        [
            [
                found.task,
                found.own.subject,
                _score(found.own),
                _score(found.score),
                *_difference(found.loss),
                _verdict(found.loss),
            ]
        ],
    )
    for note in found.notes:
        typer.echo(f"note: {note}")
    for how, own in groupby(found.suspects, lambda s: s.how):
        _show_suspects(found, how, list(own))
    if found.routed:
        output.title(f"held-out probe prompts of {found.task.partition('#')[0]}, by where they go")
        output.table(["member", ">prompts"], list(found.routed.items()))
    if found.suspects:
        typer.echo(f"\n{_conclusion(found)}")


def _score(score: Score) -> str:
    return output.with_error(score.value, score.error)


def _show_suspects(found: Blame, how: str, suspects: Sequence[Suspect]) -> None:
    if how == "stage":
        output.title(f"{found.task.partition('#')[0]} at every stage since {found.own.subject}")
    elif how == "dropped":
        output.title(f"{found.ref} without one member")
    else:
        output.title(f"{found.ref} with one member at half its weight")
    stages = how == "stage"
    columns = ["stage" if stages else "member", "taught", *([] if stages else [">weight"])]
    columns += [">score", ">change", ">95%", ">p", ">p (Holm)", f">to {found.own.subject}", ""]
    rows = []
    for s in suspects:
        weight = [] if s.weight is None else [f"{s.weight:.4g}"]
        left = output.signed(s.left.change)
        told = [output.with_error(s.value, s.error), *_difference(s.change), _p(s.p), left]
        rows.append([s.ref, s.task, *weight, *told, s.verdict])
    output.table(columns, rows)


def _conclusion(found: Blame) -> str:
    task = found.task.partition("#")[0]
    if found.cause is None and not (found.loss.worse and found.loss.real):
        return f"{task} has lost nothing beyond noise"
    if found.cause is None:
        what = "stage" if found.kind == "stages" else "member"
        return f"no single {what} accounts for a loss of {task} beyond noise"
    if found.kind == "stages":
        return f"{task} was lost most at {found.cause}"
    return f"{task} loses most by {found.cause}"
