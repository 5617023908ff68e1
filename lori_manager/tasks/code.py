"""pass@1: does the program that the model wrote pass the row's tests?

A row carries `tests`: Python source, or a list of it, in which something fails where the
program is wrong; and may carry `entry_point`, the name of the function asked for. So rows
of HumanEval (arXiv:2107.03374: `tests` defines `check`, which is called with the entry
point) and of MBPP (arXiv:2108.07732: a list of `assert`s) fit as they are.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lori_manager.errors import InvalidInput
from lori_manager.sandbox.run import Limits, check, run
from lori_manager.tasks.encoding import Encoded
from lori_manager.tasks.room import room_for
from lori_manager.tasks.rows import Row, bad_row, shown

# Where a function that goes on from the prompt has ended: HumanEval's own list.
_ENDS = re.compile(r"\n(?=class |def |#|if |print)")
_FENCE = re.compile(r"^```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class PassAt1:
    """1 where the program that the model wrote passes the row's tests, else 0.

    One greedy completion a row: pass@1 of temperature 0. Each program runs in a process of
    its own, see `sandbox`; one that takes too long or too much has not passed.

    Attributes:
        limits: of each program; the usual ones where None.
    """

    limits: Limits | None = None
    version: ClassVar[int] = 1
    binary: ClassVar[bool] = True
    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "share"
    workers: ClassVar[int] = min(os.cpu_count() or 1, 8)
    reads: ClassVar[Literal["text"]] = "text"

    def check(self, tokenizer: Any, row: Row, encoded: Encoded) -> None:
        """Raise BadData for a row without tests, or with tests that every program passes."""
        checks_of(row)

    def ready(self, run_code: bool) -> str:
        """InvalidInput where running was not asked for, or cannot be confined here."""
        if not run_code:
            raise InvalidInput(
                "`pass_at_1` runs programs that a model wrote, which is off: give --run-code, or "
                "set `run_code = true` under [defaults] in lori.toml; docs/scorers.md says what "
                "the sandbox keeps from them and what it does not"
            )
        _, guards = check()
        return f"programs run confined by {', '.join(guards)}"

    def new_tokens(self, encoded: Sequence[Encoded]) -> int:
        """Room for programs that are longer than the rows' own."""
        return room_for(encoded, 256)

    def outcome(self, text: str, completion: str, row: Row) -> tuple[float, float]:
        """Whether the program passes; the weight is always 1."""
        namespaces, _ = check()
        ended = run([program_of(text, row), checks_of(row)], self.limits, namespaces=namespaces)
        return float(ended.passed), 1.0


def program_of(text: str, row: Row) -> str:
    """The program in what the model wrote.

    The first fenced block where there is one, else the text. Where the prompt begins the
    function that `entry_point` names and the text does not define it, the program is the
    prompt and the text up to where the function ends: at the next `class`, `def`, `#`, `if`
    or `print` that begins a line.
    """
    fenced = _FENCE.search(text)
    program = fenced.group(1) if fenced else text
    name = row.extra.get("entry_point")
    if not isinstance(name, str) or not _defines(row.prompt, name) or _defines(program, name):
        return program
    return row.prompt + _ENDS.split(program, maxsplit=1)[0] + "\n"


def checks_of(row: Row) -> str:
    """The row's tests as one source, `check` called where they only define it.

    Raises:
        BadData: no tests, no Python, or nothing in them that could fail.
    """
    where = row.where or "a row"
    tests = row.extra.get("tests")
    parts = [tests] if isinstance(tests, str) else tests
    if not isinstance(parts, list) or not parts or not all(isinstance(p, str) for p in parts):
        raise bad_row(
            where,
            f"`pass_at_1` needs `tests`, Python source or a list of it, found {shown(tests)}",
            "add them, or use another scorer",
        )
    source = "\n".join(parts) + "\n"
    name = row.extra.get("entry_point")
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise bad_row(where, f"`entry_point` must be a name, found {shown(name)}", "mend it")
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise bad_row(where, f"`tests` are no Python: {e}", "mend them") from e
    if name and any(isinstance(s, ast.FunctionDef) and s.name == "check" for s in statements):
        return f"{source}\ncheck({name})\n"
    if all(isinstance(s, _INERT) or _is_text(s) for s in statements):
        raise bad_row(
            where,
            "`tests` only define and import, so that every program would pass",
            "call or assert something, or name the function in `entry_point`",
        )
    return source


_INERT = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign,
          ast.Pass)  # fmt: skip


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _defines(source: str, name: str) -> bool:
    return (
        re.search(rf"^\s*(?:async\s+)?def\s+{re.escape(name)}\b", source, re.MULTILINE) is not None
    )
