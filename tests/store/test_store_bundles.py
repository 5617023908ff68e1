"""Bundles: the same bytes each time, whole, and nothing but what lori writes is read."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import store_builders as build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_store_moving import contents, empty

from lori_manager.errors import Conflict, DamagedObject, LoriError, NotFound, StorageFailed
from lori_manager.records import Split
from lori_manager.refs import AdapterRef, parse_adapter_ref
from lori_manager.store import bundles, outcomes
from lori_manager.store.bundles import Bundle
from lori_manager.store.moving import Moved, StoreSource, move
from lori_manager.store.store import Store

SOAK = os.environ.get("LORI_SOAK") == "1"


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Store]:
    with empty(tmp_path / "full") as store:
        fill(store)
        yield store


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Store]:
    with empty(tmp_path / "target") as store:
        yield store


def fill(store: Store) -> None:
    safety = build.add_task(store, "safety", rows=30)
    wiki = build.add_task(store, "wiki", rows=9)
    mask = store.add_mask(
        task=safety, blob=b"mask", projection="a" * 64, sparsity=0.9, scope="model", kept=1,
        total=10, config={"seed": 1},
    )  # fmt: skip
    run = store.open_run({"tasks": ["safety#1"]})
    first = store.add_adapter(
        build.new_adapter("safety", task="safety", task_revision=1, mask=mask.ref, run=run.id,
                          stage=0), b"first",
    )  # fmt: skip
    second = store.add_adapter(build.new_adapter("wiki"), b"second" * 200)
    merge = store.add_adapter(
        build.new_adapter("main", origin="merged", facts={"loss": float("inf")},
                          parents=build.parents(first, second, weights=[0.25, 0.75])), b"merge",
    )  # fmt: skip
    store.add_adapter(build.new_adapter("main"), b"scrap")
    store.remove([AdapterRef("main", "2")], reason="a mistake")
    rng = np.random.default_rng(0)
    for adapter in (first, second, merge):
        right = (rng.random(30) < 0.7).astype(np.float32)
        right[3] = np.nan
        store.add_score(build.new_score(adapter.ref, adapter.digest, safety), right)
        losses, tokens = rng.gamma(2, 1, 9), rng.integers(1, 20, 9)
        store.add_score(build.new_score(adapter.ref, adapter.digest, wiki, value=float("nan")),
                        losses.astype(np.float32), tokens.astype(np.float32))  # fmt: skip
    store.set_alias("main", "production", 1)


def pack(store: Store, path: Path, *refs: str) -> Path:
    source = StoreSource(store, "full")
    asked = [ref for ref in map(parse_adapter_ref, refs) if ref is not None]
    bundles.write(path, source, source.parcel(asked or None))
    return path


def take(path: Path, target: Store, *refs: str, aliases: bool = False) -> Moved:
    asked = [ref for ref in map(parse_adapter_ref, refs) if ref is not None]
    with Bundle(path) as bundle:
        parcel = bundle.parcel(asked or None)
        return move(bundle, parcel, target, check=lambda *_: None, aliases=aliases)


def test_a_bundle_brings_what_the_store_would(full: Store, tmp_path: Path) -> None:
    path = pack(full, tmp_path / "b.tar")
    with empty(tmp_path / "target") as target:
        moved = take(path, target, aliases=True)
        found, expected = contents(target), contents(full)
        assert moved.adapters == ("safety@1", "wiki@1", "main@1")
        assert moved.aliases == ("main@production",)
        assert target.adapter(AdapterRef("main", "1")).facts == {"loss": None}  # JSON has no inf
        for name in ("tasks", "masks", "lines", "content", "keys"):
            assert found[name] == expected[name]
        assert repr(found["scores"]) == repr(expected["scores"])  # NaN is not itself
        assert list(target.verify()) == []
        assert take(path, target) == Moved(known=3)


def test_the_same_content_is_the_same_bytes(full: Store, tmp_path: Path) -> None:
    first = pack(full, tmp_path / "1").read_bytes()
    time.sleep(0.01)
    assert pack(full, tmp_path / "2").read_bytes() == first


def test_any_tool_lists_it(full: Store, tmp_path: Path) -> None:
    path = pack(full, tmp_path / "b.tar")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    assert bundles.MANIFEST.fullmatch(members[0].name)
    assert all(m.isreg() and m.mtime == 0 and m.uid == 0 and m.mode == 0o644 for m in members)
    listed = subprocess.run(["tar", "tf", str(path)], capture_output=True, text=True, check=True)
    assert listed.stdout.splitlines() == [m.name for m in members]
    assert listed.stderr == ""


def test_it_tells_nothing_of_the_machine(full: Store, tmp_path: Path) -> None:
    full.move_base(path="/home/somebody/tiny", source="hub/tiny")
    assert b"somebody" not in pack(full, tmp_path / "b.tar").read_bytes()


def test_a_file_that_is_there_is_left(full: Store, tmp_path: Path) -> None:
    path = tmp_path / "b.tar"
    path.write_text("mine")
    with pytest.raises(Conflict, match="is there already"):
        pack(full, path)
    assert path.read_text() == "mine"


def test_interrupted_nothing_is_left(
    full: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(StorageFailed, match="no space left"):
        pack(full, tmp_path / "b.tar")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_versions_are_chosen_out_of_a_bundle(full: Store, tmp_path: Path) -> None:
    path = pack(full, tmp_path / "b.tar")
    with empty(tmp_path / "target") as target:
        assert take(path, target, "wiki").adapters == ("wiki@1",)
        assert [t.name for t in target.tasks()] == ["safety", "wiki"]  # it is scored on both
        assert take(path, target, "main@production").adapters == ("safety@1", "main@1")
        for ref in ("main@2", "main@3", "nobody@1", "main@champion"):
            with pytest.raises(NotFound, match=f"holds no {ref}.*main@1"):
                take(path, target, ref)


def test_a_bundle_of_one_version_holds_what_it_needs_alone(full: Store, tmp_path: Path) -> None:
    with Bundle(pack(full, tmp_path / "b.tar", "safety@1")) as bundle:
        parcel = bundle.parcel()
    assert [a.ref for a in parcel.adapters] == ["safety@1"]
    assert parcel.asked == {"safety@1"}


def with_images(store: Store) -> list[str]:
    """A task whose rows name images, and an adapter of it."""
    found = [store.objects.put(b"image %d" % i) for i in range(3)]
    rows = b"".join(
        json.dumps({"completion": "", "image": image, "prompt": "x"}).encode() + b"\n"
        for image in found
    )
    split = Split(store.objects.put(rows), 3)
    store.add_task(
        "watercolour", scorer="noise_loss", scorer_version="1", description="",
        splits={"eval": split, "train": split}, options={"images": {}},
    )  # fmt: skip
    store.add_adapter(build.new_adapter("watercolour", task="watercolour", task_revision=1), b"w")
    return found


@pytest.mark.parametrize("by", ["store", "bundle"])
def test_images_come_with_the_rows_that_name_them(
    full: Store, target: Store, tmp_path: Path, by: str
) -> None:
    found = with_images(full)
    seen = []
    if by == "bundle":
        path = pack(full, tmp_path / "b.tar", "watercolour")
        with Bundle(path) as bundle:
            move(bundle, bundle.parcel(), target, check=lambda file, _: seen.append(file))
    else:
        source = StoreSource(full, "full")
        parcel = source.parcel([AdapterRef("watercolour", "1")])
        move(source, parcel, target, check=lambda file, _: seen.append(file))
    assert [target.objects.get(digest) for digest in found] == [b"image 0", b"image 1", b"image 2"]
    assert {file.digest for file in seen if file.kind == "image"} == set(found)
    assert list(target.verify()) == []
    list(target.collect(grace=timedelta(0)))
    assert list(target.verify()) == []


def test_a_bundle_without_an_image_that_its_rows_name_is_refused(
    full: Store, target: Store, tmp_path: Path
) -> None:
    gone = with_images(full)[1]

    def change(manifest: dict[str, Any], _: dict[str, bytes]) -> None:
        manifest["files"] = [entry for entry in manifest["files"] if entry[0] != gone]

    path = rebuilt(pack(full, tmp_path / "b.tar", "watercolour"), change)
    refused(path, target, f"the file {gone} is missing")


@pytest.mark.parametrize(
    "rows", [b"[]\n", b"x\n", b"{}\n", b'{"image": 7}\n', b'{"image": "../x"}\n']
)
def test_rows_that_name_no_images_are_refused(
    full: Store, target: Store, tmp_path: Path, rows: bytes
) -> None:
    with_images(full)
    path = pack(full, tmp_path / "b.tar", "watercolour")

    def change(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        digest = hashlib.sha256(rows).hexdigest()
        files[digest] = rows
        manifest["files"] = sorted([*manifest["files"], [digest, len(rows)]])
        (task,) = manifest["parcel"]["tasks"]
        task["splits"] = {"eval": task["splits"]["eval"] | {"digest": digest, "rows": 1}}

    refused(rebuilt(path, change), target)


# hostile files


def rebuilt(path: Path, change: Callable[[dict[str, Any], dict[str, bytes]], Any]) -> Path:
    """The bundle as somebody would write it who knows the format, with another manifest."""
    with tarfile.open(path) as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
    manifest = json.loads(members.pop(next(iter(members))))
    files = {name.replace("/", ""): content for name, content in members.items()}
    change(manifest, files)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    out = b"".join(bundles._member(bundles.manifest_name(text), text))
    for digest, _ in manifest["files"] if isinstance(manifest.get("files"), list) else []:
        out += b"".join(bundles._member(f"{digest[:2]}/{digest[2:]}", files[digest]))
    path.write_bytes(out + bundles._END)
    return path


def refused(path: Path, target: Store, told: str | None = None) -> None:
    start = time.monotonic()
    with pytest.raises(DamagedObject, match=told) as caught:
        take(path, target)
    assert time.monotonic() - start < 1
    assert "\n" not in str(caught.value)
    assert target.adapters() == []
    assert [f for f in target.verify() if f.kind != "orphan"] == []


def edit(path: str, value: Any) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    """Set one place of the manifest: `parcel.adapters.0.line`."""

    def change(manifest: dict[str, Any], _: dict[str, bytes]) -> None:
        *where, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        inner: Any = manifest
        for part in where:
            inner = inner[part]
        inner[last] = value

    return change


DEEP: Any = {"a": 1}
for _ in range(60):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("format", "zip", "manifest is none"),
        ("version", 2, "it has version 2"),
        ("extra", 1, "must have exactly"),
        ("files", [["../../etc/passwd", 3]], "no SHA-256"),
        ("files", [["a" * 64, -1]], "by digest and size"),
        ("files", [["a" * 64, True]], "by digest and size"),
        ("files", {}, "lacks a list"),
        ("parcel", [], "must have exactly"),
        ("parcel.adapters.0.line", "../x", "not usable"),
        ("parcel.adapters.0.line", "nobody", "has no line"),
        ("parcel.adapters.0.version", 0, "has no line"),
        ("parcel.adapters.0.version", -1, "negative"),
        ("parcel.adapters.0.version", "1", "cannot be"),
        ("parcel.adapters.0.version", 2**63, "too large"),
        ("parcel.adapters.0.digest", "A" * 64, "no SHA-256"),
        ("parcel.adapters.0.digest", "a" * 64, "another size"),
        ("parcel.adapters.0.bytes", 4, "another size"),
        ("parcel.adapters.0.base", "e" * 64, "of another base"),
        ("parcel.adapters.0.mask", "safety%9", "mask of safety@1 is missing"),
        ("parcel.adapters.0.mask", "x", "not a mask"),
        ("parcel.adapters.0.task_revision", 7, "task of safety@1 is missing"),
        ("parcel.adapters.0.task_revision", None, "task of safety@1 is missing"),
        ("parcel.adapters.0.run", "b" * 32, "run of safety@1 is missing"),
        ("parcel.adapters.0.stage", None, "run of safety@1 is missing"),
        ("parcel.adapters.0.created_at", "yesterday", "is no time"),
        ("parcel.adapters.0.created_at", "2026-01-01T00:00:00", "without a zone"),
        ("parcel.scores.0.created_at", "9999-12-31T23:59:59-12:00", "no time that there is"),
        ("parcel.lines.0.created_at", "0001-01-01T00:00:00+14:00", "no time that there is"),
        ("parcel.scores.0.error", 10**400, "too large"),
        ("parcel.scores.0.rows", 2**62, "where there are"),
        ("parcel.adapters.0.config", [], "no object"),
        ("parcel.adapters.0.config", DEEP, "nested deeper"),
        ("parcel.adapters.0.more", 1, "must have exactly"),
        ("parcel.adapters.2.parents.0.digest", "b" * 64, "is missing or comes later"),
        ("parcel.adapters.2.parents.0.ref", "safety", "no version"),
        ("parcel.adapters.2.parents.0.ref", "main@1", "is missing or comes later"),
        ("parcel.adapters.2.parents.0.weight", "x", "cannot be"),
        ("parcel.adapters.3.version", 1, "stands there twice"),
        ("parcel.tasks.0.splits", {}, "no such rows"),
        ("parcel.tasks.0.name", "base", "reserved"),
        ("parcel.tasks.0.splits.eval.rows", 31, "another number of eval rows"),
        ("parcel.tasks.0.splits.eval.rows", 2**40, "another number of eval rows"),
        ("parcel.tasks.1.splits.eval.rows", 2**40, "another number of eval rows"),
        ("parcel.masks.0.kept", 11, "no mask"),
        ("parcel.lines.0.name", "wiki", "twice"),
        ("parcel.scores.0.digest", "c" * 64, "missing or of other weights"),
        ("parcel.scores.0.subject", "main@2", "missing or of other weights"),
        ("parcel.scores.0.task_revision", 3, "which is missing"),
        ("parcel.scores.0.value", "high", "cannot be"),
        ("parcel.aliases.0.version", 2, "points nowhere"),
        ("parcel.asked", ["x@1"], "asked for is missing"),
        ("parcel.asked", "x", "no list"),
        ("outcomes", [], "another number of scores"),
        ("outcomes.0", ["d" * 64, None], "digests of its files"),
        ("outcomes.0", None, "digests of its files"),
    ],
)  # fmt: skip
def test_a_manifest_that_says_what_cannot_be_is_refused(
    full: Store, target: Store, tmp_path: Path, place: str, value: Any, told: str
) -> None:
    path = pack(full, tmp_path / "b.tar")

    def change(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        edit(place, value)(manifest, files)
        for digest, _ in manifest["files"] if isinstance(manifest["files"], list) else []:
            files.setdefault(digest, b"")

    refused(rebuilt(path, change), target, told)


def swap_first_outcomes(content: bytes) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    def change(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        digest = hashlib.sha256(content).hexdigest()
        files[digest] = content
        manifest["files"] = sorted([*manifest["files"], [digest, len(content)]])
        manifest["outcomes"][0][0] = digest

    return change


@pytest.mark.parametrize(
    "content",
    [
        b"\x01", b"\x07junk", bytes([outcomes.RAW]) + b"\xff" * 3, bytes([outcomes.ONES, 31]),
        bytes([outcomes.FLIPS, 1, 255]), bytes([outcomes.RAW | outcomes.GAPS]),
        bytes([outcomes.ONES]) + b"\xff" * 200,
        outcomes.encode_floats(np.zeros(10**7, np.float32)),  # a bomb: 40 MB in 39 kB
    ],
)  # fmt: skip
def test_outcomes_that_are_none_are_refused(
    full: Store, target: Store, tmp_path: Path, content: bytes
) -> None:
    path = pack(full, tmp_path / "b.tar")
    refused(rebuilt(path, swap_first_outcomes(content)), target, "outcomes of safety@1")


def archive(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    """As lori ends one, so that what is refused is not the end."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for info, content in members:
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content))
        end = out.tell()
    return out.getvalue()[:end] + bundles._END


