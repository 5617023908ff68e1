"""Which layers a task's adapter goes to: scored on its inputs, remembered, used by training."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lori_manager.config import PLOP, Config, types_to_place
from lori_manager.context import SETTINGS, Context
from lori_manager.errors import InvalidInput
from lori_manager.evaluation import counted_progress
from lori_manager.kinds import LORI, kind_of
from lori_manager.placement import Placement, module_types
from lori_manager.projecting import APART
from lori_manager.ranks import ranks
from lori_manager.records import Adapter, Task
from lori_manager.settings_file import with_default
from lori_manager.store.files import private_folder, storing, write_atomic

logger = logging.getLogger(__name__)

PROMPTS = 64
FOLDER = "placements"
_VERSION = 1  # of what is computed; another one asks the model again
_BATCH = 16  # rows a forward; more is no faster on a CPU


@dataclass(frozen=True)
class Placed:
    """A configuration whose `targets` name layers, and how they were chosen.

    `facts` are kept with an adapter; there are none where nothing was to choose.
    """

    config: Config
    facts: dict[str, Any] = field(default_factory=dict)


def place(
    ws: Context,
    name: str,
    config: Config | None = None,
    *,
    prompts: int = PROMPTS,
) -> Placement:
    """Score the base's linear layers on prompts of a task, or tell what is known.

    The prompts are a seeded draw from the rows that the task trains on; a row without a
    prompt gives its text, and of an encoder's task it is the text or image itself. What
    was scored on the same rows, tokens, base and precision is remembered beside the registry,
    so that every training finds the same.

    Args:
        name: a task.
        config: seed, precision, bits of the base; the workspace's own where None.
        prompts: how many to draw; all where there are fewer.
    Raises:
        InvalidInput: a task that is only scored, `prompts` below 1, layers without score, or
            a diffusion pipeline.
    """
    ws.check_transformer("scoring layers on prompts")
    config = config or ws.settings.config
    if prompts < 1:
        raise InvalidInput(f"`prompts` must be at least 1, got {prompts}")
    task = ws.trainable(name)
    path = _memory(ws, task, config, prompts)
    known = ranks().led(lambda: _read(path, task), "the placement")
    if known is not None:
        return known
    from lori_manager.feature_norms import feature_norms

    rows = _draw(ws, task, config.seed, prompts)
    base = ws.base_model(config)
    progress = counted_progress(ws, f"scoring layers on {task.ref}")
    scores = feature_norms(base, rows, _BATCH, progress)
    found = Placement(
        task=task.name,
        task_revision=task.revision,
        scores=scores,
        shapes={module: base.linear_shapes[module] for module in scores},
        prompts=len(rows),
        tokens=0 if task.images is not None else sum(row.length for row in rows),
        seed=config.seed,
        precision=ws.score_precision(config),
        reads=_reads(ws, task),
    )
    found = ranks().led(lambda: found, "the scores of layers")
    if ranks().first:
        with storing(path):
            private_folder(path.parent)
        write_atomic(path, json.dumps(asdict(found)).encode())
    return found


def placed(ws: Context, task: Task, config: Config, parent: Adapter | None = None) -> Placed:
    """The configuration with "plop" in `targets` resolved for a task.

    Args:
        parent: what is continued. Where its A is kept, its layers are too.
    """
    top = types_to_place(config.targets)
    if top is None:
        return Placed(config)
    if "targets" not in kind_of(config.kind).settings:
        return Placed(config.replace(targets=Config().targets))
    if parent is not None and not (config.kind == LORI and config.projection in APART):
        ws.on_message(f"{parent.ref} is continued in its own layers: nothing is placed")
        return Placed(config.replace(targets=_layers_of(ws, parent)))
    found = place(ws, task.name, config)
    found.chosen(top, f"the N of --targets {PLOP}:N")
    targets = found.targets(top)
    ws.on_message(f"layers for {task.ref}: {found.reason(top)}")
    facts = {
        "task": task.ref,
        "prompts": found.prompts,
        "seed": found.seed,
        "scores": {one.name: round(one.score, 4) for one in found.types},
    }
    return Placed(config.replace(targets=targets), {"placement": facts})


def apply_placement(ws: Context, targets: tuple[str, ...]) -> Path:
    """Write `targets` into the defaults of lori.toml; all else in it stays.

    Raises:
        InvalidInput: a file in which they cannot be set line by line; it is left as it is.
    """
    path = ws.root / SETTINGS
    with storing(path):
        text = path.read_bytes().decode() if path.exists() else ""
    changed = with_default(text, "targets", list(targets), str(path))
    write_atomic(path, changed.encode(), private=False)
    ws.__dict__.pop("settings", None)  # to be read again
    return path


def _layers_of(ws: Context, parent: Adapter) -> tuple[str, ...]:
    """The types of layers that an adapter is in, or all its modules where it is in some only."""
    from lori_manager.engine.weights import AdapterWeights

    weights = ws.stored(parent)
    if not isinstance(weights, AdapterWeights):
        return tuple(parent.config["targets"])
    modules = set(weights.updates())
    shapes = ws.skeleton().linear_shapes
    types = {name: own for name, own in module_types(shapes).items() if set(own) <= modules}
    covered = {module for own in types.values() for module in own}
    return tuple(types if covered == modules else sorted(modules))


def _reads(ws: Context, task: Task) -> str:
    if not ws.architecture.encoder:
        return "prompts"
    return "texts" if task.images is None else "images"


def _draw(ws: Context, task: Task, seed: int, count: int) -> Sequence[Any]:
    """Prompts as training shows them, or texts where a row has no prompt; an encoder's rows."""
    from lori_manager.tasks.batches import permutation
    from lori_manager.tasks.encoding import Encoded

    if ws.architecture.encoder:
        _, labelled = ws.labelled(task, "train")
        return [labelled[i] for i in permutation(len(labelled), seed, "placement")[:count]]
    rows, encoded = ws.rows(task, "train")
    out = []
    for number in permutation(len(rows), seed, "placement")[:count]:
        row = encoded[number]
        end = row.prompt_length if rows[number].prompt.strip() else max(1, len(row.ids) - 1)
        out.append(Encoded(row.ids[:end], end))
    return out


def _memory(ws: Context, task: Task, config: Config, prompts: int) -> Path:
    """Where the scores are kept that follow from all this."""
    told = {
        "version": _VERSION,
        "base": ws.store.base().fingerprint,
        "rows": task.splits["train"].digest,
        "encoding": ws.encoding,
        "precision": ws.score_precision(config),
        "seed": config.seed,
        "prompts": prompts,
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return ws.store.root / FOLDER / f"{digest[:32]}.json"


def _read(path: Path, task: Task) -> Placement | None:
    """What is kept there, for the task as it is called now."""
    try:
        values = json.loads(path.read_bytes())
        sizes = values["shapes"].items()
        values["shapes"] = {module: (int(out), int(inner)) for module, (out, inner) in sizes}
        return Placement(**values | {"task": task.name, "task_revision": task.revision})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        logger.warning("%s is unusable (%s): layers are scored again", path, e)
        return None
