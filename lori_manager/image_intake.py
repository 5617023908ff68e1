"""A folder of images with captions -> a task of frozen rows and stored images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
) -> AddedTask:
    """Read, check and freeze a folder of images with their captions.

    The images are stored by their digest, so that later changes of the folder change nothing;
    rows are captions and digests. The same images and captions again change nothing, others
    make a new revision.

    Args:
        images: see `tasks.images.read_image_folder`.
        eval_images: a folder to score on; without it a share of `images` is held out.
        eval_share: of that; `EVAL_SHARE` where None.
        seed: of the draw of what is held out; the workspace's where None.
    Raises:
        BadData: images that cannot be used, or one that is learned and scored. Nothing is
            stored then. InvalidInput: the base is a language model, or the name.
    """
    from lori_manager.tasks.images import read_image_folder, stored_row
    from lori_manager.tasks.rows import rows_to_jsonl
    from lori_manager.tasks.scorers import NOISE_LOSS, NoiseLoss
    from lori_manager.tasks.splits import hold_out

    check_name(name, "task")
    if not ws.makes_images:
        raise InvalidInput(
            "a task of images needs a diffusion pipeline as the base, and this one is a language "
            "model: make a workspace with `lori init --base PIPELINE_FOLDER`"
        )
    if eval_images is not None and eval_share is not None:
        raise InvalidInput("a folder of eval images leaves nothing to hold out: leave the eval "
                           "share out")  # fmt: skip
    NoiseLoss().ready(run_code=False)
    seed = ws.settings.config.seed if seed is None else seed
    share = EVAL_SHARE if eval_share is None else eval_share
    found = read_image_folder(Path(images))
    told: dict[str, Any] = {"folder": str(images)}
    if eval_images is None:
        train, held = hold_out([stored_row(f) for f in found], share, seed, _image)
        told |= {"eval_share": share, "seed": seed}
    else:
        scored = read_image_folder(Path(eval_images))
        train, held = [stored_row(f) for f in found], [stored_row(f) for f in scored]
        _check_apart(train, held)
        found += scored
        told |= {"eval_folder": str(eval_images)}
    for image in found:
        if ws.store.objects.put(image.path.read_bytes()) != image.digest:
            raise BadData(f"{image.path} changed while it was read: run it again")
    splits = {
        split: Split(ws.store.objects.put(rows_to_jsonl(rows)), len(rows))
        for split, rows in (("train", train), ("eval", held))
    }
    known = {t.ref for t in ws.store.tasks()}
    task = ws.store.add_task(
        name,
        scorer=NOISE_LOSS,
        scorer_version=str(NoiseLoss.version),
        description=description or "",
        splits=splits,
        options={"images": told},
    )
    return AddedTask(task, _notes(train + held), {}, task.ref not in known)


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
