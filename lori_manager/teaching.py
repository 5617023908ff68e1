"""Tasks -> masks -> adapters: independent ones or the stages of a sequence, exactly resumed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lori_manager import models
from lori_manager.by_base import all_heads, check_fits, head_of, rows_of, steps_of
from lori_manager.config import Config
from lori_manager.context import Context, library_versions
from lori_manager.errors import Conflict, InvalidInput, LoriError, NotFound
from lori_manager.evaluation import counted_progress, ready_to_score, score_missing
from lori_manager.kinds import KINDS, LORI, resolved
from lori_manager.placing import Placed, placed
from lori_manager.plain import counted
from lori_manager.projecting import check_projection, start_of
from lori_manager.ranks import ranks
from lori_manager.records import Adapter, Mask, NewAdapter, Parent, Run, Score, Task
from lori_manager.refs import BASE, check_name, parse_mask_ref
from lori_manager.replaying import check_replay, with_replay

if TYPE_CHECKING:
    from filelock import FileLock
    from torch import Tensor

    from lori_manager.engine.head import SoftTargets
    from lori_manager.engine.weights import AdapterWeights, Block, Stored
    from lori_manager.training import TrainResult


NOT_DECIDING = frozenset({"checkpoint_seconds", "score_batch", "run_code"})


@dataclass(frozen=True)
class Trained:
    """An adapter as stored, with its scores; `resumed` if it was there already."""

    adapter: Adapter
    scores: tuple[Score, ...]
    mask: Mask | None
    capacity: Mapping[str, float] | None = None
    resumed: bool = False


@dataclass(frozen=True)
class TrainOptions:
    """How `train` is to go about it, beside the configuration."""

    mask: str | None = None
    dense: bool = False
    start: str | None = None
    line: str | None = None
    protect: bool = False
    allow_foreign_mask: bool = False
    avoid: tuple[str, ...] | None = None
    replay: int = 0
    replay_general: int = 240
    general_text: str | None = None
    compared: str | None = None  # digest of the comparison of kinds that this belongs to

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(self.__dict__)


def calibrate(
    ws: Context, name: str, config: Config | None = None, *, line: str | None = None
) -> Mask:
    """Train B dense from zero, keep where it grew most. Later trainings take it as it is.

    Args:
        name: a task.
        config: settings; the workspace's own where None.
        line: whose A the mask is for; the task's own line where None.
    """
    if line is not None:
        check_name(line, "line")
    config = resolved(config or ws.settings.config)
    if config.kind != LORI:
        raise InvalidInput(f"a mask is for kind `{LORI}`, and the settings say `{config.kind}`")
    task = ws.trainable(name)
    config = placed(ws, task, config).config
    with _decomposing(ws):
        block = start_of(ws, task, config, line or name).block
    steps = _dense_steps(config, task.splits["train"].rows)
    return _calibrated_mask(ws, task, block, config, None, None, steps=steps, asked=True)


def _dense_steps(config: Config, rows: int) -> int:
    """Of the calibration for a training on so many rows."""
    from lori_manager.training import steps_for

    return config.calibration_steps or steps_for(rows, config)


def _calibrated_mask(
    ws: Context,
    task: Task,
    block: Block,
    config: Config,
    exclude: Mapping[str, Tensor] | None,
    checkpoint: Path | None,
    beside: AdapterWeights | None = None,
    *,
    steps: int,
    asked: bool,
) -> Mask:
    """The mask of a task on a block's A, made and stored; `asked` for by itself or not."""
    from lori_manager.calibrating import calibration_rows, grown_mask
    from lori_manager.engine import mask as masks
    from lori_manager.engine.codec import encode_mask

    split = "calibration" if "calibration" in task.splits else "train"
    phase = f"calibrating {task.name}"
    base, encoded = ws.model(config), rows_of(ws, task, split, config)
    if split == "train":
        encoded = calibration_rows(encoded, config)
    with head_of(ws, task, base, config) as head:
        mask, result = grown_mask(
            base, block, encoded, config, steps=steps, exclude=exclude, beside=beside, head=head,
            phase=phase, checkpoint=checkpoint, on_progress=ws.on_progress,
            steps_of=steps_of(ws, base, config, phase),
        )  # fmt: skip
    kept, total = masks.count(mask), masks.size(mask)
    if kept == 0:
        reason = (
            f"sparsity {config.sparsity} leaves none of {total} entries: lower it"
            if exclude is None
            else "the parents' tasks took them all: train without --protect or at a larger rank"
        )
        raise InvalidInput(f"no entry of B is left for {task.name!r}: {reason}")
    spec = block.projection
    meta = {
        "kind": "mask",
        "projection": None if spec is None else spec.to_json(),
        "digest": block.projection_digest,
        "in_features": {name: int(block.A[name].shape[1]) for name in mask},
    }
    stored = ws.store.add_mask(
        task=task,
        blob=encode_mask(mask, meta),
        projection=block.projection_digest,
        sparsity=config.sparsity,
        scope=config.scope,
        kept=kept,
        total=total,
        config=config.to_json()
        | {
            "protected": exclude is not None,
            "dense_steps": steps,
            "seconds": round(result.seconds, 3),
            "asked": asked,
        },
    )
    ws.on_message(
        f"mask {stored.ref}: {kept} of {total} entries of B kept, "
        f"{counted(steps, 'dense step')} in {result.seconds:.1f} s"
    )
    return stored


