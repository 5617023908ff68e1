"""Heads beside an adapter's update: stored bit for bit, and nothing changes without them."""

import json
from dataclasses import replace

import pytest
import torch

from lori_manager.engine import codec
from lori_manager.engine.codec import decode, encode
from lori_manager.engine.container import read_container, write_container
from lori_manager.engine.weights import AdapterWeights, Block, Head, KindWeights, joined_heads
from lori_manager.errors import DamagedObject, InvalidInput


def head(*labels, dtype=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"classifier.weight": (len(labels), 6), "classifier.bias": (len(labels),),
              "bert.pooler.dense.weight": (6, 6)}  # fmt: skip
    return Head(labels, {n: torch.randn(s, generator=g).to(dtype) for n, s in shapes.items()})


def low_rank():
    return AdapterWeights((Block({"m": torch.randn(5, 2)}, 2.0, tensors={"m": torch.randn(2, 3)}),))


def whole():
    return KindWeights("svfit", {"rank": 2}, {"m": torch.randn(4, 3, 2)})


HEADS = {"size": head("big", "tiny", "old"), "colour": head("a", "b", dtype=torch.float32, seed=1)}


@pytest.fixture(params=[low_rank, whole], ids=["low_rank", "kind"])
def weights(request):
    torch.manual_seed(0)
    return request.param()


def test_heads_return_bit_for_bit_in_either_format(weights):
    data = encode(replace(weights, heads=HEADS), {"x": 1})
    found, meta = decode(data)
    assert meta == {"x": 1}
    assert list(found.heads) == ["colour", "size"]
    for task, own in HEADS.items():
        assert found.heads[task].same_as(own)
        assert {t.dtype for t in found.heads[task].tensors.values()} == {
            t.dtype for t in own.tensors.values()
        }
    assert encode(found, {"x": 1}) == data
    assert encode(replace(weights, heads=dict(reversed(HEADS.items()))), {"x": 1}) == data


def test_a_file_without_heads_does_not_speak_of_them(weights):
    data = encode(weights)
    _, record, _ = read_container(data, format_of(weights))
    assert "heads" not in record
    assert not decode(data)[0].heads
    assert len(encode(replace(weights, heads=HEADS))) > len(data)


def format_of(weights):
    return codec.KIND_FORMAT if isinstance(weights, KindWeights) else codec.ADAPTER_FORMAT


def test_cut_and_flipped_files_are_refused(weights):
    data = encode(replace(weights, heads=HEADS))
    for at in range(0, len(data), 7):
        with pytest.raises(DamagedObject):
            decode(data[:at])
        flipped = bytearray(data)
        flipped[at] ^= 4
        with pytest.raises(DamagedObject):
            decode(bytes(flipped))


def put(*path_and_value):
    *path, value = path_and_value

    def change(record):
        node = record["heads"]
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(heads=[]), "a list of heads and none"),
        (lambda r: r.update(heads={}), "'heads' of the file"),
        (lambda r: r["heads"].reverse(), "values need"),
        (lambda r: r["heads"].pop(), "unexpected tensor"),
        (put(0, "labels", ["a"]), "too few"),
        (put(0, "labels", ["a", "a"]), "repeats a label"),
        (put(0, "labels", ["a", "\n"]), "malformed names"),
        (put(0, "labels", ["a", 3]), "malformed names"),
        (put(0, "task", ""), "malformed names"),
        (put(1, "task", "colour"), "repeats a label or a task"),
        (put(0, "task", 3), "'task' of head 0"),
        (put(0, "more", 3), "head 0 must record exactly"),
        (put(0, "shapes", []), "head 0 names no modules"),
        (put(0, "shapes", [[2**31, ["classifier.weight"]]]), "modules of size"),
        (put(0, "shapes", [[2**30, 2, ["classifier.weight"]]]), "cannot hold tensors as large"),
        (put(0, "values", "dtype", "int8"), "has dtype"),
    ],
)
def test_forged_heads_are_refused(weights, change, message):
    data = encode(replace(weights, heads=HEADS))
    meta, record, tensors = read_container(data, format_of(weights))
    record = json.loads(json.dumps(record))
    change(record)
    forged = write_container(format_of(weights), codec.Container(meta, record, tensors))
    with pytest.raises(DamagedObject, match=message):
        decode(forged)


def test_what_is_no_head_is_a_value_error(weights):
    for labels in (("a",), ("a", "a"), ()):
        with pytest.raises(ValueError, match="two labels or more"):
            Head(labels, {"w": torch.ones(1, 1)})
    bad = {
        "not finite": Head(("a", "b"), {"w": torch.tensor([1.0, float("nan")])}),
        "no values in rows": Head(("a", "b"), {"w": torch.ones(0, 2)}),
        "one dtype": Head(("a", "b"), {"w": torch.ones(2), "v": torch.ones(2).half()}),
        "printable": Head(("a", "b\n"), {"w": torch.ones(2)}),
    }
    for message, own in bad.items():
        with pytest.raises(ValueError, match=message):
            encode(replace(weights, heads={"t": own}))


def test_members_heads_are_joined_unless_they_differ_for_one_task():
    first, second = replace(low_rank(), heads={"colour": HEADS["colour"]}), low_rank()
    other = replace(low_rank(), heads=HEADS)
    assert set(joined_heads([first, second, other])) == set(HEADS)
    changed = replace(low_rank(), heads={"colour": head("a", "b", seed=2)})
    with pytest.raises(InvalidInput, match="a head for task 'colour'"):
        joined_heads([first, changed])
