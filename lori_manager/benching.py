"""What adapters cost at use: kept apart from the base, merged into it, and switched.

Nothing is stored and the base is the same after as before, to the bit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.errors import InvalidInput
from lori_manager.records import Adapter
from lori_manager.refs import BASE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lori_manager.engine.update import LowRankUpdate
    from lori_manager.models import BaseModel

ALONE, APART, MERGED = "alone", "apart", "merged"
LEAST_TOKENS = 2


@dataclass(frozen=True)
class Use:
    """Greedy decoding of some prompts at once, one way of using one adapter.

    Attributes:
        ref: the adapter, or "base".
        way: "alone" (the base), "apart" (beside the base's weights), "merged" (in them).
        prefill_seconds: until the first new token of all prompts, a median.
        token_seconds: for each further one of all prompts, a median.
        peak_bytes: see `metering.Peak`, over prefill and decoding.
    """

    ref: str
    way: str
    prefill_seconds: float
    token_seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Switch:
    """Seconds to change over to and from an adapter, medians.

    Attributes:
        load: from the store into main memory, checked against its digest, A made again.
        attach, detach: from main memory to acting beside the base, and away.
        merge, unmerge: into the base's weights, and back to the bit; None where there is no
            such thing, see `note`.
    """

    ref: str
    method: str
    bytes: int
    load: float
    attach: float
    detach: float
    merge: float | None
    unmerge: float | None
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """Everything that was measured, on which machine and what."""

    device: str
    precision: str
    rows: int  # prompts decoded together
    prompt_tokens: int  # of all of them
    tokens: int  # new ones, of each
    repeats: int
    uses: tuple[Use, ...]
    switches: tuple[Switch, ...]


def bench(
    ws: Context,
    refs: Sequence[str],
    *,
    rows: int = 16,
    tokens: int = 64,
    repeats: int = 5,
    config: Config | None = None,
) -> Bench:
    """Measure the base alone, every adapter apart and merged, and changing between them.

    Prompts are eval rows of the first adapter's task, or pieces of general text; every text
    has all its new tokens. Each way runs once before it is measured.

    Args:
        refs: adapters, none routed.
        rows: prompts decoded together.
        tokens: new ones of each prompt, at least 2.
        repeats: of every measurement; medians are told.
        config: precision, bits and kernels count; the workspace's own where None.
    Raises:
        InvalidInput: no or a routed adapter, counts too small.
    """
    from lori_manager.metering import device_name

    for name, value, least in (("rows", rows, 1), ("tokens", tokens, LEAST_TOKENS),
                               ("repeats", repeats, 1)):  # fmt: skip
        if value < least:
            raise InvalidInput(f"`{name}` must be at least {least}, got {value}")
    if not refs:
        raise InvalidInput("name at least one adapter to measure")
    ws.check_language("`lori bench`")
    config = config or ws.settings.config
    adapters = [ws.adapter(ref) for ref in dict.fromkeys(refs)]
    for adapter in adapters:
        ws.check_single(adapter)
    base = ws.base_model(config)
    prompts, tokens = _prompts(ws, base, adapters, rows, tokens)
    if tokens < LEAST_TOKENS:
        raise InvalidInput(f"the model's context of {base.context} tokens leaves no room for "
                           f"{LEAST_TOKENS} new ones")  # fmt: skip
    timer = _Timer(base, repeats)
    uses = [timer.use(BASE, ALONE, nullcontext, prompts, tokens)]
    ws.on_message(f"{BASE}: {uses[0].token_seconds * 1e3:.3g} ms a token")
    switches = []
    for adapter in adapters:
        found, switch = _measured(ws, timer, adapter, prompts, tokens)
        uses += found
        switches.append(switch)
    return Bench(
        device_name(base.device),
        ws.score_precision(config),
        len(prompts),
        sum(len(p) for p in prompts),
        tokens,
        repeats,
        tuple(uses),
        tuple(switches),
    )


def _measured(
    ws: Context, timer: _Timer, adapter: Adapter, prompts: Sequence[Any], tokens: int
) -> tuple[list[Use], Switch]:
    """One adapter, in all ways that it can be used."""
    from lori_manager.adapters.applying import applied
    from lori_manager.engine.weights import AdapterWeights

    base = timer.base
    load = timer.seconds(lambda: ws.stored(adapter))
    weights = ws.stored(adapter)

    def apart() -> AbstractContextManager[None]:
        return applied(base, weights)

    uses = [timer.use(adapter.ref, APART, apart, prompts, tokens)]
    attach, detach = timer.around(apart)
    merge = unmerge = None
    note = cannot_merge(base, weights)
    if isinstance(weights, AdapterWeights) and not note:
        updates = weights.updates()

        def inside() -> AbstractContextManager[None]:
            return merged(base, updates)

        uses.append(timer.use(adapter.ref, MERGED, inside, prompts, tokens))
        merge, unmerge = timer.around(inside)
    for use in uses:
        ws.on_message(f"{use.ref} {use.way}: {use.token_seconds * 1e3:.3g} ms a token")
    return uses, Switch(
        adapter.ref, adapter.method, adapter.bytes, load, attach, detach, merge, unmerge, note
    )


def cannot_merge(base: BaseModel, weights: object) -> str:
    """Why these weights have no place in the base's own; empty where they have."""
    from lori_manager.engine.weights import AdapterWeights

    if not isinstance(weights, AdapterWeights):
        return "no low-rank update: it is not merged into the base"
    if base.base_bits != 16 or base.precision == "fp8":
        return "the base's weights are packed: nothing is added to them without changing answers"
    return ""


@contextmanager
def merged(base: BaseModel, updates: Mapping[str, LowRankUpdate]) -> Iterator[None]:
    """W + scaling B A in the place of W inside; the weights are as before after, to the bit.

    The sum is made in float32 and rounded once; the old weights wait in main memory.
    """
    import torch

    from lori_manager.engine.layers import linear_weight

    places = {name: linear_weight(base.model.get_submodule(name)) for name in updates}
    kept = {name: weight.detach().to("cpu", copy=True) for name, weight in places.items()}
    try:
        with torch.no_grad():
            for name, update in updates.items():
                weight = places[name]
                A, B = (m.to(weight.device, torch.float32) for m in (update.A, update.B))
                weight.copy_(torch.addmm(weight.float(), B, A, alpha=update.scaling))
        yield
    finally:
        with torch.no_grad():
            for name, weight in places.items():
                weight.copy_(kept[name])


class _Timer:
    """Medians of what is done several times, the device waited for."""

    def __init__(self, base: BaseModel, repeats: int) -> None:
        self.base, self._repeats = base, repeats

    def _now(self) -> float:
        import torch

        if self.base.device.type == "cuda":
            torch.cuda.synchronize(self.base.device)
        return time.perf_counter()

    def seconds(self, call: Callable[[], object]) -> float:
        """How long a call takes."""
        call()
        taken = []
        for _ in range(self._repeats):
            begin = self._now()
            call()
            taken.append(self._now() - begin)
        return statistics.median(taken)

    def around(self, way: Callable[[], AbstractContextManager[None]]) -> tuple[float, float]:
        """How long it takes to go into a way of using an adapter, and out of it."""
        there, back = [], []
        for number in range(self._repeats + 1):
            entered = way()
            begin = self._now()
            entered.__enter__()
            middle = self._now()
            entered.__exit__(None, None, None)
            end = self._now()
            if number:
                there.append(middle - begin)
                back.append(end - middle)
        return statistics.median(there), statistics.median(back)

    def use(
        self,
        ref: str,
        way: str,
        using: Callable[[], AbstractContextManager[None]],
        prompts: Sequence[Any],
        tokens: int,
    ) -> Use:
        """Decode the prompts, a first token alone and all tokens in turns."""
        from lori_manager.generation import generate
        from lori_manager.metering import Peak

        def decode(count: int) -> None:
            generate(self.base, prompts, count, len(prompts), min_new_tokens=count)

        firsts, wholes = [], []
        with using():
            decode(tokens)
            peak = Peak(self.base.device)
            for _ in range(self._repeats):
                begin = self._now()
                decode(1)
                middle = self._now()
                decode(tokens)
                firsts.append(middle - begin)
                wholes.append(self._now() - middle)
            held = peak.read()
        first = statistics.median(firsts)
        further = max(0.0, statistics.median(wholes) - first)
        return Use(ref, way, first, further / (tokens - 1), held)


def _prompts(
    ws: Context, base: BaseModel, adapters: Sequence[Adapter], rows: int, tokens: int
) -> tuple[list[Any], int]:
    """So many prompts with room for the new tokens, and how many of these there may be."""
    from lori_manager.generation import within_context

    names = [a.task for a in adapters if a.task] + [t.name for t in ws.store.tasks()]
    found: list[Any] = []
    if names:
        _, encoded = ws.rows(ws.store.task(names[0]), "eval")
        found = [row.ids[: row.prompt_length] for row in encoded[:rows]]
    if not found:
        from pydoc_data.topics import topics

        ids = base.tokenizer(topics["assert"] + topics["class"])["input_ids"]
        found = [ids[:64]]
    found = [found[i % len(found)] for i in range(rows)]
    return within_context(base, found, tokens)
