"""From workspace to workspace, into a bundle and out of one: `push`, `pull`, `clone`, `bundle`.

Whatever comes is checked before a row names it: files by digest, then by what they are to be.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lori_manager import models
from lori_manager.context import FOLDER, SETTINGS, Context
from lori_manager.errors import BadData, DamagedObject, InvalidInput, LoriError, NotFound, WrongBase
from lori_manager.records import Adapter, Base, Mask, Task
from lori_manager.refs import AdapterRef, parse_adapter_ref
from lori_manager.store import bundles, parcels
from lori_manager.store.moving import Moved, Source, StoreSource, move
from lori_manager.store.store import Store

if TYPE_CHECKING:
    from lori_manager.engine.weights import Stored


def push(
    ws: Context,
    target: str | Path,
    refs: Sequence[str] = (),
    *,
    names: Mapping[str, str] | None = None,
    aliases: bool = False,
) -> Moved:
    """Bring versions with all that they need into another workspace; everything without `refs`.

    Args:
        target: its folder.
        names: line -> what its versions are to be called there; numbers stay.
        aliases: set aliases, too, where they are new.
    Raises:
        WrongBase, Conflict: see `store.moving.move`.
    """
    with open_store(target) as store:
        _check_two(store, ws.store)
        source = StoreSource(ws.store, str(ws.root))
        return _move(ws, source, store, refs, names, aliases)


def pull(
    ws: Context,
    source: str | Path,
    refs: Sequence[str] = (),
    *,
    names: Mapping[str, str] | None = None,
    aliases: bool = False,
) -> Moved:
    """The other way: from another workspace's folder, or from a bundle."""
    with open_source(source) as found:
        if isinstance(found, StoreSource):
            _check_two(found.store, ws.store)
        return _move(ws, found, ws.store, refs, names, aliases)


def bundle(ws: Context, refs: Sequence[str], path: str | Path) -> bundles.Written:
    """Write versions with all that they need as one file; everything without `refs`.

    Raises:
        Conflict: the file is there.
    """
    source = StoreSource(ws.store, str(ws.root))
    parcel = source.parcel(_parsed(refs))
    return bundles.write(Path(path), source, parcel, told=ws.on_message)


@dataclass(frozen=True)
class Origin:
    """What a clone begins with: the base, and the settings that its scores hang on."""

    base: Base
    settings: Path | None


def origin(source: str | Path) -> Origin:
    """Of a workspace or a bundle; a bundle brings no settings."""
    with open_source(source) as found:
        if isinstance(found, bundles.Bundle):
            return Origin(found.parcel().base, None)
        settings = found.store.root.parent / SETTINGS
        return Origin(found.store.base(), settings if settings.is_file() else None)


def find_base(theirs: Base, given: str | None) -> tuple[str, str | None]:
    """What a workspace of the same base is made with here: a folder, or a hub id and its revision.

    Args:
        given: a folder that the user names.
    Raises:
        NotFound: it is nowhere. WrongBase: it is of other weights.
    """
    source, revision = given or theirs.source, None if given else theirs.revision
    if given is None and theirs.path and Path(theirs.path).is_dir():
        source, revision = theirs.path, None
    try:
        folder, commit = models.locate(source, revision)
    except NotFound as e:
        raise NotFound(f"{e}; say where the weights are with --base PATH") from e
    mark = models.fingerprint(folder)
    if mark != theirs.fingerprint:
        raise WrongBase(
            f"{folder} holds weights {mark[:12]}, expected {theirs.fingerprint[:12]} "
            f"({theirs.source}): say where these are with --base PATH"
        )
    return source, commit


def check_base(here: Base, theirs: Base, root: Path) -> None:
    """Refuse to go on with a clone in a workspace of another base."""
    if here.fingerprint != theirs.fingerprint:
        raise WrongBase(f"{root} is a workspace of another base: clone into another folder")


def open_store(where: str | Path) -> Store:
    """The store of the workspace in a folder.

    Raises:
        NotFound: there is none. InvalidInput: a URL, which is not repeated.
    """
    if "://" in str(where):
        raise InvalidInput(
            "a bucket holds files, not what they are: name the folder of a workspace (made with "
            "`lori init --objects s3://...` to keep its files there)"
        )
    folder = Path(where).absolute()
    root = folder if folder.name == FOLDER else folder / FOLDER
    if not root.is_dir():
        raise NotFound(f"{folder} is no workspace: it has no {FOLDER}/")
    return Store.open(root)


@contextmanager
def open_source(where: str | Path) -> Iterator[StoreSource | bundles.Bundle]:
    """A workspace by its folder, or a bundle by its file."""
    if "://" not in str(where) and Path(where).is_file():
        with bundles.Bundle(Path(where)) as found:
            yield found
    else:
        with open_store(where) as store:
            yield StoreSource(store, str(store.root.parent))


