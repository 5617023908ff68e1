"""One record in full, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lori_manager.architectures import architecture_of
from lori_manager.cli import output
from lori_manager.records import Adapter, Base, Mask, Task

Shown = Base | Task | Mask | Adapter


def describe(record: Shown) -> None:
    """Print a record's fields, then its settings."""
    if isinstance(record, Base):
        _base(record)
    elif isinstance(record, Task):
        _task(record)
    elif isinstance(record, Mask):
        _mask(record)
    else:
        _adapter(record)


def task_of(adapter: Adapter) -> str | None:
    """`safety#2`, what an adapter was trained on last."""
    return None if adapter.task is None else f"{adapter.task}#{adapter.task_revision}"


def parents(adapter: Adapter) -> str | None:
    """`base`, `safety@1`, or a merge's members with their weights."""
    if not adapter.parents:
        return "base" if adapter.origin == "trained" else None
    told = (p.ref if p.weight is None else f"{p.weight:.3g} {p.ref}" for p in adapter.parents)
    return " + ".join(told)


def _base(base: Base) -> None:
    output.fields(
        {
            "base": base.source,
            "revision": base.revision,
            "type": f"{base.model_type}, a {architecture_of(base.model_type).title}",
            "path": base.path,
            "fingerprint": base.fingerprint,
            "code": base.code and f"{base.code}, runs",
            "since": output.time(base.created_at),
        }
    )


def _task(task: Task) -> None:
    output.fields(
        {
            "task": task.ref,
            "description": task.description or None,
            "scorer": f"{task.scorer}, version {task.scorer_version}",
            "labels": ", ".join(task.labels) or None,
            "added": output.time(task.created_at),
        }
    )
    output.title("rows")
    columns = ["split", ">rows", ">tokens", ">longest", ">truncated", "source", "digest"]
    sources = task.options.get("sources", {})
    rows = [
        [
            name,
            *map(output.count, (split.rows, split.tokens, split.longest, split.truncated)),
            sources.get(name),
            split.digest[:12],
        ]
        for name, split in task.splits.items()
    ]
    output.table(columns, rows)


def _mask(mask: Mask) -> None:
    output.fields(
        {
            "mask": mask.ref,
            "task": f"{mask.task}#{mask.task_revision}",
            "made": output.time(mask.created_at),
            "kept": f"{output.count(mask.kept)} of {output.count(mask.total)} entries of B",
            "sparsity": f"{mask.sparsity:g}",
            "scope": mask.scope,
            "A": mask.projection,
            "digest": mask.digest,
        }
    )
    _plain_values("settings", mask.config)


def _adapter(adapter: Adapter) -> None:
    output.fields(
        {
            "adapter": adapter.ref,
            "made": output.time(adapter.created_at),
            "origin": adapter.origin,
            "method": adapter.method,
            "task": task_of(adapter),
            "mask": adapter.mask,
            "from": parents(adapter),
            "sequence": "yes" if adapter.sequence else None,
            "rank": adapter.rank,
            "A": adapter.projection,
            "digest": adapter.digest,
            "size": output.size(adapter.bytes),
        }
    )
    _plain_values("measured on the way", adapter.facts)
    _plain_values("settings", adapter.config)
    _plain_values("made with", adapter.versions)


def _plain_values(title: str, values: Mapping[str, Any]) -> None:
    if values:
        output.title(title)
        output.fields({key: _value(value) for key, value in values.items()})


def _value(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items() if v not in (None, False))
    if isinstance(value, list):
        return ", ".join(str(_value(v)) for v in value)
    return value
