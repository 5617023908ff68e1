"""A routed adapter at work: each prompt goes to one member, which alone acts on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lori_manager import models
from lori_manager.adapters.routed_directory import RESERVED, read_routed
from lori_manager.engine.layers import LowRankLinear, attached, low_rank_layers
from lori_manager.engine.weights import AdapterWeights
from lori_manager.errors import InvalidInput
from lori_manager.generation import generate, text_of
from lori_manager.models import BaseModel
from lori_manager.records import Adapter
from lori_manager.routing import features_of
from lori_manager.scoring import score_rows
from lori_manager.tasks.encoding import Encoded, encode_prompts
from lori_manager.tasks.rows import Row
from lori_manager.tasks.scorers import Scorer

Routes = NDArray[np.int64]


class RoutedModel:
    """One model out of a base and a routed adapter.

    Attributes:
        base: the model; without any adapter between calls.
        names: of the members, in the router's order.
    """

    def __init__(self, base: BaseModel, weights: AdapterWeights, names: Sequence[str] = ()) -> None:
        """Put nothing into the base yet.

        Args:
            base: the model that the members were trained on.
            weights: with a router.
            names: of the members; their numbers by default.
        Raises:
            InvalidInput: the adapter is not routed. ValueError: not one name a member.
        """
        if weights.router is None:
            raise InvalidInput("this adapter is not routed: it acts on every input as it is")
        self.base = base
        self.router = weights.router
        self.names = tuple(names) or tuple(str(i) for i in range(weights.router.members))
        if len(self.names) != weights.router.members:
            raise ValueError(f"got {len(self.names)} names for {weights.router.members} members")
        self._weights = weights
        self._layers: dict[int, dict[str, LowRankLinear]] = {}

    @contextmanager
    def member(self, number: int) -> Iterator[None]:
        """That member acts on every input inside."""
        if number not in self._layers:
            updates = self._weights.member(number).updates()
            self._layers[number] = low_rank_layers(self.base.model, updates)
        with attached(self.base.model, self._layers[number]):
            yield

    def routes(self, rows: Sequence[Encoded], batch: int, packing: str = "auto") -> Routes:
        """The member's number for each row, by its prompt alone, (rows,) int64."""
        if not rows:
            return np.zeros(0, np.int64)
        reads = self.router.reads
        features = features_of(self.base, rows, [reads], batch, packing)[reads]
        return self.router.choose(features.cpu()).numpy()

    def route(self, prompts: Sequence[str], batch: int = 32) -> list[str]:
        """The name of the member that each prompt goes to."""
        rows = encode_prompts(self.base.tokenizer, prompts, room=self.base.context)
        return [self.names[i] for i in self.routes(rows, batch)]

    def generate(self, prompts: Sequence[str], max_new_tokens: int, batch: int = 32) -> list[str]:
        """What each prompt's member writes after it, by greedy decoding.

        Args:
            prompts: texts; one that leaves no room for new tokens loses its beginning.
            max_new_tokens: where to stop what has not ended.
            batch: prompts at a time.
        Raises:
            BadData: `max_new_tokens` alone is more than the model's context.
        """
        context = self.base.context
        room = None if context is None else max(context - max_new_tokens, 1)
        rows = encode_prompts(self.base.tokenizer, prompts, room=room)
        out = [""] * len(rows)
        for number, mine in self._groups(self.routes(rows, batch)):
            with self.member(number):
                said = generate(self.base, [rows[i].ids for i in mine], max_new_tokens, batch)
            for i, tokens in zip(mine, said, strict=True):
                out[i] = text_of(self.base, tokens)
        return out

    def score_rows(
        self,
        rows: Sequence[Row],
        encoded: Sequence[Encoded],
        scorer: Scorer,
        batch: int,
        on_batch: Callable[[int, int], None] | None = None,
        packing: str = "auto",
        *,
        routes: Routes | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Outcomes and weights as `scoring.score_rows` gives them, each row by its member.

        Args:
            rows, encoded, scorer, batch, packing: as there.
            on_batch: called with (rows done, rows in all).
            routes: as `routes` found them for these rows; found here where None.
        """
        if routes is None:
            routes = self.routes(encoded, batch, packing)
        outcomes = np.zeros(len(rows), np.float32)
        weights = np.ones(len(rows), np.float32)
        before = 0
        for number, mine in self._groups(routes):

            def told(done: int, total: int, before: int = before, own: int = len(mine)) -> None:
                if on_batch:
                    on_batch(before + done * own // total, len(rows))

            with self.member(number):
                found, weighed = score_rows(
                    self.base,
                    [rows[i] for i in mine],
                    [encoded[i] for i in mine],
                    scorer,
                    batch,
                    told,
                    packing,
                    among=encoded,
                )
            outcomes[mine] = found
            if weighed is not None:
                weights[mine] = weighed
            before += len(mine)
        return outcomes, None if (weights == 1).all() else weights

    def tally(self, routes: Routes) -> str:
        """`safety 18, nlu 2`: how many rows went to which member."""
        counts = np.bincount(routes, minlength=len(self.names))
        return ", ".join(f"{n} {c}" for n, c in zip(self.names, counts, strict=True) if c)

    def _groups(self, routes: Routes) -> list[tuple[int, NDArray[np.int64]]]:
        """(member, the places of its rows), those of no row left out."""
        return [(int(n), np.flatnonzero(routes == n)) for n in np.unique(routes)]


def member_names(members: Sequence[Adapter]) -> list[str]:
    """Names for members that differ: their tasks, else their lines, else lines and versions."""
    for found in ([m.task or "" for m in members], [m.line for m in members]):
        different = {name.casefold() for name in found}
        if all(found) and len(different) == len(found) and different.isdisjoint(RESERVED):
            return found
    return [f"{m.line}-{m.version}" for m in members]


def load_routed(directory: str | Path, base: BaseModel | str | Path) -> RoutedModel:
    """The model out of a directory that `lori export` wrote of a routed adapter.

    Args:
        directory: holds `router.json`, `router.safetensors` and a PEFT directory a member.
        base: the loaded base, or its folder or hub id.
    Raises:
        ImportRefused: no such directory, or one of another base.
        DamagedObject: a file is malformed.
    """
    if not isinstance(base, BaseModel):
        base = models.load_base(models.locate(str(base))[0])
    weights, names = read_routed(
        Path(directory), shapes=base.linear_shapes, fingerprint=models.fingerprint(base.folder)
    )
    return RoutedModel(base, weights, names)
