"""push, pull, clone and bundle as they are typed: real adapters, folders, buckets and files."""

import shutil

import buckets
import pytest

from lori_manager.store import bundles
from lori_manager.store.moving import StoreSource
from lori_manager.workspace import Workspace


@pytest.fixture
def other(tiny_base, tmp_path, trained):
    """An empty workspace of the same base, beside `trained`."""
    lori = type(trained)(tmp_path / "other")
    lori("init", lori.folder, "--base", tiny_base)
    shutil.copy(trained.folder / "lori.toml", lori.folder)
    return lori


def shown(lori, ref):
    return lori.json("show", ref)["record"]


def test_pull_brings_all_and_again_nothing(trained, other):
    told = other("pull", trained.folder).stdout
    assert "colour@1, shape@1, main@1" in told
    assert "3 new versions, 0 known" in told
    assert "colour#1, shape#1" in told
    assert trained("audit", "main").stdout == other("audit", "main").stdout
    assert other.json("verify") == []
    again = other.json("pull", trained.folder)
    assert (again["adapters"], again["known"], again["scores"], again["files"]) == ([], 3, 0, 0)
    other("score", "main@1", "--tasks", "colour")  # its weights, on this base


def test_what_comes_later_is_no_clock_that_went_back(trained, other):
    other("pull", trained.folder, "shape")
    other("pull", trained.folder, "colour")
    states = {check["name"]: check["state"] for check in other.json("doctor")}
    assert states["clock"] == "ok"


def test_push_brings_one_version_with_what_it_needs(trained, other):
    moved = trained.json("push", other.folder, "colour")
    assert moved["adapters"] == ["colour@1"]
    assert moved["masks"] == ["colour%1"]
    assert {line["name"] for line in other.json("lines")} >= {"colour"}
    assert shown(other, "colour@1") == shown(trained, "colour@1")
    other("train", "colour")  # and it goes on from there
    assert shown(other, "colour@latest")["ref"] == "colour@2"


def test_a_conflict_names_the_way_out(trained, other):
    trained("push", other.folder, "colour")
    trained("train", "shape")
    other("pull", trained.folder, "shape@1")
    other("train", "shape", "--seed", "5")
    told = other.refuses("pull", trained.folder, "shape@2", code=10)
    assert "--as shape=NAME" in told
    assert other.json("pull", trained.folder, "shape@2", "--as", "theirs")["adapters"] == [
        "theirs@2"
    ]
    assert other.json("verify") == []


def test_as_needs_to_know_whose_name_it_is(trained, other):
    told = other.refuses("pull", trained.folder, "--as", "theirs", code=2)
    assert "say --as LINE=theirs" in told
    told = other.refuses("pull", trained.folder, "--as", "main=a", "--as", "main=b", code=2)
    assert "two names" in told


def test_aliases_come_where_they_are_asked_for(trained, other):
    trained("alias", "main@1", "production")
    assert other.json("pull", trained.folder)["aliases"] == []
    assert other.json("pull", trained.folder, "--aliases")["aliases"] == ["main@production"]
    assert shown(other, "main@production")["ref"] == "main@1"


def test_a_clone_is_a_workspace_of_its_own(trained, tmp_path, empty):
    trained("alias", "main@1", "production")
    moved = empty.json("clone", trained.folder, tmp_path / "copy")
    assert moved["adapters"] == ["colour@1", "shape@1", "main@1"]
    assert moved["aliases"] == ["main@production"]
    copy = type(trained)(tmp_path / "copy")
    assert (copy.folder / "lori.toml").read_text() == (trained.folder / "lori.toml").read_text()
    trained("train", "colour")
    again = empty.json("clone", trained.folder, tmp_path / "copy")
    assert (again["adapters"], again["known"]) == (["colour@2"], 3)
    assert copy("audit", "main").stdout == trained("audit", "main").stdout


def test_a_bundle_goes_where_no_network_is(trained, other, tmp_path, tiny_base, empty):
    file = tmp_path / "release.lori"
    written = trained.json("bundle", "main", "-o", file)
    assert written["adapters"] == ["colour@1", "shape@1", "main@1"]
    assert written["bytes"] == file.stat().st_size
    first = file.read_bytes()
    assert "is there already" in trained.refuses("bundle", "main", "-o", file, code=10)
    file.unlink()
    trained("bundle", "main@1", "-o", file)
    assert file.read_bytes() == first
    assert other.json("pull", file)["adapters"] == written["adapters"]
    assert other.json("verify") == []
    assert other("audit", "main").stdout == trained("audit", "main").stdout
    told = empty.refuses("clone", file, tmp_path / "copy", code=4)
    assert "--base PATH" in told
    assert not (tmp_path / "copy").exists()
    moved = empty.json("clone", file, tmp_path / "copy", "--base", tiny_base)
    assert moved["adapters"] == written["adapters"]