def _mask_for(
    ws: Context,
    task: Task,
    block: Block,
    config: Config,
    options: TrainOptions,
    checkpoint: Path | None,
    beside: AdapterWeights | None,
    dense_steps: int,
) -> Mask | None:
    """The mask to train a task under: the one named, the newest that fits, or a new one.

    Of any length where `lori calibrate` made it, else of as many steps as it would now get.
    """
    from lori_manager.adapters.lori import used_entries

    if options.dense:
        return None
    used = used_entries(block) if options.protect else None
    if options.mask is not None:
        mask = ws.store.mask(*parse_mask_ref(options.mask))
        if mask.projection != block.projection_digest and not options.allow_foreign_mask:
            raise InvalidInput(
                f"mask {mask.ref} was calibrated on another A "
                f"({mask.projection[:12]}, not {block.projection_digest[:12]}): calibrate "
                "again, or give --allow-foreign-mask"
            )
        shapes = {n: tuple(m.shape) for n, m in ws.mask_tensors(mask).items()}
        if shapes != {n: tuple(b.shape) for n, b in block.B.items()}:
            raise InvalidInput(f"mask {mask.ref} is for other modules, or for another rank")
        if used is not None and _touches(ws, mask, used):
            raise InvalidInput(
                f"mask {mask.ref} holds entries that the parents' tasks use: leave --mask or "
                "--protect out"
            )
        return mask
    for mask in reversed(ws.store.masks(task.name)):
        fits = (
            mask.task_revision == task.revision
            and mask.projection == block.projection_digest
            and mask.sparsity == config.sparsity
            and mask.scope == config.scope
            and (mask.config.get("asked") or mask.config.get("dense_steps") == dense_steps)
        )
        if used is None:
            fits = fits and not mask.config.get("protected")
        elif fits:
            fits = not _touches(ws, mask, used)
        if fits:
            return mask
    return _calibrated_mask(ws, task, block, config, used, checkpoint, beside,
                            steps=dense_steps, asked=False)  # fmt: skip


def _touches(ws: Context, mask: Mask, used: Mapping[str, Tensor]) -> bool:
    return any(bool((m & used[n]).any()) for n, m in ws.mask_tensors(mask).items())


