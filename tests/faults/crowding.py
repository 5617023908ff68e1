"""What several processes do to one store at the same time."""

from __future__ import annotations

import os
import random
import time
from datetime import timedelta
from pathlib import Path

import acting

from lori_manager.errors import Conflict, NotFound
from lori_manager.records import Parent
from lori_manager.refs import AdapterRef
from lori_manager.store.files import MissingObject
from lori_manager.store.store import Store


def start(root: Path, said: Path, at: float) -> None:
    """A first start, at a time that all have agreed on."""
    time.sleep(max(0.0, at - time.time()))
    try:
        Store.create(root).close()
        said.write_text("created")
    except Conflict:
        said.write_text("conflict")
    with Store.open(root) as store:
        store.lines()


def write(root: Path, count: int, at: float) -> None:
    """So many versions, each after a look at what there is."""
    time.sleep(max(0.0, at - time.time()))
    with Store.open(root) as store:
        for _ in range(count):
            store.adapters("safety", last=1)
            store.add_adapter(acting.adapter("safety"), os.urandom(200))


def _slowly(store: Store, chance: random.Random) -> None:
    """Let time go by between a file and its row."""
    put = store.objects.put

    def put_and_wait(content: bytes) -> str:
        digest = put(content)
        time.sleep(chance.uniform(0, 0.05))
        return digest

    store.objects.put = put_and_wait  # type: ignore[method-assign]


def train(root: Path, stop: Path, seed: int) -> None:
    """Versions from the newest one, of contents that others put and free as well."""
    chance = random.Random(seed)
    with Store.open(root) as store:
        _slowly(store, chance)
        while not stop.exists():
            blob = b"content %d" % chance.randrange(6)
            if chance.random() < 0.5:  # what no row names until this one does
                blob = chance.randbytes(300)
            try:
                newest = store.adapter(AdapterRef("work", "latest"))
                parents = (Parent(newest.ref, newest.digest),) if chance.random() < 0.3 else ()
                store.add_adapter(acting.adapter("work", parents=parents), blob)
            except NotFound:  # removed meanwhile, or there is none yet
                store.add_adapter(acting.adapter("work"), blob)


def merge(root: Path, stop: Path, seed: int) -> None:
    """Merges of what it has just read."""
    chance = random.Random(seed)
    with Store.open(root) as store:
        _slowly(store, chance)
        while not stop.exists():
            known = store.adapters("work", last=6)
            if len(known) < 2:
                continue
            try:
                members = chance.sample(known, 2)
                for member in members:
                    store.adapter_bytes(member)
                parents = tuple(Parent(m.ref, m.digest, 0.5) for m in members)
                new = acting.adapter("merged", origin="merged", parents=parents)
                store.add_adapter(new, b"merge %d" % chance.randrange(6))
            except (
                NotFound,
                MissingObject,
            ):  # a member is gone since
                continue


def throw_away(root: Path, stop: Path, seed: int) -> None:
    """Removes whatever lets itself be removed."""
    chance = random.Random(seed)
    with Store.open(root) as store:
        while not stop.exists():
            known = store.adapters(chance.choice(["work", "merged"]), last=8)
            if known:
                gone = chance.choice(known)
                try:
                    store.remove([AdapterRef(gone.line, str(gone.version))])
                except (Conflict, NotFound):
                    continue


def collect(root: Path, rounds: int, said: Path) -> None:
    """gc without a time of grace, again and again."""
    freed = 0
    with Store.open(root) as store:
        for _ in range(rounds):
            store.objects.put(os.urandom(30))
            freed += sum(f.kind != "run" for f in store.collect(grace=timedelta(0)))
    said.write_text(str(freed))
