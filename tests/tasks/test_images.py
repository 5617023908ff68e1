import hashlib
import io
import json
import struct
import zlib

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow is missing: install the extra `diffusion`")

from PIL import Image

from lori_manager.errors import BadData, InvalidInput
from lori_manager.tasks.images import (
    MOST_PIXELS,
    load_image,
    picture,
    read_image_folder,
    stored_row,
)
from lori_manager.tasks.rows import Row, rows_from_jsonl, rows_to_jsonl
from lori_manager.tasks.splits import hold_out


def save(path, colour=(200, 10, 10), size=(12, 10), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_header(width, height):
    """A PNG that only says how large it is."""
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"x" * 20)
    written = [
        struct.pack(">I", len(told)) + name + told + struct.pack(">I", zlib.crc32(name + told))
        for name, told in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def captioned(folder, name="a.png", caption="a cat"):
    path = save(folder / name)
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def test_captions_beside_the_images_are_read(tmp_path):
    captioned(tmp_path, "b.png", "  a red\n square ")
    first = captioned(tmp_path, "a.jpg", "a cat")
    found = read_image_folder(tmp_path)
    assert [(r.where, r.caption, r.label) for r in found] == [
        ("a.jpg", "a cat", None), ("b.png", "a red square", None),
    ]  # fmt: skip
    assert found[0].digest == hashlib.sha256(first.read_bytes()).hexdigest()


def test_metadata_names_images_in_folders_too(tmp_path):
    save(tmp_path / "in" / "a.png")
    line = {"file_name": "in/a.png", "text": "one", "artist": "somebody"}
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + json.dumps(line) + "\n\n", "utf-8")
    assert [(r.where, r.caption) for r in read_image_folder(tmp_path)] == [("in/a.png", "one")]


def test_folders_are_labels(tmp_path):
    save(tmp_path / "dog" / "x.png")
    save(tmp_path / "cat" / "y.webp")
    found = read_image_folder(tmp_path, "labels")
    assert [(r.label, r.caption, r.where) for r in found] == [
        ("cat", None, "cat/y.webp"), ("dog", None, "dog/x.png"),
    ]  # fmt: skip
    save(tmp_path / "z.png")
    with pytest.raises(BadData, match=r"z\.png: the image lies in no label's folder"):
        read_image_folder(tmp_path, "labels")


def metadata(folder, *lines):
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def no_caption(folder):
    save(folder / "a.png")


def link(folder):
    outside = save(folder.parent / "outside.png")
    captioned(folder, "b.png")
    (folder / "a.png").symlink_to(outside)


def linked_folder(folder):
    captioned(folder.parent / "elsewhere")
    captioned(folder, "b.png")
    (folder / "in").symlink_to(folder.parent / "elsewhere")


def cut_short(folder):
    path = captioned(folder)
    path.write_bytes(encoded(Image.effect_noise((64, 64), 50))[:-200])


def another_format(folder):
    captioned(folder).write_bytes(encoded(Image.new("RGB", (9, 9)), "GIF"))


def moving(folder):
    frames = [Image.new("RGB", (9, 9), c) for c in ("red", "blue")]
    frames[0].save(captioned(folder), "PNG", save_all=True, append_images=frames[1:])


def bomb(folder):
    captioned(folder).write_bytes(png_header(60_000, 60_000))


