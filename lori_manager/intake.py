"""A task's files -> frozen rows in the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from lori_manager import models
from lori_manager.architectures import context_of
from lori_manager.context import SETTINGS, Context
from lori_manager.errors import InvalidInput, NotFound
from lori_manager.records import Split, Task
from lori_manager.refs import check_name

if TYPE_CHECKING:
    from lori_manager.harness.freezing import Frozen


@dataclass(frozen=True)
class AddedTask:
    """A task as stored, and what reading its files brought to light."""

    task: Task
    notes: tuple[str, ...]
    lengths: Mapping[str, Mapping[str, Any]]
    new: bool


def add_task(
    ws: Context,
    name: str,
    *,
    train: str | None = None,
    eval: str | None = None,
    calibration: str | None = None,
    probe: str | None = None,
    scorer: str | None = None,
    description: str | None = None,
    probe_rows: int | None = None,
    allow_overlap: bool | None = None,
    lm_eval: str | None = None,
    lm_eval_include: str | None = None,
    lm_eval_metric: str | None = None,
    lm_eval_fewshot: int | None = None,
    lm_eval_limit: int | None = None,
) -> AddedTask:
    """Read, check and freeze a task's rows.

    What is not given comes from `[tasks.NAME]` in lori.toml, then from
    tasks/NAME/{train,eval,calibration,probe}.jsonl. The same rows and scorer
    again change nothing; other rows or another scorer make a new revision.

    Args:
        lm_eval: a task of lm-evaluation-harness, whose documents become the eval rows and
            which scores them. lm_eval_include, lm_eval_metric, lm_eval_fewshot,
            lm_eval_limit: see `harness.freezing.freeze`.
    Raises:
        BadData: rows that cannot be used, by file and line. Nothing is stored then.
        NotFound: no such file or scorer. InvalidInput, Conflict: the name.
    """
    from lori_manager.tasks.choosing import find_scorer
    from lori_manager.tasks.encoding import (
        chat_renderer,
        encode_prompts,
        encode_rows,
        lengths_summary,
    )
    from lori_manager.tasks.labelled import asked_of, encode_labelled, labels_of
    from lori_manager.tasks.rows import rows_to_jsonl
    from lori_manager.tasks.sources import read_source
    from lori_manager.tasks.splits import make_splits

    check_name(name, "task")
    ws.check_text("a task of text")
    entry = ws.settings.tasks.get(name, {})
    given = {"train": train, "eval": eval, "calibration": calibration, "probe": probe}
    if eval is not None and train is None:
        entry = {k: v for k, v in entry.items() if k not in given}
    asked = {
        "lm_eval": lm_eval, "lm_eval_include": lm_eval_include, "lm_eval_metric": lm_eval_metric,
        "lm_eval_fewshot": lm_eval_fewshot, "lm_eval_limit": lm_eval_limit,
    }  # fmt: skip
    frozen = _frozen(ws, entry, asked, given["eval"] or scorer)
    encoder = ws.architecture.encoder
    sources = _sources_of(ws, name, given, entry, frozen=frozen is not None)
    if frozen is not None:
        scorer, version, check = frozen.scorer, frozen.version, None
    else:
        usual = "label_accuracy" if encoder else "exact_match"
        scorer = str(scorer or entry.get("scorer") or usual)
        method = find_scorer(scorer, ws.settings.scorers, ws.root)
        if encoder != (method.reads == "labels"):
            raise InvalidInput(
                f"scorer `{scorer}` reads {method.reads}, which a {ws.architecture.title} does not "
                f"answer with: use `--scorer {usual}`"
            )
        version, check = str(method.version), method.check
    rows_wanted = probe_rows if probe_rows is not None else entry.get("probe_rows", 256)
    overlap = allow_overlap if allow_overlap is not None else entry.get("allow_overlap", False)
    render = None if encoder else chat_renderer(ws.tokenizer)
    read = {
        split: read_source(source, root=ws.root, render_chat=render, labelled=encoder)
        for split, source in sources.items()
    }
    prepared = make_splits(
        read.get("train"),
        read["eval"] if frozen is None else frozen.rows,
        read.get("calibration"),
        read.get("probe"),
        probe_rows=rows_wanted,
        allow_overlap=overlap,
        asked=asked_of if encoder else attrgetter("prompt"),
    )
    labels = labels_of(prepared.splits) if encoder else ()
    context = context_of(models.read_config(ws.base_folder))
    limits: dict[str, Any] = {"max_length": ws.settings.config.max_length, "context": context}
    splits, lengths = {}, {}
    for split, rows in prepared.splits.items():
        if split == "eval" and frozen is not None:
            encoded = encode_prompts(ws.tokenizer, [row.prompt for row in rows], room=context)
        elif encoder:
            lengths[split] = lengths_summary(encode_labelled(ws.tokenizer, rows, labels, **limits))
            continue
        else:
            encoded = encode_rows(ws.tokenizer, rows, **limits)
        if split == "eval" and check is not None:
            for row, e in zip(rows, encoded, strict=True):
                check(ws.tokenizer, row, e)
        lengths[split] = lengths_summary(encoded)
    for split, rows in prepared.splits.items():
        told = lengths[split]
        splits[split] = Split(
            ws.store.objects.put(rows_to_jsonl(rows)),
            len(rows),
            int(told["tokens"]),
            int(told["longest"]),
            int(told["truncated"]),
        )
    known = {t.ref for t in ws.store.tasks()}
    task = ws.store.add_task(
        name,
        scorer=scorer,
        scorer_version=version,
        description=description or entry.get("description", ""),
        splits=splits,
        options={"sources": {k: str(v) for k, v in sources.items()}, "probe_rows": rows_wanted}
        | ({} if frozen is None else {"lm_eval": frozen.options})
        | ({"labels": labels} if labels else {}),
    )
    return AddedTask(task, tuple(prepared.notes), lengths, task.ref not in known)


def _frozen(
    ws: Context, entry: Mapping[str, Any], asked: Mapping[str, Any], also: str | None
) -> Frozen | None:
    """The harness's rows where a task of it is named, on the command line or in lori.toml.

    Args:
        asked: the options of the harness. also: what does not go with them.
    """
    told = {key: value if value is not None else entry.get(key) for key, value in asked.items()}
    name, include = told.pop("lm_eval"), told.pop("lm_eval_include")
    if also is not None and asked["lm_eval"] is None:
        name = None  # lori.toml's is given up for what the command line says
    if name is None:
        if lost := [key for key, value in asked.items() if value is not None]:
            flag = f"--{lost[0].replace('_', '-')}"
            raise InvalidInput(f"{flag} needs --lm-eval TASK, a task of lm-evaluation-harness")
        return None
    if also is not None:
        raise InvalidInput("--lm-eval brings eval rows and their scorer: leave --eval and "
                           "--scorer out")  # fmt: skip
    from lori_manager.harness.freezing import freeze

    ws.check_language("--lm-eval")
    if include is not None:
        path = (ws.root / str(include)).absolute()
        include = str(path.relative_to(ws.root)) if path.is_relative_to(ws.root) else str(path)
    found = freeze(
        str(name),
        None if include is None else str(ws.root / include),
        metric=told["lm_eval_metric"],
        fewshot=told["lm_eval_fewshot"],
        limit=told["lm_eval_limit"],
    )
    return replace(found, options=found.options | {"include": include})


def _sources_of(
    ws: Context,
    name: str,
    given: Mapping[str, str | None],
    entry: Mapping[str, Any],
    *,
    frozen: bool,
) -> dict[str, str]:
    """Where each split of a task is read from; only `eval` has to be there, or be `frozen`."""
    alone = given["eval"] is not None and given["train"] is None
    found: dict[str, str] = {}
    for split, value in given.items():
        usual = ws.root / "tasks" / name / f"{split}.jsonl"
        if frozen and split == "eval":
            continue
        if value is not None:
            found[split] = value
        elif split in entry:
            spec = str(entry[split])
            found[split] = spec if spec.startswith("hf:") else str(ws.root / spec)
        elif usual.is_file() and not alone:
            found[split] = str(usual)
    if "eval" not in found and not frozen:
        raise NotFound(
            f"no eval rows for task {name!r}: give --eval FILE, [tasks.{name}] in {SETTINGS}, "
            f"or tasks/{name}/eval.jsonl"
        )
    if "train" not in found and {"calibration", "probe"} & found.keys():
        raise InvalidInput(f"task {name!r} has calibration or probe rows but no train rows")
    return found
