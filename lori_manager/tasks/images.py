"""Image folders -> checked rows, and stored images -> arrays.

A folder holds images with captions (`metadata.jsonl` of `file_name` and `text`, as Hugging
Face's imagefolder has it, or `NAME.txt` beside `NAME.png`), or a folder a label
(`LABEL/NAME.png`). Nothing in it is trusted: what is no regular file inside the folder, no
picture of a known format, or too large, is refused before it is decoded.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lori_manager.errors import BadData
from lori_manager.extras import load_extra
from lori_manager.pipelines import EXTRA
from lori_manager.tasks.labelled import label_of
from lori_manager.tasks.rows import Row, bad_row, decode_object, shorten

if TYPE_CHECKING:
    import numpy as np

METADATA = "metadata.jsonl"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
FORMATS = ("PNG", "JPEG", "WEBP")
MOST_BYTES = 64 * 1024**2  # of a file
MOST_PIXELS = 64 * 1024**2  # of an image: 192 MiB of memory
SMALLEST = 8  # pixels of a side
LONGEST_CAPTION = 10_000  # characters


@dataclass(frozen=True)
class ImageRow:
    """One image of a folder, checked.

    Attributes:
        path: the file.
        digest: SHA-256 of its bytes, by which it will be stored.
        caption: what it shows, None where the folder has labels.
        label: the folder that it lies in, None where it has captions.
        where: for messages: the file's path inside the folder.
    """

    path: Path
    digest: str
    caption: str | None
    label: str | None
    where: str


@dataclass(frozen=True)
class Picture:
    """A stored image with its caption, as training and scoring take it.

    Attributes:
        key: the row's, by which its noise is drawn.
        digest: of the image.
        read: gives the image's bytes.
        length: one, as a row of text has its tokens.
    """

    key: bytes
    digest: str
    caption: str
    read: Callable[[], bytes] = field(compare=False, repr=False)
    length: ClassVar[int] = 1


def stored_row(found: ImageRow) -> Row:
    """A captioned image as a task's row: its caption, and its digest as the field `image`."""
    return Row(found.caption or "", "", extra={"image": found.digest}, where=found.where)


def labelled_row(found: ImageRow) -> Row:
    """A labelled image as a task's row: the file's name, the label, the image's digest."""
    return Row(found.where, found.label or "", extra={"image": found.digest}, where=found.where)


def picture(row: Row, get: Callable[[str], bytes]) -> Picture:
    """A task's row as a picture.

    Args:
        get: digest -> the stored bytes.
    Raises:
        BadData: the row holds no image.
    """
    digest = row.extra.get("image")
    if not isinstance(digest, str):
        raise bad_row(row.where or "a row", "no image", "restore the file")
    return Picture(row.key, digest, row.prompt, lambda: get(digest))