@dataclass(frozen=True)
class Course:
    """A training that can begin: its tasks, in order, and settings that go together."""

    tasks: tuple[Task, ...]
    config: Config
    options: TrainOptions
    sequence: str | None = None

    def plan(self, ws: Context) -> dict[str, Any]:
        """What a run is known by: equal plans go on with one another."""
        # What does not change the result may differ when an interrupted command is given again.
        settings = {k: v for k, v in self.config.to_json().items() if k not in NOT_DECIDING}
        return {
            "sequence": self.sequence,
            "tasks": [t.ref for t in self.tasks],
            "config": settings,
            "options": self.options.to_json(),
            "base": ws.store.base().fingerprint,
        }


def prepared(
    ws: Context,
    names: Sequence[str],
    config: Config | None = None,
    options: TrainOptions | None = None,
    *,
    sequence: str | None = None,
) -> Course:
    """The training that these name, checked as far as it can be before a model is loaded.

    Raises:
        InvalidInput, Conflict, NotFound: see `train`.
    """
    config = resolved(config or ws.settings.config)
    options = options or TrainOptions()
    _check_kind(config, options, sequence)
    check_fits(ws, config)
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
    if options.replay < 0:
        raise InvalidInput(f"`replay` must be 0 or more rows of each task, got {options.replay}")
    if options.replay_general < 0:
        raise InvalidInput(f"`replay_general` must be 0 or more pieces of general text, got "
                           f"{options.replay_general}")  # fmt: skip
    if options.general_text and not (options.replay and options.replay_general):
        raise InvalidInput("a general text counts with --replay alone: give both")
    if options.replay and options.start is None and sequence is None:
        raise InvalidInput("--replay brings back rows of earlier tasks: it needs --from or "
                           "--sequence")  # fmt: skip
    if options.protect and options.start is None and sequence is None:
        raise InvalidInput("--protect keeps clear of the parents' tasks: it needs --from or "
                           "--sequence")  # fmt: skip
    tasks = ready_to_score(ws, [ws.trainable(name) for name in names], config)
    if config.kind == LORI:
        check_projection(
            config, tasks, sequence=sequence is not None, protect=options.protect,
            avoid=options.avoid,
        )  # fmt: skip
    if options.line is not None and options.line != names[0]:
        ws.check_line(options.line)
    if options.start is not None:
        start = ws.adapter(options.start)
        ws.check_single(start)
        options = TrainOptions(**{**options.to_json(), "start": start.ref})
    if options.replay:
        ws.check_language("`--replay`")
        parent = ws.adapter(options.start) if options.start else None
        check_replay(ws, tasks, parent, sequence=sequence is not None)
    if sequence is not None:
        ws.check_line(sequence, sequence=True)
    return Course(tuple(tasks), config, options, sequence)


def train_stage(
    ws: Context,
    course: Course,
    stage: int,
    run: str,
    folder: Path,
    done: Adapter | None = None,
    before: Adapter | None = None,
    placement: Placed | None = None,
) -> Trained:
    """Train, store and score one task of a run, or score what it left.

    Args:
        stage: the task's place in the course.
        run, folder: the open run, see `running`.
        done: what the run has stored for this stage.
        before: the stage before, of a sequence.
        placement: of a sequence; None places the task's own layers.
    """
    task, config, options = course.tasks[stage], course.config, course.options
    adapter, mask, capacity = done, None, None
    if adapter is None:
        parent = before or (ws.adapter(options.start) if options.start else None)
        adapter, mask, capacity = _train_stage(
            ws, task, placement or placed(ws, task, config, parent), options, parent,
            course.sequence, run, stage, folder,
        )  # fmt: skip
    scored = course.tasks if course.sequence is not None else [task]
    scores = score_missing(ws, adapter.ref, scored, config)
    return Trained(adapter, tuple(scores), mask, capacity, done is not None)