def _check_two(one: Store, other: Store) -> None:
    if one.root.resolve() == other.root.resolve():
        raise InvalidInput(f"{one.root.parent} is this workspace: name another one")


def _parsed(refs: Sequence[str]) -> list[AdapterRef] | None:
    """None stands for everything."""
    found = [parse_adapter_ref(ref) for ref in refs]
    if None in found:
        raise InvalidInput("`base` does not move: name adapters such as `safety@1`")
    return [ref for ref in found if ref is not None] or None


def _move(
    ws: Context,
    source: Source,
    target: Store,
    refs: Sequence[str],
    names: Mapping[str, str] | None,
    aliases: bool,
) -> Moved:
    parcel = parcels.renamed(source.parcel(_parsed(refs)), names or {})
    parcels.check(parcel, source.shown)
    check = Inspector(ws, source.shown)
    return move(source, parcel, target, check=check, aliases=aliases, told=ws.on_message)


class Inspector:
    """Refuses a file that is not what its record says. Several threads may ask."""

    def __init__(self, ws: Context, shown: str) -> None:
        self._ws, self._shown = ws, shown
        self._fingerprint = ws.store.base().fingerprint
        self._lock = threading.Lock()
        self._shapes: Mapping[str, tuple[int, int]] | None = None
        self._looked = False

    def __call__(self, file: parcels.File, content: bytes) -> None:
        """Raises a LoriError that names source and record."""
        try:
            if file.kind == parcels.IMAGE:
                _check_image(content)
            elif isinstance(file.record, Task):
                _check_rows(file.record, file.split, content)
            elif isinstance(file.record, Mask):
                _check_mask(file.record, content)
            else:
                self._check_adapter(file.record, content)
        except LoriError as e:
            raise type(e)(f"{self._shown}: {file.subject}: {e}") from e

    def _check_adapter(self, adapter: Adapter, content: bytes) -> None:
        from lori_manager.engine.codec import decode

        if len(content) != adapter.bytes:
            raise DamagedObject(f"expected {adapter.bytes} bytes, found {len(content)}")
        weights, meta = decode(content)
        if meta.get("base", self._fingerprint) != self._fingerprint:
            raise WrongBase(f"it was made for base {str(meta['base'])[:12]}")
        if weights.rank != adapter.rank:
            raise DamagedObject(f"its rank is {weights.rank}, expected {adapter.rank}")
        shapes = self._of_base()
        if shapes is not None:
            _check_shapes(weights, shapes)

    def _of_base(self) -> Mapping[str, tuple[int, int]] | None:
        """Module -> (out_features, in_features) of the base, where its files are at hand."""
        with self._lock:
            if not self._looked:
                self._looked = True
                if Path(self._ws.store.base().path).is_dir():
                    self._shapes = self._ws.skeleton().linear_shapes
                else:
                    self._ws.on_message(
                        "the base's files are not here: shapes are not compared with it"
                    )
            return self._shapes


def _check_rows(task: Task, split: str, content: bytes) -> None:
    from lori_manager.tasks.rows import rows_from_jsonl

    found, expected = len(rows_from_jsonl(content)), task.splits[split].rows
    if found != expected:
        raise BadData(f"it has {found} rows, expected {expected}")


def _check_image(content: bytes) -> None:
    from lori_manager.tasks.images import load_image

    load_image(content, 1)


def _check_mask(mask: Mask, content: bytes) -> None:
    from lori_manager.engine.codec import decode_mask

    tensors, _ = decode_mask(content)
    kept = sum(int(one.sum()) for one in tensors.values())
    total = sum(one.numel() for one in tensors.values())
    if (kept, total) != (mask.kept, mask.total):
        raise DamagedObject(f"it keeps {kept} of {total}, expected {mask.kept} of {mask.total}")


def _check_shapes(weights: Stored, shapes: Mapping[str, tuple[int, int]]) -> None:
    from lori_manager.engine.weights import AdapterWeights

    if not isinstance(weights, AdapterWeights):
        return  # how its tensors fit is for its kind to say, when it is used
    for block in weights.blocks:
        spec = block.projection
        for name, B in block.B.items():
            columns = (
                spec.modules[name] if spec is not None else (block.tensors or {})[name].shape[1]
            )
            if shapes.get(name) != (B.shape[0], columns):
                found = " x ".join(map(str, shapes[name])) if name in shapes else "none"
                raise DamagedObject(
                    f"module {name} is of {B.shape[0]} x {columns}, in the base {found}"
                )