def read_image_folder(
    folder: Path, kind: Literal["captions", "labels"] = "captions"
) -> list[ImageRow]:
    """All images of a folder in the order of their names, each with its caption or label.

    Args:
        folder: of images.
        kind: whether captions are looked for, or labels: those of `metadata.jsonl`, or without
            one the names of the folders.
    Raises:
        BadData: no such folder, no images, an image without caption or label, one that cannot
            be decoded or is too large, a link. Names the file.
    """
    if not folder.is_dir():
        raise BadData(f"{folder} is no folder: give one of images")
    if kind == "labels":
        named = _labels(folder)
        found = [ImageRow(p, _checked(p, w), None, named[w], w) for p, w in _files(folder)]
    else:
        captions = _captions(folder)
        found = [ImageRow(p, _checked(p, w), captions[w], None, w) for p, w in _files(folder)]
    if not found:
        raise BadData(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
    return found


def load_image(content: bytes, size: int) -> np.ndarray:
    """An image's middle square, scaled.

    Transparent parts are put on white, a camera's turn is undone.

    Args:
        content: a stored image's bytes.
        size: height and width wanted, pixels.
    Returns:
        uint8 (size, size, 3), red, green and blue.
    Raises:
        BadData: not an image of a known format, or too large.
    """
    import numpy as np

    image = _decoded(content, "a stored image")
    from PIL import Image, ImageOps

    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    fitted = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(fitted, np.uint8)


def _checked(path: Path, where: str) -> str:
    """The digest of an image file that can be used."""
    if (size := path.stat().st_size) > MOST_BYTES:
        raise bad_row(where, f"the file has {size:,} bytes", f"at most {MOST_BYTES:,} are taken")
    content = path.read_bytes()
    _decoded(content, where)
    return hashlib.sha256(content).hexdigest()


def _decoded(content: bytes, where: str) -> Any:
    """The image, decoded whole; its size is looked at first."""
    Image: Any = load_extra("PIL.Image", EXTRA, "reading images")
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's on sizes that are allowed here
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            width, height = image.size
            fits = min(width, height) >= SMALLEST and width * height <= MOST_PIXELS
            frames = getattr(image, "n_frames", 1)
            if fits and frames == 1:
                image.load()
                image = ImageOps.exif_transpose(image)
    except Exception as e:  # decoders raise whatever a broken file makes them
        known = ", ".join(FORMATS)
        raise bad_row(where, f"not a whole image ({e})", f"save it anew as {known}") from e
    if not fits:
        wanted = f"sides of {SMALLEST} pixels or more, at most {MOST_PIXELS:,} pixels in all"
        raise bad_row(where, f"it has {width} x {height} pixels", f"scale it: {wanted}")
    if frames > 1:
        raise bad_row(where, f"it has {frames} frames", "keep one of them")
    return image


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Images in the folder and those below it, with their paths inside it."""
    for path in sorted(folder.rglob("*")):
        where = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in PurePosixPath(where).parts):
            continue
        if path.is_symlink():
            raise bad_row(where, "a link", "put the file itself there: links are not followed")
        if path.suffix.lower() in SUFFIXES and path.is_file():
            yield path, where


def _labels(folder: Path) -> dict[str, str]:
    """Path inside the folder -> label, of all its images and of nothing else."""
    metadata = folder / METADATA
    if metadata.is_file():
        return _named(folder, metadata, _metadata(metadata, "label", label_of))
    found = {}
    for _, where in _files(folder):
        if len(PurePosixPath(where).parts) != 2:
            raise bad_row(
                where,
                "the image lies in no label's folder",
                f"expected LABEL/NAME.png, or {METADATA} with `file_name` and `label`",
            )
        found[where] = label_of(PurePosixPath(where).parts[0], where)
    return found


def _named(folder: Path, metadata: Path, told: dict[str, str]) -> dict[str, str]:
    """What the metadata tells of each image; BadData where it and the folder differ."""
    found = {}
    for _, where in _files(folder):
        if where not in told:
            raise bad_row(where, f"{METADATA} does not name it", "name it or take it away")
        found[where] = told[where]
    if lost := sorted(told.keys() - found.keys()):
        raise BadData(f"{metadata} names {shorten(lost[0])}, which is no image of {folder}")
    return found


def _captions(folder: Path) -> dict[str, str]:
    """Path inside the folder -> caption, of all its images and of nothing else."""
    metadata = folder / METADATA
    if metadata.is_file():
        return _named(folder, metadata, _metadata(metadata, "text", _caption))
    found = {}
    for path, where in _files(folder):
        beside = path.with_suffix(".txt")
        if beside.is_symlink() or not beside.is_file():
            problem = f"no caption: neither {METADATA} nor {beside.name} beside it"
            raise bad_row(where, problem, "write one, or take the image away")
        name = beside.relative_to(folder).as_posix()
        if beside.stat().st_size > 4 * LONGEST_CAPTION:
            raise bad_row(name, "too long for a caption", f"write at most {LONGEST_CAPTION:,}")
        try:
            found[where] = _caption(beside.read_text("utf-8-sig"), name)
        except UnicodeDecodeError as e:
            raise bad_row(name, "not UTF-8", "save it as UTF-8") from e
    return found


def _metadata(path: Path, field: str, read: Callable[[Any, str], str]) -> dict[str, str]:
    """`file_name` -> what `read(value, where)` makes of the field, of every line."""
    found: dict[str, str] = {}
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as e:
        raise BadData(f"cannot read {path} as UTF-8 text: {e}") from e
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{METADATA}, line {number}"
        told = decode_object(line, where)
        name = told.get("file_name")
        if not isinstance(name, str):
            raise bad_row(where, f"expected `file_name` and `{field}`", "mend the line")
        name = PurePosixPath(name).as_posix()
        if name in found:
            raise bad_row(where, f"{shorten(name)} is named twice", "keep one line")
        found[name] = read(told.get(field), where)
    return found


def _caption(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise bad_row(where, "expected `file_name` and `text`, both text", "mend the line")
    caption = " ".join(text.split())
    if not caption or len(caption) > LONGEST_CAPTION:
        wanted = f"1 to {LONGEST_CAPTION:,} characters"
        raise bad_row(where, f"a caption of {len(caption):,} characters", f"write {wanted}")
    return caption
