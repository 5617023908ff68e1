from __future__ import annotations

import errno
import hashlib
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lori_manager.errors import DamagedObject, StorageFailed
from lori_manager.store.files import MissingObject, ObjectStore, read_texts, write_atomic

CONTENT = b"some weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    (tmp_path / "objects").mkdir(mode=0o700)
    return ObjectStore(tmp_path / "objects")


def everything(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_an_object_is_named_by_the_hash_of_its_content(objects: ObjectStore) -> None:
    assert objects.put(CONTENT) == DIGEST
    assert objects.path(DIGEST) == objects.root / DIGEST[:2] / DIGEST[2:]
    assert objects.get(DIGEST) == CONTENT
    assert objects.exists(DIGEST)
    assert objects.size(DIGEST) == len(CONTENT)
    assert everything(objects.root) == [objects.path(DIGEST)]


def test_empty_content_is_an_object_too(objects: ObjectStore) -> None:
    assert objects.get(objects.put(b"")) == b""


def test_folders_are_for_their_owner_alone(objects: ObjectStore) -> None:
    objects.put(CONTENT)
    assert stat.S_IMODE(objects.path(DIGEST).parent.stat().st_mode) == 0o700


def test_a_file_is_copied_in_and_the_source_stays(objects: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(CONTENT * 200)  # longer than one chunk
    digest = objects.put_file(source)
    assert objects.get(digest) == source.read_bytes()
    assert objects.put_file(source) == digest


def test_a_file_that_changes_while_it_is_read_is_refused(
    objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(CONTENT)
    monkeypatch.setattr(objects, "_kept", lambda *_: source.write_bytes(b"other") == 0)
    with pytest.raises(StorageFailed, match="changed while it was read"):
        objects.put_file(source)
    assert everything(objects.root) == []


def test_digests_are_listed_without_foreign_or_temporary_files(objects: ObjectStore) -> None:
    digests = sorted(objects.put(bytes([i])) for i in range(5))
    (objects.path(digests[0]).parent / ".tmp-1").write_bytes(b"half")
    (objects.path(digests[0]).parent / "notes.txt").write_bytes(b"mine")
    assert list(objects.digests()) == digests
    assert [Path(place).name for place in objects.leftovers()] == [".tmp-1"]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "append"])
def test_damage_is_found_on_reading_and_healed_by_putting_again(
    objects: ObjectStore, damage: str
) -> None:
    path = objects.path(objects.put(CONTENT))
    altered = bytearray(CONTENT)
    altered[5000] ^= 1
    path.write_bytes(
        {"flip": bytes(altered), "cut": CONTENT[:-1], "empty": b"", "append": CONTENT + b"x"}[
            damage
        ]
    )
    for read in (objects.get, objects.check):
        with pytest.raises(DamagedObject, match=f"{DIGEST} is cut short or altered"):
            read(DIGEST)
    assert objects.put(CONTENT) == DIGEST
    assert objects.get(DIGEST) == CONTENT
    objects.check(DIGEST)


def test_a_missing_object_is_told_with_its_digest(objects: ObjectStore) -> None:
    for read in (objects.get, objects.check, objects.size):
        with pytest.raises(MissingObject, match=f"{DIGEST} is missing"):
            read(DIGEST)
    assert not objects.exists(DIGEST)


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_what_is_no_digest_never_becomes_a_path(objects: ObjectStore, digest: str) -> None:
    with pytest.raises(DamagedObject, match="no SHA-256"):
        objects.get(digest)


def test_an_object_already_there_is_not_written_again(objects: ObjectStore) -> None:
    path = objects.path(objects.put(CONTENT))
    before = path.stat()
    objects.put(CONTENT)
    assert path.stat().st_ino == before.st_ino


def test_the_file_is_synced_before_and_the_folders_after_the_rename(
    objects: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watch_fsync(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        seen.append("file" if path.is_file() else f"folder {path.name}")
        fsync(fd)

    def watch_replace(self: Path, target: Path) -> Path:
        seen.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(Path, "replace", watch_replace)
    objects.put(CONTENT)
    end = ["file", "rename", f"folder {DIGEST[:2]}", "folder objects"]
    assert seen == ["folder objects", *end]
    seen.clear()
    objects.put(CONTENT)  # whoever wrote it may have been killed before these two
    assert seen == end[2:]


def test_write_atomic_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert everything(tmp_path) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EROFS, "check permissions and the mount"),
        (errno.EACCES, "check permissions and the mount"),
        (errno.EIO, "check the disk"),
    ],
)
def test_a_refusing_disk_leaves_the_old_file_whole_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, advice: str
) -> None:
    path = tmp_path / "checkpoint"
    write_atomic(path, b"old")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr(os, "fsync", refuse)
        elif call == "replace":
            patch.setattr(Path, "replace", refuse)
        else:
            patch.setattr(Path, "open", refuse)
        with pytest.raises(StorageFailed, match=advice) as caught:
            write_atomic(path, b"new")
    assert isinstance(caught.value.__cause__, OSError)
    assert path.read_bytes() == b"old"
    assert everything(tmp_path) == [path]


def test_an_interrupt_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(tmp_path / "checkpoint", b"new")
    assert everything(tmp_path) == []


def test_a_real_limit_on_file_size_is_a_storage_failure(tmp_path: Path) -> None:
    """The kernel refuses the write half way, as a full disk does."""
    script = (
        "import sys; from pathlib import Path\n"
        "from lori_manager.store.files import write_atomic\n"
        "from lori_manager.errors import StorageFailed\n"
        "try: write_atomic(Path(sys.argv[1]), bytes(200_000))\n"
        "except StorageFailed: sys.exit(9)\n"
    )
    path = tmp_path / "checkpoint"
    write_atomic(path, b"old")
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 9
    assert path.read_bytes() == b"old"
    assert everything(tmp_path) == [path]


def test_texts_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    path.write_text('{"a": "1", "b": "\u00e9", "c": 3}')
    assert read_texts(path, "b", "a", advice="") == ("\u00e9", "1")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b'{"a": "1"}', b'{"a": "1", "b": 2}', b"\xff", b"[" * 100_000],
    ids=["empty", "half", "list", "number", "lacking", "no text", "no UTF-8", "deep"],
)
def test_a_damaged_file_of_texts_is_told_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "note.json"
    path.write_bytes(content)
    with pytest.raises(DamagedObject) as caught:
        read_texts(path, "a", "b", advice="write it anew")
    assert str(caught.value) == f"{path} is damaged: write it anew"


def test_a_file_of_texts_that_cannot_be_read_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="cannot be written or read"):
        read_texts(tmp_path, "a", advice="")
