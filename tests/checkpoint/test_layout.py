"""The file layout against the safetensors package: what we write it reads, what it refuses we refuse."""

import json
import random
import struct

import pytest
import torch
from folders import same_bits
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from lowbit.checkpoint import CheckpointReader, TensorInfo
from lowbit.checkpoint.layout import DTYPES, build_header, read_header
from lowbit.errors import InputError


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def packed(header, data=b"", length=None) -> bytes:
    """A file: `header` as JSON, or as it is when it is text or bytes; `length` overrides what the file says of it."""
    if isinstance(header, dict | list):
        header = json.dumps(header)
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def read_all(folder, blob: bytes) -> dict[str, torch.Tensor]:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(blob)
    reader = CheckpointReader(folder)
    return {name: reader.tensor(name) for name in reader.tensors}


EIGHT = b"\0" * 8
SIXTEEN = b"\0" * 16
WHOLE = packed({"a": entry()}, EIGHT)
ATTACKS = {
    "empty file": b"",
    "shorter than the length": b"\x10\0\0\0",
    "header of 0 bytes": packed(""),
    "header of 1 byte": packed("{", EIGHT),
    "header shorter than it says": packed({"a": entry()}, length=10_000),
    "header longer than it says": packed({"a": entry()}, EIGHT, length=20),
    "header of 2^63 bytes": packed({"a": entry()}, EIGHT, length=2**63),
    "header of 2^64 - 1 bytes": packed({"a": entry()}, EIGHT, length=2**64 - 1),
    "header beyond 100 MB": packed({"a": entry()}, EIGHT, length=100_000_001),
    "no JSON": packed("not json at all"),
    "cut JSON": packed('{"a": {"dtype": "F32", "sha'),
    "no UTF-8": packed(b'{"\xff\xfe": 1}'),
    "JSON list": packed([]),
    "JSON string": packed('"model"'),
    "JSON number": packed("12"),
    "JSON null": packed("null"),
    "nested 100,000 deep": packed('{"a":' * 100_000),
    "number of 5,000 digits": packed('{"a": {"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,8]}}', EIGHT),
    "tensor is a list": packed({"a": []}),
    "tensor is null": packed({"a": None}),
    "tensor is a number": packed({"a": 3}),
    "tensor is a string": packed({"a": "F32"}),
    "no dtype": packed({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT),
    "no shape": packed({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT),
    "no offsets": packed({"a": {"dtype": "F32", "shape": [2]}}, EIGHT),
    "unknown dtype": packed({"a": entry("F31")}, EIGHT),
    "dtype null": packed({"a": entry(None)}, EIGHT),
    "dtype list": packed({"a": entry(["F32"])}, EIGHT),
    "shape null": packed({"a": entry(shape=None)}, EIGHT),
    "shape number": packed({"a": entry(shape=2)}, EIGHT),
    "shape string": packed({"a": entry(shape="2")}, EIGHT),
    "shape object": packed({"a": entry(shape={"2": 2})}, EIGHT),
    "shape of a string": packed({"a": entry(shape=["2"])}, EIGHT),
    "shape of a fraction": packed({"a": entry(shape=[2.0])}, EIGHT),
    "shape of null": packed({"a": entry(shape=[None])}, EIGHT),
    "shape of a list": packed({"a": entry(shape=[[2]])}, EIGHT),
    "shape of NaN": packed('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', EIGHT),
    "shape negative": packed({"a": entry(shape=[-2])}, EIGHT),
    "shape negative twice": packed({"a": entry(shape=[-1, -2])}, EIGHT),
    "shape negative, offsets backwards": packed({"a": entry(shape=[-2], offsets=[8, 0]), "b": entry()}, EIGHT),
    "shape too small": packed({"a": entry(shape=[1])}, EIGHT),
    "shape too large": packed({"a": entry(shape=[3])}, EIGHT),
    "shape product wraps to 2": packed({"a": entry("U8", [2**63, 2, 1, 3], [0, 0])}),
    "shape product wraps to 0": packed({"a": entry("U8", [2**32, 2**32], [0, 0])}),
    "shape with 0 and 2^70": packed({"a": entry("U8", [0, 2**70], [0, 0])}),
    "offsets null": packed({"a": entry(offsets=None)}, EIGHT),
    "offsets of null": packed({"a": entry(offsets=[0, None])}, EIGHT),
    "offsets of strings": packed({"a": entry(offsets=["0", "8"])}, EIGHT),
    "end is a string": packed({"a": entry(offsets=[0, "8"])}, EIGHT),
    "offsets of fractions": packed({"a": entry(offsets=[0.0, 8.0])}, EIGHT),
    "offset infinite": packed('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, Infinity]}}', EIGHT),
    "one offset": packed({"a": entry(offsets=[0])}, EIGHT),
    "three offsets": packed({"a": entry(offsets=[0, 8, 8])}, EIGHT),
    "offsets negative": packed({"a": entry(offsets=[-8, 0])}, EIGHT),
    "offsets reach into the header": packed({"a": entry(offsets=[-4, 4])}, EIGHT),
    "offsets backwards": packed({"a": entry(offsets=[8, 0])}, EIGHT),
    "offsets behind the file": packed({"a": entry(offsets=[8, 16])}, EIGHT),
    "offsets of 2^64": packed({"a": entry(offsets=[2**64, 2**64 + 8])}, EIGHT),
    "two tensors on one place": packed({"a": entry(), "b": entry()}, EIGHT),
    "two tensors overlap": packed({"a": entry(), "b": entry(offsets=[4, 12])}, SIXTEEN[:12]),
    "hole at the start": packed({"a": entry(offsets=[8, 16])}, SIXTEEN),
    "hole in the middle": packed({"a": entry(), "b": entry(offsets=[12, 20])}, b"\0" * 20),
    "data cut": WHOLE[:-1],
    "data missing": WHOLE[:-8],
    "data too long": WHOLE + b"\0",
    "one name twice": packed(
        '{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        ' "a": {"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        SIXTEEN,
    ),
}


def test_the_file_that_attacks_are_made_from_is_whole(tmp_path):
    assert same_bits(read_all(tmp_path, WHOLE)["a"], torch.zeros(2))


@pytest.mark.parametrize("name", ATTACKS)
def test_damaged_file_is_refused(name, tmp_path):
    # nobody opens these: if the package starts to, the expectation is wrong and not lowbit
    with pytest.raises((SafetensorError, OverflowError)):
        load(ATTACKS[name])
    with pytest.raises(InputError, match=r"model\.safetensors") as refused:
        read_all(tmp_path, ATTACKS[name])
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_unknown_dtype_is_named(tmp_path):
    """The file may be fine and newer than lowbit: downloading it again would not help."""
    with pytest.raises(InputError, match="F31") as refused:
        read_all(tmp_path, ATTACKS["unknown dtype"])
    assert "download it again" not in str(refused.value)


def test_mutated_headers_are_read_as_the_package_reads_them_or_refused(tmp_path):
    """600 headers with one to three bytes changed: lowbit opens no more of them than the package and none otherwise."""
    tensors = {
        "a_name_of_some_length": torch.randn(3, 4),
        "another_such_name": torch.arange(6, dtype=torch.int16),
        "and_a_scalar": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "source.safetensors")
    blob = (tmp_path / "source.safetensors").read_bytes()
    length = struct.unpack("<Q", blob[:8])[0]
    opened = 0
    generator = random.Random(0)
    for _ in range(600):
        changed = bytearray(blob)
        for _ in range(generator.randint(1, 3)):
            changed[generator.randrange(8, 8 + length)] = ord(generator.choice('0123456789-,:[]{}" aFI.e'))
        changed = bytes(changed)
        try:
            actual = read_all(tmp_path, changed)
        except InputError:
            continue
        expected = load(changed)
        assert actual.keys() == expected.keys(), changed[8 : 8 + length]
        assert all(same_bits(actual[name], expected[name]) for name in expected), changed[8 : 8 + length]
        opened += 1
    assert opened > 20  # changes in names and in the padding do no harm


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_odd_shape_is_read_as_the_package_wrote_it(name, tmp_path):
    dtype = DTYPES[name]
    shapes = {"matrix": (3, 5), "scalar": (), "empty": (0,), "no rows": (3, 0, 2), "one": (1,), "prime": (7,)}
    tensors = {
        key: torch.randint(0, 2, shape).to(dtype)
        if dtype == torch.bool
        else torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).view(shape)
        for key, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt", "note": "ü\n"})
    (tmp_path / "config.json").write_text("{}")
    reader = CheckpointReader(tmp_path)
    assert set(reader.tensors) == set(tensors)
    for key, tensor in tensors.items():
        info = reader.tensors[key]
        assert (info.shape, info.dtype, info.nbytes) == (shapes[key], dtype, tensor.nbytes)
        assert same_bits(reader.tensor(key), tensor)


def test_file_without_tensors(tmp_path):
    assert read_all(tmp_path, packed("{}")) == {}
    assert read_all(tmp_path, packed({"__metadata__": {"format": "pt"}})) == {}


def test_header_is_aligned_and_says_pt(tmp_path):
    infos = [
        TensorInfo("byte", torch.uint8, (3,)),
        TensorInfo("word", torch.int64, (1, 1)),
        TensorInfo("half", torch.bfloat16, (5,)),
        TensorInfo("float", torch.float32, ()),
        TensorInfo("nothing", torch.float32, (0, 4)),
        TensorInfo("naïve \"name\"\\.weight", torch.float16, (1,)),
    ]  # fmt: skip
    header, offsets = build_header(infos, {"format": "pt"})
    assert len(header) % 8 == 0
    assert all(offsets[info.name] % info.dtype.itemsize == 0 for info in infos)
    path = tmp_path / "model.safetensors"
    path.write_bytes(header + bytes(sum(info.nbytes for info in infos)))
    assert {(t.name, t.dtype, t.shape, t.offset) for t in read_header(path)} == {
        (info.name, info.dtype, info.shape, offsets[info.name]) for info in infos
    }
    loaded = load(path.read_bytes())
    assert {(name, t.dtype, tuple(t.shape)) for name, t in loaded.items()} == {
        (info.name, info.dtype, info.shape) for info in infos
    }
    assert json.loads(header[8:])["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": entry(shape=[0] * 65, offsets=(0, 0))}, "a has 65 dimensions"),
        ({"a" * 600: entry(offsets=(0, 0), shape=[0])}, "expected 1 to 512 characters"),
        ({"a\x1b[2J\n": entry(offsets=(0, 0), shape=[0])}, r"'a\\x1b\[2J\\n'"),
        ('{"a": [' + "[]," * 9_000_000 + "[]]}", "more than 8,000,000 values"),
    ],
    ids=["dimensions", "long name", "control characters", "lists"],
)
def test_headers_have_bounds(tmp_path, header, says):
    with pytest.raises(InputError, match=says) as caught:
        read_all(tmp_path, packed(header))
    assert str(caught.value).isprintable()


def test_tensors_of_a_checkpoint_have_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit.checkpoint.reader.MOST_TENSORS", 2)
    with pytest.raises(InputError, match="more than 2 tensors"):
        read_all(tmp_path, packed({name: entry(offsets=(0, 0), shape=[0]) for name in "abc"}))
