"""What is fuzzed: whole files of every form, and what must hold of each that is taken.

`Target.run(rng, folder)` reads one mutated case. A LoriError is a refusal; what is accepted is
looked at by code that shares nothing with the package but numpy.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutating
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lori_manager import models
from lori_manager.adapters import bottleneck, ia3, prefix
from lori_manager.adapters.importing import read_adapter
from lori_manager.adapters.own_form import JSON_FILE, TENSORS_FILE, write_own
from lori_manager.adapters.peft_export import write_peft
from lori_manager.adapters.routed_directory import (
    ROUTER_CONFIG,
    ROUTER_FILE,
    read_routed,
    write_routed,
)
from lori_manager.config import load_settings
from lori_manager.engine.codec import decode, decode_mask, encode, encode_mask
from lori_manager.engine.projection import ORTHOGONAL, ProjectionSpec
from lori_manager.engine.router import Router
from lori_manager.engine.update import LowRankUpdate
from lori_manager.engine.weights import AdapterWeights, Block, KindWeights, routed_adapter
from lori_manager.store.files import ObjectStore
from lori_manager.tasks.outcomes import read_outcomes
from lori_manager.tasks.rows import rows_from_jsonl, rows_to_jsonl
from lori_manager.tasks.sources import read_source

BASE, FINGERPRINT = "org/Tiny", "f" * 64
FLOATS = {"F32": 4, "BF16": 2, "F16": 2}


class Accepted(AssertionError):
    """Something was taken that must not be."""


@dataclass(frozen=True)
class Target:
    """One kind of case; `run` says whether it was accepted."""

    group: str  # "files" or "configs"
    run: Callable[[random.Random, Path], bool]


class Bed:
    """A tiny base, and whole files of every form made for it."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.base = folder / "base"
        self._make_base()
        self.skeleton = models.load_skeleton(self.base)
        self.shapes = self.skeleton.linear_shapes
        self.imports = {
            "lora": self._lora(), "dora": self._dora(), "ia3": self._ia3(),
            "prefix": self._prefix(), "bottleneck": self._bottleneck(), "full": self._full(),
        }  # fmt: skip
        self.routed = self._routed()
        self.stored = self._stored()

    def _make_base(self) -> None:
        from tokenizers import Tokenizer, pre_tokenizers
        from tokenizers import models as parts
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        words = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(parts.BPE(vocab=words, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
        fast.save_pretrained(self.base)
        LlamaForCausalLM(
            LlamaConfig(vocab_size=len(words) + 1, hidden_size=16, intermediate_size=24,
                        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                        max_position_embeddings=64)
        ).save_pretrained(self.base)  # fmt: skip

    def _told(self) -> dict[str, Any]:
        modules = [name for name, _ in self.skeleton.model.named_modules()]
        return {
            "base_name": BASE, "revision": None, "fingerprint": FINGERPRINT, "label": "a",
            "all_modules": modules, "transposed": frozenset(), "folder": self.base,
        }  # fmt: skip

    def _export_told(self) -> dict[str, Any]:
        return {key: value for key, value in self._told().items() if key != "folder"}

    def _updates(self) -> dict[str, LowRankUpdate]:
        return {
            n: LowRankUpdate(torch.randn(2, i), torch.randn(o, 2), 0.5)
            for n, (o, i) in self.shapes.items()
        }

    def _lora(self) -> Path:
        target = self.folder / "lora"
        write_peft(self._updates(), target, **self._export_told())
        return target

    def _dora(self) -> Path:
        target = self.folder / "dora"
        shutil.copytree(self.imports_folder("lora"), target)
        path = target / "adapter_model.safetensors"
        tensors = load_file(path)
        for name, (out, _) in self.shapes.items():
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = torch.rand(out) + 0.5
        save_file(tensors, path, metadata={"lori_base_fingerprint": FINGERPRINT})
        config = json.loads((target / "adapter_config.json").read_text())
        (target / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
        return target

    def imports_folder(self, name: str) -> Path:
        """Where a form lies."""
        return self.folder / name

    def _ia3(self) -> Path:
        tensors = {
            f"{n}.{'inputs' if 'down' in n else 'outputs'}": torch.rand(i if "down" in n else o)
            for n, (o, i) in self.shapes.items()
            if n.rpartition(".")[2] in ("k_proj", "v_proj", "down_proj")
        }
        ia3.write(KindWeights("ia3", {}, tensors), self.folder / "ia3", self._told())
        return self.folder / "ia3"

    def _prefix(self) -> Path:
        shape = prefix.cache_shape(self.skeleton.model)
        options = {"layers": shape.layers, "heads": shape.heads, "size": shape.size}
        weights = KindWeights("prefix", options, {prefix.TENSOR: torch.randn(3, shape.width)})
        prefix.write(weights, self.folder / "prefix", self._told())
        return self.folder / "prefix"

    def _bottleneck(self) -> Path:
        places = bottleneck.find_places(self.skeleton.model, "houlsby")
        tensors = bottleneck._fresh(places, 4, 0)
        options = {"placement": "houlsby", "reduction": 4, "activation": "relu"}
        write_own(
            KindWeights("bottleneck", options, tensors), self.folder / "bottleneck", self._told()
        )
        return self.folder / "bottleneck"

    def _full(self) -> Path:
        name, (out, inputs) = next(iter(self.shapes.items()))
        tensors = {f"{name}.weight": torch.randn(out, inputs)}
        write_own(
            KindWeights("full", {"modules": "all"}, tensors), self.folder / "full", self._told()
        )
        return self.folder / "full"

    def _routed(self) -> Path:
        router = Router("model.layers.0", torch.randn(2, 32), torch.randn(2), ((3, 1), (0, 4)))
        members = {"one": self._updates(), "two": self._updates()}
        write_routed(members, router, self.folder / "routed", **self._export_told())
        return self.folder / "routed"

    def _stored(self) -> dict[str, bytes]:
        names = list(self.shapes)[:3]
        mask = {n: torch.rand(self.shapes[n][0], 4) < 0.2 for n in names}
        B = {n: torch.randn(self.shapes[n][0], 4).bfloat16() * m for n, m in mask.items()}
        inputs = {n: self.shapes[n][1] for n in names}
        sparse = Block(B, 2.0, ProjectionSpec(1, "a", 4, inputs), mask=mask)
        rows = Block(B, 2.0, ProjectionSpec(1, "", 4, inputs, ORTHOGONAL, 4), mask=mask)
        dense = Block(
            {n: torch.randn(self.shapes[n][0], 2) for n in names}, 1.0,
            tensors={n: torch.randn(2, self.shapes[n][1]) for n in names},
        )  # fmt: skip
        router = Router("model.layers.0", torch.randn(2, 32), torch.randn(2), ((3, 1), (0, 4)))
        one, two = AdapterWeights((sparse,)), AdapterWeights((dense,))
        kind = KindWeights("full", {"modules": "all"}, {"x.weight": torch.randn(5, 4)})
        return {
            "adapter": encode(AdapterWeights((sparse, dense)), {"base": FINGERPRINT}),
            "rows": encode(AdapterWeights((rows,)), {"base": FINGERPRINT}),
            "routed": encode(routed_adapter([one, two], router), {"base": FINGERPRINT}),
            "kind": encode(kind, {"base": FINGERPRINT}),
            "mask": encode_mask(mask, {"in_features": inputs}),
        }


# An independent reader.


def whole_file(path: Path) -> dict[str, np.ndarray]:
    """Values of a safetensors file by nobody's library; Accepted where the file is not whole."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise Accepted("a name occurs twice")
        return dict(pairs)

    header = json.loads(data[8 : 8 + size], object_pairs_hook=once)
    header.pop("__metadata__", None)
    values, used = {}, []
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        count = int(np.prod([int(n) for n in entry["shape"]], dtype=object))
        if entry["dtype"] not in FLOATS or count * FLOATS[entry["dtype"]] != end - begin:
            raise Accepted(f"{name!r} is of another size than its shape")
        part = data[8 + size + begin : 8 + size + end]
        if entry["dtype"] == "BF16":
            words = np.frombuffer(part, "<u2").astype(np.uint32) << 16
            numbers = words.view(np.float32)
        else:
            numbers = np.frombuffer(part, "<f4" if entry["dtype"] == "F32" else "<f2")
        if not np.isfinite(numbers).all():
            raise Accepted(f"{name!r} has values that are not finite")
        values[name] = numbers.reshape(entry["shape"])
        used.append((begin, end))
    position = 0
    for begin, end in sorted(used):
        if begin != position:
            raise Accepted("tensors overlap or leave gaps")
        position = end
    if position != len(data) - 8 - size:
        raise Accepted("bytes follow the last tensor")
    return values


def finite(weights: Any, shapes: dict[str, tuple[int, int]] | None = None) -> None:
    """Accepted where something is not finite, or does not fit the shapes."""
    if isinstance(weights, KindWeights):
        tensors = list(weights.tensors.values())
    else:
        tensors = []
        for block in weights.blocks:
            if not np.isfinite(np.float32(block.scaling)):
                raise Accepted("the scaling is not finite")
            for name, B in block.B.items():
                A = block.A[name]
                if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
                    raise Accepted(f"A and B of {name!r} do not fit each other")
                if shapes is not None and (B.shape[0], A.shape[1]) != shapes.get(name):
                    raise Accepted(f"{name!r} does not fit the base")
                tensors += [A, B]
        if weights.router is not None:
            tensors += [weights.router.weights, weights.router.bias]
    for tensor in tensors:
        if not np.isfinite(tensor.float().numpy()).all():
            raise Accepted("a value is not finite")


# Cases.


def stored(bed: Bed, name: str) -> Target:
    """A stored file with any bytes changed: refused always, by digest and by its own checksum."""
    whole = bed.stored[name]

    def run(rng: random.Random, folder: Path) -> bool:
        data = mutating.raw(rng, whole) if rng.random() < 0.6 else mutating.safetensors(rng, whole)
        if data == whole:
            return False
        store = ObjectStore(folder / "objects")
        store.root.mkdir(exist_ok=True)
        digest = hashlib.sha256(whole).hexdigest()
        path = store.path(digest)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        if taken(lambda: store.get(digest)):
            raise Accepted(f"a damaged {name}, by digest")
        # Spaces in its header change nothing of what it says.
        if taken(lambda: written_again(name, data)) not in (None, whole):
            raise Accepted(f"a damaged {name}")
        return False

    return Target("files", run)


def resealed(bed: Bed, name: str) -> Target:
    """A stored file by somebody who can compute its checksum: what is taken must make sense."""
    whole = bed.stored[name]

    def run(rng: random.Random, folder: Path) -> bool:
        header, values = mutating.split(whole)
        doc = json.loads(header["__metadata__"]["lori"])
        act = rng.random()
        if act < 0.6:
            doc = mutating.document(rng, doc)
        else:
            values = mutating.spoiled(rng, values)
        names = sorted(key for key in header if key != "__metadata__")
        if isinstance(doc, dict):
            doc.pop("sha256", None)
            try:
                text = json.dumps(doc, sort_keys=True, separators=(",", ":"))
            except (TypeError, RecursionError):
                return False
            h = hashlib.sha256(text.encode())
            for key in names:
                begin, end = header[key]["data_offsets"]
                h.update(f"|{key}|{end - begin}|".encode() + values[begin:end])
            doc["sha256"] = h.hexdigest()
            header["__metadata__"]["lori"] = json.dumps(doc, sort_keys=True, separators=(",", ":"))
        data = mutating.joined(header, values)
        found = taken(lambda: read_stored(name, data))
        if found and name != "mask":
            finite(found)
        return bool(found)

    return Target("files", run)


def read_stored(name: str, data: bytes) -> Any:
    """As the store's readers do."""
    return decode_mask(data)[0] if name == "mask" else decode(data)[0]


def written_again(name: str, data: bytes) -> bytes:
    """The file that the store would write of what it reads."""
    return encode_mask(*decode_mask(data)) if name == "mask" else encode(*decode(data))


def taken(read: Callable[[], Any]) -> Any:
    """What was read, or None where it was refused in one printable line."""
    from lori_manager.errors import LoriError

    try:
        return read() or True
    except LoriError as e:
        message = str(e)
        if not message or "\n" in message or len(message) > 5000:
            raise AssertionError(f"a refusal is not one line: {message[:200]!r}") from e
        return None


def imported(bed: Bed, name: str, what: str) -> Target:
    """A folder with its weights (`what` "weights") or its configuration changed."""
    files = {"bottleneck": (JSON_FILE, TENSORS_FILE), "full": (JSON_FILE, TENSORS_FILE)}
    config, weights = files.get(name, ("adapter_config.json", "adapter_model.safetensors"))
    doc = json.loads((bed.imports[name] / config).read_text())
    data = (bed.imports[name] / weights).read_bytes()

    def run(rng: random.Random, folder: Path) -> bool:
        new_config = (
            json.dumps(doc).encode() if what == "weights" else mutating.json_bytes(rng, doc)
        )
        new_data = mutating.safetensors(rng, data) if what == "weights" else data
        (folder / config).write_bytes(new_config)
        (folder / weights).write_bytes(new_data)
        found = taken(
            lambda: read_adapter(
                folder, bed.skeleton, folder=bed.base, base_names=[BASE], fingerprint=FINGERPRINT
            )
        )
        if found:
            whole_file(folder / weights)
            finite(found.weights, bed.shapes)
            encode(found.weights, {"base": FINGERPRINT})
            json.dumps(found.config, allow_nan=False).encode()
        return bool(found)

    return Target("files" if what == "weights" else "configs", run)


def routed(bed: Bed, what: str) -> Target:
    """A routed adapter's directory with its router changed."""
    doc = json.loads((bed.routed / ROUTER_CONFIG).read_text())
    data = (bed.routed / ROUTER_FILE).read_bytes()

    def run(rng: random.Random, folder: Path) -> bool:
        for member in ("one", "two"):
            (folder / member).symlink_to(bed.routed / member)
        (folder / ROUTER_CONFIG).write_bytes(
            mutating.json_bytes(rng, doc) if what == "config" else json.dumps(doc).encode()
        )
        (folder / ROUTER_FILE).write_bytes(
            mutating.safetensors(rng, data) if what == "weights" else data
        )
        read = lambda: read_routed(folder, shapes=bed.shapes, fingerprint=FINGERPRINT)  # noqa: E731
        found = taken(read)
        if found:
            whole_file(folder / ROUTER_FILE)
            finite(found[0], bed.shapes)
        return bool(found)

    return Target("files" if what == "weights" else "configs", run)


def base_config(bed: Bed, name: str) -> Target:
    """A base with a configuration changed, looked at and built as `lori init` and commands do."""
    doc = json.loads((bed.base / name).read_text())

    def run(rng: random.Random, folder: Path) -> bool:
        for file in bed.base.iterdir():
            (folder / file.name).symlink_to(file)
        (folder / name).unlink()
        (folder / name).write_bytes(mutating.json_bytes(rng, doc))

        def read() -> Any:
            models.locate(str(folder))
            models.check_base(folder, False, str(folder), None)
            if name == "config.json":
                return models.load_skeleton(folder)
            return models.load_tokenizer(folder)

        return bool(taken(read))

    return Target("configs", run)


def base_weights(bed: Bed) -> Target:
    """A base's weights changed: read by the header as `lori init` does, or refused."""
    data = (bed.base / "model.safetensors").read_bytes()

    def run(rng: random.Random, folder: Path) -> bool:
        header, values = mutating.split(data)
        changed = (
            mutating.joined(mutating.document(rng, header), values)
            if rng.random() < 0.6
            else mutating.raw(rng, data[: 8 + 4096]) + data[8 + 4096 :]
        )
        (folder / "config.json").symlink_to(bed.base / "config.json")
        (folder / "model.safetensors").write_bytes(changed)
        found = taken(lambda: models.fingerprint(folder))
        if found:
            size = 8 + int.from_bytes(changed[:8], "little")
            entries = {k: v for k, v in json.loads(changed[8:size]).items() if k != "__metadata__"}
            if max(e["data_offsets"][1] for e in entries.values()) != len(changed) - size:
                raise Accepted("the header does not cover the file")
        return bool(found)

    return Target("files", run)


TOML = """
[defaults]
rank = 8
alpha = 16.0
targets = ["q_proj", "v_proj"]
kind = "lora"
kind_options = {a = 1}
run_code = false
[tasks.safety]
train = "data/train.jsonl"
eval = "data/eval.jsonl"
probe_rows = 3
allow_overlap = true
[scorers]
polite = "scorers/polite.py:polite"
kind = {function = "a.py:b", unit = "x", new_tokens = 4}
[gate]
margin = 0.02
minimum = 0.8
undecided = "warn"
[gate.tasks.safety]
must_stay = "x.jsonl"
"""


def toml(bed: Bed) -> Target:
    """lori.toml changed, as text or a value at a time."""
    words = [
        "1" * 5000, "1" + "0" * 400, "-1", "nan", "inf", "1e999", "[" * 2000, "{}", "[]", '""',
        "true", '"../../x"', "2020-13-45", "1979-05-27T07:32:00Z", '"\\u0000"', "[[1]]",
        "{a = {b = 1}}", "0x7f",
    ]  # fmt: skip

    def run(rng: random.Random, folder: Path) -> bool:
        text = TOML
        if rng.random() < 0.6:
            lines = text.splitlines()
            for _ in range(rng.choice((1, 1, 3))):
                at = rng.choice([i for i, line in enumerate(lines) if "=" in line])
                lines[at] = lines[at].partition("=")[0] + "= " + rng.choice(words)
            data = "\n".join(lines).encode()
        else:
            data = mutating.raw(rng, text.encode())
        (folder / "lori.toml").write_bytes(data)
        found = taken(lambda: load_settings(folder / "lori.toml"))
        if found:
            json.dumps(found.config.to_json(), allow_nan=False)
        return bool(found)

    return Target("configs", run)


ROWS = (
    {"prompt": "a?", "completion": " b", "answer": "b", "choices": ["b", "c"]},
    {"prompt": "Ünï", "completion": "x", "n": [1, 2.5, None, {"k": "v"}]},
)
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


def rows(bed: Bed) -> Target:
    """A file of rows changed: each row read is one that comes back from the store as it was."""

    def chat(messages: Any) -> tuple[str, str]:
        return "".join(m["content"] for m in messages[:-1]), messages[-1]["content"]

    def run(rng: random.Random, folder: Path) -> bool:
        docs: list[Any] = list(ROWS) if rng.random() < 0.7 else [CHAT, CHAT]
        lines = [
            mutating.json_bytes(rng, doc) if rng.random() < 0.7 else json.dumps(doc).encode()
            for doc in docs
        ]
        (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
        found = taken(lambda: read_source("rows.jsonl", root=folder, render_chat=chat))
        if found and rows_from_jsonl(rows_to_jsonl(found)) != found:
            raise Accepted("rows that do not come back")
        return bool(found)

    return Target("configs", run)


def outcomes(bed: Bed) -> Target:
    """A file of outcomes changed: what is read is finite where it says something."""
    keys = [hashlib.sha256(bytes([i])).digest()[:16] for i in range(4)]
    docs = [
        {"row": 0, "value": 1.0},
        {"row": keys[1].hex(), "value": True},
        {"row": 2, "value": 0.5},
    ]

    def run(rng: random.Random, folder: Path) -> bool:
        lines = [
            mutating.json_bytes(rng, doc) if rng.random() < 0.5 else json.dumps(doc).encode()
            for doc in docs
        ]
        (folder / "o.jsonl").write_bytes(b"\n".join(lines))
        found = taken(lambda: [read_outcomes(folder / "o.jsonl", keys)])
        if found and np.isinf(found[0]).any():
            raise Accepted("an outcome is not finite")
        return bool(found)

    return Target("configs", run)


def targets(bed: Bed) -> dict[str, Target]:
    """All of them by name."""
    found = {f"stored {name}": stored(bed, name) for name in bed.stored}
    found |= {f"resealed {name}": resealed(bed, name) for name in bed.stored}
    for name in bed.imports:
        found[f"import {name}"] = imported(bed, name, "weights")
        found[f"config of {name}"] = imported(bed, name, "config")
    found["import router"] = routed(bed, "weights")
    found["config of router"] = routed(bed, "config")
    found["base weights"] = base_weights(bed)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        found[f"base {name}"] = base_config(bed, name)
    found["lori.toml"] = toml(bed)
    found["rows"] = rows(bed)
    found["outcomes"] = outcomes(bed)
    return found
