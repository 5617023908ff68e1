"""Bundles to be fuzzed: any byte changed, and manifests by somebody who knows the format."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sqlite3
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mutating
import numpy as np
from targets import Accepted, Target, taken

from lori_manager.records import Base, NewAdapter, NewScore, Parent, Split
from lori_manager.store import bundles
from lori_manager.store.databases import REGISTRY
from lori_manager.store.moving import StoreSource, move
from lori_manager.store.store import Store

FINGERPRINT, ROWS = "f" * 64, 8


class Packed:
    """A whole bundle, and an empty store that takes it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        path = folder / "whole.tar"
        with Store.create(folder / "full") as store:
            store.set_base(self._base(folder))
            self._fill(store)
            source = StoreSource(store, "full")
            bundles.write(path, source, source.parcel(None))
        self.bytes = path.read_bytes()
        with tarfile.open(path) as archive:
            members = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
        self.manifest = json.loads(members.pop(next(iter(members))))
        self.files = {name.replace("/", ""): content for name, content in members.items()}
        self.empty = folder / "empty"
        with Store.create(self.empty) as store:
            store.set_base(self._base(folder))

    def _base(self, folder: Path) -> Base:
        at = datetime(2026, 1, 1, tzinfo=UTC)
        return Base(FINGERPRINT, "tiny", None, str(folder), "llama", at)

    def _fill(self, store: Store) -> None:
        rows = b"".join(b'{"prompt":"%d","completion":"x"}\n' % i for i in range(ROWS))
        split = Split(store.objects.put(rows), ROWS)
        task = store.add_task(
            "safety", scorer="exact_match", scorer_version="1", description="",
            splits={"eval": split}, options={},
        )  # fmt: skip
        mask = store.add_mask(task=task, blob=b"mask", projection="a" * 64, sparsity=0.9,
                              scope="model", kept=1, total=10, config={})  # fmt: skip
        values: dict[str, Any] = {
            "task": None, "task_revision": None, "mask": None, "parents": (), "method": "lori-s",
            "rank": 4, "projection": "a" * 64, "base": FINGERPRINT,
        }  # fmt: skip
        own = values | {"task": "safety", "task_revision": 1, "mask": mask.ref}
        first = store.add_adapter(NewAdapter(line="safety", origin="trained", **own), b"first")
        parents = (Parent(first.ref, first.digest, 0.5),)
        merged = values | {"parents": parents, "method": "concat", "projection": None}
        main = store.add_adapter(NewAdapter(line="main", origin="merged", **merged), b"main")
        for adapter in (first, main):
            score = NewScore(adapter.ref, adapter.digest, "safety", 1, "exact_match", "1", "fp32",
                             0.5, 0.1, ROWS)  # fmt: skip
            store.add_score(score, (np.arange(ROWS) % 2).astype(np.float32))
        store.set_alias("main", "production", 1)

    def joined(self, manifest: Any) -> bytes:
        """A bundle of this manifest, in every other byte as lori would write it."""
        text = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode(errors="replace")
        out = b"".join(bundles._member(bundles.manifest_name(text), text))
        named = manifest.get("files") if isinstance(manifest, dict) else None
        for entry in named if isinstance(named, list) else []:
            digest = entry[0] if isinstance(entry, list) and entry else None
            if digest in self.files if isinstance(digest, str) else False:
                name = f"{digest[:2]}/{digest[2:]}"
                out += b"".join(bundles._member(name, self.files[digest]))
        return out + bundles._END


def whole_store(root: Path) -> None:
    """Accepted where a row names a file that is not there whole; by nobody's library."""
    connection = sqlite3.connect(f"file:{root / REGISTRY}?mode=ro", uri=True)
    try:
        named = [d for table in ("adapters", "masks", "splits")
                 for (d,) in connection.execute(f"SELECT digest FROM {table}")]  # fmt: skip
        if connection.execute("PRAGMA foreign_key_check").fetchall():
            raise Accepted("rows that point nowhere")
        lowest = connection.execute("SELECT min(version) FROM adapters").fetchone()[0]
    finally:
        connection.close()
    if lowest is not None and lowest < 1:
        raise Accepted("a version below 1")
    for digest in named:
        path = root / "objects" / digest[:2] / digest[2:]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise Accepted(f"a row without its file {digest[:80]!r}")


def _moved(path: Path, root: Path) -> bool:
    with bundles.Bundle(path) as bundle, Store.open(root) as store:
        move(bundle, bundle.parcel(), store, check=lambda *_: None, aliases=True)
    return True


def bundle(packed: Packed, what: str) -> Target:
    """A bundle with bytes (`what` "bytes") or its manifest changed, taken as by `lori pull`."""

    def run(rng: random.Random, folder: Path) -> bool:
        if what == "bytes":
            data = mutating.raw(rng, packed.bytes)
        else:
            changed = mutating.document(rng, packed.manifest)
            try:
                data = packed.joined(changed)
            except (TypeError, ValueError, RecursionError):  # no JSON
                return False
        path = folder / "b.tar"
        path.write_bytes(data)
        shutil.copytree(packed.empty, folder / "store")
        found = taken(lambda: _moved(path, folder / "store"))
        if found and what == "bytes" and data != packed.bytes:
            raise Accepted("a bundle with other bytes")
        whole_store(folder / "store")
        return bool(found)

    return Target("files", run)


def bundle_targets(folder: Path) -> dict[str, Target]:
    """All of them by name."""
    packed = Packed(folder)
    return {"bundle": bundle(packed, "bytes"), "manifest of a bundle": bundle(packed, "manifest")}
