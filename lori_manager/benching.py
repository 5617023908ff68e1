"""What adapters cost at use: kept apart from the base, merged into it, and switched.

Nothing is stored and the base is the same after as before, to the bit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.errors import InvalidInput
from lori_manager.records import Adapter, Task
from lori_manager.refs import BASE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lori_manager.engine.update import LowRankUpdate
    from lori_manager.engine.weights import Stored
    from lori_manager.models import BaseModel

ALONE, APART, MERGED = "alone", "apart", "merged"
TOKENS, LEAST_TOKENS = 64, 2


@dataclass(frozen=True)
class Use:
    """Some rows at once, one way of using one adapter: greedy decoding, or of an encoder labels.

    Attributes:
        ref: the adapter, or "base".
        way: "alone" (the base), "apart" (beside the base's weights), "merged" (in them).
        peak_bytes: see `metering.Peak`, over all that was measured.
        prefill_seconds: until the first new token of all prompts, a median; None of an encoder.
        token_seconds: for each further one of all prompts, a median; None of an encoder.
        batch_seconds: from an encoder's input to the logits of all rows, a median; else None.
    """

    ref: str
    way: str
    peak_bytes: int | None
    prefill_seconds: float | None = None
    token_seconds: float | None = None
    batch_seconds: float | None = None

    @property
    def repeated_seconds(self) -> float:
        """What recurs in use: each further token, or each batch of rows."""
        return self.batch_seconds or self.token_seconds or 0.0


@dataclass(frozen=True)
class Switch:
    """Seconds to change over to and from an adapter, medians.

    Attributes:
        load: from the store into main memory, checked against its digest, A made again.
        attach, detach: from main memory to acting beside the base, and away.
        merge, unmerge: into the base's weights, and back to the bit; None where there is no
            such thing, see `note`.
        An encoder's head comes and goes with all four.
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
    """Everything that was measured, on which machine and what.

    Attributes:
        rows: prompts, or an encoder's rows, together.
        prompt_tokens: of all of them; None of images.
        tokens: new ones of each prompt; None of an encoder.
    """

    device: str
    precision: str
    rows: int
    prompt_tokens: int | None
    tokens: int | None
    repeats: int
    uses: tuple[Use, ...]
    switches: tuple[Switch, ...]


def bench(
    ws: Context,
    refs: Sequence[str],
    *,
    rows: int = 16,
    tokens: int | None = None,
    repeats: int = 5,
    config: Config | None = None,
) -> Bench:
    """Measure the base alone, every adapter apart and merged, and changing between them.

    Prompts are eval rows of the first adapter's task, or pieces of general text; every text
    has all its new tokens. An encoder takes such rows to their labels instead, through the head
    that the adapter has for the task, else through one of that size. Each way runs once before
    it is measured.

    Args:
        refs: adapters, none routed.
        rows: prompts decoded together, or an encoder's rows.
        tokens: new ones of each prompt, at least 2; 64 where None. Not of an encoder.
        repeats: of every measurement; medians are told.
        config: precision, bits and kernels count; the workspace's own where None.
    Raises:
        InvalidInput: no or a routed adapter, counts too small, `tokens` of an encoder, or a
            diffusion pipeline.
    """
    from lori_manager.metering import device_name

    for name, value, least in (("rows", rows, 1), ("tokens", tokens, LEAST_TOKENS),
                               ("repeats", repeats, 1)):  # fmt: skip
        if value is not None and value < least:
            raise InvalidInput(f"`{name}` must be at least {least}, got {value}")
    if not refs:
        raise InvalidInput("name at least one adapter to measure")
    ws.check_transformer("`lori bench`")
    if tokens is not None and ws.architecture.encoder:
        ws.check_language("`--tokens`")
    config = config or ws.settings.config
    adapters = [ws.adapter(ref) for ref in dict.fromkeys(refs)]
    for adapter in adapters:
        ws.check_single(adapter)
    base = ws.base_model(config)
    work: _Work
    if base.architecture.encoder:
        work = _labelling(ws, base, adapters, rows, config)
    else:
        work = _decoding(ws, base, adapters, rows, tokens or TOKENS)
    timer = _Timer(base, repeats)
    uses = [timer.use(BASE, ALONE, lambda: work.acting(None), work)]
    ws.on_message(f"{BASE}: {uses[0].repeated_seconds * 1e3:.3g} ms a {work.unit}")
    switches = []
    for adapter in adapters:
        found, switch = _measured(ws, timer, adapter, work)
        uses += found
        switches.append(switch)
    return Bench(
        device_name(base.device),
        ws.score_precision(config),
        rows,
        work.read,
        work.tokens,
        repeats,
        tuple(uses),
        tuple(switches),
    )


def _measured(
    ws: Context, timer: _Timer, adapter: Adapter, work: _Work
) -> tuple[list[Use], Switch]:
    """One adapter, in all ways that it can be used."""
    from lori_manager.adapters.applying import applied
    from lori_manager.engine.weights import AdapterWeights

    base = timer.base
    load = timer.seconds(lambda: ws.stored(adapter))
    weights = ws.stored(adapter)

    @contextmanager
    def apart() -> Iterator[None]:
        with applied(base, weights), work.acting(weights):
            yield

    uses = [timer.use(adapter.ref, APART, apart, work)]
    attach, detach = timer.around(apart)
    merge = unmerge = None
    note = cannot_merge(base, weights)
    if isinstance(weights, AdapterWeights) and not note:
        updates = weights.updates()

        @contextmanager
        def inside() -> Iterator[None]:
            with merged(base, updates), work.acting(weights):
                yield

        uses.append(timer.use(adapter.ref, MERGED, inside, work))
        merge, unmerge = timer.around(inside)
    for use in uses:
        ws.on_message(f"{use.ref} {use.way}: {use.repeated_seconds * 1e3:.3g} ms a {work.unit}")
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

    def now(self) -> float:
        """The time at which all that was asked for is done."""
        import torch

        if self.base.device.type == "cuda":
            torch.cuda.synchronize(self.base.device)
        return time.perf_counter()

    def seconds(self, call: Callable[[], object]) -> float:
        """How long a call takes."""
        call()
        taken = []
        for _ in range(self._repeats):
            begin = self.now()
            call()
            taken.append(self.now() - begin)
        return statistics.median(taken)

    def around(self, way: Callable[[], AbstractContextManager[None]]) -> tuple[float, float]:
        """How long it takes to go into a way of using an adapter, and out of it."""
        there, back = [], []
        for number in range(self._repeats + 1):
            entered = way()
            begin = self.now()
            entered.__enter__()
            middle = self.now()
            entered.__exit__(None, None, None)
            end = self.now()
            if number:
                there.append(middle - begin)
                back.append(end - middle)
        return statistics.median(there), statistics.median(back)

    def use(
        self, ref: str, way: str, using: Callable[[], AbstractContextManager[None]], work: _Work
    ) -> Use:
        """The work done once to be ready, then measured."""
        from lori_manager.metering import Peak

        with using():
            work.once()
            peak = Peak(self.base.device)
            found = work.timed(self)
            held = peak.read()
        return Use(ref, way, held, **found)

    @property
    def repeats(self) -> range:
        """To measure in."""
        return range(self._repeats)


class _Work(Protocol):
    """What is done with an adapter to measure it.

    Attributes:
        unit: what recurs. read: tokens of its input in all. tokens: that it writes, of each row.
    """

    unit: ClassVar[str]
    read: int | None
    tokens: int | None

    def acting(self, weights: Stored | None) -> AbstractContextManager[None]:
        """What must be in the model beside an adapter's layers, or the base alone (None)."""

    def once(self) -> None:
        """The work."""

    def timed(self, timer: _Timer) -> dict[str, float]:
        """Medians of it, as `Use` calls them."""


class _Decoding:
    """Greedy decoding of some prompts together."""

    unit: ClassVar[str] = "token"

    def __init__(self, base: BaseModel, prompts: Sequence[Any], tokens: int) -> None:
        self._base, self._prompts = base, prompts
        self.tokens: int | None = tokens
        self._count = tokens
        self.read: int | None = sum(len(p) for p in prompts)

    def acting(self, weights: Stored | None) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def once(self) -> None:
        """All tokens of all prompts."""
        self._decode(self._count)

    def timed(self, timer: _Timer) -> dict[str, float]:
        """A first token alone and all tokens in turns."""
        firsts, wholes = [], []
        for _ in timer.repeats:
            begin = timer.now()
            self._decode(1)
            middle = timer.now()
            self._decode(self._count)
            firsts.append(middle - begin)
            wholes.append(timer.now() - middle)
        first = statistics.median(firsts)
        further = max(0.0, statistics.median(wholes) - first)
        return {"prefill_seconds": first, "token_seconds": further / (self._count - 1)}

    def _decode(self, count: int) -> None:
        from lori_manager.generation import generate

        generate(self._base, self._prompts, count, len(self._prompts), min_new_tokens=count)


class _Labels:
    """A batch of rows through an encoder and a task's head, to logits."""

    unit: ClassVar[str] = "batch"

    def __init__(self, base: BaseModel, task: Task, rows: Sequence[Any], seed: int) -> None:
        from lori_manager.adapters.heads import fresh_head
        from lori_manager.labelling import Labelling

        self._base, self._task = base, task.name
        self._fresh = fresh_head(base, task.labels, seed)
        self._labelling = Labelling(base)
        self._batch = self._labelling.place(self._labelling.batch(rows))
        self.read: int | None = None if task.images is not None else sum(r.length for r in rows)
        self.tokens: int | None = None

    @contextmanager
    def acting(self, weights: Stored | None) -> Iterator[None]:
        """The adapter's head for the task, or an untaught one of the same size."""
        from lori_manager.adapters.heads import head_attached

        held = {} if weights is None else weights.heads
        with head_attached(self._base, held.get(self._task, self._fresh)):
            yield

    def once(self) -> None:
        """Logits of all rows."""
        import torch

        with torch.inference_mode():
            self._labelling.logits(self._batch)

    def timed(self, timer: _Timer) -> dict[str, float]:
        """All rows together."""
        return {"batch_seconds": timer.seconds(self.once)}


def _decoding(
    ws: Context, base: BaseModel, adapters: Sequence[Adapter], rows: int, tokens: int
) -> _Work:
    """So many prompts with room for the new tokens, fewer of these where the context is short."""
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
    prompts, tokens = within_context(base, [found[i % len(found)] for i in range(rows)], tokens)
    if tokens < LEAST_TOKENS:
        raise InvalidInput(f"the model's context of {base.context} tokens leaves no room for "
                           f"{LEAST_TOKENS} new ones")  # fmt: skip
    return _Decoding(base, prompts, tokens)


def _labelling(
    ws: Context, base: BaseModel, adapters: Sequence[Adapter], rows: int, config: Config
) -> _Work:
    """So many eval rows of the first adapter's task, or of the first that went into it."""
    names = [*ws.tasks_of(adapters[0]), *(t.name for t in ws.store.tasks())]
    task = ws.store.task(names[0])
    _, found = ws.labelled(task, "eval")
    chosen = [found[i % len(found)] for i in range(rows)]
    return _Labels(base, task, chosen, config.seed)