def test_what_is_no_store_is_one_line(trained, tmp_path):
    assert "is no workspace" in trained.refuses("pull", tmp_path / "none", code=4)
    assert "is this workspace" in trained.refuses("pull", trained.folder, code=2)
    assert "is this workspace" in trained.refuses("push", trained.folder / ".lori", code=2)
    told = trained.refuses("push", "s3://key:hushhush@bucket/x", code=2)
    assert "hushhush" not in told
    assert "folder of a workspace" in told
    assert "`base` does not move" in trained.refuses("bundle", "base", "-o", "x", code=2)
    (tmp_path / "noise").write_bytes(b"noise" * 1000)
    assert "not a bundle" in trained.refuses("pull", tmp_path / "noise", code=8)
    told = trained.refuses("bundle", "nobody@1", "-o", tmp_path / "x", code=4)
    assert "no line is called 'nobody'" in told


def test_another_base_is_one_line(trained, tmp_path, tiny_base):
    import torch
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(tiny_base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + torch.ones(32)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    other = type(trained)(tmp_path / "other")
    other("init", other.folder, "--base", base)
    for told in (
        other.refuses("pull", trained.folder, code=6),
        trained.refuses("push", other.folder, code=6),
        other.refuses("clone", trained.folder, other.folder, code=6),
        other.refuses("clone", trained.folder, tmp_path / "new", "--base", base, code=6),
    ):
        assert "base" in told
    assert other.json("lines") == []


def forged(trained, path, changes):
    """A bundle of colour@1 that is whole in itself, with other content in a file."""
    from dataclasses import replace

    class Forger(StoreSource):
        def content(self, digest):
            return self.forgery.get(digest) or super().content(digest)

    with Workspace.open(trained.folder) as ws:
        source = Forger(ws.store, "forger")
        parcel = ws.store.parcel([_ref("colour@1")])
        (adapter,) = parcel.adapters
        (mask,) = parcel.masks
        forgery = {}
        parcel = changes(parcel, adapter, mask, forgery, ws, replace)
        object.__setattr__(source, "forgery", forgery)
        bundles.write(path, source, parcel)
    return path


def _ref(text):
    from lori_manager.refs import parse_adapter_ref

    return parse_adapter_ref(text)


def _digest(content, forgery):
    import hashlib

    digest = hashlib.sha256(content).hexdigest()
    forgery[digest] = content
    return digest


def _other_adapter(make):
    """Put an adapter of other weights in the place of colour@1, with an honest digest."""

    def change(parcel, adapter, mask, forgery, ws, replace):
        from lori_manager.engine.codec import decode_adapter, encode_adapter

        weights, meta = decode_adapter(ws.store.adapter_bytes(adapter))
        weights, meta = make(weights, meta, replace)
        blob = encode_adapter(weights, meta) if not isinstance(weights, bytes) else weights
        digest = _digest(blob, forgery)
        other = replace(adapter, digest=digest, bytes=len(blob))
        scores = tuple(s for s in parcel.scores if s.subject == "base")
        return replace(parcel, adapters=(other,), scores=scores)

    return change


def _wider(weights, meta, replace):
    import torch

    (block,) = weights.blocks
    B = {
        name: torch.zeros(matrix.shape[0] + 1, matrix.shape[1]) for name, matrix in block.B.items()
    }
    return replace(weights, blocks=(replace(block, B=B, mask=None),)), meta


def _elsewhere(weights, meta, replace):
    (block,) = weights.blocks
    B = {f"{name}.more": matrix for name, matrix in block.B.items()}
    spec = replace(
        block.projection, modules={f"{n}.more": v for n, v in block.projection.modules.items()}
    )
    return replace(weights, blocks=(replace(block, B=B, mask=None, projection=spec),)), meta


def _other_rows(count):
    def change(parcel, adapter, mask, forgery, ws, replace):
        task = next(t for t in parcel.tasks if t.name == "colour")
        split = task.splits["train"]
        content = ws.store.objects.get(split.digest)
        content = content + content.split(b"\n")[0] + b"\n" if count else b"[1]\n" * split.rows
        split = replace(split, digest=_digest(content, forgery))
        tasks = tuple(
            replace(t, splits={**t.splits, "train": split}) if t.name == "colour" else t
            for t in parcel.tasks
        )
        return replace(parcel, tasks=tasks)

    return change


def _mask_of(kept):
    def change(parcel, adapter, mask, forgery, ws, replace):
        if kept is None:  # the adapter's own file, told as a mask
            return replace(parcel, masks=(replace(mask, digest=adapter.digest),))
        return replace(parcel, masks=(replace(mask, kept=kept),))

    return change


FORGERIES = {
    "no adapter": (_other_adapter(lambda *_: (b"no adapter at all", {})), "colour@1"),
    "other shapes": (_other_adapter(_wider), "in the base"),
    "other modules": (_other_adapter(_elsewhere), "in the base none"),
    "another base": (_other_adapter(lambda w, m, _: (w, {**m, "base": "e" * 64})), "made for base"),
    "another rank": (
        lambda p, a, m, f, ws, replace: replace(p, adapters=(replace(a, rank=5),)), "its rank is 4"
    ),
    "more rows": (_other_rows(1), "it has 22 rows, expected 21"),
    "no rows": (_other_rows(0), "colour#1 train"),
    "no mask": (_mask_of(None), "colour%1"),
    "another mask": (_mask_of(3), "it keeps"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_bundle_that_is_whole_in_itself_is_refused(trained, other, tmp_path, name):
    change, told = FORGERIES[name]
    file = forged(trained, tmp_path / "forged", change)
    for _ in range(2):  # what was taken the first time does not help it
        code = 6 if name == "another base" else 5 if "rows" in name else 8
        assert told in other.refuses("pull", file, code=code)
    with Workspace.open(other.folder) as ws:
        assert ws.store.adapters() == []
        assert [f for f in ws.store.verify() if f.kind != "orphan"] == []


def test_without_the_bases_files_it_is_told_that_shapes_are_not_compared(
    trained, tmp_path, tiny_base
):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    other = type(trained)(tmp_path / "other")
    other("init", other.folder, "--base", base)
    shutil.rmtree(base)
    told = other("pull", trained.folder)
    assert "shapes are not compared" in told.stderr
    assert "3 new versions" in told.stdout


def test_what_is_no_image_is_refused(trained):
    pytest.importorskip("PIL")
    from lori_manager.errors import BadData
    from lori_manager.moving import Inspector
    from lori_manager.store.parcels import File

    with Workspace.open(trained.folder) as ws:
        file = File("a" * 64, "image", ws.store.task("colour"), "train")
        with pytest.raises(BadData, match="there: colour#1 train"):
            Inspector(ws, "there")(file, b"no image")


# buckets


def test_a_workspace_in_a_bucket(trained, bucket, tmp_path, tiny_base, empty, s3):
    team = type(trained)(tmp_path / "team")
    url = f"s3://{bucket}/team"
    team("init", team.folder, "--base", tiny_base, "--objects", url)
    shutil.copy(trained.folder / "lori.toml", team.folder)
    assert trained.json("push", team.folder)["adapters"] == ["colour@1", "shape@1", "main@1"]
    assert team.json("verify") == []
    assert "objects" in team("doctor").stdout
    team("train", "colour")
    assert shown(team, "colour@latest")["ref"] == "colour@2"
    team("rm", "colour@2")
    team("gc", "--grace", "0")
    moved = empty.json("clone", team.folder, tmp_path / "laptop")
    assert moved["adapters"] == ["colour@1", "shape@1", "main@1"]
    for path in team.folder.rglob("*"):
        if path.is_file():
            assert buckets.KEYS["AWS_SECRET_ACCESS_KEY"].encode() not in path.read_bytes()
    assert "holds the objects of another store" in empty.refuses(
        "clone", team.folder, tmp_path / "second", "--objects", url, code=10
    )


def test_init_with_a_bucket_that_is_none_is_one_line_and_may_be_given_anew(
    empty, bucket, tmp_path, tiny_base
):
    folder = tmp_path / "ws"
    told = empty.refuses(
        "init", folder, "--base", tiny_base, "--objects", "s3://no-such-bucket/x", code=9
    )
    assert "no such bucket" in told
    told = empty.refuses(
        "init", folder, "--base", tiny_base, "--objects", "s3://key:hushhush@b/x", code=2
    )
    assert "hushhush" not in told
    empty("init", folder, "--base", tiny_base, "--objects", f"s3://{bucket}/x")
