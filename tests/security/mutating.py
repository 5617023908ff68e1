"""Mutations with a seed: bytes, JSON documents and safetensors files, the same in every run."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

BOMBS = ("(a+)+b", "(.*)*x", r"(([a-z_.0-9]+)+)+!", "(?:(?:.*.*)*.*)*z", "(", "[", "a{9999999}",
         r"(.*\.)*(.*\.)*(.*\.)*q_projx", "|".join("ab" for _ in range(3000)))  # fmt: skip
NAMES = ("", ".", "..", "../../x", "/etc/passwd", "a/b", "con", "a\0b", "\ud800", "\u202e",
         "x" * 10_000, "\n", "\x1b[31m", "__class__", "base", "latest", "NaN", "{}",
         "${x}", "-")  # fmt: skip
NUMBERS = (0, -1, 1, 2, 3, 7, 2**16, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30,
           10**400, 0.0, -0.0, 0.5, 1e-320, 1e38, 1e39, 1e308, float("inf"),
           float("nan"))  # fmt: skip


def nasty(rng: random.Random) -> Any:
    """A value that nobody expects."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(NAMES)
    if kind == 2:
        return rng.choice(BOMBS)
    if kind == 3:
        return rng.choice((None, True, False))
    if kind == 4:
        deep: Any = []
        for _ in range(rng.choice((3, 70, 200))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    if kind == 5:
        return [rng.choice(NUMBERS) for _ in range(rng.choice((0, 1, 2, 3, 9)))]
    if kind == 6:
        return {rng.choice(NAMES): rng.choice(NUMBERS) for _ in range(rng.choice((0, 1, 2)))}
    return [rng.choice((*NAMES, *BOMBS)) for _ in range(rng.choice((1, 2, 500)))]


def places(doc: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a document."""
    found = [path]
    if isinstance(doc, dict):
        for key, value in doc.items():
            found += places(value, (*path, key))
    elif isinstance(doc, list):
        for i, value in enumerate(doc[:20]):
            found += places(value, (*path, i))
    return found


def document(rng: random.Random, doc: Any) -> Any:
    """A changed copy: values replaced, taken from elsewhere, removed, added, renamed."""
    doc = {"root": copy.deepcopy(doc)}
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        ways = [path for path in places(doc) if path]
        way = rng.choice(ways)
        holder: Any = doc
        for step in way[:-1]:
            holder = holder[step]
        act = rng.randrange(6)
        if act <= 1 or way == ("root",):
            holder[way[-1]] = nasty(rng)
        elif act == 2:
            other: Any = doc
            for step in rng.choice(ways):
                other = other[step]
            holder[way[-1]] = copy.deepcopy(other)
        elif act == 3:
            del holder[way[-1]]
        elif isinstance(holder, dict):
            key = rng.choice((*NAMES, "rank", "use_dora", "auto_map", "bias", "unknown"))
            holder[key] = holder.pop(way[-1]) if act == 4 else nasty(rng)
        else:
            holder.insert(rng.randrange(len(holder) + 1), nasty(rng))
        doc.setdefault("root", None)
    return doc["root"]


def json_bytes(rng: random.Random, doc: Any) -> bytes:
    """A mutated document as text, its keys twice or its bytes changed at times."""
    text = json.dumps(document(rng, doc))
    act = rng.random()
    if act > 0.95:
        deep = rng.choice((900, 5000, 100_000)) * rng.choice(("[", '{"a":'))
        at = text.find(":", rng.randrange(len(text))) + 1
        return (text[:at] + deep + text[at:]).encode("utf-8", "surrogatepass")
    if act < 0.1 and "," in text:
        part = rng.choice(text.strip("{}").split(","))
        text = text[:-1] + "," + part + text[-1:]
    data = text.encode("utf-8", "surrogatepass")
    return raw(rng, data) if 0.1 <= act < 0.25 else data


def raw(rng: random.Random, data: bytes) -> bytes:
    """Bits flipped, bytes put in, taken out, doubled, cut off; never the same bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(out)) if out else 0
        size = rng.choice((1, 1, 2, 8, 64))
        act = rng.randrange(7)
        if act == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif act == 1:
            out[at:at] = rng.randbytes(size)
        elif act == 2:
            del out[at : at + size]
        elif act == 3:
            out[at : at + size] = rng.choice((b"\0", b"\xff", b"\x7f", b"9", b"{")) * size
        elif act == 4:
            begin = rng.randrange(len(out)) if out else 0
            out[at:at] = out[begin : begin + size]
        elif act == 5:
            del out[at:]
        else:
            out[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**62, 2**64 - 1)))
    return bytes(out) if bytes(out) != data else data + b"\0"


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and values of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: Any, values: bytes) -> bytes:
    """The inverse of `split`, whatever the header holds."""
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + values


def safetensors(rng: random.Random, data: bytes) -> bytes:
    """A file whose lengths fit again: header or values changed; or any bytes."""
    header, values = split(data)
    act = rng.random()
    if act < 0.3:
        return raw(rng, data)
    if act < 0.55:
        return joined(document(rng, header), values)
    if act < 0.75:  # names exchanged or made up
        entries = [key for key in header if key != "__metadata__"]
        one, two = rng.choice(entries), rng.choice(entries)
        if rng.random() < 0.5:
            header[one], header[two] = header[two], header[one]
        else:
            header[rng.choice((*NAMES, one + ".bias", one.upper()))] = header.pop(one)
        return joined(header, values)
    return joined(header, spoiled(rng, values))


def spoiled(rng: random.Random, values: bytes) -> bytes:
    """Some values are NaN, infinite or anything."""
    out = bytearray(values)
    for _ in range(rng.choice((1, 1, 5))):
        at = 4 * rng.randrange(max(1, len(out) // 4))
        out[at : at + 4] = rng.choice(
            (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff" * 4, rng.randbytes(4), b"\0\x7c\0\x7c")
        )
    return bytes(out[: len(values)])
