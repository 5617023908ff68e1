"""Several adapters -> one, stored with its members and scored on their tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lori_manager.config import Config
from lori_manager.context import Context, library_versions
from lori_manager.errors import InvalidInput, NotFound
from lori_manager.evaluation import counted_progress, score_missing
from lori_manager.records import Adapter, NewAdapter, Parent, Score

if TYPE_CHECKING:
    from lori_manager.registry import Entry
    from lori_manager.tasks.encoding import Encoded


@dataclass(frozen=True)
class Merged:
    """A merge as stored; scores of the members and of the merge by task."""

    adapter: Adapter
    members: tuple[Adapter, ...]
    weights: tuple[float, ...]
    scores: tuple[Score, ...]


AUTO = "auto"
ENOUGH = 16  # probe rows of each task, from which `auto` fits the merge to them


def methods() -> list[Entry[Any]]:
    """All merge methods: those on factors alone, and those that run the model."""
    from lori_manager.layerwise import LAYERWISE
    from lori_manager.merging.methods import load_all
    from lori_manager.routing import ROUTED

    return sorted([*load_all(), LAYERWISE, ROUTED], key=lambda entry: entry.name)


def _method(name: str) -> Entry[Any]:
    known = {entry.name: entry for entry in methods()}
    if name not in known:
        listed = ", ".join([AUTO, *known])
        raise NotFound(f"no merge method is called {name!r}; there are: {listed}")
    return known[name]


def merge(
    ws: Context,
    refs: Sequence[str],
    *,
    names: Sequence[str] = (),
    method: str = AUTO,
    weights: Sequence[float] | None = None,
    into: str = "main",
    options: Mapping[str, Any] | None = None,
    probe_rows: int = 32,
    config: Config | None = None,
) -> Merged:
    """One adapter out of several, stored with its members and scored on their tasks.

    Args:
        refs: adapters. names: tasks, each standing for its own adapter.
        method: a name of `methods()`; "auto" is `layerwise` where every task has at least
            `ENOUGH` probe rows, else `concat`.
        weights: one a member, in the order refs, names; default 1/T each.
        into: the line that the merge is added to.
        options: of the method, see `MergeOptions`.
        probe_rows: how many probe rows of each task methods read that need inputs; their
            prompts alone.
        config: settings for scoring.
    Raises:
        NotFound, InvalidInput, Conflict.
    """
    from lori_manager.engine.codec import encode_adapter
    from lori_manager.merging.methods import MergeOptions

    config = config or ws.settings.config
    told = MergeOptions(**dict(options or {}))
    if probe_rows < 1:
        raise InvalidInput(f"`probe_rows` must be at least 1, got {probe_rows}")
    chosen = None if method == AUTO else _method(method)  # refused before anything is loaded
    members = [ws.adapter(ref) for ref in refs]
    for name in names:
        members.append(ws.task_adapter(name))
        ws.on_message(f"{name} means {members[-1].ref}")
    if not members:
        raise InvalidInput("nothing to merge: give --tasks or --adapters")
    if len({m.ref for m in members}) != len(members):
        raise InvalidInput("an adapter is named twice; name each once and give it a weight")
    shares = [1 / len(members)] * len(members) if weights is None else list(weights)
    if len(shares) != len(members) or not all(abs(w) < float("inf") for w in shares):
        raise InvalidInput(
            f"got {len(shares)} weights for {len(members)} members: give one finite number each"
        )
    for member in members:
        ws.check_single(member)
    ws.check_line(into)
    if chosen is None:
        chosen = _method(_automatic(ws, members))
        ws.on_message(f"auto means {chosen.name}")
    method = chosen.name
    needs = chosen.facts.get("needs")
    weighed = [ws.weights(m) for m in members]
    if needs is None:
        merged = chosen.item(weighed, shares, told)
    else:
        from lori_manager.consolidation import input_grams, prompts_of

        rows = [prompts_of(_probe_rows(ws, m, probe_rows)) for m in members]
        # Least squares wants the whole weights, whatever the merge is scored on.
        precision = "auto" if config.precision == "fp8" else config.precision
        base = ws.base_model(config.replace(base_bits=16, precision=precision))
        if needs == "labels":
            merged = chosen.item(base, weighed, shares, rows, told)
        elif needs == "model":
            merged = chosen.item(
                base, weighed, shares, rows, eps=told.eps, max_rank=told.max_rank,
                on_block=counted_progress(ws, f"merging by {method}"),
            )  # fmt: skip
        else:
            grams = [
                input_grams(base, one.updates(), own, config.score_batch)
                for one, own in zip(weighed, rows, strict=True)
            ]
            merged = chosen.item(weighed, shares, replace(told, grams=grams))
    one_a = len(merged.blocks) == 1
    adapter = ws.store.add_adapter(
        NewAdapter(
            line=into,
            origin="merged",
            task=None,
            task_revision=None,
            mask=None,
            parents=tuple(Parent(m.ref, m.digest, w) for m, w in zip(members, shares, strict=True)),
            method=method,
            rank=merged.rank,
            projection=merged.blocks[0].projection_digest if one_a else None,
            base=ws.store.base().fingerprint,
            config={"method": method, "weights": shares, "options": dict(options or {})}
            | ({"probe_rows": probe_rows} if needs else {}),
            versions=library_versions(),
            facts={} if merged.router is None else {"routing": merged.router.report()},
        ),
        encode_adapter(merged, {"base": ws.store.base().fingerprint}),
    )
    ws.on_message(f"{adapter.ref}: {method} of {len(members)} at rank {adapter.rank}")
    scores: list[Score] = []
    wanted: list[str] = []
    for member in members:
        own = ws.tasks_of(member)
        wanted.extend(n for n in own if n not in wanted)
        scores += score_missing(ws, member.ref, [ws.store.task(n) for n in own], config)
    scores += score_missing(ws, adapter.ref, [ws.store.task(n) for n in wanted], config)
    return Merged(adapter, tuple(members), tuple(shares), tuple(scores))


def _automatic(ws: Context, members: Sequence[Adapter]) -> str:
    """The method for these members."""
    if len(members) < 2:
        return "concat"
    for member in members:
        splits = [ws.store.task(name).splits for name in ws.tasks_of(member)]
        enough = ["probe" in own and own["probe"].rows >= ENOUGH for own in splits]
        if not (enough and all(enough)):
            return "concat"
    return "layerwise"


def _probe_rows(ws: Context, member: Adapter, count: int) -> list[Encoded]:
    """Up to `count` probe rows of each of the member's own tasks."""
    rows: list[Encoded] = []
    for name in ws.tasks_of(member):
        task = ws.store.task(name)
        if "probe" not in task.splits:
            raise InvalidInput(
                f"task {name!r} has no probe rows to take inputs from: add it again with "
                "--probe or with more training rows, or use `--method concat`"
            )
        rows += ws.rows(task, "probe")[1][:count]
    if not rows:
        raise InvalidInput(
            f"{member.ref} belongs to no task, so there are no inputs to merge it by: use "
            "`--method concat`"
        )
    return rows
