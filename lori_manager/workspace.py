"""The whole sequence, in order: the Python API that the command line calls.

task -> calibrate -> mask -> train -> score -> merge -> audit. Each stage takes
values and returns values; this module alone puts them in order and keeps them.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lori_manager import models
from lori_manager.config import Config, Settings, default_toml, load_settings
from lori_manager.errors import Conflict, InvalidInput, NotFound, WrongBase
from lori_manager.records import (
    Adapter,
    Alias,
    Base,
    Finding,
    Mask,
    NewAdapter,
    NewScore,
    Parent,
    Score,
    Split,
    Task,
)
from lori_manager.refs import BASE, AdapterRef, check_name, parse_adapter_ref, parse_mask_ref
from lori_manager.store.store import Store

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lori_manager.audit import Audit
    from lori_manager.engine.weights import AdapterWeights, Block
    from lori_manager.tasks.encoding import Encoded
    from lori_manager.tasks.rows import Row
    from lori_manager.training import Progress

logger = logging.getLogger(__name__)

FOLDER = ".lori"
SETTINGS = "lori.toml"
CHAMPION = "champion"
LIBRARIES = ("lori-manager", "torch", "transformers", "peft", "numpy", "safetensors")


@dataclass(frozen=True)
class AddedTask:
    """A task as stored, and what reading its files brought to light."""

    task: Task
    notes: tuple[str, ...]
    lengths: Mapping[str, Mapping[str, Any]]
    new: bool


@dataclass(frozen=True)
class Trained:
    """An adapter as stored, with its scores; `resumed` if it was there already."""

    adapter: Adapter
    scores: tuple[Score, ...]
    mask: Mask | None
    capacity: Mapping[str, float] | None = None
    resumed: bool = False


@dataclass(frozen=True)
class Merged:
    """A merge as stored; scores of the members and of the merge by task."""

    adapter: Adapter
    members: tuple[Adapter, ...]
    weights: tuple[float, ...]
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Imported:
    """What became of one foreign adapter: stored, or refused with the reason."""

    directory: Path
    adapter: Adapter | None
    reason: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainOptions:
    """How `train` is to go about it, beside the configuration."""

    mask: str | None = None
    dense: bool = False
    start: str | None = None
    line: str | None = None
    protect: bool = False
    allow_foreign_mask: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(self.__dict__)


def _ignore(*_: object) -> None:
    return None


@dataclass
class Workspace:
    """A folder with `.lori/` in it: one base, its tasks, adapters and scores.

    Attributes:
        root: the folder.
        store: everything that is kept.
        on_progress: called after every training step and scored batch.
        on_message: called with one line whenever a step of a command is done.
    """

    root: Path
    store: Store
    on_progress: Callable[[Progress], None] = _ignore
    on_message: Callable[[str], None] = _ignore
    _rows: dict[tuple[str, str], tuple[list[Row], list[Encoded]]] = field(default_factory=dict)

    # -- opening -----------------------------------------------------------------

    @classmethod
    def create(cls, root: str | Path, base: str, revision: str | None = None) -> Workspace:
        """Make a workspace in `root` for a base model.

        Args:
            root: a folder, made where it is missing.
            base: a model folder or a hub id.
            revision: of the hub id.
        Raises:
            NotFound: no such base. Conflict: there is a workspace already.
        """
        root = Path(root).absolute()
        if (root / FOLDER / "registry.db").exists():
            raise Conflict(f"{root} holds a workspace already; remove {FOLDER}/ or choose another")
        path, commit = models.locate(base, revision)
        mark = models.fingerprint(path)
        config = models.read_config(path)
        root.mkdir(parents=True, exist_ok=True)
        store = Store.create(root / FOLDER)
        source = str(Path(base).expanduser().resolve()) if commit is None else base
        now = datetime.now(UTC)
        store.set_base(Base(mark, source, commit, str(path), config.get("model_type", ""), now))
        if not (root / SETTINGS).exists():
            (root / SETTINGS).write_text(default_toml(), encoding="utf-8")
        return cls(root, store)

    @classmethod
    def open(cls, path: str | Path = ".") -> Workspace:
        """The workspace that `path` lies in, looked for upwards.

        Raises:
            NotFound: none up to the root of the file system.
        """
        start = Path(path).absolute()
        for folder in (start, *start.parents):
            if (folder / FOLDER).is_dir():
                return cls(folder, Store.open(folder / FOLDER))
        raise NotFound(f"no workspace in {start} or above it: run `lori init --base MODEL` first")

    def close(self) -> None:
        """Let go of the database."""
        self.store.close()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def settings(self) -> Settings:
        """`lori.toml` as it was when first asked for."""
        return load_settings(self.root / SETTINGS)

    # -- the base ----------------------------------------------------------------

    @cached_property
    def base_folder(self) -> Path:
        """Where the base's files are, checked to be the weights this workspace began with.

        Raises:
            NotFound: the folder is gone. WrongBase: it holds other weights.
        """
        base = self.store.base()
        path = Path(base.path)
        if not path.is_dir():
            path, _ = models.locate(base.source, base.revision)
        mark = models.fingerprint(path, self.store.root / "fingerprint.json")
        if mark != base.fingerprint:
            raise WrongBase(
                f"{path} is not the base of this workspace: expected weights "
                f"{base.fingerprint[:12]}, found {mark[:12]}; restore them or start a new workspace"
            )
        return path

    def move_base(self, path: str) -> Base:
        """The same weights now lie elsewhere.

        Raises:
            WrongBase: `path` holds other weights.
        """
        folder, _ = models.locate(path)
        mark = models.fingerprint(folder)
        if mark != (base := self.store.base()).fingerprint:
            raise WrongBase(
                f"{folder} holds weights {mark[:12]}, this workspace's base is "
                f"{base.fingerprint[:12]}: one workspace has one base"
            )
        return self.store.move_base(path=str(folder), source=str(folder))

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return models.load_tokenizer(self.base_folder)

    def base_model(self, config: Config) -> models.BaseModel:
        """The loaded base; kept for later calls with the same precision."""
        precision = models.resolve_precision(config.precision)
        if self._model is None or self._model.precision != precision:
            self._model = models.load_base(self.base_folder, precision)
        return self._model

    _model: models.BaseModel | None = None

    # -- tasks -------------------------------------------------------------------

    def add_task(
        self,
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
    ) -> AddedTask:
        """Read, check and freeze a task's rows.

        What is not given comes from `[tasks.NAME]` in lori.toml, then from
        tasks/NAME/{train,eval,calibration,probe}.jsonl. The same rows and scorer
        again change nothing; other rows or another scorer make a new revision.
        Raises:
            BadData: rows that cannot be used, by file and line. Nothing is stored then.
            NotFound: no such file or scorer. InvalidInput, Conflict: the name.
        """
        from lori_manager.tasks.encoding import chat_renderer, encode_rows, lengths_summary
        from lori_manager.tasks.rows import rows_to_jsonl
        from lori_manager.tasks.scorers import scorers
        from lori_manager.tasks.sources import read_source
        from lori_manager.tasks.splits import make_splits

        check_name(name, "task")
        entry = self.settings.tasks.get(name, {})
        given = {"train": train, "eval": eval, "calibration": calibration, "probe": probe}
        if eval is not None and train is None:
            entry = {k: v for k, v in entry.items() if k not in given}
        sources = self._sources(name, given, entry)
        scorer = scorer or entry.get("scorer") or "exact_match"
        method = scorers.get(scorer)
        rows_wanted = probe_rows if probe_rows is not None else entry.get("probe_rows", 256)
        overlap = allow_overlap if allow_overlap is not None else entry.get("allow_overlap", False)
        render = chat_renderer(self.tokenizer)
        read = {
            split: read_source(source, root=self.root, render_chat=render)
            for split, source in sources.items()
        }
        prepared = make_splits(
            read.get("train"),
            read["eval"],
            read.get("calibration"),
            read.get("probe"),
            probe_rows=rows_wanted,
            allow_overlap=overlap,
        )
        config = self.settings.config
        context = models.read_config(self.base_folder).get("max_position_embeddings")
        splits, lengths = {}, {}
        for split, rows in prepared.splits.items():
            encoded = encode_rows(
                self.tokenizer, rows, max_length=config.max_length, context=context
            )
            if split == "eval":
                for row, e in zip(rows, encoded, strict=True):
                    method.sequences(self.tokenizer, row, e)
            lengths[split] = lengths_summary(encoded)
        for split, rows in prepared.splits.items():
            told = lengths[split]
            splits[split] = Split(
                self.store.objects.put(rows_to_jsonl(rows)),
                len(rows),
                int(told["tokens"]),
                int(told["longest"]),
                int(told["truncated"]),
            )
        known = {t.ref for t in self.store.tasks()}
        task = self.store.add_task(
            name,
            scorer=scorer,
            scorer_version=method.version,
            description=description or entry.get("description", ""),
            splits=splits,
            options={"sources": {k: str(v) for k, v in sources.items()}, "probe_rows": rows_wanted},
            eval_keys=[row.key for row in prepared.splits["eval"]],
        )
        return AddedTask(task, tuple(prepared.notes), lengths, task.ref not in known)

    def _sources(
        self, name: str, given: Mapping[str, str | None], entry: Mapping[str, Any]
    ) -> dict[str, str]:
        """Where each split of a task is read from; only `eval` has to be there."""
        alone = given["eval"] is not None and given["train"] is None
        found: dict[str, str] = {}
        for split, value in given.items():
            usual = self.root / "tasks" / name / f"{split}.jsonl"
            if value is not None:
                found[split] = value
            elif split in entry:
                spec = str(entry[split])
                found[split] = spec if spec.startswith("hf:") else str(self.root / spec)
            elif usual.is_file() and not alone:
                found[split] = str(usual)
        if "eval" not in found:
            raise NotFound(
                f"no eval rows for task {name!r}: give --eval FILE, [tasks.{name}] in {SETTINGS}, "
                f"or tasks/{name}/eval.jsonl"
            )
        if "train" not in found and {"calibration", "probe"} & found.keys():
            raise InvalidInput(f"task {name!r} has calibration or probe rows but no train rows")
        return found

    def rows(self, task: Task, split: str) -> tuple[list[Row], list[Encoded]]:
        """A split's rows and their tokens, as frozen when the task was added."""
        from lori_manager.tasks.encoding import encode_rows
        from lori_manager.tasks.rows import rows_from_jsonl

        key = (task.splits[split].digest, split)
        if key not in self._rows:
            rows = rows_from_jsonl(self.store.objects.get(key[0]))
            context = models.read_config(self.base_folder).get("max_position_embeddings")
            max_length = self.settings.config.max_length
            encoded = encode_rows(self.tokenizer, rows, max_length=max_length, context=context)
            self._rows[key] = (rows, encoded)
        return self._rows[key]

    # -- calibrate ---------------------------------------------------------------

    def calibrate(
        self, name: str, config: Config | None = None, *, line: str | None = None
    ) -> Mask:
        """Train B dense for a few steps from zero, keep where it grew most.

        Args:
            name: a task.
            config: settings; the workspace's own where None.
            line: whose A the mask is for; the task's own line where None.
        """
        from lori_manager.adapters.lori import fresh_block

        config = config or self.settings.config
        task = self._trainable(name)
        base = self.base_model(config)
        block = fresh_block(base.linear_shapes, config, line or name)
        return self._calibrated(task, block, config, None, None)

    def _calibrated(
        self,
        task: Task,
        block: Block,
        config: Config,
        exclude: Mapping[str, Tensor] | None,
        checkpoint: Path | None,
    ) -> Mask:
        """The mask of a task on a block's A, made and stored."""
        import torch

        from lori_manager.adapters.lori import trainable_layers, trained_B
        from lori_manager.engine import mask as masks
        from lori_manager.engine.codec import encode_mask
        from lori_manager.engine.layers import attached
        from lori_manager.engine.weights import Block
        from lori_manager.tasks.batches import permutation
        from lori_manager.training import fit

        split = "calibration" if "calibration" in task.splits else "train"
        _, encoded = self.rows(task, split)
        if split == "train":
            chosen = permutation(len(encoded), config.seed, "calibration")
            encoded = [encoded[i] for i in sorted(chosen[: config.calibration_rows])]
        zero = {name: torch.zeros_like(b, dtype=torch.float32) for name, b in block.B.items()}
        empty = Block(zero, block.scaling, block.projection, block.tensors)
        base = self.base_model(config)
        layers = trainable_layers(base.model, empty, None)
        with attached(base.model, layers):
            result = fit(
                base,
                {name: layer.values for name, layer in layers.items()},
                encoded,
                config,
                steps=config.calibration_steps,
                peak=config.dense_learning_rate,
                phase=f"calibrating {task.name}",
                checkpoint=checkpoint,
                on_progress=self.on_progress,
            )
        mask = masks.calibrate_mask(trained_B(layers), config.sparsity, config.scope, exclude)
        kept, total = masks.count(mask), masks.size(mask)
        if kept == 0:
            raise InvalidInput(
                f"no entry of B is left for {task.name!r}: the parents' tasks took them all; "
                "train without --protect or with a larger rank"
            )
        spec = block.projection
        meta = {
            "kind": "mask",
            "projection": None if spec is None else spec.to_json(),
            "in_features": {name: int(block.A[name].shape[1]) for name in mask},
        }
        stored = self.store.add_mask(
            task=task,
            blob=encode_mask(mask, meta),
            projection=block.projection_digest,
            sparsity=config.sparsity,
            scope=config.scope,
            kept=kept,
            total=total,
            config=config.to_json() | {"protected": exclude is not None},
        )
        self.on_message(
            f"mask {stored.ref}: {kept} of {total} entries of B kept, {config.calibration_steps} "
            f"dense steps in {result.seconds:.1f} s"
        )
        return stored

    def mask_tensors(self, mask: Mask) -> dict[str, Tensor]:
        """Module name -> bool (out_features, rank)."""
        from lori_manager.engine.codec import decode_mask

        return decode_mask(self.store.mask_bytes(mask))[0]

    def _mask_for(
        self,
        task: Task,
        block: Block,
        config: Config,
        options: TrainOptions,
        checkpoint: Path | None,
    ) -> Mask | None:
        """The mask to train a task under: the one named, the newest that fits, or a new one."""
        from lori_manager.adapters.lori import used_entries

        if options.dense:
            return None
        if options.mask is not None:
            mask = self.store.mask(*parse_mask_ref(options.mask))
            if mask.projection != block.projection_digest and not options.allow_foreign_mask:
                raise InvalidInput(
                    f"mask {mask.ref} was calibrated on another A "
                    f"({mask.projection[:12]}, not {block.projection_digest[:12]}): calibrate "
                    "again, or give --allow-foreign-mask"
                )
            shapes = {n: tuple(m.shape) for n, m in self.mask_tensors(mask).items()}
            if shapes != {n: tuple(b.shape) for n, b in block.B.items()}:
                raise InvalidInput(f"mask {mask.ref} is for other modules, or for another rank")
            return mask
        used = used_entries(block) if options.protect else None
        for mask in reversed(self.store.masks(task.name)):
            fits = (
                mask.task_revision == task.revision
                and mask.projection == block.projection_digest
                and mask.sparsity == config.sparsity
                and mask.scope == config.scope
            )
            if fits and (used is None or not self._touches(mask, used)):
                return mask
        return self._calibrated(task, block, config, used, checkpoint)

    def _touches(self, mask: Mask, used: Mapping[str, Tensor]) -> bool:
        return any(bool((m & used[n]).any()) for n, m in self.mask_tensors(mask).items())

    # -- train -------------------------------------------------------------------

    def train(
        self,
        names: Sequence[str],
        config: Config | None = None,
        options: TrainOptions | None = None,
        *,
        sequence: str | None = None,
    ) -> list[Trained]:
        """Train tasks, one after another.

        Without `sequence` each is an adapter of its own, from the base or from
        `options.start`. With it they are the stages of one line: one A, each stage
        continuing the one before, and after every stage all the tasks are scored,
        also the coming ones. Interrupted, the same call goes on.

        Raises:
            Conflict: another process is at the same, or the line holds another sequence.
            InvalidInput: options that do not go together.
        """
        config = config or self.settings.config
        options = options or TrainOptions()
        if not names:
            raise InvalidInput("name at least one task to train")
        if len(set(names)) != len(names):
            raise InvalidInput("a task is named twice; name each once")
        if len(names) > 1 and (options.mask or (options.line and sequence is None)):
            raise InvalidInput("--mask and --line go with one task; train them one by one")
        if sequence is not None and (options.line or options.start or options.mask):
            raise InvalidInput("--sequence names its own line and start: leave --line, --from "
                               "and --mask out")  # fmt: skip
        if options.dense and (options.mask or options.protect):
            raise InvalidInput("--dense trains all of B: it cannot go with --mask or --protect")
        if options.protect and options.start is None and sequence is None:
            raise InvalidInput("--protect keeps clear of the parents' tasks: it needs --from or "
                               "--sequence")  # fmt: skip
        tasks = [self._trainable(name) for name in names]
        if options.line is not None and options.line != names[0]:
            self._check_line(options.line)
        if options.start is not None:
            start = self.adapter(options.start)
            options = TrainOptions(**{**options.to_json(), "start": start.ref})
        if sequence is not None:
            self._check_line(sequence)
        plan = {
            "sequence": sequence,
            "tasks": [t.ref for t in tasks],
            "config": config.to_json(),
            "options": options.to_json(),
            "base": self.store.base().fingerprint,
        }
        with self._running(plan) as (run, folder):
            done = {a.stage: a for a in self.store.run_adapters(run)}
            if sequence is not None:
                self._claim_sequence(sequence, tasks, done)
                self._score_missing(BASE, tasks, config)
            results: list[Trained] = []
            for stage, task in enumerate(tasks):
                adapter = done.get(stage)
                mask = capacity = None
                resumed = adapter is not None
                if adapter is None:
                    parent = (
                        results[-1].adapter
                        if sequence is not None and results
                        else (self.adapter(options.start) if options.start else None)
                    )
                    adapter, mask, capacity = self._stage(
                        task, config, options, parent, sequence, run, stage, folder
                    )
                else:
                    self.on_message(f"{adapter.ref} is there already, going on")
                scored = tasks if sequence is not None else [task]
                scores = self._score_missing(adapter.ref, scored, config)
                results.append(Trained(adapter, tuple(scores), mask, capacity, resumed))
            self.store.finish_run(run)
        return results

    def _stage(
        self,
        task: Task,
        config: Config,
        options: TrainOptions,
        parent: Adapter | None,
        sequence: str | None,
        run: str,
        stage: int,
        folder: Path,
    ) -> tuple[Adapter, Mask | None, dict[str, float] | None]:
        """Mask, train and store one adapter."""
        from lori_manager.adapters import lori
        from lori_manager.engine.codec import encode_adapter
        from lori_manager.engine.layers import attached
        from lori_manager.engine.weights import AdapterWeights
        from lori_manager.training import fit, steps_for

        line = sequence or options.line or task.name
        base = self.base_model(config)
        if parent is None:
            block = lori.fresh_block(base.linear_shapes, config, line)
        else:
            block = lori.continued_block(self.weights(parent), config)
        mask = self._mask_for(
            task, block, config, options, folder / f"{stage}-calibration.safetensors"
        )
        tensors = None if mask is None else self.mask_tensors(mask)
        _, encoded = self.rows(task, "train")
        layers = lori.trainable_layers(base.model, block, tensors)
        with attached(base.model, layers):
            result = fit(
                base,
                {name: layer.values for name, layer in layers.items()},
                encoded,
                config,
                steps=steps_for(len(encoded), config),
                peak=config.dense_learning_rate if mask is None else config.learning_rate,
                phase=f"training {task.name}",
                checkpoint=folder / f"{stage}-training.safetensors",
                on_progress=self.on_progress,
            )
        trained = lori.trained_block(block, lori.trained_B(layers), tensors, config.store_dtype)
        capacity = None
        if options.protect:
            capacity = lori.capacity_left([lori.used_entries(trained)])
        adapter = self.store.add_adapter(
            NewAdapter(
                line=line,
                origin="trained",
                task=task.name,
                task_revision=task.revision,
                mask=None if mask is None else mask.ref,
                parents=() if parent is None else (Parent(parent.ref, parent.digest),),
                method="lori-d" if mask is None else "lori-s",
                rank=max(int(b.shape[1]) for b in block.B.values()),
                projection=block.projection_digest,
                base=self.store.base().fingerprint,
                sequence=sequence is not None,
                run=run,
                stage=stage,
                config=config.to_json() | {"options": options.to_json()},
                versions=library_versions(),
                facts={
                    "rows": len(encoded),
                    "steps": len(result.losses),
                    "tokens": result.tokens,
                    "seconds": round(result.seconds, 2),
                    "parameters": result.parameters,
                    "first_loss": result.losses[0],
                    "last_loss": result.losses[-1],
                },
            ),
            encode_adapter(AdapterWeights((trained,)), {"base": self.store.base().fingerprint}),
        )
        for name in ("calibration", "training"):
            (folder / f"{stage}-{name}.safetensors").unlink(missing_ok=True)
        self.on_message(
            f"{adapter.ref}: {len(result.losses)} steps in {result.seconds:.1f} s, loss "
            f"{result.losses[0]:.3f} -> {result.losses[-1]:.3f}, {adapter.bytes / 1e6:.2f} MB"
        )
        return adapter, mask, capacity

    @contextmanager
    def _running(self, plan: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
        """The run of this plan, open or new, held by this process alone.

        Raises:
            Conflict: another process holds it.
        """
        from filelock import FileLock, Timeout

        run = self.store.open_run(plan)
        folder = self.store.root / "runs" / run.id
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as e:
            raise Conflict("the same training is running in another process; wait for it") from e
        try:
            yield run.id, folder
        finally:
            lock.release()
        import shutil

        shutil.rmtree(folder, ignore_errors=True)

    def _claim_sequence(
        self, name: str, tasks: Sequence[Task], done: Mapping[int | None, Adapter]
    ) -> None:
        """Refuse a line that holds stages which this run did not make."""
        refs = [t.ref for t in tasks]
        line = self.store.add_line(name, sequence=refs)
        if line.versions == len(done):
            return
        held = f"line {name!r} holds {line.versions} stage(s) already"
        if line.versions < len(refs):
            raise Conflict(
                f"{held}, trained with other settings: give the same settings to go on, or "
                "another --sequence name"
            )
        raise Conflict(f"{held}: choose another --sequence name")

    def _trainable(self, name: str) -> Task:
        task = self.store.task(name)
        if not task.trainable:
            raise InvalidInput(
                f"task {name!r} has no train rows, it is only scored: add it again with --train"
            )
        return task

    def _check_line(self, name: str) -> None:
        check_name(name, "line")
        if any(task.name == name for task in self.store.tasks()):
            raise Conflict(f"{name!r} is a task's own line: choose another name")

    # -- adapters ----------------------------------------------------------------

    def adapter(self, ref: str) -> Adapter:
        """The adapter that `line@3`, `line@latest` or `line@alias` means.

        Raises:
            NotFound: none. InvalidInput: `base`, or not a reference.
        """
        parsed = parse_adapter_ref(ref)
        if parsed is None:
            raise InvalidInput("`base` is not an adapter; name one such as `safety@1`")
        return self.store.adapter(parsed)

    def weights(self, adapter: Adapter) -> AdapterWeights:
        """The stored factors, checked against digest and base.

        Raises:
            DamagedObject, WrongBase.
        """
        from lori_manager.engine.codec import decode_adapter

        weights, meta = decode_adapter(self.store.adapter_bytes(adapter))
        expected = self.store.base().fingerprint
        if meta.get("base", expected) != expected:
            raise WrongBase(f"{adapter.ref} was made for base {str(meta['base'])[:12]}")
        return weights

    def task_adapter(self, name: str) -> Adapter:
        """What a task's name means where an adapter is wanted.

        From the task's own line: its `champion`, else the latest adapter trained on
        that task alone.
        Raises:
            NotFound: no such task, or nothing trained for it yet.
        """
        task = self.store.task(name)
        if CHAMPION in self.store.line(name).aliases:
            return self.store.adapter(AdapterRef(name, CHAMPION))
        for adapter in reversed(self.store.adapters(name)):
            if self.tasks_of(adapter) == [task.name] and adapter.origin != "merged":
                return adapter
        raise NotFound(f"nothing is trained for task {name!r} alone: run `lori train {name}`")

    def tasks_of(self, adapter: Adapter) -> list[str]:
        """Names of all tasks that went into an adapter, in the order they came in."""
        names: list[str] = []
        for parent in adapter.parents:
            for name in self.tasks_of(self.adapter(parent.ref)):
                if name not in names:
                    names.append(name)
        if adapter.task is not None and adapter.task not in names:
            names.append(adapter.task)
        return names

    # -- score -------------------------------------------------------------------

    def score(
        self, refs: Sequence[str], names: Sequence[str] | None = None, config: Config | None = None
    ) -> list[Score]:
        """Score adapters or the base on tasks; what is scored already is not run again.

        Args:
            refs: `line@3`, `base`, or a task's name for its own adapter.
            names: tasks; None means all.
            config: settings; the workspace's own where None.
        """
        config = config or self.settings.config
        tasks = [self.store.task(n) for n in names] if names is not None else self.store.tasks()
        if not refs or not tasks:
            raise InvalidInput("name at least one adapter (or `base`) and have at least one task")
        known = {t.name for t in self.store.tasks()}
        out = []
        for ref in refs:
            if ref in known:
                adapter = self.task_adapter(ref)
                self.on_message(f"{ref} means {adapter.ref}")
                ref = adapter.ref
            subject = BASE if ref == BASE else self.adapter(ref).ref
            out.extend(self._score_missing(subject, tasks, config))
        return out

    def _score_missing(self, subject: str, tasks: Sequence[Task], config: Config) -> list[Score]:
        """Scores of one subject on tasks, run only where they are not known yet."""
        from lori_manager.tasks.scorers import scorers

        precision = models.resolve_precision(config.precision)
        adapter = None if subject == BASE else self.adapter(subject)
        digest = adapter.digest if adapter else self.store.base().fingerprint
        found: dict[str, Score] = {}
        for task in tasks:
            version = scorers.get(task.scorer).version
            score = self.store.find_score(
                digest=digest, task=task, scorer=task.scorer, scorer_version=version,
                precision=precision,
            )  # fmt: skip
            if score is not None:
                found[task.name] = score
        missing = [t for t in tasks if t.name not in found]
        if missing:
            for task, outcomes, weights in self._run(adapter, missing, config):
                found[task.name] = self._keep_score(
                    subject, digest, task, outcomes, weights, precision, "measured"
                )
        return [found[t.name] for t in tasks]

    def _run(
        self, adapter: Adapter | None, tasks: Sequence[Task], config: Config
    ) -> Iterator[tuple[Task, np.ndarray, np.ndarray | None]]:
        """Outcomes of one subject on tasks, from the model."""
        from lori_manager.engine.layers import attached, low_rank_layers
        from lori_manager.scoring import score_rows
        from lori_manager.tasks.scorers import scorers

        base = self.base_model(config)
        layers = {}
        if adapter is not None:
            layers = low_rank_layers(base.model, self.weights(adapter).updates())
        subject = adapter.ref if adapter else BASE
        with attached(base.model, layers):
            for task in tasks:
                rows, encoded = self.rows(task, "eval")
                progress = self._scoring_progress(f"scoring {subject} on {task.name}")
                yield (
                    task,
                    *score_rows(
                        base, rows, encoded, scorers.get(task.scorer), config.score_batch, progress
                    ),
                )

    def _scoring_progress(self, phase: str) -> Callable[[int, int], None]:
        import time

        from lori_manager.training import Progress

        start = time.monotonic()

        def told(done: int, total: int) -> None:
            spent = max(time.monotonic() - start, 1e-9)
            left = spent / done * (total - done)
            self.on_progress(Progress(phase, done, total, float("nan"), done / spent, left))

        return told

    def _keep_score(
        self,
        subject: str,
        digest: str,
        task: Task,
        outcomes: np.ndarray,
        weights: np.ndarray | None,
        precision: str,
        origin: str,
    ) -> Score:
        from lori_manager.metrics.summary import summarize
        from lori_manager.tasks.scorers import scorers

        scorer = scorers.get(task.scorer)
        summary = summarize(outcomes, weights)
        score = self.store.add_score(
            NewScore(
                subject=subject,
                digest=digest,
                task=task.name,
                task_revision=task.revision,
                scorer=task.scorer,
                scorer_version=scorer.version,
                precision=precision,
                value=summary.value,
                error=summary.error,
                rows=summary.rows,
                origin=origin,
                facts={"higher_is_better": scorer.higher_is_better, "unit": scorer.unit},
            ),
            outcomes,
            weights,
        )
        self.on_message(f"{subject} on {task.ref}: {score.value:.3f} +- {score.error:.3f}")
        return score

    def add_outcomes(self, ref: str, name: str, file: str | Path, origin: str) -> Score:
        """Store outcomes that were measured elsewhere.

        Args:
            ref: whose they are.
            name: the task.
            file: JSONL of {"row": index or key in hex, "value": number}, a row each.
            origin: where they come from, kept with the score.
        Raises:
            BadData: unknown or repeated rows, values that are not numbers.
        """
        from lori_manager.tasks.outcomes import read_outcomes

        task = self.store.task(name)
        outcomes = read_outcomes(Path(file), self.store.eval_keys(task))
        adapter = None if ref == BASE else self.adapter(ref)
        digest = adapter.digest if adapter else self.store.base().fingerprint
        subject = adapter.ref if adapter else BASE
        return self._keep_score(subject, digest, task, outcomes, None, "", origin)

    # -- merge -------------------------------------------------------------------

    def merge(
        self,
        refs: Sequence[str],
        *,
        names: Sequence[str] = (),
        method: str = "concat",
        weights: Sequence[float] | None = None,
        into: str = "main",
        config: Config | None = None,
    ) -> Merged:
        """One adapter out of several, stored with its members and scored on their tasks.

        Args:
            refs: adapters. names: tasks, each standing for its own adapter.
            method: a name in the registry of merge methods.
            weights: one a member, in the order refs, names; default 1/T each.
            into: the line that the merge is added to.
            config: settings for scoring.
        Raises:
            NotFound, InvalidInput, Conflict.
        """
        from lori_manager.engine.codec import encode_adapter
        from lori_manager.merging.methods import load_all

        config = config or self.settings.config
        merge = load_all().get(method)
        members = [self.adapter(ref) for ref in refs]
        for name in names:
            members.append(self.task_adapter(name))
            self.on_message(f"{name} means {members[-1].ref}")
        if not members:
            raise InvalidInput("nothing to merge: give --tasks or --adapters")
        if len({m.ref for m in members}) != len(members):
            raise InvalidInput("an adapter is named twice; name each once and give it a weight")
        shares = [1 / len(members)] * len(members) if weights is None else list(weights)
        if len(shares) != len(members) or not all(abs(w) < float("inf") for w in shares):
            raise InvalidInput(
                f"got {len(shares)} weights for {len(members)} members: give one finite number each"
            )
        self._check_line(into)
        self._check_not_sequence(into)
        merged = merge([self.weights(m) for m in members], shares)
        one_a = len(merged.blocks) == 1
        adapter = self.store.add_adapter(
            NewAdapter(
                line=into,
                origin="merged",
                task=None,
                task_revision=None,
                mask=None,
                parents=tuple(
                    Parent(m.ref, m.digest, w) for m, w in zip(members, shares, strict=True)
                ),
                method=method,
                rank=merged.rank,
                projection=merged.blocks[0].projection_digest if one_a else None,
                base=self.store.base().fingerprint,
                config={"method": method, "weights": shares},
                versions=library_versions(),
            ),
            encode_adapter(merged, {"base": self.store.base().fingerprint}),
        )
        self.on_message(f"{adapter.ref}: {method} of {len(members)} at rank {adapter.rank}")
        scores: list[Score] = []
        wanted: list[str] = []
        for member in members:
            own = self.tasks_of(member)
            wanted.extend(n for n in own if n not in wanted)
            scores += self._score_missing(member.ref, [self.store.task(n) for n in own], config)
        scores += self._score_missing(adapter.ref, [self.store.task(n) for n in wanted], config)
        return Merged(adapter, tuple(members), tuple(shares), tuple(scores))

    def _check_not_sequence(self, name: str) -> None:
        for line in self.store.lines():
            if line.name == name and line.sequence:
                raise Conflict(f"line {name!r} is a sequence: merge --into another line")

    # -- audit -------------------------------------------------------------------

    def audit(
        self, ref: str | None = None, task: str | None = None, max_drop: float | None = None
    ) -> Audit:
        """What every step did to every task; reads the store only."""
        from lori_manager.audit import audit

        return audit(self.store, ref, task, max_drop)

    def set_alias(self, ref: str, alias: str) -> Alias:
        """Let `line@alias` mean the adapter `ref`."""
        adapter = self.adapter(ref)
        return self.store.set_alias(adapter.line, check_name(alias, "alias"), adapter.version)

    # -- out and in --------------------------------------------------------------

    def export(self, ref: str, directory: str | Path, *, full: bool = False) -> Path:
        """Write an adapter as a PEFT directory, or the base with it merged in.

        Raises:
            Conflict: the directory is there and not empty.
        """
        from lori_manager.adapters.full_export import write_full
        from lori_manager.adapters.peft_export import write_peft

        adapter = self.adapter(ref)
        updates = self.weights(adapter).updates()
        base = self.store.base()
        target = Path(directory)
        if full:
            write_full(self.base_folder, updates, target)
            return target
        model = models.load_skeleton(self.base_folder)
        write_peft(
            updates,
            target,
            base_name=base.source,
            revision=base.revision,
            fingerprint=base.fingerprint,
            all_modules=[name for name, _ in model.model.named_modules()],
            transposed=model.transposed,
            label=adapter.ref,
        )
        return target

    def import_adapters(
        self, directories: Sequence[str | Path], *, assume_base: bool = False
    ) -> list[Imported]:
        """Bring in PEFT LoRAs, each as version 1 of a line named after its folder.

        What cannot be imported faithfully is refused with its reason; the rest is
        imported.
        """
        from lori_manager.adapters.peft_import import read_peft
        from lori_manager.engine.codec import encode_adapter
        from lori_manager.errors import LoriError

        skeleton = models.load_skeleton(self.base_folder)
        base = self.store.base()
        names = {base.source, base.path, models.read_config(self.base_folder).get("_name_or_path")}
        out = []
        for directory in map(Path, directories):
            try:
                line = line_name(directory)
                self._check_line(line)
                if any(known.name == line for known in self.store.lines()):
                    raise Conflict(f"line {line!r} exists; rename the folder or the line")
                found = read_peft(
                    directory,
                    shapes=skeleton.linear_shapes,
                    base_names=[n for n in names if n],
                    fingerprint=base.fingerprint,
                    assume_base=assume_base,
                )
                adapter = self.store.add_adapter(
                    NewAdapter(
                        line=line,
                        origin="imported",
                        task=None,
                        task_revision=None,
                        mask=None,
                        parents=(),
                        method="peft-lora",
                        rank=found.rank,
                        projection=None,
                        base=base.fingerprint,
                        config={"peft": found.config},
                        versions=library_versions(),
                        facts={"source": directory.name},
                    ),
                    encode_adapter(found.weights, {"base": base.fingerprint}),
                )
                out.append(Imported(directory, adapter, notes=tuple(found.notes)))
            except LoriError as e:
                out.append(Imported(directory, None, str(e)))
        return out

    # -- integrity ---------------------------------------------------------------

    def verify(self) -> Iterator[Finding]:
        """Every row has its file, every file its digest, every mask fits its A."""
        from lori_manager.engine.codec import decode_adapter, decode_mask
        from lori_manager.engine.projection import ProjectionSpec
        from lori_manager.errors import DamagedObject

        damaged = set()
        for finding in self.store.verify():
            damaged.add(finding.subject)
            yield finding
        known: dict[str, str] = {}
        for adapter in self.store.adapters():
            if adapter.ref in damaged:
                continue
            try:
                weights, _ = decode_adapter(self.store.adapter_bytes(adapter))
            except DamagedObject as e:
                yield Finding("damaged", adapter.ref, str(e))
                continue
            for block in weights.blocks:
                known[block.projection_digest] = adapter.ref
        for task in self.store.tasks():
            for mask in self.store.masks(task.name):
                if mask.ref in damaged:
                    continue
                try:
                    tensors, meta = decode_mask(self.store.mask_bytes(mask))
                except DamagedObject as e:
                    yield Finding("damaged", mask.ref, str(e))
                    continue
                spec = meta.get("projection")
                if spec is not None:
                    made = ProjectionSpec(
                        spec["seed"], spec["line"], spec["rank"], meta["in_features"]
                    )
                    fits = made.digest == mask.projection
                else:
                    fits = mask.projection in known
                shapes = all(m.shape[1] == spec["rank"] for m in tensors.values()) if spec else True
                if not fits or not shapes:
                    yield Finding(
                        "unfit", mask.ref, "the A that it names is not the A it was calibrated on"
                    )


def library_versions() -> dict[str, str]:
    """Versions of what decides a result, kept with every adapter."""
    out = {}
    for name in LIBRARIES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "unknown"
    return out


def line_name(directory: Path) -> str:
    """A usable line name out of a folder's name."""
    import re

    name = re.sub(r"[^A-Za-z0-9_-]+", "-", directory.resolve().name).strip("-_") or "imported"
    return check_name(name[:64] if not name.isdigit() else f"adapter-{name}", "line")
