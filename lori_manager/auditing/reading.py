"""What an audit reads from the store."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from lori_manager.records import Adapter, Line, Score, Task
from lori_manager.refs import AdapterRef

Outcomes = tuple[NDArray[Any], NDArray[Any] | None]


class AuditStore(Protocol):
    """What an audit reads from the store."""

    def task(self, name: str, revision: int | None = None) -> Task:
        """One revision of a task, the latest by default; raises NotFound."""

    def tasks(self) -> Sequence[Task]:
        """Every task."""

    def lines(self) -> Sequence[Line]:
        """Every line."""

    def adapter(self, ref: AdapterRef) -> Adapter:
        """One adapter; raises NotFound."""

    def adapters(self, line: str | None = None) -> Sequence[Adapter]:
        """Every adapter, in order of creation."""

    def scores(
        self, *, subject: str | None = None, task: str | None = None, revision: int | None = None
    ) -> Sequence[Score]:
        """Every score that fits, in order of creation."""

    def scores_of(self, subjects: Collection[str]) -> Sequence[Score]:
        """Every score of these subjects, in order of creation."""

    def outcomes_of(self, scores: Sequence[Score]) -> Sequence[Outcomes]:
        """For each score the outcome of each row, NaN where not measured, and weights if any."""
