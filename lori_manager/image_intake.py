"""A folder of images with captions or labels -> a task of frozen rows and stored images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lori_manager.architectures import IMAGE_ENCODER
from lori_manager.context import Context
from lori_manager.errors import BadData, InvalidInput
from lori_manager.intake import AddedTask
from lori_manager.records import Split
from lori_manager.refs import check_name

if TYPE_CHECKING:
    from lori_manager.tasks.rows import Row

EVAL_SHARE = 0.2


def add_image_task(
    ws: Context,
    name: str,
    images: str | Path,
    *,
    eval_images: str | Path | None = None,
    eval_share: float | None = None,
    seed: int | None = None,
    description: str | None = None,
    scorer: str | None = None,
    probe_rows: int | None = None,
) -> AddedTask:
    """Read, check and freeze a folder of images with their captions, or with labels.

    Captions are for a diffusion pipeline, labels for an image encoder. The images are stored
    by their digest, so that later changes of the folder change nothing; rows are captions or
    labels, and digests. The same again changes nothing, others make a new revision.

    Args:
        images: see `tasks.images.read_image_folder`.
        eval_images: a folder to score on; without it a share of `images` is held out.
        eval_share: of that, of each label; `EVAL_SHARE` where None.
        seed: of the draw of what is held out; the workspace's where None.
        scorer: of labels. probe_rows: labelled images set aside for merging, see `make_splits`.
    Raises:
        BadData: images that cannot be used, or one that is learned and scored. Nothing is
            stored then. InvalidInput: the base is a language model, or the name.
    """
    from lori_manager.tasks.images import labelled_row, read_image_folder, stored_row
    from lori_manager.tasks.labelled import labels_of
    from lori_manager.tasks.rows import rows_to_jsonl
    from lori_manager.tasks.splits import hold_out, make_splits

    check_name(name, "task")
    labelled = ws.architecture == IMAGE_ENCODER
    if not (labelled or ws.makes_images):
        raise InvalidInput(
            "a task of images needs a diffusion pipeline or an image encoder as the base, and "
            f"this one is a {ws.architecture.title}: make another workspace for such a base"
        )
    if not labelled and (scorer is not None or probe_rows is not None):
        raise InvalidInput("images with captions are scored by the noise they are found in: leave "
                           "--scorer and --probe-rows out")  # fmt: skip
    if eval_images is not None and eval_share is not None:
        raise InvalidInput("a folder of eval images leaves nothing to hold out: leave the eval "
                           "share out")  # fmt: skip
    name_of_scorer, version = _scorer(ws, scorer) if labelled else _noise()
    row_of = labelled_row if labelled else stored_row
    kind: Literal["labels", "captions"] = "labels" if labelled else "captions"
    seed = ws.settings.config.seed if seed is None else seed
    share = EVAL_SHARE if eval_share is None else eval_share
    found = read_image_folder(Path(images), kind)
    told: dict[str, Any] = {"folder": str(images)}
    if eval_images is None:
        hold = _hold_out_by_label if labelled else hold_out
        train, held = hold([row_of(f) for f in found], share, seed, _image)
        told |= {"eval_share": share, "seed": seed}
    else:
        scored = read_image_folder(Path(eval_images), kind)
        train, held = [row_of(f) for f in found], [row_of(f) for f in scored]
        found += scored
        told |= {"eval_folder": str(eval_images)}
    _check_apart(train, held)
    sets, notes = {"train": train, "eval": held}, _notes(train + held)
    options: dict[str, Any] = {"images": told}
    if labelled:
        count = 256 if probe_rows is None else probe_rows
        prepared = make_splits(train, held, probe_rows=count, asked=_image)
        sets, notes = prepared.splits, tuple(prepared.notes)
        options |= {"labels": labels_of(sets), "probe_rows": count}
    for image in found:
        if ws.store.objects.put(image.path.read_bytes()) != image.digest:
            raise BadData(f"{image.path} changed while it was read: run it again")
    splits = {
        split: Split(ws.store.objects.put(rows_to_jsonl(rows)), len(rows))
        for split, rows in sets.items()
    }
    known = {t.ref for t in ws.store.tasks()}
    task = ws.store.add_task(
        name,
        scorer=name_of_scorer,
        scorer_version=version,
        description=description or "",
        splits=splits,
        options=options,
    )
    return AddedTask(task, notes, {}, task.ref not in known)


def _noise() -> tuple[str, str]:
    """The scorer of images with captions."""
    from lori_manager.tasks.scorers import NOISE_LOSS, NoiseLoss

    NoiseLoss().ready(run_code=False)
    return NOISE_LOSS, str(NoiseLoss.version)


def _scorer(ws: Context, name: str | None) -> tuple[str, str]:
    """The scorer of images with labels."""
    from lori_manager.tasks.choosing import find_scorer

    name = name or "label_accuracy"
    found = find_scorer(name, ws.settings.scorers, ws.root)
    if found.reads != "labels":
        raise InvalidInput(
            f"scorer `{name}` reads {found.reads}, which an image encoder does not answer with: "
            "use `--scorer label_accuracy`"
        )
    return name, str(found.version)


def _hold_out_by_label(
    rows: Sequence[Row], share: float, seed: int, alike: Callable[[Row], str]
) -> tuple[list[Row], list[Row]]:
    """`hold_out` in each label; of one that has a single image, that is learned."""
    from lori_manager.tasks.splits import hold_out

    held: set[bytes] = set()
    for label in sorted({row.completion for row in rows}):
        own = [row for row in rows if row.completion == label]
        if len({alike(row) for row in own}) > 1:
            held |= {row.key for row in hold_out(own, share, seed, alike)[1]}
    return [r for r in rows if r.key not in held], [r for r in rows if r.key in held]


def _image(row: Row) -> str:
    return str(row.extra["image"])


def _check_apart(train: list[Row], held: list[Row]) -> None:
    learned = {_image(row): row for row in train}
    for row in held:
        if (other := learned.get(_image(row))) is not None:
            raise BadData(
                f"{row.where} of the eval images is {other.where} of the others: what is learned "
                "must not be scored; remove one"
            )


def _notes(rows: list[Row]) -> tuple[str, ...]:
    copies = len(rows) - len({_image(row) for row in rows})
    return (f"{copies} of {len(rows)} images are copies of others; kept",) if copies else ()
