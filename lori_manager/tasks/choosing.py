"""A scorer's name -> the scorer: lori's own, the workspace's, or lm-evaluation-harness's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lori_manager.config import ScorerEntry
from lori_manager.errors import InvalidInput, NotFound
from lori_manager.tasks.own import own_scorer
from lori_manager.tasks.scorers import RequestScorer, Scorer, scorers


def find_scorer(name: str, own: Mapping[str, ScorerEntry], root: Path) -> Scorer:
    """The scorer of that name.

    Args:
        own: what [scorers] of lori.toml says.
        root: the workspace's folder.
    Raises:
        NotFound: none. InvalidInput: lori.toml gives a name of lori's own away, or the file
            of one of its scorers cannot be read.
    """
    known = scorers.names()
    if name in own:
        if name in known:
            raise InvalidInput(
                f"[scorers] in lori.toml names {name!r}, which is lori's own: choose another name"
            )
        return own_scorer(name, own[name], root)
    if name in known:
        return scorers.get(name)
    raise NotFound(
        f"no scorer is called {name!r}; there are: {', '.join([*known, *own])}; a function of "
        'yours is one by `NAME = "FILE.py:FUNCTION"` under [scorers] in lori.toml'
    )


def request_scorer(options: Mapping[str, Any], version: str, root: Path) -> RequestScorer:
    """The scorer of a task that was added with `--lm-eval`.

    Args:
        options: what the task keeps under `lm_eval`.
        version: of its scorer, when it was added.
        root: where a relative folder starts.
    """
    include = options["include"]
    return RequestScorer(
        task=options["task"],
        include=None if include is None else str(root / include),
        metric=options["metric"],
        filter=options["filter"],
        version=version,
        higher_is_better=options["higher_is_better"],
        unit=options["unit"],
        binary=options["binary"],
    )
