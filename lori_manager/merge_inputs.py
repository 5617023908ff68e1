"""What merge methods are given beside the members: the base, probe rows, general text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.errors import InvalidInput
from lori_manager.evaluation import counted_progress
from lori_manager.records import Adapter

if TYPE_CHECKING:
    from lori_manager.engine.weights import AdapterWeights
    from lori_manager.grams import StreamedGrams
    from lori_manager.merging.methods import MergeOptions
    from lori_manager.models import BaseModel
    from lori_manager.registry import Entry

GENERAL = 16  # pieces of general text


@dataclass
class MergeInputs:
    """The members of a merge and, made when first asked for, what methods read.

    Attributes:
        config: settings for scoring.
        probe_rows: how many rows of each task are read.
        general: a text file; None is Python's own manual.
    """

    ws: Context
    members: Sequence[Adapter]
    config: Config
    probe_rows: int
    general: Path | None = None
    _answered: dict[str, list[Any]] = field(default_factory=dict)  # by reference

    @cached_property
    def weights(self) -> list[AdapterWeights]:
        """The members' own."""
        return [self.ws.weights(member) for member in self.members]

    @cached_property
    def base(self) -> BaseModel:
        """The model; whole weights, whatever the merge is scored on: least squares wants them."""
        precision = "auto" if self.config.precision == "fp8" else self.config.precision
        return self.ws.base_model(self.config.replace(base_bits=16, precision=precision))

    def of(self, numbers: Sequence[int]) -> MergeInputs:
        """Some of the members; what any of them answers is asked for once."""
        return replace(self, members=[self.members[i] for i in numbers])

    def labelled(self, member: int) -> list[Any]:
        """Probe rows of the member's own tasks, with their completions or labels.

        Raises:
            InvalidInput: a task without probe rows, or no task.
        """
        rows: list[Any] = []
        adapter = self.members[member]
        for name in self.ws.tasks_of(adapter):
            task = self.ws.store.task(name)
            if "probe" not in task.splits:
                raise InvalidInput(
                    f"task {name!r} has no probe rows to take inputs from: add it again with "
                    "--probe or with more training rows, or use `--method concat`"
                )
            read = self.ws.labelled if self.ws.architecture.encoder else self.ws.rows
            rows += read(task, "probe")[1][: self.probe_rows]
        if not rows:
            raise InvalidInput(
                f"{adapter.ref} belongs to no task, so there are no inputs to merge it by: use "
                "`--method concat`"
            )
        return rows

    def answered(self, member: int) -> list[Any]:
        """Prompts of the member's own tasks with what it writes after them itself.

        An encoder writes nothing: rows as they are.
        """
        from lori_manager.consolidation import answered

        if self.ws.architecture.encoder:
            return self.labelled(member)
        ref = self.members[member].ref
        if ref not in self._answered:
            progress = counted_progress(self.ws, f"{ref} answers")
            self._answered[ref] = answered(
                self.base,
                self.weights[member].updates(),
                self.labelled(member),
                self.config.score_batch,
                progress,
            )
        return self._answered[ref]

    def grams(self) -> StreamedGrams:
        """Second moments of the modules' inputs on what each member answers, in its own model."""
        from lori_manager.grams import StreamedGrams

        rows = [self.answered(i) for i in range(len(self.members))]
        updates = [weights.updates() for weights in self.weights]
        return StreamedGrams(self.base, updates, rows, self.config.score_batch)

    def merged(
        self, entry: Entry[Any], shares: Sequence[float], options: MergeOptions
    ) -> AdapterWeights:
        """The members merged by a method, each task's head as its member has it."""
        from lori_manager.engine.weights import joined_heads

        heads = joined_heads(self.weights)
        found = self._merged(entry, shares, options)
        return replace(found, heads=heads) if heads else found

    def _merged(
        self, entry: Entry[Any], shares: Sequence[float], options: MergeOptions
    ) -> AdapterWeights:
        from lori_manager.merging.methods import options_of
        from lori_manager.tasks.general import general_rows

        needs = entry.facts.get("needs")
        if needs is None:
            return entry.item(self.weights, shares, options)  # type: ignore[no-any-return]
        count = range(len(self.members))
        if needs == "grams":
            grams = self.grams()
            told = replace(options, grams=grams, groups=grams.groups)
            return entry.item(self.weights, shares, told)  # type: ignore[no-any-return]
        rows = [self.labelled(i) if needs == "labels" else self.answered(i) for i in count]
        text = []
        if options.general and "general" in options_of(entry):
            text = general_rows(self.base.tokenizer, self.general, GENERAL, self.base.context)
        return entry.item(  # type: ignore[no-any-return]
            self.base,
            self.weights,
            shares,
            rows,
            options,
            general=text,
            on_progress=counted_progress(self.ws, f"merging by {entry.name}"),
        )
