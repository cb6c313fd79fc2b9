"""Heads of GGUF files: as the gguf package reads them, and damaged in any way."""

import random
import struct

import numpy as np
import pytest

from lowbit.checkpoint.gguf.blocks import decoded, pieces_of
from lowbit.checkpoint.gguf.header import read_head
from lowbit.errors import InputError

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")

TEXTS = ["one", "two", "three"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file with a value of each type, and tensors of several."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint64("count", 7)
    writer.add_float32("share", 0.5)
    writer.add_bool("whether", True)
    writer.add_int8("less", -1)
    writer.add_array("texts", TEXTS)
    writer.add_array("numbers", [1, 2, 3])
    rng = np.random.default_rng(0)
    writer.add_tensor("plain", rng.normal(size=(4, 3)).astype(np.float32))
    blocks = gguf.quantize(rng.normal(size=(2, 8, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("stack", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def damaged(file, tmp_path, change) -> str:
    """What is said of the file after `change` of its bytes."""
    data = bytearray(file.read_bytes())
    made = tmp_path / "damaged.gguf"
    changed = change(data)
    made.write_bytes(data if changed is None else changed)
    with pytest.raises(InputError) as error:
        read_head(made)
    assert "\n" not in str(error.value) and "damaged.gguf" in str(error.value)
    return str(error.value)


def test_it_is_what_the_package_reads(file):
    head, theirs = read_head(file), gguf.GGUFReader(file)
    assert head.metadata == {
        "general.architecture": "llama", "count": 7, "share": 0.5, "whether": True, "less": -1, "texts": 3, "numbers": 3
    }  # fmt: skip
    for ours, tensor in zip(head.tensors, theirs.tensors, strict=True):
        assert (ours.name, ours.offset, ours.nbytes) == (tensor.name, tensor.data_offset, tensor.n_bytes)
        assert ours.kind == tensor.tensor_type.name and ours.values == tuple(tensor.shape.tolist()[::-1])
        assert np.array_equal(ours.read().numpy().reshape(-1), tensor.data.view(np.uint8).reshape(-1))


def test_rows_are_read_from_where_they_lie(file):
    stack = next(tensor for tensor in read_head(file).tensors if tensor.name == "stack")
    whole = decoded(stack.read().view(16, -1), "Q8_0", torch.float32)
    for rows in ([3, 4, 5], [5, 3], [15], list(range(16))[::-1], [2, 2]):
        pieces = pieces_of([stack], np.array(rows))
        assert torch.equal(torch.cat([decoded(piece.read(), "Q8_0", torch.float32) for piece in pieces]), whole[rows])
    two = pieces_of([stack, stack], np.array([14, 15, 16, 17, 1]))
    assert [piece.rows for piece in two] == [2, 2, 1] and two[0].blocks.nbytes == 2 * 68


def at(data: bytearray, text: bytes) -> int:
    """Where a text ends."""
    return data.index(text) + len(text)


def patch(position, form, *values):
    def change(data):
        struct.pack_into(form, data, position(data), *values)

    return change


DAMAGES = {
    "does not begin with GGUF": patch(lambda data: 0, "<I", 1),
    "version 99": patch(lambda data: 4, "<I", 99),
    "holds 1,152,921,504,606,846,976 tensors": patch(lambda data: 8, "<Q", 2**60),
    "1,152,921,504,606,846,976 values of metadata": patch(lambda data: 16, "<Q", 2**60),
    "ends within a key of its metadata": patch(lambda data: 24, "<Q", 2**62),
    "a list of 1,152,921,504,606,846,976 texts": patch(lambda data: at(data, b"texts") + 8, "<Q", 2**60),
    "ends within the value of 'numbers'": patch(lambda data: at(data, b"numbers") + 8, "<Q", 2**61),
    "a list of type 9": patch(lambda data: at(data, b"numbers") + 4, "<I", 9),
    "is of type 77, which there is none of": patch(lambda data: at(data, b"count"), "<I", 77),
    "has 0 dimensions": patch(lambda data: at(data, b"plain"), "<I", 0),
    "plain has 4,000,000,000 dimensions": patch(lambda data: at(data, b"plain"), "<I", 4_000_000_000),
    "plain has shape": patch(lambda data: at(data, b"plain") + 4, "<QQ", 2**62, 2**62),
    "plain is said to be at": patch(lambda data: at(data, b"plain") + 24, "<Q", 2**40),
    "plain in damaged.gguf is of type 250": patch(lambda data: at(data, b"plain") + 20, "<I", 250),
    "no multiple of 32 as Q8_0 takes": patch(lambda data: at(data, b"stack") + 4, "<Q", 33),
    "stack is said to be at": patch(lambda data: at(data, b"stack") + 4, "<Q", 64 * 1024),
    "plain is in it twice": lambda data: data.replace(b"stack", b"plain"),
    "'share' is in its metadata twice": lambda data: data.replace(b"count", b"share"),
    "it names a tensor '\\x1b[2J.'": lambda data: data.replace(b"stack", b"\x1b[2J."),
    "no text in UTF-8": lambda data: data.replace(b"plain", b"\xff\xfe\xff\xfe\xff"),
}  # fmt: skip


@pytest.mark.parametrize("reason", DAMAGES)
def test_damage_is_named(reason, file, tmp_path):
    assert reason in damaged(file, tmp_path, DAMAGES[reason])


def test_a_file_that_ends_early_is_refused(file, tmp_path):
    tensors = read_head(file).tensors
    head, last = min(tensor.offset for tensor in tensors), max(tensor.offset + tensor.nbytes for tensor in tensors)
    for end in (0, 3, 23, *range(24, head, 17), head, last - 1):
        damaged(file, tmp_path, lambda data, end=end: data[:end])


def test_any_byte_may_be_another_one(file, tmp_path):
    """A head is read, or refused in one line."""
    rng, data, made = random.Random(0), file.read_bytes(), tmp_path / "damaged.gguf"
    head = min(tensor.offset for tensor in read_head(file).tensors)
    refused = 0
    for _ in range(400):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 4))):
            changed[rng.randrange(head)] = rng.choice((0, 1, 9, 127, 255, rng.randrange(256)))
        made.write_bytes(changed)
        try:
            read_head(made)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


def test_pipes_are_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(InputError, match="is a pipe"):
        read_head(tmp_path / "model.gguf")
