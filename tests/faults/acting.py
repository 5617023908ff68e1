"""What is interrupted: small acts on a store through its own methods, and what must hold after.

Each act may be run again after an interruption, as a command is. What it has got back it tells
(`ack`), a line each; whatever was told must be there for good.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from lori_manager.errors import Conflict
from lori_manager.records import Adapter, Base, NewAdapter, NewScore, Parent, Split
from lori_manager.refs import AdapterRef
from lori_manager.store import bundles, database
from lori_manager.store.databases import REGISTRY
from lori_manager.store.files import private_folder, storing
from lori_manager.store.moving import StoreSource, move
from lori_manager.store.postgres import Postgres
from lori_manager.store.store import Store

Ack = Callable[[str], None]
FINGERPRINT = "f" * 64
ROWS = 8
SCHEMAS = Path(__file__).parents[1] / "store" / "schemas"
OLD = "0005"  # the schema that is migrated from
ACTS: dict[str, Callable[[Path, Ack], None]] = {}


def act(function: Callable[[Path, Ack], None]) -> Callable[[Path, Ack], None]:
    ACTS[function.__name__] = function
    return function


def prepare(place: Path, server: Postgres | None = None) -> None:
    """A store with a task, two trained adapters and an old database beside it."""
    with Store.create(place / ".lori", server) as store:
        store.set_base(Base(FINGERPRINT, "tiny", None, str(place), "llama", datetime.now(UTC)))
        rows = b"".join(b'{"prompt":"%d","completion":"x"}\n' % i for i in range(ROWS))
        digest = store.objects.put(rows)
        store.add_task(
            "safety", scorer="exact_match", scorer_version="1", description="",
            splits={"eval": Split(digest, ROWS)}, options={},
        )  # fmt: skip
        for i in range(2):
            made = store.add_adapter(adapter("safety"), b"first weights %d" % i)
            score(store, made.ref, made.digest)
    with Store.create(place / "far" / ".lori") as far:
        far.set_base(Base(FINGERPRINT, "tiny", None, str(place), "llama", datetime.now(UTC)))
    old = place / "old"
    old.mkdir()
    with sqlite3.connect(old / REGISTRY) as file:
        file.executescript((SCHEMAS / f"{OLD}.sql").read_text())
    file.close()


def spare(place: Path) -> Postgres | None:
    """An empty database for a first start; None for a file."""
    told = place / "spare"
    return Postgres.at(told.read_text()) if told.exists() else None


def adapter(line: str, **changes: Any) -> NewAdapter:
    values: dict[str, Any] = {
        "line": line, "origin": "trained", "task": None, "task_revision": None, "mask": None,
        "parents": (), "method": "lori-s", "rank": 4, "projection": "a" * 64, "base": FINGERPRINT,
    }  # fmt: skip
    return NewAdapter(**values | changes)


def score(store: Store, ref: str, digest: str) -> None:
    task = store.task("safety")
    values = np.ones(ROWS, np.float32)
    store.add_score(
        NewScore(ref, digest, task.name, task.revision, task.scorer, "1", "fp32", 1.0, 0.0, ROWS),
        values,
    )


@act
def create(place: Path, ack: Ack) -> None:
    """A first start, in a folder that was not there."""
    root = place / "team" / "project" / ".lori"
    with contextlib.suppress(Conflict):
        Store.create(root, spare(place)).close()
    with Store.open(root) as store:
        store.set_base(Base(FINGERPRINT, "tiny", None, str(place), "llama", datetime.now(UTC)))
        store.add_adapter(adapter("first"), b"first")
    ack("created")


@act
def train(place: Path, ack: Ack) -> None:
    """One stage of a run, as `lori train` does it: checkpoints, mask, adapter, score."""
    import torch

    from lori_manager import checkpoints

    with Store.open(place / ".lori") as store:
        task = store.task("safety")
        run = store.open_run({"tasks": [task.ref], "options": {}})
        folder = store.runs / run.id
        with storing(folder):
            private_folder(folder)
        state = checkpoints.newest(folder / "training", lambda _: None)
        for step in range(state.step + 1 if state else 1, 4):
            tensors = {"values": torch.full((5,), float(step))}
            checkpoints.save(folder / "training", step, tensors, {"step": step})
            ack(f"checkpoint {step}")
        state = checkpoints.newest(folder / "training", lambda _: None)
        assert state is not None
        assert (state.step, state.tensors["values"].tolist()) == (3, [3.0] * 5)
        mask = store.add_mask(
            task=task, blob=os.urandom(60), projection="a" * 64, sparsity=0.9, scope="model",
            kept=1, total=9, config={},
        )  # fmt: skip
        new = adapter("safety", task="safety", task_revision=1, mask=mask.ref, run=run.id, stage=0)
        made = store.add_adapter(new, os.urandom(3000))
        ack(f"version {made.ref} {made.digest}")
        score(store, made.ref, made.digest)
        store.finish_run(run.id)
        shutil.rmtree(folder, ignore_errors=True)


@act
def merge(place: Path, ack: Ack) -> None:
    """The newest two of a line into another."""
    with Store.open(place / ".lori") as store:
        members = store.adapters("safety", last=2)
        for member in members:
            store.adapter_bytes(member)
        parents = tuple(Parent(m.ref, m.digest, 0.5) for m in members)
        new = adapter("main", origin="merged", method="concat", parents=parents, projection=None)
        made = store.add_adapter(new, os.urandom(6000))
        ack(f"version {made.ref} {made.digest}")
        score(store, made.ref, made.digest)


@act
def promote(place: Path, ack: Ack) -> None:
    """The newest version takes the alias from the one before."""
    with Store.open(place / ".lori") as store:
        newest = store.adapters("safety", last=1)[0]
        alias = store.set_alias(
            "safety", "production", newest.version, action="promoted", verdict={"passed": True}
        )
        ack(f"alias {alias.ref} {alias.version}")


@act
def gc(place: Path, ack: Ack) -> None:
    """Something is thrown away for good, beside what is needed."""
    with Store.open(place / ".lori") as store:
        store.objects.put(os.urandom(500))  # an orphan
        scratch = store.add_adapter(adapter("scratch"), os.urandom(500))
        store.remove([AdapterRef("scratch", str(scratch.version))], reason="a trial")
        ack(f"removed {scratch.ref}")
        freed = [f.subject for f in store.collect(grace=timedelta(0)) if f.kind == "removed"]
        assert scratch.ref in freed
        ack(f"freed {scratch.digest}")


@act
def migrate(place: Path, ack: Ack) -> None:
    """The old database becomes one of today."""
    done = database.upgrade(place / "old")
    assert done.after == database.HEAD
    ack("migrated")


@act
def pull(place: Path, ack: Ack) -> None:
    """Another store brings two versions and is brought one that it lacks, by a bundle."""
    with Store.open(place / "far" / ".lori") as far, Store.open(place / ".lori") as near:
        source = StoreSource(near, "near")
        asked = [AdapterRef("safety", str(version)) for version in (1, 2)]
        move(source, source.parcel(asked), far, check=lambda *_: None)
        ack("pulled safety@1 safety@2")
        made = far.add_adapter(adapter("faraway"), os.urandom(4000))
        file = place / f"faraway-{made.version}.tar"
        parcel = far.parcel([AdapterRef("faraway", str(made.version))])
        bundles.write(file, StoreSource(far, "far"), parcel)
        ack(f"bundled {file.name} {made.ref}")
        with bundles.Bundle(file) as bundle:
            move(bundle, bundle.parcel(), near, check=lambda *_: None)
        ack(f"moved {made.ref} {made.digest}")


@act
def export(place: Path, ack: Ack) -> None:
    """A PEFT directory, whole or not there."""
    import torch

    from lori_manager.adapters.peft_export import write_peft
    from lori_manager.engine.update import LowRankUpdate

    update = LowRankUpdate(torch.ones(2, 6), torch.ones(4, 2), 0.5)
    target = place / "exported"
    name = "model.layers.0.self_attn.q_proj"
    try:
        write_peft(
            {name: update}, target, base_name="tiny", revision=None, fingerprint=FINGERPRINT,
            all_modules=[name], transposed=frozenset(), label="safety@1",
        )  # fmt: skip
    except Conflict:  # an export that was told to have failed is there all the same
        check_export(target)
    ack("exported")


def check_export(target: Path) -> None:
    from safetensors.torch import load_file

    config = json.loads((target / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert len(load_file(target / "adapter_model.safetensors")) == 2


def check_far(place: Path, acks: list[str], near: dict[str, Adapter]) -> None:
    """What was brought is there with all that it needs; what was not is absent or whole."""
    with Store.open(place / "far" / ".lori") as far:
        wrong = [f for f in far.verify() if f.kind != "orphan"]
        assert not wrong, wrong
        here = {a.ref: a for a in far.adapters()}
        for told in acks:
            kind, *words = told.split()
            if kind == "pulled":
                assert here.keys() >= set(words), told
            elif kind == "moved":
                assert near[words[0]].digest == words[1], told
            elif kind == "bundled":
                with bundles.Bundle(place / words[0]) as bundle:
                    assert words[1] in {a.ref for a in bundle.parcel().adapters}
        for version in here.values():
            assert len(far.adapter_bytes(version)) == version.bytes
            if version.line == "safety":
                assert version.digest == near[version.ref].digest
                assert len(far.scores(subject=version.ref, task="safety")) == 1


def check(place: Path, acks: list[str]) -> None:
    """Nothing that was told is lost, and no row is without a good file."""
    with Store.open(place / ".lori") as store:
        wrong = [f for f in store.verify() if f.kind != "orphan"]
        assert not wrong, wrong
        every = {a.ref: a for a in store.adapters(removed=True)}
        for line in {a.line for a in every.values()} - {"faraway"}:  # which comes with gaps
            versions = [a.version for a in every.values() if a.line == line]
            assert versions == list(range(1, len(versions) + 1))
        for adapter in store.adapters():
            assert len(store.adapter_bytes(adapter)) == adapter.bytes
        aliases = {a.ref: a.version for a in store.aliases()}
        journal = [e.to_version for e in store.journal("safety", "production")]
        assert journal[-1:] == list(aliases.values())
        for told in acks:
            kind, *words = told.split()
            if kind == "version":
                assert every[words[0]].digest == words[1], told
            elif kind == "alias":
                assert int(words[1]) in journal, told
            elif kind == "removed":
                assert every[words[0]].hidden, told
        last = [told.split() for told in acks if told.startswith("alias")][-1:]
        assert all(aliases[word] >= int(version) for _, word, version in last)
    check_far(place, acks, every)
    old = sqlite3.connect(place / "old" / REGISTRY)
    (revision,) = old.execute("SELECT version_num FROM alembic_version").fetchone()
    (rows,) = old.execute("SELECT count(*) FROM adapters").fetchone()
    assert old.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    old.close()
    assert rows == 4
    assert revision == database.HEAD if "migrated" in acks else revision in (OLD, database.HEAD)
    if revision == database.HEAD:
        backup = sqlite3.connect(place / "old" / f"registry.{OLD}.db")
        assert backup.execute("SELECT version_num FROM alembic_version").fetchone() == (OLD,)
        backup.close()
    if "created" in acks:
        with Store.open(place / "team" / "project" / ".lori") as store:
            assert store.adapter_bytes(store.adapters()[0]) == b"first"
            assert not [f for f in store.verify() if f.kind != "orphan"]
    if "exported" in acks or (place / "exported").exists():
        check_export(place / "exported")
