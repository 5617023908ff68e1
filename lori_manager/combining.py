"""Several adapters -> one, stored with its members and scored on their tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lori_manager.config import Config
from lori_manager.context import Context, library_versions
from lori_manager.errors import InvalidInput
from lori_manager.evaluation import score_missing
from lori_manager.records import Adapter, NewAdapter, Parent, Score


@dataclass(frozen=True)
class Merged:
    """A merge as stored; scores of the members and of the merge by task."""

    adapter: Adapter
    members: tuple[Adapter, ...]
    weights: tuple[float, ...]
    scores: tuple[Score, ...]


def merge(
    ws: Context,
    refs: Sequence[str],
    *,
    names: Sequence[str] = (),
    method: str = "concat",
    weights: Sequence[float] | None = None,
    into: str = "main",
    config: Config | None = None,
) -> Merged:
    """One adapter out of several, stored with its members and scored on their tasks.

    Args:
        refs: adapters. names: tasks, each standing for its own adapter.
        method: a name in the registry of merge methods.
        weights: one a member, in the order refs, names; default 1/T each.
        into: the line that the merge is added to.
        config: settings for scoring.
    Raises:
        NotFound, InvalidInput, Conflict.
    """
    from lori_manager.engine.codec import encode_adapter
    from lori_manager.merging.methods import load_all

    config = config or ws.settings.config
    merge = load_all().get(method)
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
    ws.check_line(into)
    merged = merge([ws.weights(m) for m in members], shares)
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
            config={"method": method, "weights": shares},
            versions=library_versions(),
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
