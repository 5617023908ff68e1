"""What a base's configuration may ask for, and code that comes with a model.

transformers builds what config.json says: it may name Python files beside it (`auto_map`), kernels
to be fetched (`attn_implementation`), or any number of layers. Code is refused unless the user
asked for it with the commit that it is of; then its files must stay what they were.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lori_manager import foreign
from lori_manager.errors import InvalidInput, NotFound, WrongBase

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADAPTER_CONFIG = "adapter_config.json"
MOST_LAYERS = 10_000
LARGEST = 2**53
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LAYERS = re.compile(r"layers?$|^num_(stages|blocks)$")
_IMPLEMENTATION = re.compile(r"_implementation(_internal)?$")


def check_folder(folder: Path) -> None:
    """Refuse a base whose files would have transformers do more than build and load a model.

    Raises:
        InvalidInput: its configuration asks for kernels of the hub, or for sizes that no
            model has, or the folder is an adapter's.
        NotFound: config.json is unreadable.
    """
    if (folder / ADAPTER_CONFIG).exists():
        raise InvalidInput(
            f"{folder} holds {ADAPTER_CONFIG}: transformers would put that adapter into the base; "
            "merge it into the base or move it away"
        )
    config = read_settings(folder / CONFIG)
    context = config.get("max_position_embeddings")
    if context is not None and (type(context) is not int or context < 1):
        raise InvalidInput(
            f"{folder}/{CONFIG}: max_position_embeddings is {repr(context)[:60]}, expected a whole "
            "number of 1 or more"
        )
    for place, key, value in _settings(config, CONFIG):
        where = ascii(place)[1:-1][:200]
        shown = repr(value)[:60]
        if _IMPLEMENTATION.search(key) and value is not None:
            named = [*value.values()] if isinstance(value, dict) else [value]
            if not all(n is None or (isinstance(n, str) and n.isidentifier()) for n in named):
                raise InvalidInput(
                    f"{folder}/{where} is {shown}: a base may not name kernels to be fetched; "
                    "remove it"
                )
        if isinstance(value, int) and abs(value) > LARGEST:
            raise InvalidInput(f"{folder}/{where} is {shown}: no model is so large; mend the file")
        if isinstance(value, int) and _LAYERS.search(key) and value > MOST_LAYERS:
            raise InvalidInput(
                f"{folder}/{where} is {shown}: more than {MOST_LAYERS} layers; mend the file"
            )


def check_code(folder: Path, trust: bool, source: str, revision: str | None) -> str | None:
    """What `lori init` keeps of a base's own code: the digest of its files, or None.

    Args:
        trust: run the code. source, revision: as the user gave them.
    Raises:
        InvalidInput: the base needs code and `trust` is not given; or it is given for a folder,
            without a whole commit, or for a base that has no code or whose code lies elsewhere.
    """
    named = [*_code_named(folder)]
    if not trust:
        if named and not _known(folder):
            raise InvalidInput(
                f"base {source!r} is built by Python code that comes with it ({named[0]}), and "
                "transformers has no model of that type: read that code; to run it, give "
                "--trust-remote-code and --revision with the commit that you read"
            )
        return None
    if Path(source).expanduser().is_dir():
        raise InvalidInput(
            "`--trust-remote-code` is for hub ids: a folder has no commit that says which code "
            "it is; give the hub id with --revision (what is in the hub's cache is not fetched)"
        )
    if revision is None or not _COMMIT.fullmatch(revision):
        raise InvalidInput(
            "`--trust-remote-code` needs --revision with the 40 hexadecimal digits of a commit: "
            f"branches and tags can be moved to other code, got {revision!r}"
        )
    if not named:
        raise InvalidInput(f"base {source!r} brings no code: leave --trust-remote-code out")
    for reference in named:
        if "--" in reference:
            raise InvalidInput(
                f"base {source!r} is built by code of another repository ({reference}), which "
                "--revision does not pin: it cannot be used"
            )
    return code_digest(folder)


def may_run_code(folder: Path, code: str | None) -> bool:
    """Whether transformers may run the base's own code: the files must be those of `code`.

    Raises:
        WrongBase: they are others than when the workspace was made.
    """
    if code is None:
        return False
    found = code_digest(folder)
    if found != code:
        raise WrongBase(
            f"the code in {folder} is not what this workspace was made with: expected "
            f"{code[:12]}, found {found[:12]}; restore it, none of it is run"
        )
    return True


def code_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all Python files, and of what names them."""
    h = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        h.update(f"{path.relative_to(folder).as_posix()}|{len(content)}|".encode() + content)
    h.update("|".join(_code_named(folder)).encode())
    return h.hexdigest()


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object of a base's folder.

    Raises:
        NotFound: missing, or not an object.
    """
    try:
        found = foreign.read_json(path, constants=True)
    except (OSError, foreign.Malformed) as e:
        raise NotFound(f"{path.parent} holds no readable {path.name}: {e}") from e
    if not isinstance(found, dict):
        raise NotFound(f"{path} is not a JSON object")
    return found


def _code_named(folder: Path) -> Iterator[str]:
    """Every class of its own that a configuration names, as `file.Class`."""
    for name in (CONFIG, TOKENIZER_CONFIG):
        if (folder / name).is_file():
            named = read_settings(folder / name).get("auto_map")
            values = named.values() if isinstance(named, Mapping) else [named]
            for value in values:
                yield from _texts(value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif value is not None:
        yield str(value)


def _known(folder: Path) -> bool:
    """Whether transformers itself has the model, and so leaves the base's code alone."""
    from transformers import CONFIG_MAPPING

    return read_settings(folder / CONFIG).get("model_type") in CONFIG_MAPPING


def _settings(value: Any, where: str, key: str = "") -> Iterator[tuple[str, str, Any]]:
    """(where it stands, its key, value) of everything in a JSON document."""
    yield where, key, value
    if isinstance(value, dict):
        for inner, one in value.items():
            yield from _settings(one, f"{where}: {inner}", inner)
    elif isinstance(value, list):
        for one in value:
            yield from _settings(one, where, key)