def train(
    ws: Context,
    names: Sequence[str],
    config: Config | None = None,
    options: TrainOptions | None = None,
    *,
    sequence: str | None = None,
) -> list[Trained]:
    """Train tasks, one after another.

    Without `sequence` each is an adapter of its own, from the base or from
    `options.start`. With it they are the stages of one line: one A, each stage
    continuing the one before (with an orthogonal or nullspace A each stage adds a
    block of its own to those before), and after every stage all the tasks are scored,
    also the coming ones. Interrupted, the same call goes on.

    Raises:
        Conflict: another process is at the same, or the line holds another sequence.
        InvalidInput: options that do not go together.
    """
    from lori_manager.adapters.lori import fresh_block

    course = prepared(ws, names, config, options, sequence=sequence)
    tasks, config, options = course.tasks, course.config, course.options
    with running(ws, course.plan(ws)) as (run, folder):
        done = {a.stage: a for a in ws.store.run_adapters(run)}
        placement = None
        if sequence is not None:
            placement = placed(ws, tasks[0], config)  # one A, so its first task decides
            if not done:  # a name is claimed for good, so only settings that can be used claim it
                shapes = ws.skeleton().linear_shapes
                if config.kind == LORI:
                    fresh_block(shapes, placement.config, sequence)
                else:
                    models.resolve_targets(shapes, placement.config.targets)
            _claim_sequence(ws, sequence, tasks, done)
            score_missing(ws, BASE, tasks, config)
        results: list[Trained] = []
        for stage in range(len(tasks)):
            if stage in done:
                ws.on_message(f"{done[stage].ref} is there already, going on")
            before = results[-1].adapter if sequence is not None and results else None
            results.append(
                train_stage(ws, course, stage, run, folder, done.get(stage), before, placement)
            )
        ws.store.finish_run(run)
    return results


def _train_stage(
    ws: Context,
    task: Task,
    placement: Placed,
    options: TrainOptions,
    parent: Adapter | None,
    sequence: str | None,
    run: str,
    stage: int,
    folder: Path,
) -> tuple[Adapter, Mask | None, dict[str, float] | None]:
    """Train and store one adapter."""
    from lori_manager.engine.codec import encode

    config = placement.config
    line = sequence or options.line or task.name
    checkpoint = folder / f"{stage}-training"
    encoded = rows_of(ws, task, "train", config)
    soft = None
    if options.replay:
        text = None if options.general_text is None else Path(options.general_text)
        encoded, soft = with_replay(
            ws, task, encoded, parent, config, options.replay, options.replay_general, text
        )
    learn = _learn_lori if config.kind == LORI else _learn_kind
    with _decomposing(ws):
        learned = learn(ws, task, encoded, soft, config, options, parent, line, checkpoint)
    result, mask = learned.result, learned.mask
    rank = learned.weights.rank
    base = ws.store.base().fingerprint
    adapter = ws.store.add_adapter(
        NewAdapter(
            line=line,
            origin="trained",
            task=task.name,
            task_revision=task.revision,
            mask=None if mask is None else mask.ref,
            parents=() if parent is None else (Parent(parent.ref, parent.digest),),
            method=learned.method,
            rank=rank,
            projection=learned.projection,
            base=base,
            sequence=sequence is not None,
            run=run,
            stage=stage,
            config=config.to_json() | {"rank": rank, "options": options.to_json()},
            versions=library_versions(config.base_bits),
            facts={
                "rows": len(encoded),
                "steps": len(result.losses),
                "tokens": result.tokens,
                "seconds": round(result.seconds, 2),
                "parameters": result.parameters,
                "first_loss": result.losses[0],
                "last_loss": result.losses[-1],
            }
            | ({"processes": ranks().world} if ranks().world > 1 else {})
            | learned.facts
            | placement.facts,
        ),
        encode(learned.weights, {"base": base} | learned.meta),
    )
    for left in folder.glob(f"{stage}-*") if ranks().first else ():
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    ws.on_message(
        f"{adapter.ref}: {len(result.losses)} steps in {result.seconds:.1f} s, loss "
        f"{result.losses[0]:.3f} -> {result.losses[-1]:.3f}, {adapter.bytes / 1e6:.2f} MB"
    )
    return adapter, mask, learned.capacity


