"""`lori merge`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from lori_manager.cli import complete, output
from lori_manager.cli.output import Json
from lori_manager.cli.scores import names
from lori_manager.cli.session import workspace
from lori_manager.cli.settings import SCORING, Changes, configured, with_settings
from lori_manager.errors import InvalidInput

if TYPE_CHECKING:
    from lori_manager.auditing import Audit, Entry
    from lori_manager.combining import Merged
    from lori_manager.forecasting import Forecast
    from lori_manager.records import Adapter


SEARCH = "search"
READS: dict[object, str] = {
    None: "weights alone",
    "grams": "probe prompts",
    "answers": "probe prompts",
    "labels": "probe rows",
}


def _list_methods(wanted: bool) -> None:
    if not wanted:
        return
    from lori_manager.combining import methods
    from lori_manager.merging.methods import options_of

    columns = ["method", "one adapter at weight 1", "order", "reads", "source", "options"]
    rows = [
        [
            entry.name,
            "returns itself" if entry.facts.get("identity") else "changes",
            "matters" if entry.facts.get("ordered") else "does not matter",
            READS[entry.facts.get("needs")],
            entry.source,
            " ".join(option.replace("_", "-") for option in options_of(entry)) or "none",
        ]
        for entry in methods()
    ]
    output.table(columns, rows)
    raise typer.Exit


@with_settings(*SCORING)
def merge(
    ctx: typer.Context,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Tasks, by their own adapters.", autocompletion=complete.tasks
        ),
    ] = None,
    adapters: Annotated[
        str | None,
        typer.Option(metavar="REF,REF", help="Adapters.", autocompletion=complete.refs),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="See --list-methods; auto tries several. Unset: layerwise where tasks "
                     "have probe rows, else concat."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W", help="One a member, adapters first; 1/T each by default; "
                     "search: a common one by probe rows."),
    ] = None,
    merge_from: Annotated[
        str | None,
        typer.Option("--from", metavar="REF", help="A merge to make anew, see --drop, --reweight.",
                     autocompletion=complete.refs),
    ] = None,
    drop: Annotated[
        str | None, typer.Option(metavar="A,B", help="With --from: members to leave out.")
    ] = None,
    reweight: Annotated[
        str | None, typer.Option(metavar="A=W,B=W", help="With --from: other weights of members.")
    ] = None,
    into: Annotated[
        str | None, typer.Option(metavar="LINE", help="The merge's line; main.",
                                 autocompletion=complete.lines)
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option(help="Rank of the merge; as the method gives it if unset. Which method takes "
                     "which option: --list-methods."),
    ] = None,
    probe_rows: Annotated[
        int | None,
        typer.Option(help="Probe rows of each task, for methods that read them; 32."),
    ] = None,
    span: Annotated[
        str | None,
        typer.Option(help="layerwise, repair: free, or members, which keeps every B and its mask."),
    ] = None,
    answers: Annotated[
        float | None,
        typer.Option(help="layerwise, repair: share of the weight on the places answers are "
                     "read from."),
    ] = None,
    general: Annotated[
        float | None,
        typer.Option(help="layerwise, iteris, repair: weight of general text against all tasks, "
                     "0: none."),
    ] = None,
    general_text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="General text; Python's own manual if unset."),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(help="magnitude, ties, dare, della: core or full, where they look at single "
                     "entries."),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="magnitude, ties, dare, della, core, knots: share of entries kept."),
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option(help="regmean, lorm, layerwise, iteris, repair: of the regression, against "
                     "the mean second moment."),
    ] = None,
    shrink: Annotated[
        float | None,
        typer.Option(help="regmean, layerwise, iteris, repair: what entries of the moments off the "
                     "diagonal are multiplied with, 1: nothing is changed."),
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="iteris: how often to solve.")] = None,
    steps: Annotated[int | None, typer.Option(help="repair, soups: steps of training.")] = None,
    rate: Annotated[float | None, typer.Option(help="repair, soups: learning rate.")] = None,
    labels: Annotated[
        float | None,
        typer.Option(help="repair, soups: share of the rows' own completions; the rest is what "
                     "each task's own adapter says."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="dare, della, repair, soups: of what they draw or train.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Merge nothing: tell how much the members would get in "
                     "each other's way, and what each task would lose, by probe prompts."),
    ] = False,
    list_methods: Annotated[
        bool,
        typer.Option(
            "--list-methods", help="Show the methods and exit.", callback=_list_methods,
            is_eager=True,
        ),
    ] = False,
    json: Json = False,
    *,
    changes: Changes,
) -> None:  # fmt: skip
    """Merge adapters into one, store and score it.

    Its score on each member's task is shown beside the member's own. With `--method
    routed` every member is kept whole, and each prompt goes to one of them.
    """
    options = {
        "max_rank": max_rank, "span": span, "answers": answers, "general": general,
        "space": space, "density": density, "eps": eps, "shrink": shrink,
        "iterations": iterations,
        "steps": steps, "rate": rate, "labels": labels, "seed": seed,
    }  # fmt: skip
    given = {key: value for key, value in options.items() if value is not None}
    if merge_from is None and (drop is not None or reweight is not None):
        raise InvalidInput("--drop and --reweight go with --from, which names a merge")
    if merge_from is not None and (
        tasks or adapters or method or weights or given or probe_rows is not None
    ):
        raise InvalidInput("--from takes members, method and options from the merge that it names: "
                           "give only --drop, --reweight and --into with it")  # fmt: skip
    if dry_run and (merge_from is not None or weights == SEARCH):
        raise InvalidInput("--dry-run looks at --tasks and --adapters with given weights: leave "
                           "--from and `--weights search` out")  # fmt: skip
    shares = weights if weights == SEARCH else _numbers(weights)
    with workspace(ctx) as ws:
        config = configured(ws.settings.config, changes)
        if dry_run:
            told = ws.forecast(
                names(adapters) or [],
                names=names(tasks) or [],
                method=method,
                weights=_numbers(weights),
                options=given,
                probe_rows=32 if probe_rows is None else probe_rows,
                config=config,
            )
            if json:
                output.print_json(told)
            else:
                _show_forecast(told)
            return
        if merge_from is not None:
            merged = ws.merge_again(
                merge_from,
                drop=names(drop) or [],
                reweight=_shares(reweight),
                into=into,
                general=general_text,
                config=config,
            )
        else:
            merged = ws.merge(
                names(adapters) or [],
                names=names(tasks) or [],
                method=method,
                weights=shares,
                into=into or "main",
                options=given,
                probe_rows=probe_rows,
                general=general_text,
                config=config,
            )
        found = ws.audit(merged.adapter.ref)
    if json:
        output.print_json({"merged": merged, "audit": found.to_json()["tasks"]})
    else:
        _show(merged, found)


def _show_forecast(told: Forecast) -> None:
    found, refs = told.interference, [member.ref for member in told.members]
    for title, rows, digits in (
        ("how loud a column's adapter speaks on a row's own prompts, its own being 1",
         found.response, 3),
        ("share of a column's directions that a row's adapter writes to as well",
         found.directions, 3),
        ("entries of B that both use, of those that either does", found.entries, 3),
    ):  # fmt: skip
        output.title(title)
        output.table(
            ["adapter", *(f">{ref}" for ref in refs)],
            [
                [ref, *(output.number(value, digits) for value in row)]
                for ref, row in zip(refs, rows, strict=True)
            ],
        )
    output.title("what the weighted sum gets wrong of each one's own update (1: as if it had none)")
    output.table(
        ["adapter", ">weight", ">error"],
        [
            [ref, f"{weight:.4g}", output.number(error)]
            for ref, weight, error in zip(refs, told.weights, found.error, strict=True)
        ],
    )
    if told.loudest is not None:
        one, other, loud = told.loudest
        typer.echo(f"\n{one} and {other} disturb each other most ({loud:.3f})")
    _show_expected(told)


def _show_expected(told: Forecast) -> None:
    if not told.expected:
        return
    output.title(f"expected of {told.method}, by a rehearsal on prompts that it was not fitted to")
    output.table(
        ["task", "own adapter", ">says the same", ">own", ">expected"],
        [
            [
                f"{e.task}#{e.task_revision}",
                e.member,
                f"{round(e.agrees * e.rows)} of {e.rows}",
                output.number(e.own),
                output.with_error(e.score, e.error),
            ]
            for e in told.expected
        ],
    )
    past = told.past
    if past.forecasts:
        fits = "" if math.isnan(past.r_squared) else f", R^2 of the losses {past.r_squared:.2f}"
        typer.echo(
            f"\n{past.forecasts} earlier forecasts of {past.merges} merges were off by "
            f"{past.off_by:.3f} on average{fits}"
        )
    else:
        typer.echo("\nno earlier forecast here has come to a merge yet")


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as e:
        raise InvalidInput(f"`weights` must be numbers such as 0.5,0.5, got {text!r}") from e


def _shares(text: str | None) -> dict[str, float]:
    """`a=0.3,b=1` by name."""
    out: dict[str, float] = {}
    for part in text.split(",") if text is not None else ():
        name, _, weight = (word.strip() for word in part.partition("="))
        try:
            number = float(weight)
        except ValueError as e:
            raise InvalidInput(
                f"--reweight takes members and weights such as a=0.3,b=1, got {part!r}"
            ) from e
        if name in out:
            raise InvalidInput(f"{name!r} is named twice: give it one weight")
        out[name] = number
    return out


def _show(merged: Merged, found: Audit) -> None:
    adapter = merged.adapter
    output.table(
        ["member", "task", ">weight", ">rank"],
        [
            [m.ref, m.task, f"{weight:.4g}", m.rank]
            for m, weight in zip(merged.members, merged.weights, strict=True)
        ],
    )
    typer.echo(
        f"\n{adapter.ref}: {adapter.method} at rank {adapter.rank}, {output.size(adapter.bytes)}"
    )
    if "routing" in adapter.facts:
        _show_routing(adapter)
    rows = []
    for task in found.tasks:
        entry = next((e for e in task.entries if e.subject == adapter.ref), None)
        if entry is None or not task.latest:
            continue
        against = entry.parent.against if entry.parent else None
        own = next((e for e in task.entries if e.subject == against), None)
        rows.append([task.ref, *_comparison(entry, own)])
    output.table(["task", "own adapter", ">own", ">merge", ">difference", ""], rows)


def _show_routing(adapter: Adapter) -> None:
    routing = adapter.facts["routing"]
    typer.echo(
        f"router: {routing['accuracy']:.1%} of held-out probe prompts go to their own member, "
        f"read at {routing['reads']}"
    )
    refs = [parent.ref for parent in adapter.parents]
    counts = [[ref, *row] for ref, row in zip(refs, routing["held_out"], strict=True)]
    output.table(["prompts of", *(f">to {ref}" for ref in refs)], counts)
    typer.echo()


def _comparison(entry: Entry, own: Entry | None) -> list[str | None]:
    from lori_manager.auditing import wording

    change = entry.parent
    return [
        own.subject if own else None,
        output.with_error(own.value, own.error) if own else None,
        output.with_error(entry.value, entry.error),
        wording.change(change),
        wording.verdict(change),
    ]
