"""The file around the tensors: same bytes everywhere, and nothing altered gets through."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from lori_manager.engine.container import Container, read_container, read_meta, write_container
from lori_manager.errors import DamagedObject, IncompatibleStore

CONTENT = Container(
    {"name": "é", "list": [1, 2.5, None, True]},
    {"b": 1, "a": {"y": "z", "x": [[]]}},
    {"t": np.arange(9, dtype=np.uint8), "s": np.empty(0, np.uint8)},
)

WRITE_ELSEWHERE = """
import hashlib, numpy as np
from lori_manager.engine.container import Container, write_container
names = {f"name{i}" for i in range(50)}  # a set: its order changes with the hash seed
data = write_container("f", Container(
    {n: n for n in names}, {n + "r": 1 for n in names},
    {n: np.frombuffer(n.encode(), np.uint8) for n in names}))
print(hashlib.sha256(data).hexdigest())
"""


@pytest.fixture(scope="module")
def data():
    return write_container("f", CONTENT)


def split(data):
    """The header's JSON and what follows it."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header, payload):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def canonical(doc):
    return json.dumps(doc, sort_keys=True, separators=(",", ":"))


def with_doc(data, **changes):
    header, payload = split(data)
    doc = json.loads(header["__metadata__"]["lori"]) | changes
    header["__metadata__"]["lori"] = canonical({k: v for k, v in doc.items() if v != "drop"})
    return join(header, payload)


def test_content_returns(data):
    meta, record, tensors = read_container(data, "f")
    assert (meta, record) == CONTENT[:2]
    assert {n: t.tobytes() for n, t in tensors.items()} == {"s": b"", "t": bytes(range(9))}


def test_meta_is_read_from_the_beginning_of_a_file_alone(data):
    header_end = 8 + int.from_bytes(data[:8], "little")
    assert read_meta(data[:header_end]) == CONTENT.meta
    with pytest.raises(DamagedObject, match="cut short"):
        read_meta(data[: header_end - 1])


def test_the_same_content_gives_the_same_bytes_in_every_process():
    def digest(hash_seed):
        env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", WRITE_ELSEWHERE]
        return subprocess.run(command, env=env, capture_output=True, check=True).stdout

    assert digest("1") == digest("2")


def test_a_file_cut_anywhere_or_extended_is_refused(data):
    for end in range(len(data)):
        with pytest.raises(DamagedObject):
            read_container(data[:end], "f")
    with pytest.raises(DamagedObject):
        read_container(data + b"\0", "f")


def test_every_flipped_bit_is_noticed(data):
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises((DamagedObject, IncompatibleStore)):
            read_container(bytes(flipped), "f")


def test_a_file_of_another_format_is_named(data):
    with pytest.raises(DamagedObject, match="expected a g file, found 'f'"):
        read_container(data, "g")


def test_a_newer_version_asks_for_an_update(data):
    for read in (read_meta, lambda d: read_container(d, "f")):
        with pytest.raises(IncompatibleStore, match=r"version 2.*update lori"):
            read(with_doc(data, version=2))


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, True, None])
def test_impossible_versions_are_refused(data, version):
    with pytest.raises(DamagedObject, match="version"):
        read_container(with_doc(data, version=version), "f")


@pytest.mark.parametrize("key", ["format", "version", "meta", "sha256"])
def test_every_field_of_the_envelope_is_needed(data, key):
    with pytest.raises(DamagedObject, match=key):
        read_container(with_doc(data, **{key: "drop"}), "f")


@pytest.mark.parametrize(
    "changes",
    [{"meta": []}, {"meta": {}}, {"format": []}, {"sha256": 0}, {"extra": 1}, {"b": 2}],
)
def test_a_changed_document_is_refused(data, changes):
    with pytest.raises(DamagedObject):
        read_container(with_doc(data, **changes), "f")


def entry(begin, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": shape or [end - begin], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "t",
    [
        None,
        [],
        {},
        entry(0, 9) | {"more": 1},
        entry(0, 9, "I8"),
        entry(0, 9, "F64"),
        entry(0, 9, shape=[3, 3]),
        entry(0, 9, shape=[2**70]),
        entry(0, 9, shape=[-9]),
        entry(0, 9, shape=[9.0]),
        entry(0, 9, shape=9),
        entry(0, 9, shape=[True]),
        entry(0, 8),
        entry(0, 2**60),
        entry(1, 10),
        entry(0, 9) | {"data_offsets": [0]},
        entry(0, 9) | {"data_offsets": ["0", "9"]},
    ],
)
def test_an_odd_tensor_is_refused(data, t):
    header, payload = split(data)
    header["t"] = t
    with pytest.raises(DamagedObject):
        read_container(join(header, payload), "f")


def test_renamed_missing_and_additional_tensors_are_refused(data):
    header, payload = split(data)
    for change in (
        {"../../t": header["t"]},
        {"t": header["t"], "u": entry(9, 9)},
        {"t": header["t"], "u": header["t"]},
    ):
        rest = {k: v for k, v in header.items() if k != "t"}
        with pytest.raises(DamagedObject):
            read_container(join(rest | change, payload), "f")


def test_duplicate_keys_are_refused_though_safetensors_takes_the_last(data):
    header, payload = split(data)
    text = json.dumps(header)
    twice = text[:-1] + ', "t": ' + json.dumps(header["t"]) + "}"
    with pytest.raises(DamagedObject, match="twice"):
        read_container(join(twice.encode(), payload), "f")
    header["__metadata__"]["lori"] = header["__metadata__"]["lori"].replace("{", '{"b":1,', 1)
    with pytest.raises(DamagedObject, match="twice"):
        read_container(join(header, payload), "f")


@pytest.mark.parametrize(
    "metadata",
    [None, [], {}, {"lori": "{}", "x": ""}, {"lori": 1}, {"lori": ""}, {"lori": "[]"}]
    + [{"lori": text} for text in ("{", "null", '{"a":NaN}', '{"a":1e999}', "[" * 10**5)]
    + [{"lori": '{"a":' + "9" * 5000 + "}"}, {"lori": '{"a":' + "[" * 3000 + "]" * 3000 + "}"}],
)
def test_metadata_that_is_not_ours_is_refused(data, metadata):
    header, payload = split(data)
    header["__metadata__"] = metadata
    for read in (read_meta, lambda d: read_container(d, "f")):
        with pytest.raises(DamagedObject) as caught:
            read(join(header, payload))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"{}" + b"[" * 10**5, b"[" * 10**5, b"{}{}"]
)
def test_a_header_that_is_not_an_object_is_refused(text):
    for read in (read_meta, lambda d: read_container(d, "f")):
        with pytest.raises(DamagedObject):
            read(join(text, b""))


def test_spaces_in_the_metadata_are_refused(data):
    header, payload = split(data)
    header["__metadata__"]["lori"] = header["__metadata__"]["lori"].replace(":", ": ")
    with pytest.raises(DamagedObject, match="not as lori writes it"):
        read_container(join(header, payload), "f")


@pytest.mark.parametrize(
    "meta", [{"a": {1, 2}}, {"a": float("nan")}, {"a": (1, 2)}, {1: 2}, {"a": {None: 1}}]
)
def test_meta_that_json_would_change_is_a_value_error(meta):
    with pytest.raises(ValueError, match="`meta` must"):
        write_container("f", Container(meta, {}, {}))


def test_hostile_names_appear_shortened_in_messages(data):
    header, payload = split(data)
    header["x" * 10**6] = {}
    with pytest.raises(DamagedObject) as caught:
        read_container(join(header, payload), "f")
    assert len(str(caught.value)) < 200