@dataclass(frozen=True)
class _Learned:
    """What a stage has taught: the weights to store and what is told of them."""

    weights: Stored
    method: str
    result: TrainResult
    mask: Mask | None = None
    projection: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    capacity: dict[str, float] | None = None


def _learn_lori(
    ws: Context,
    task: Task,
    rows: Sequence[Any],
    soft: SoftTargets | None,
    config: Config,
    options: TrainOptions,
    parent: Adapter | None,
    line: str,
    checkpoint: Path,
) -> _Learned:
    """Mask and train the values of B on a frozen A."""
    from lori_manager.adapters import lori
    from lori_manager.adapters.heads import with_head
    from lori_manager.adapters.kind import Training
    from lori_manager.engine.weights import AdapterWeights
    from lori_manager.training import fit, no_weights, steps_for

    base = ws.model(config)
    kept = checkpoint.with_name(checkpoint.name.replace("training", "A"))
    start = start_of(ws, task, config, line, parent, options.avoid, kept)
    block, beside = start.block, start.beside
    calibration = checkpoint.with_name(checkpoint.name.replace("training", "calibration"))
    dense_steps = _dense_steps(config, len(rows))
    mask = _mask_for(ws, task, block, config, options, calibration, beside, dense_steps)
    tensors = None if mask is None else ws.mask_tensors(mask)
    layers = lori.trainable_layers(base.model, block, tensors, beside)
    phase = f"training {task.name}"
    held = None if parent is None else ws.stored(parent)
    with (
        head_of(ws, task, base, config, held) as head,
        lori.in_training(base, layers, beside) as parameters,
    ):
        training = with_head(Training(parameters, no_weights), head, config.head_learning_rate)
        result = fit(
            base,
            training.parameters,
            rows,
            config,
            steps=steps_for(len(rows), config),
            peak=config.dense_learning_rate if mask is None else config.learning_rate,
            phase=phase,
            checkpoint=checkpoint,
            on_progress=ws.on_progress,
            soft=soft,
            training=training,
            steps_of=steps_of(ws, base, config, phase),
        )
    trained = lori.trained_block(block, lori.trained_B(layers), tensors, config.store_dtype)
    return _Learned(
        AdapterWeights(
            (*(beside.blocks if beside else ()), trained),
            heads=all_heads(task, head, held, config),
        ),
        "lori-d" if mask is None else "lori-s",
        result,
        mask,
        None if beside else block.projection_digest,
        dict(start.facts),
        dict(start.meta),
        lori.capacity_left([lori.used_entries(trained)]) if options.protect else None,
    )


def _learn_kind(
    ws: Context,
    task: Task,
    rows: Sequence[Any],
    soft: SoftTargets | None,
    config: Config,
    options: TrainOptions,
    parent: Adapter | None,
    line: str,
    checkpoint: Path,
) -> _Learned:
    """Train whatever the kind trains."""
    from lori_manager.adapters.heads import with_head
    from lori_manager.adapters.kind import module_of
    from lori_manager.adapters.lori import DTYPES
    from lori_manager.training import fit, steps_for

    base = ws.model(config)
    steps = steps_for(len(rows), config)
    start = None if parent is None else ws.stored(parent)
    phase = f"training {task.name}"
    with (
        head_of(ws, task, base, config, start) as head,
        module_of(config.kind).training(base, config, steps=steps, start=start) as own,
    ):
        training = with_head(own, head, config.head_learning_rate)
        for note in training.notes:
            ws.on_message(note)
        result = fit(
            base,
            training.parameters,
            rows,
            config,
            steps=steps,
            peak=config.learning_rate,
            phase=phase,
            checkpoint=checkpoint,
            on_progress=ws.on_progress,
            soft=soft,
            training=training,
            steps_of=steps_of(ws, base, config, phase),
        )
        heads = all_heads(task, head, start, config)
        weights = replace(training.weights(DTYPES[config.store_dtype]), heads=heads)
    return _Learned(weights, config.kind, result, facts=dict(training.facts))


