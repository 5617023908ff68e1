"""An open workspace: its store, its base and the look-ups that every stage needs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lori_manager import models
from lori_manager.architectures import (
    CAUSAL,
    DIFFUSION,
    TEXT_ENCODER,
    Architecture,
    architecture_of,
    context_of,
)
from lori_manager.config import PRECISIONS, Config, Settings, load_settings
from lori_manager.errors import Conflict, DamagedObject, InvalidInput, NotFound, WrongBase
from lori_manager.kinds import KINDS
from lori_manager.ranks import led_store, ranks
from lori_manager.records import Adapter, Mask, Task
from lori_manager.refs import AdapterRef, check_name, parse_adapter_ref
from lori_manager.store.files import write_atomic
from lori_manager.store.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from lori_manager.diffusion.pipeline import DiffusionBase
    from lori_manager.engine.weights import AdapterWeights, Stored
    from lori_manager.tasks.encoding import Encoded
    from lori_manager.tasks.images import Picture
    from lori_manager.tasks.labelled import LabelledImage, LabelledText
    from lori_manager.tasks.rows import Row
    from lori_manager.tasks.scorers import Scorer
    from lori_manager.training import Progress

FOLDER = ".lori"
SETTINGS = "lori.toml"
MACHINE = "machine.json"
CHAMPION = "champion"
LIBRARIES = ("lori-manager", "torch", "transformers", "peft", "numpy", "safetensors")


def _ignore(*_: object) -> None:
    return None


@dataclass
class Context:
    """What the stages of a workspace share.

    Attributes:
        root: the folder that holds `.lori/`.
        store: everything that is kept.
        on_progress: called after every training step and scored batch.
        on_message: called with one line whenever a step of a command is done.
    """

    root: Path
    store: Store
    on_progress: Callable[[Progress], None] = _ignore
    on_message: Callable[[str], None] = _ignore
    _model: models.BaseModel | None = None
    _pipeline: DiffusionBase | None = None
    _rows: dict[tuple[str, int], tuple[list[Row], list[Encoded]]] = field(default_factory=dict)
    _labelled: dict[
        tuple[str, int, tuple[str, ...]],
        tuple[list[Row], list[LabelledText] | list[LabelledImage]],
    ] = field(default_factory=dict)
    _scorers: dict[str, Scorer] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path = ".") -> Self:
        """The workspace that `path` lies in, looked for upwards.

        Raises:
            NotFound: none up to the root of the file system.
            InvalidInput: it is above `path` and another user's, whose lori.toml may name code.
        """
        start = Path(path).absolute()
        for folder in (start, *start.parents):
            if (folder / FOLDER).is_dir():
                if folder != start:
                    _check_owner(folder)
                return cls(folder, led_store(partial(Store.open, folder / FOLDER)))
        raise NotFound(f"no workspace in {start} or above it: run `lori init --base MODEL` first")

    def close(self) -> None:
        """Let go of the database."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def settings(self) -> Settings:
        """`lori.toml` as it was when first asked for."""
        return load_settings(self.root / SETTINGS)

    @cached_property
    def base_folder(self) -> Path:
        """Where the base's files are, checked to be the weights this workspace began with.

        Raises:
            NotFound: the folder is gone. WrongBase: it holds other weights.
        """
        base = self.store.base()
        path = Path(base.path)
        if not path.is_dir():
            path, _ = models.locate(base.source, base.revision, code=base.code is not None)
        memory = self.store.root / "fingerprint.json"
        ranks().led(lambda: models.fingerprint(path, memory), "fingerprint")  # then it is known
        mark = models.fingerprint(path, memory)
        if mark != base.fingerprint:
            raise WrongBase(
                f"{path} is not the base of this workspace: expected weights "
                f"{base.fingerprint[:12]}, found {mark[:12]}; restore them or start a new workspace"
            )
        return path

    @cached_property
    def encoding(self) -> str:
        """The digest of what makes tokens of rows: part of what a score is known by."""
        folder = Path(self.store.base().path)
        folder = folder if folder.is_dir() else self.base_folder
        return models.encoding_digest(folder, self.settings.config.max_length)

    def score_precision(self, config: Config) -> str:
        """The precision that scores are kept under.

        "auto" is resolved by torch once; then it is remembered for as long as machine,
        driver and torch are the same, so that what is known is found without torch.
        """
        if config.precision == "auto":
            memory = self.store.root / MACHINE
            stamp = models.machine_stamp()
            try:
                known = json.loads(memory.read_text("utf-8"))
                resolved = str(known["precision"]) if known["machine"] == stamp else None
            except (OSError, ValueError, KeyError, TypeError):
                resolved = None
            if resolved not in PRECISIONS:
                resolved = models.resolve_precision("auto")
                told = json.dumps({"machine": stamp, "precision": resolved})
                if ranks().first:
                    write_atomic(memory, told.encode())
            config = config.replace(precision=resolved)
        return models.score_precision(config)

    @cached_property
    def architecture(self) -> Architecture:
        """What kind of model the base is."""
        return architecture_of(self.store.base().model_type)

    @property
    def makes_images(self) -> bool:
        """Whether the base is a diffusion pipeline, whose tasks are images with captions."""
        return self.architecture == DIFFUSION

    def check_language(self, what: str) -> None:
        """Refuse what is only possible with a causal language model.

        Args:
            what: a command or an option.
        Raises:
            InvalidInput: the base is something else.
        """
        if self.architecture != CAUSAL:
            raise self._unfit(what, f"a {CAUSAL.title}")

    def check_text(self, what: str) -> None:
        """Refuse what is only possible with a base that reads text, as `check_language` does."""
        if self.architecture not in (CAUSAL, TEXT_ENCODER):
            raise self._unfit(what, "a language model or a text encoder")

    def check_transformer(self, what: str) -> None:
        """Refuse what a diffusion pipeline cannot do, as `check_language` does."""
        if self.makes_images:
            raise self._unfit(what, "a language model or an encoder")

    def _unfit(self, what: str, wanted: str) -> InvalidInput:
        base = f"{self.architecture.article} {self.architecture.title}"
        return InvalidInput(f"{what} needs {wanted}; the base of this workspace is {base}")

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer; InvalidInput where the base does not read text."""
        self.check_text("a tokenizer")
        return models.load_tokenizer(self.base_folder, self.store.base().code)

    def skeleton(self) -> models.Skeleton:
        """The base's modules without its weights."""
        return models.load_skeleton(self.base_folder, self.store.base().code)

    def base_model(self, config: Config) -> models.BaseModel:
        """The loaded base; kept for later calls with the same precision and bits."""
        from lori_manager.acceleration import accelerate

        self.check_transformer("this")
        wanted = models.resolve_precision(config.precision), config.base_bits
        if self._model is None or (self._model.precision, self._model.base_bits) != wanted:
            self._model = None  # before the next is loaded: memory may hold one alone
            self._model = models.load_base(
                self.base_folder, wanted[0], base_bits=wanted[1], code=self.store.base().code
            )
            accelerate(self._model, config.kernels)
        return self._model

    def pipeline(self, config: Config) -> DiffusionBase:
        """The loaded diffusion pipeline; kept for later calls with the same precision.

        Raises:
            InvalidInput: the base is a language model, or settings that are for one.
        """
        from lori_manager.diffusion.pipeline import check_precision, load_pipeline

        if not self.makes_images:
            raise InvalidInput("images need a diffusion pipeline as the base: this is a language "
                               "model")  # fmt: skip
        wanted = models.resolve_precision(config.precision)
        check_precision(wanted, config.base_bits)
        if self._pipeline is None or self._pipeline.precision != wanted:
            self._pipeline = None  # before the next is loaded: memory may hold one alone
            self._pipeline = load_pipeline(self.base_folder, wanted)
        return self._pipeline

    def model(self, config: Config) -> Any:
        """What adapters act on: the language model, or the pipeline with its UNet."""
        return self.pipeline(config) if self.makes_images else self.base_model(config)

    def pictures(self, task: Task, split: str) -> list[Picture]:
        """A split's images with their captions, as frozen when the task was added."""
        from lori_manager.tasks.images import picture
        from lori_manager.tasks.rows import rows_from_jsonl

        rows = rows_from_jsonl(self.store.objects.get(task.splits[split].digest))
        return [picture(row, self.store.objects.get) for row in rows]

    def scorer(self, task: Task) -> Scorer:
        """What scores the task's rows; a function of the user's own is read once.

        Raises:
            NotFound, InvalidInput: see `find_scorer`.
        """
        from lori_manager.tasks.choosing import find_scorer, request_scorer
        from lori_manager.tasks.scorers import NOISE_LOSS, NoiseLoss

        if task.scorer == NOISE_LOSS:
            return NoiseLoss()
        if task.requests is not None:
            return request_scorer(task.requests, task.scorer_version, self.root)
        if task.scorer not in self._scorers:
            found = find_scorer(task.scorer, self.settings.scorers, self.root)
            self._scorers[task.scorer] = found
        return self._scorers[task.scorer]

    def rows(
        self, task: Task, split: str, max_length: int | None = None
    ) -> tuple[list[Row], list[Encoded]]:
        """A split's rows and their tokens, as frozen when the task was added.

        Args:
            task, split: which.
            max_length: tokens a row; None is the workspace's own, with which all
                scores are made.
        """
        from lori_manager.tasks.encoding import encode_prompts, encode_rows
        from lori_manager.tasks.rows import rows_from_jsonl

        max_length = max_length or self.settings.config.max_length
        key = (task.splits[split].digest, max_length)
        if key not in self._rows:
            rows = rows_from_jsonl(self.store.objects.get(key[0]))
            context = context_of(models.read_config(self.base_folder))
            if (
                task.requests is not None and split == "eval"
            ):  # what they ask is for the harness to encode
                prompts = [row.prompt for row in rows]
                encoded = encode_prompts(self.tokenizer, prompts, room=context)
            else:
                encoded = encode_rows(self.tokenizer, rows, max_length=max_length, context=context)
            self._rows[key] = (rows, encoded)
        return self._rows[key]

    def labelled(
        self, task: Task, split: str, max_length: int | None = None
    ) -> tuple[list[Row], list[LabelledText] | list[LabelledImage]]:
        """As `rows`, of a task whose rows carry labels; `max_length` counts for text alone."""
        from lori_manager.tasks.labelled import encode_labelled, labelled_images
        from lori_manager.tasks.rows import rows_from_jsonl

        max_length = max_length or self.settings.config.max_length
        key = (task.splits[split].digest, max_length, task.labels)
        if key not in self._labelled:
            rows = rows_from_jsonl(self.store.objects.get(key[0]))
            if task.images is not None:
                found = labelled_images(rows, task.labels, self.store.objects.get)
                self._labelled[key] = (rows, found)
                return self._labelled[key]
            context = context_of(models.read_config(self.base_folder))
            encoded = encode_labelled(
                self.tokenizer, rows, task.labels, max_length=max_length, context=context
            )
            self._labelled[key] = (rows, encoded)
        return self._labelled[key]

    def mask_tensors(self, mask: Mask) -> dict[str, Tensor]:
        """Module name -> bool (out_features, rank)."""
        from lori_manager.engine.codec import decode_mask

        return decode_mask(self.store.mask_bytes(mask))[0]

    def adapter(self, ref: str, *, removed: bool = False) -> Adapter:
        """The adapter that `line@3`, `line@latest` or `line@alias` means.

        Args:
            removed: take a removed version, too.
        Raises:
            NotFound: none. InvalidInput: `base`, or not a reference.
        """
        parsed = parse_adapter_ref(ref)
        if parsed is None:
            raise InvalidInput("`base` is not an adapter; name one such as `safety@1`")
        return self.store.adapter(parsed, removed=removed)

    def weights(self, adapter: Adapter) -> AdapterWeights:
        """The stored factors, checked against digest and base.

        Raises:
            DamagedObject, WrongBase.
            InvalidInput: it is of a kind that has none.
        """
        from lori_manager.engine.weights import AdapterWeights

        self.check_low_rank(adapter)
        weights = self.stored(adapter)
        if not isinstance(weights, AdapterWeights):
            raise DamagedObject(f"{adapter.ref} is recorded as {adapter.method}, and its file "
                                f"holds {weights.kind}")  # fmt: skip
        return weights

    def check_low_rank(self, adapter: Adapter) -> None:
        """Refuse an adapter that is no B A update where one is wanted.

        Raises:
            InvalidInput: says its kind and which kinds are.
        """
        kind = KINDS.get(adapter.method)
        if kind is not None and not kind.low_rank:
            able = ", ".join(k.name for k in KINDS.values() if k.low_rank)
            raise InvalidInput(
                f"{adapter.ref} is of kind `{kind.name}`, which is no low-rank update: it cannot "
                f"be merged, routed or gone on from as one; kinds that can: {able}"
            )

    def stored(self, adapter: Adapter) -> Stored:
        """What is stored of an adapter of any kind, checked against digest and base.

        Raises:
            DamagedObject, WrongBase.
        """
        from lori_manager.engine.codec import decode

        weights, meta = decode(self.store.adapter_bytes(adapter))
        expected = self.store.base().fingerprint
        if meta.get("base", expected) != expected:
            raise WrongBase(f"{adapter.ref} was made for base {str(meta['base'])[:12]}")
        return weights

    def check_single(self, adapter: Adapter) -> None:
        """Refuse a routed adapter where one update is wanted, before anything is loaded.

        Raises:
            InvalidInput: it is routed; names its members.
        """
        if "routing" in adapter.facts:
            members = ", ".join(parent.ref for parent in adapter.parents)
            raise InvalidInput(
                f"{adapter.ref} is routed: one of {members} acts on each input, and there is no "
                "single update to go on with; use these instead"
            )

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
            if self._trained_alone(adapter, task.name):
                return adapter
        raise NotFound(f"nothing is trained for task {name!r} alone: run `lori train {name}`")

    def _trained_alone(self, adapter: Adapter, name: str) -> bool:
        """Whether the adapter and all it was continued from were trained on that task."""
        return adapter.task == name and all(
            self._trained_alone(self.adapter(parent.ref), name) for parent in adapter.parents
        )

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

    def trainable(self, name: str) -> Task:
        """A task that has rows to train on; InvalidInput for one that is only scored."""
        task = self.store.task(name)
        if not task.trainable:
            raise InvalidInput(
                f"task {name!r} has no train rows, it is only scored: add it again with --train"
            )
        return task

    def check_line(self, name: str, *, sequence: bool = False) -> None:
        """Refuse a name for a free line that is unusable or a task's own.

        Args:
            name: the line.
            sequence: whether it may be a sequence, which holds its own stages alone.
        Raises:
            InvalidInput, Conflict.
        """
        check_name(name, "line")
        for line in self.store.lines():
            if line.name == name and line.task is not None:
                raise Conflict(f"{name!r} is a task's own line: choose another name")
            if line.name == name and line.sequence and not sequence:
                raise Conflict(f"line {name!r} is a sequence: choose another name")


def library_versions(base_bits: int = 16) -> dict[str, str]:
    """Versions of what decides a result, kept with every adapter.

    Args:
        base_bits: of the base that it was trained on; 4 adds the library that packed it.
    """
    import importlib.metadata

    out = {}
    for name in (*LIBRARIES, *(("bitsandbytes",) if base_bits == 4 else ())):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "unknown"
    return out


def _check_owner(root: Path) -> None:
    """Refuse a workspace that was not named, and that somebody else put above this folder."""
    owner = (root / FOLDER).stat().st_uid
    if hasattr(os, "geteuid") and owner not in (os.geteuid(), 0):
        raise InvalidInput(
            f"the workspace {root} above this folder belongs to another user, and its lori.toml "
            f"may name code to run: if you trust it, say so with `lori -C {root}`"
        )