def entry(name: str, kind: bytes = tarfile.REGTYPE, **changes: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in changes.items():
        setattr(info, key, value)
    return info


def test_archives_that_lori_does_not_write_are_refused(
    full: Store, target: Store, tmp_path: Path
) -> None:
    """Traversal, links, devices, sparse and extended headers, second names, other orders."""
    good = pack(full, tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "b.tar") as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    text, named = members[0][1], members[0][0].name
    assert archive(*members) == good
    bad = {
        "empty": b"",
        "zeros": bytes(10240),
        "noise": random.Random(0).randbytes(5000),
        "a zip": b"PK\x03\x04" + bytes(2000),
        "no manifest": archive(*members[1:]),
        "traversal": archive((entry(f"../../{named}"), text), *members[1:]),
        "absolute": archive((entry(f"/{named}"), text), *members[1:]),
        "a link": archive((entry(named, tarfile.SYMTYPE, linkname="/etc/passwd"), b"")),
        "a hard link": archive((entry(named, tarfile.LNKTYPE, linkname="x"), b"")),
        "a device": archive((entry(named, tarfile.CHRTYPE), b"")),
        "sparse": good[:156] + tarfile.GNUTYPE_SPARSE + good[157:],
        "extended headers": archive(
            (entry(named, pax_headers={"x": "y" * 10000}), text), *members[1:],
            form=tarfile.PAX_FORMAT,
        ),
        "an owner": archive((entry(named, uid=7), text), *members[1:]),
        "one more": archive(*members, (entry("more"), b"x")),
        "twice": archive(*members, members[-1]),
        "another order": archive(members[0], *members[:0:-1]),
        "a name": archive(*members[:-1], (entry("../../../tmp/x"), members[-1][1])),
        "a linked file": archive(
            *members[:-1], (entry(members[-1][0].name, tarfile.SYMTYPE, linkname="/"), b"")
        ),
        "another's manifest": archive((entry(named), text[:-2] + b" }"), *members[1:]),
        "a huge manifest": b"".join(bundles._member(named, b""))[:124] + b"77777777777\0"
        + good[136:],
        "cut short": good[:-1],
        "longer": good + bytes(512),
        "padding": good[:512 + len(text)] + b"x" + good[513 + len(text):],
    }  # fmt: skip
    for name, content in bad.items():
        path = tmp_path / "bad.tar"
        path.write_bytes(content)
        try:
            refused(path, target)
        except BaseException as e:
            raise AssertionError(name) from e
    assert take(tmp_path / "b.tar", target).known == 0


def test_other_files_are_refused(target: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no file"):
        Bundle(tmp_path / "none")
    os.symlink("/dev/zero", tmp_path / "zero")
    with pytest.raises(DamagedObject, match="no plain file"):
        Bundle(tmp_path / "zero")
    with pytest.raises((DamagedObject, NotFound)):
        Bundle(tmp_path)


def read(path: Path) -> None:
    """All of it."""
    with Bundle(path) as bundle:
        parcel = bundle.parcel()
        for file in parcel.files():
            assert hashlib.sha256(bundle.content(file.digest)).hexdigest() == file.digest
        bundle.outcomes(parcel.scores)


def test_every_flipped_bit_is_found(full: Store, tmp_path: Path) -> None:
    """In headers, manifest, files and padding alike."""
    good = pack(full, tmp_path / "b.tar", "safety@1").read_bytes()
    chance = random.Random(1)
    bits = range(8 * len(good))
    path = tmp_path / "bad.tar"
    for bit in chance.sample(bits, 4000 if SOAK else 150):
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(DamagedObject):
            read(path)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("packed")
    with empty(folder / "full") as store:
        fill(store)
        return folder, pack(store, folder / "b.tar").read_bytes()


@settings(
    max_examples=5000 if SOAK else 60, deadline=1000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    cuts=st.lists(st.tuples(st.integers(0, 40000), st.integers(0, 40), st.binary(max_size=40)),
                  min_size=1, max_size=4)
)  # fmt: skip
def test_whatever_is_done_to_a_bundle_it_is_taken_whole_or_refused_in_one_line(
    packed: tuple[Path, bytes], cuts: list[tuple[int, int, bytes]]
) -> None:
    folder, good = packed
    content = good
    for at, length, new in cuts:
        at %= len(content) + 1
        content = content[:at] + new + content[at + length :]
    path = folder / "mutated.tar"
    path.write_bytes(content)
    told = "taken"
    try:
        read(path)
    except LoriError as e:
        told = str(e)
    assert "\n" not in told
