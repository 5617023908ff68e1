"""Adapters out of the workspace and into it: PEFT directories and whole models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lori_manager import models
from lori_manager.architectures import TEXT_ENCODER
from lori_manager.config import Config
from lori_manager.context import Context, library_versions
from lori_manager.errors import Conflict, InvalidInput, LoriError
from lori_manager.evaluation import counted_progress
from lori_manager.records import Adapter, NewAdapter
from lori_manager.refs import check_name

if TYPE_CHECKING:
    from lori_manager.engine.weights import Head
    from lori_manager.routed import RoutedModel


@dataclass(frozen=True)
class Imported:
    """What became of one foreign adapter: stored, or refused with the reason."""

    directory: Path
    adapter: Adapter | None
    reason: str | None = None
    notes: tuple[str, ...] = ()


def export(
    ws: Context, ref: str, directory: str | Path, *, full: bool = False, task: str | None = None
) -> Path:
    """Write an adapter as a PEFT directory, or the base with it merged in.

    For a UNet, the PEFT directory is one that diffusers' loaders read.

    A routed adapter is a PEFT directory a member, with the router beside them. What is no
    low-rank update is written as its kind says. A whole model is written as a stream;
    interrupted and called again, it goes on.

    Args:
        task: whose head is written, where the base is an encoder and the adapter has several.
    Raises:
        Conflict: the directory is there and not empty.
        InvalidInput: `full` and a routed adapter, or one of a kind that has no place in the
            base's weights; an encoder and `full`, or no single head.
    """
    from lori_manager.adapters.full_export import write_full
    from lori_manager.adapters.kind import module_of
    from lori_manager.adapters.peft_export import write_peft
    from lori_manager.adapters.routed_directory import write_routed
    from lori_manager.engine.weights import KindWeights

    adapter = ws.adapter(ref)
    target = Path(directory)
    if full:
        ws.check_language("`--format full`")
        ws.check_single(adapter)
        weights = ws.stored(adapter)
        progress = counted_progress(ws, f"writing {adapter.ref}, MB", rate=False)
        whole: dict[str, Any] = {"fingerprint": ws.store.base().fingerprint, "told": progress}
        if isinstance(weights, KindWeights):
            writer = module_of(weights.kind)
            if not hasattr(writer, "write_full"):
                raise InvalidInput(
                    f"{adapter.ref} is of kind `{weights.kind}`, which changes no weight of the "
                    "base: it cannot be merged into them; leave `--format full` out"
                )
            writer.write_full(weights, ws.base_folder, target, **whole)
        else:
            write_full(ws.base_folder, weights.updates(), target, **whole)
        return target
    if ws.makes_images:
        from lori_manager.adapters.diffusers_export import write_diffusers

        write_diffusers(ws.weights(adapter).updates(), target, **_told(ws, adapter, None))
        return target
    weights = ws.stored(adapter)
    head = _head_for(ws, adapter, weights.heads, task)
    told = _told(ws, adapter, head)
    if isinstance(weights, KindWeights):
        ws.check_language(f"an export of kind `{weights.kind}`")
        module_of(weights.kind).write(weights, target, {**told, "folder": ws.base_folder})
    elif weights.router is not None:
        names = _member_names(ws, adapter)
        members = {name: weights.member(i).updates() for i, name in enumerate(names)}
        write_routed(members, weights.router, target, **told)
    else:
        write_peft(weights.updates(), target, **told)
    return target


def _head_for(
    ws: Context, adapter: Adapter, heads: Mapping[str, Head], task: str | None
) -> Head | None:
    """The head to export with an adapter; None where the base is no encoder."""
    if not ws.architecture.encoder:
        if task is not None:
            raise InvalidInput("--task names a head, which only an adapter of an encoder has: "
                               "leave it out")  # fmt: skip
        return None
    if task is None and len(heads) == 1:
        return next(iter(heads.values()))
    if task is None or task not in heads:
        has = ", ".join(heads) or "none"
        raise InvalidInput(f"say by --task whose head goes with {adapter.ref}; it has: {has}")
    return heads[task]


def _told(ws: Context, adapter: Adapter, head: Head | None) -> dict[str, Any]:
    """What a PEFT directory says of an adapter, its head and its base."""
    base = ws.store.base()
    skeleton = ws.skeleton()
    told = {
        "base_name": base.source,
        "revision": base.revision,
        "fingerprint": base.fingerprint,
        "all_modules": [name for name, _ in skeleton.model.named_modules()],
        "transposed": skeleton.transposed,
        "label": adapter.ref,
    }
    if head is None:
        return told
    kind = "SEQ_CLS" if ws.architecture == TEXT_ENCODER else None
    behind = models.head_names(skeleton.model)
    return told | {"head": head, "head_modules": behind, "task_type": kind}


def routed(ws: Context, ref: str, config: Config | None = None) -> RoutedModel:
    """A routed adapter as a model to ask: `ws.routed("main@4").generate(prompts, 32)`.

    Args:
        ref: the adapter.
        config: precision and bits of the base count here; the workspace's own where None.
    Raises:
        InvalidInput: it is not routed.
    """
    from lori_manager.routed import RoutedModel

    adapter = ws.adapter(ref)
    if "routing" not in adapter.facts:
        raise InvalidInput(f"{adapter.ref} is not routed: it acts on every input as it is")
    weights = ws.weights(adapter)
    base = ws.base_model(config or ws.settings.config)
    return RoutedModel(base, weights, _member_names(ws, adapter))


def _member_names(ws: Context, adapter: Adapter) -> list[str]:
    from lori_manager.routed import member_names

    return member_names([ws.adapter(parent.ref) for parent in adapter.parents])


def import_adapters(
    ws: Context, directories: Sequence[str | Path], *, assume_base: bool = False
) -> list[Imported]:
    """Bring in PEFT's LoRAs, DoRAs, IA3s, prefixes and what `export` writes of its own form.

    Each is version 1 of a line named after its folder.

    What cannot be imported faithfully is refused with its reason; the rest is
    imported.
    """
    from lori_manager.adapters.importing import read_adapter
    from lori_manager.engine.codec import encode

    ws.check_language("importing PEFT adapters")

    skeleton = ws.skeleton()
    base = ws.store.base()
    names = {base.source, base.path, models.read_config(ws.base_folder).get("_name_or_path")}
    out = []
    for directory in map(Path, directories):
        try:
            line = line_name(directory)
            ws.check_line(line)
            if any(known.name == line for known in ws.store.lines()):
                raise Conflict(f"line {line!r} exists; rename the folder or the line")
            found = read_adapter(
                directory,
                skeleton,
                folder=ws.base_folder,
                base_names=[n for n in names if n],
                fingerprint=base.fingerprint,
                assume_base=assume_base,
            )
            adapter = ws.store.add_adapter(
                NewAdapter(
                    line=line,
                    origin="imported",
                    task=None,
                    task_revision=None,
                    mask=None,
                    parents=(),
                    method=found.method,
                    rank=found.weights.rank,
                    projection=None,
                    base=base.fingerprint,
                    config=found.config,
                    versions=library_versions(),
                    facts={"source": directory.name},
                ),
                encode(found.weights, {"base": base.fingerprint}),
            )
            out.append(Imported(directory, adapter, notes=found.notes))
        except LoriError as e:
            out.append(Imported(directory, None, str(e)))
    return out


def line_name(directory: Path) -> str:
    """A usable line name out of a folder's name."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", directory.resolve().name).strip("-_") or "imported"
    return check_name(name[:64] if not name.isdigit() else f"adapter-{name}", "line")
