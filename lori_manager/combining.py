"""Several adapters -> one, stored with its members and scored on their tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lori_manager.config import Config
from lori_manager.context import Context, library_versions
from lori_manager.errors import BadData, InvalidInput, NotFound
from lori_manager.evaluation import ready_to_score, score_missing
from lori_manager.records import Adapter, NewAdapter, Parent, Score

if TYPE_CHECKING:
    from lori_manager.engine.weights import AdapterWeights
    from lori_manager.merge_inputs import MergeInputs
    from lori_manager.merging.methods import MergeOptions
    from lori_manager.registry import Entry


@dataclass(frozen=True)
class Merged:
    """A merge as stored; scores of the members and of the merge by task."""

    adapter: Adapter
    members: tuple[Adapter, ...]
    weights: tuple[float, ...]
    scores: tuple[Score, ...]


AUTO = "auto"
SEARCH = "search"
USUAL_ROWS = 32  # probe rows of each task that are read
ENOUGH = 16  # probe rows of each task, from which a merge is fitted to them by default
# What `auto` tries, the simplest first.
CANDIDATES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("concat", {}),
    ("tsv", {}),
    ("layerwise", {"max_rank": 64}),
    ("layerwise", {}),
    ("repair", {}),
)


def methods() -> list[Entry[Any]]:
    """All merge methods: those on factors alone, and those that run the model."""
    from lori_manager.iteris import ITERIS
    from lori_manager.layerwise import LAYERWISE
    from lori_manager.merging.methods import load_all
    from lori_manager.repair import REPAIR
    from lori_manager.routing import ROUTED
    from lori_manager.soups import SOUPS

    every = [*load_all(), LAYERWISE, ITERIS, SOUPS, REPAIR, ROUTED]
    return sorted(every, key=lambda entry: entry.name)


def method_of(name: str) -> Entry[Any]:
    """The merge method of that name; NotFound says which there are."""
    known = {entry.name: entry for entry in methods()}
    if name not in known:
        listed = ", ".join([AUTO, *known])
        raise NotFound(f"no merge method is called {name!r}; there are: {listed}")
    return known[name]


def flag(option: str) -> str:
    """An option as it is typed."""
    return f"--{option.replace('_', '-')}"


def check_options(method: str, given: Iterable[str], *, searched: bool = False) -> None:
    """Refuse options that the method would pass over.

    Args:
        method: a name of `methods()`, or "auto", which takes what any of its candidates does.
        given: names of options that were asked for; "probe_rows" and "general_text" too.
        searched: whether its weights are, which reads probe rows.
    Raises:
        InvalidInput: names them, and those that the method takes. NotFound: no such method.
    """
    from lori_manager.merging.methods import options_of

    entries = [method_of(name) for name, _ in CANDIDATES] if method == AUTO else [method_of(method)]
    taken = list(dict.fromkeys(option for entry in entries for option in options_of(entry)))
    if "general" in taken:
        taken.append("general_text")
    if searched or any(entry.facts.get("needs") for entry in entries):
        taken.append("probe_rows")
    if unused := [flag(option) for option in given if option not in taken]:
        listed = ", ".join(map(flag, taken)) or "no such option"
        raise InvalidInput(f"method `{method}` does not use {', '.join(unused)}: it takes {listed}")


def merge(
    ws: Context,
    refs: Sequence[str],
    *,
    names: Sequence[str] = (),
    method: str | None = None,
    weights: Sequence[float] | str | None = None,
    into: str = "main",
    options: Mapping[str, Any] | None = None,
    probe_rows: int | None = None,
    general: str | Path | None = None,
    config: Config | None = None,
) -> Merged:
    """One adapter out of several, stored with its members and scored on their tasks.

    Args:
        refs: adapters. names: tasks, each standing for its own adapter.
        method: a name of `methods()`; "auto" tries several on probe rows; None is
            `layerwise` where every task has at least `ENOUGH` probe rows, else `concat`,
            which weights to be searched for mean too.
        weights: one a member, in the order refs, names; default 1/T each; "search" finds a
            common one on probe rows, for methods that do not read them otherwise.
        into: the line that the merge is added to.
        options: of the method, see `MergeOptions`; those that it does not use are refused.
        probe_rows: how many probe rows of each task are read by methods that do; 32 if None.
        general: a text file for methods that protect what no task is about, with the option
            `general` above 0; None is the manual that comes with Python.
        config: settings for scoring.
    Raises:
        NotFound, InvalidInput, BadData, Conflict.
    """
    from lori_manager.merge_inputs import MergeInputs
    from lori_manager.merging.methods import MergeOptions

    config = config or ws.settings.config
    told = MergeOptions(**dict(options or {}))
    usual = MergeOptions().settings()
    given = {key: value for key, value in told.settings().items() if value != usual[key]}
    if probe_rows is not None and probe_rows < 1:
        raise InvalidInput(f"`probe_rows` must be at least 1, got {probe_rows}")
    # Refused before anything is loaded.
    more = {"general_text": general, "probe_rows": probe_rows}
    asked = [*(options or {}), *(name for name, value in more.items() if value is not None)]
    if method is not None:
        check_options(method, asked, searched=weights == SEARCH)
    rows = USUAL_ROWS if probe_rows is None else probe_rows
    chosen = None if method in (None, AUTO) else method_of(str(method))
    members = members_of(ws, refs, names)
    shares = shares_of(members, weights)
    if method == AUTO and weights is not None:
        raise InvalidInput("`--method auto` finds weights itself: leave --weights out")
    text = None if general is None else Path(general)
    if text is not None and not told.general:
        raise InvalidInput("a general text counts only with --general above 0: give both")
    ws.check_line(into)
    wanted = list(dict.fromkeys(name for m in members for name in ws.tasks_of(m)))
    ready_to_score(ws, [ws.store.task(name) for name in wanted], config)
    if method is None:
        chosen = method_of("concat" if weights == SEARCH else usual_method(ws, members))
        check_options(chosen.name, asked, searched=weights == SEARCH)
        ws.on_message(f"merging by {chosen.name}")
    if weights == SEARCH and chosen is not None and chosen.facts.get("needs") is not None:
        raise InvalidInput(
            f"method {chosen.name!r} reads probe rows itself: `--weights search` goes with "
            "methods that do not"
        )
    if weights == SEARCH or chosen is None:
        reads = f"`--weights {SEARCH}`" if weights == SEARCH else f"`--method {AUTO}`"
        ws.check_language(f"{reads} reads probe prompts and")
    elif (needs := chosen.facts.get("needs")) is not None and not (
        ws.architecture.encoder and (needs == "grams" or chosen.facts.get("encoders"))
    ):
        ws.check_language(f"`--method {chosen.name}` reads probe prompts and")
    if ws.architecture.encoder:
        if given.get("general"):
            ws.check_language("`--general`")
        told = replace(told, general=0.0)
    inputs = MergeInputs(ws, members, config, rows, text)
    kept: dict[str, Any] = {"weights": shares, "options": given}
    if text is not None:
        kept["general_text"] = general_digest(text)
    if chosen is None:
        chosen, changes, shares, trials = _tried(inputs, told)
        told = replace(told, **changes)
        kept |= {"weights": shares, "options": given | dict(changes), "tried": trials}
    elif weights == SEARCH:
        from lori_manager.trials import searched_weight

        weight, found = searched_weight(inputs, chosen, told)
        shares = [weight] * len(members)
        kept |= {"weights": shares, "searched": {str(w): round(x, 4) for w, x in found.items()}}
        ws.on_message(f"weight {weight:g} each, of {', '.join(f'{w:g}' for w in found)}")
    if chosen.facts.get("needs") is not None or {"searched", "tried"} & set(kept):
        kept["probe_rows"] = rows
    kept["settings"] = told.settings()  # defaults too: those of another version may differ
    merged = inputs.merged(chosen, shares, told)
    del inputs  # and the base in it: what scores may be another, and memory hold one alone
    adapter = _keep(ws, merged, members, shares, chosen.name, into, kept)
    ws.on_message(f"{adapter.ref}: {chosen.name} of {len(members)} at rank {adapter.rank}")
    scores: list[Score] = []
    for member in members:
        own = ws.tasks_of(member)
        scores += score_missing(ws, member.ref, [ws.store.task(n) for n in own], config)
    scores += score_missing(ws, adapter.ref, [ws.store.task(n) for n in wanted], config)
    return Merged(adapter, tuple(members), tuple(shares), tuple(scores))


def merge_again(
    ws: Context,
    ref: str,
    *,
    drop: Sequence[str] = (),
    reweight: Mapping[str, float] | None = None,
    into: str | None = None,
    general: str | Path | None = None,
    config: Config | None = None,
) -> Merged:
    """A stored merge made anew without some members, or with other weights.

    What comes out is what a fresh merge of the members left would give: the same method,
    options and rows, and weights 1/T where the stored ones were that.

    Args:
        ref: the merge.
        drop: members to leave out, as references or as their tasks' names.
        reweight: member -> its weight instead of the stored one.
        into: the line; the merge's own where None.
        general: the general text, where the merge had one that was not the usual.
    Raises:
        NotFound, InvalidInput: not a merge, or a member that it does not have.
    """
    from lori_manager.merging.methods import options_of

    old = ws.adapter(ref)
    if old.origin != "merged":
        raise InvalidInput(f"{old.ref} is no merge, so it has no members to change")
    kept = dict(old.config)
    known = {"method", "weights", "options", "settings", "probe_rows", "general_text"}
    if set(kept) - known:
        raise InvalidInput(
            f"{old.ref} was found by trying on probe rows: merge afresh, so that it is tried again"
        )
    check_general(old, general)
    members = {parent.ref: float(parent.weight or 0.0) for parent in old.parents}

    def member(name: str) -> str:
        ref = ws.adapter(name).ref if "@" in name else name
        found = [m for m in members if m == ref or ref in ws.tasks_of(ws.adapter(m))]
        if len(found) > 1:
            raise InvalidInput(f"{name!r} may be {' or '.join(found)}: name the adapter")
        if not found:
            raise InvalidInput(f"{name!r} is not one of {old.ref}'s members: {', '.join(members)}")
        return found[0]

    # What is kept are all settings, those of other methods too.
    taken = options_of(method_of(old.method))
    settings = kept.get("settings", kept.get("options", {}))
    equal = all(weight == 1 / len(members) for weight in members.values())
    gone = {member(name) for name in drop}
    changed: dict[str, float] = {}
    for name, weight in (reweight or {}).items():
        if (found := member(name)) in changed or found in gone:
            raise InvalidInput(f"{found} is named twice: drop it, or give it one weight")
        changed[found] = weight
    left = {m: changed.get(m, w) for m, w in members.items() if m not in gone}
    if not left:
        raise InvalidInput("every member is dropped: leave one at least")
    return merge(
        ws,
        list(left),
        method=old.method,
        weights=None if equal and not changed else list(left.values()),
        into=into or old.line,
        options={name: value for name, value in settings.items() if name in taken},
        probe_rows=kept.get("probe_rows"),
        general=general,
        config=config,
    )


def members_of(ws: Context, refs: Sequence[str], names: Sequence[str]) -> list[Adapter]:
    """The adapters of a merge, those that task names stand for last."""
    members = [ws.adapter(ref) for ref in refs]
    for name in names:
        members.append(ws.task_adapter(name))
        ws.on_message(f"{name} means {members[-1].ref}")
    if not members:
        raise InvalidInput("nothing to merge: give --tasks or --adapters")
    if len({m.ref for m in members}) != len(members):
        raise InvalidInput("an adapter is named twice; name each once and give it a weight")
    for member in members:
        ws.check_single(member)
        ws.check_low_rank(member)
    return members


def shares_of(members: Sequence[Adapter], weights: Sequence[float] | str | None) -> list[float]:
    """A weight for every member, 1/T where none is given."""
    if weights is None or weights == SEARCH:
        return [1 / len(members)] * len(members)
    if isinstance(weights, str):
        raise InvalidInput(f"`weights` must be numbers or `{SEARCH}`, got {weights!r}")
    shares = list(weights)
    if len(shares) != len(members) or not all(abs(w) < float("inf") for w in shares):
        raise InvalidInput(
            f"got {len(shares)} weights for {len(members)} members: give one finite number each"
        )
    return shares


def _tried(
    inputs: MergeInputs, told: MergeOptions
) -> tuple[Entry[Any], Mapping[str, Any], list[float], list[dict[str, Any]]]:
    """The candidate that does best on probe rows, and what all of them did."""
    from lori_manager.trials import measured

    candidates = []
    ranks = sum(weights.rank for weights in inputs.weights)
    most = ranks if told.max_rank is None else min(told.max_rank, ranks)
    for name, changes in CANDIDATES:
        # A smaller rank is tried where it is smaller than what is allowed anyway.
        if changes.get("max_rank", 0) < most:
            candidates.append((method_of(name), changes))
    number, trials = measured(inputs, candidates, told)
    entry, changes = candidates[number]
    best = trials[number]
    inputs.ws.on_message(f"auto means {entry.name}: it keeps {best.kept:.3f}")
    if best.losses:
        worse = ", ".join(f"{task} (p {p:.2g})" for task, p in best.losses.items())
        inputs.ws.on_message(
            f"no candidate keeps all: {worse}. Keep the adapters apart with `--method routed`, or "
            "train those tasks together"
        )
    table = [{**trial.__dict__, "options": dict(trial.options)} for trial in trials]
    shares = [best.weight] * len(inputs.members)
    return entry, changes, shares, table


def _keep(
    ws: Context,
    merged: AdapterWeights,
    members: Sequence[Adapter],
    shares: Sequence[float],
    method: str,
    into: str,
    kept: Mapping[str, Any],
) -> Adapter:
    from lori_manager.engine.codec import encode_adapter

    base = ws.store.base().fingerprint
    return ws.store.add_adapter(
        NewAdapter(
            line=into,
            origin="merged",
            task=None,
            task_revision=None,
            mask=None,
            parents=tuple(Parent(m.ref, m.digest, w) for m, w in zip(members, shares, strict=True)),
            method=method,
            rank=merged.rank,
            projection=merged.blocks[0].projection_digest if len(merged.blocks) == 1 else None,
            base=base,
            config={"method": method} | dict(kept),
            versions=library_versions(),
            facts={} if merged.router is None else {"routing": merged.router.report()},
        ),
        encode_adapter(merged, {"base": base}),
    )


def check_general(old: Adapter, general: str | Path | None) -> None:
    """Refuse another general text than a merge had; None is the usual one."""
    if (wanted := old.config.get("general_text")) != (
        None if general is None else general_digest(general)
    ):
        raise InvalidInput(
            f"{old.ref} read no general text of its own: leave --general-text out"
            if wanted is None
            else f"{old.ref} read the text of SHA-256 {wanted[:12]}: --general-text must be that"
        )


def general_digest(text: str | Path) -> str:
    """SHA-256 of a general text, by which a merge knows it; BadData where it cannot be read."""
    try:
        return hashlib.sha256(Path(text).read_bytes()).hexdigest()
    except OSError as e:
        raise BadData(f"cannot read {text} as UTF-8 text: {e}") from e


def usual_method(ws: Context, members: Sequence[Adapter]) -> str:
    """The method for these members where none is named."""
    if len(members) < 2:
        return "concat"
    for member in members:
        splits = [ws.store.task(name).splits for name in ws.tasks_of(member)]
        enough = ["probe" in own and own["probe"].rows >= ENOUGH for own in splits]
        if not (enough and all(enough)):
            return "concat"
    return "layerwise"
