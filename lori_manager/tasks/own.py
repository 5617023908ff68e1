"""A workspace's own scorers: one function in a file, named in lori.toml.

    [scorers]
    polite = "scorers/polite.py:polite"

    def polite(text, row):           # what the model wrote; the row, see `Row`
        return float("please" in text)

The file is run only when a task scored by it is scored, and its digest is the scorer's
version: changed code makes a new revision of its tasks, and shares no score with the old.
"""

from __future__ import annotations

import hashlib
import math
import numbers
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from lori_manager.config import ScorerEntry
from lori_manager.errors import BadData, InvalidInput, NotFound, first_line
from lori_manager.tasks.encoding import Encoded
from lori_manager.tasks.room import room_for
from lori_manager.tasks.rows import Row, one_line


@dataclass(frozen=True)
class OwnScorer:
    """What a function of the user says of a text.

    Attributes:
        name: in lori.toml.
        path: of the file. entry: what lori.toml says.
        source: the file as it was read.
    """

    name: str
    path: Path
    entry: ScorerEntry
    source: bytes
    binary: ClassVar[bool] = False
    workers: ClassVar[int] = 1
    reads: ClassVar[Literal["text"]] = "text"

    @property
    def version(self) -> str:
        """64 bits of the SHA-256 of the file and of what lori.toml says of the function."""
        told = f"{self.entry}".encode()
        return hashlib.sha256(told + b"\0" + self.source).hexdigest()[:16]

    @property
    def higher_is_better(self) -> bool:
        """As lori.toml says."""
        return self.entry.higher_is_better

    @property
    def unit(self) -> str:
        """As lori.toml says."""
        return self.entry.unit

    def check(self, tokenizer: Any, row: Row, encoded: Encoded) -> None:
        """Any row will do: the code is not run before something is scored."""

    def ready(self, run_code: bool) -> str:
        """Load the function."""
        return f"scorer `{self.name}` is {self.path.name}:{self._called.__name__}"

    def new_tokens(self, encoded: Sequence[Encoded]) -> int:
        """`new_tokens` of lori.toml more than the longest completion."""
        return room_for(encoded, self.entry.new_tokens)

    def outcome(self, text: str, completion: str, row: Row) -> tuple[float, float]:
        """What the function says; the weight is always 1.

        Raises:
            BadData: it raises, or says something else than a finite number.
        """
        try:
            value = self._called(text, row)
        except Exception as e:  # the user's code may fail in any way
            raise self._failed(e, f"raised {type(e).__name__} on {_place(row)}") from e
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            said = f"{value!r}"[:60]
            raise BadData(
                one_line(
                    f"scorer `{self.name}` said {said} ({type(value).__name__}) of {_place(row)}; "
                    f"expected a finite number: mend {self.path}"
                )
            )
        return float(value), 1.0

    @cached_property
    def _called(self) -> Callable[[str, Row], Any]:
        module: dict[str, Any] = {
            "__name__": f"lori_scorer_{self.name}",
            "__file__": str(self.path),
        }
        try:
            exec(compile(self.source, str(self.path), "exec", dont_inherit=True), module)  # noqa: S102
        except Exception as e:
            raise self._failed(e, f"cannot be loaded: {type(e).__name__}") from e
        found = module.get(self.entry.name)
        if not callable(found):
            raise NotFound(
                f"scorer `{self.name}`: {self.path} defines no function {self.entry.name!r}; "
                "mend [scorers] in lori.toml or the file"
            )
        return found  # type: ignore[no-any-return]

    def _failed(self, error: Exception, what: str) -> BadData:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if f.filename == str(self.path)]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        at = f", line {line}" if line else ""
        return BadData(
            one_line(f"scorer `{self.name}` ({self.path}{at}) {what}: {first_line(error)}; mend it")
        )


def own_scorer(name: str, entry: ScorerEntry, root: Path) -> OwnScorer:
    """The scorer that lori.toml names; reads its file and runs nothing.

    Args:
        root: where relative paths start.
    Raises:
        InvalidInput: no such file, or one that cannot be read.
    """
    path = (root / Path(entry.file).expanduser()).absolute()
    try:
        source = path.read_bytes()
    except OSError as e:
        raise InvalidInput(
            f"scorer `{name}`: cannot read {path}: {e.strerror or e}; mend [scorers] in lori.toml"
        ) from e
    return OwnScorer(name, path, entry, source)


def _place(row: Row) -> str:
    return row.where or "a row"