def _decomposing(ws: Context) -> AbstractContextManager[None]:
    """While it is open, the workspace is told how far singular values are."""
    from lori_manager.adapters.spectra import progress_told

    return progress_told(lambda: counted_progress(ws, "singular values of weights", rate=False))


def _check_kind(config: Config, options: TrainOptions, sequence: str | None) -> None:
    """Refuse what is for LoRI alone, and a start for kinds that begin at the base."""
    if config.kind == LORI:
        return
    given = {
        "--mask": options.mask,
        "--dense": options.dense,
        "--protect": options.protect,
        "--avoid": options.avoid,
        "--allow-foreign-mask": options.allow_foreign_mask,
    }
    for flag, value in given.items():
        if value:
            raise InvalidInput(f"{flag} is for kind `{LORI}`: leave it out with `{config.kind}`")
    if not KINDS[config.kind].continues and (options.start or sequence):
        raise InvalidInput(
            f"a training of kind `{config.kind}` begins at the base: leave --from and --sequence "
            "out"
        )


@contextmanager
def running(ws: Context, plan: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """The run of this plan, open or new, held by this process alone, or by rank 0 for all.

    Raises:
        Conflict: another process holds it.
    """
    run = ws.store.open_run(plan)
    folder = ws.store.runs / run.id
    if not ranks().first:
        yield run.id, folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = held_lock(folder / "lock", "the same training")
    line = None
    finished = False
    try:
        if plan["sequence"] is not None:
            name = plan["sequence"]
            locks = ws.store.root / "locks"
            locks.mkdir(mode=0o700, exist_ok=True)
            line = held_lock(locks / f"{name}.lock", f"sequence {name!r}")
        yield run.id, folder
        finished = True
    except LoriError:
        # A run that was refused before it began leaves nothing to go on with.
        with ranks().apart():
            begun = any(folder.glob("*/step-*")) or ws.store.run_adapters(run.id)
            if not begun:
                ws.store.finish_run(run.id)
                finished = True
        raise
    finally:
        if finished:
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()
        if line is not None:
            line.release()


def abandon(ws: Context, run: str) -> Run:
    """Give up an unfinished training: what is stored stays, its checkpoints in this folder go.

    Args:
        run: its id, or how that begins.
    Raises:
        NotFound: none or several begin so. Conflict: it is at work.
    """
    begin = [r for r in ws.store.open_runs() if run and r.id.startswith(run)]
    if len(begin) != 1:
        known = ", ".join(f"{r.id[:8]} ({' '.join(r.plan.get('tasks', []))})"
                          for r in ws.store.open_runs()) or "none"  # fmt: skip
        raise NotFound(f"no unfinished training is called {run!r}; there are: {known}")
    folder = ws.store.runs / begin[0].id
    lock = held_lock(folder / "lock", "this training") if folder.is_dir() else None
    try:
        ws.store.finish_run(begin[0].id)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        if lock is not None:
            lock.release()
    return begin[0]


def held_lock(path: Path, what: str, patience: float = 0) -> FileLock:
    """A lock held by this process; Conflict where another has it for `patience` seconds more."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=patience)
    except Timeout as e:
        raise Conflict(f"{what} is running in another process; wait for it") from e
    return lock


def _claim_sequence(
    ws: Context, name: str, tasks: Sequence[Task], done: Mapping[int | None, Adapter]
) -> None:
    """Refuse a line that holds stages which this run did not make."""
    refs = [t.ref for t in tasks]
    line = ws.store.add_line(name, sequence=refs)
    if line.versions == len(done):
        return
    held = f"line {name!r} holds {line.versions} stage(s) already"
    if line.versions < len(refs):
        raise Conflict(
            f"{held}, trained with other settings: give the same settings to go on, or "
            "another --sequence name"
        )
    raise Conflict(f"{held}: choose another --sequence name")