def larger_than_allowed(folder):
    captioned(folder).write_bytes(png_header(MOST_PIXELS // 8 + 1, 8))


def too_small(folder):
    save(captioned(folder), size=(4, 400))


def named_twice(folder):
    save(folder / "a.png")
    metadata(folder, *['{"file_name": "a.png", "text": "x"}'] * 2)


def not_named(folder):
    save(folder / "a.png")
    metadata(folder)


def names_what_is_not_there(folder):
    save(folder / "a.png")
    metadata(
        folder, '{"file_name": "a.png", "text": "x"}', '{"file_name": "../b.png", "text": "x"}'
    )


def no_text(folder):
    save(folder / "a.png")
    metadata(folder, '{"file_name": "a.png", "caption": "x"}')


def empty_caption(folder):
    captioned(folder, caption=" \n")


def nothing(folder):
    folder.mkdir(exist_ok=True)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (no_caption, "no caption: neither metadata.jsonl nor a.txt"),
        (link, "a.png: a link"),
        (linked_folder, "in: a link"),
        (cut_short, "a.png: not a whole image"),
        (another_format, "a.png: not a whole image"),
        (moving, "a.png: it has 2 frames"),
        (bomb, "could be decompression bomb"),
        (larger_than_allowed, "a.png: it has 8388609 x 8 pixels"),
        (too_small, "4 x 400 pixels"),
        (named_twice, "named twice"),
        (not_named, "metadata.jsonl does not name it"),
        (names_what_is_not_there, "which is no image of"),
        (no_text, "expected `file_name` and `text`"),
        (empty_caption, "a caption of 0 characters"),
        (nothing, "holds no images"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(tmp_path, make, says):
    folder = tmp_path / "images"
    folder.mkdir()
    make(folder)
    with pytest.raises(BadData) as e:
        read_image_folder(folder)
    assert says in str(e.value)
    assert "\n" not in str(e.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("lori_manager.tasks.images.MOST_BYTES", 10)
    captioned(tmp_path)
    with pytest.raises(BadData, match="at most 10 are taken"):
        read_image_folder(tmp_path)


def test_the_middle_square_is_taken_and_scaled():
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = 255
    loaded = load_image(encoded(Image.fromarray(pixels)), 8)
    assert loaded.shape == (8, 8, 3)
    assert loaded.dtype == np.uint8
    assert (loaded == 255).all()
    assert load_image(encoded(Image.fromarray(pixels)), 32).shape == (32, 32, 3)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_every_mode_becomes_three_channels(mode):
    image = Image.new("RGB", (9, 9), "white")
    image = Image.new(mode, (9, 9), 65535) if mode == "I;16" else image.convert(mode)
    loaded = load_image(encoded(image, "JPEG" if mode == "CMYK" else "PNG"), 9)
    assert loaded.shape == (9, 9, 3)
    assert (loaded >= 250).all()


def test_transparent_parts_are_white_and_a_cameras_turn_is_undone():
    assert (load_image(encoded(Image.new("RGBA", (9, 9), (1, 2, 3, 0))), 9) == 255).all()
    pixels = np.zeros((10, 10, 3), np.uint8)
    pixels[:5] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    loaded = load_image(encoded(Image.fromarray(pixels), exif=exif), 10)
    assert (loaded[:5] == 0).all()


def test_a_picture_is_found_again_by_its_row(tmp_path):
    path = captioned(tmp_path)
    row = rows_from_jsonl(rows_to_jsonl([stored_row(*read_image_folder(tmp_path))]))[0]
    found = picture(row, {hashlib.sha256(path.read_bytes()).hexdigest(): b"content"}.get)
    assert (found.caption, found.read(), found.key) == ("a cat", b"content", row.key)
    with pytest.raises(BadData, match="no image"):
        picture(Row("a cat", ""), {}.get)


def rows_named(names):
    return [Row(f"caption {i}", "", extra={"image": name}) for i, name in enumerate(names)]


def by_image(row):
    return row.extra["image"]


def test_what_is_held_out_does_not_depend_on_the_order_and_copies_stay_together():
    rows = rows_named("abcdefghijaa")
    train, held = hold_out(rows, 0.3, 0, by_image)
    assert len(train) + len(held) == 12
    assert 4 <= len(held) <= 6
    assert {by_image(r) for r in train}.isdisjoint(by_image(r) for r in held)
    again = hold_out(rows[::-1], 0.3, 0, by_image)[1]
    assert {by_image(r) for r in again} == {by_image(r) for r in held}
    assert [r for r in rows if r in held] == held
    others = [{by_image(r) for r in hold_out(rows, 0.3, seed, by_image)[1]} for seed in range(5)]
    assert len({frozenset(o) for o in others}) > 1


def test_one_row_stays_on_each_side():
    train, held = hold_out(rows_named("ab"), 0.99, 0, by_image)
    assert (len(train), len(held)) == (1, 1)
    with pytest.raises(BadData, match="all alike"):
        hold_out(rows_named("aa"), 0.5, 0, by_image)
    with pytest.raises(InvalidInput, match="above 0 and below 1"):
        hold_out(rows_named("ab"), 1.0, 0, by_image)
