"""A checkpoint folder read lazily: shards, index, and the ways a download or a stranger gets them wrong."""

import shutil
from pathlib import Path

import pytest
import torch
from folders import edit_tensors, read_json, same_bits, save_random_llama, stored_tensors, write_json
from models import save_tiny
from safetensors.torch import save_file

from lowbit.checkpoint import CheckpointReader
from lowbit.errors import InputError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def single(tmp_path):
    return save_tiny(tmp_path / "model", num_hidden_layers=1)


@pytest.fixture
def sharded(tmp_path):
    return save_tiny(tmp_path / "model", max_shard_size="60KB")


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(InputError) as error:
        reader = CheckpointReader(folder)
        for name in reader.tensors:
            reader.tensor(name)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_reads_what_the_package_reads(layout, request):
    folder = request.getfixturevalue(layout)
    reader = CheckpointReader(folder)
    expected = stored_tensors(folder)
    assert len(reader.files) == len(list(folder.glob("*.safetensors"))) and (len(reader.files) > 2) == (
        layout == "sharded"
    )
    assert reader.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(reader.tensor(name), tensor)
    assert reader.config == read_json(folder / "config.json")


def test_a_tensor_has_memory_of_its_own(single):
    """Writing to it must reach neither the file nor what is read next."""
    reader = CheckpointReader(single)
    first = reader.tensor("model.norm.weight")
    first.zero_()
    assert reader.tensor("model.norm.weight").abs().sum() > 0


def test_no_config(single):
    (single / "config.json").unlink()
    refused(single, "not a model folder", str(single))


def test_no_folder(tmp_path):
    refused(tmp_path / "absent", "not a model folder")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b'{"a": 1,}', b"[" * 100_000, b"\xff\xfe{}"],
    ids=["empty", "cut", "comma", "nested", "not UTF-8"],
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_damaged_json(sharded, name, text):
    (sharded / name).write_bytes(text)
    refused(sharded, name, "JSON")


@pytest.mark.parametrize("data", [[], "llama", 3, None])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_of_another_kind(sharded, name, data):
    write_json(sharded / name, data)
    refused(sharded, name)


def test_config_that_is_a_folder(single):
    (single / "config.json").unlink()
    (single / "config.json").mkdir()
    refused(single, "config.json")


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_index_without_a_map(sharded, weight_map):
    write_json(sharded / INDEX, {"metadata": {}, "weight_map": weight_map})
    refused(sharded, INDEX, "weight_map")


@pytest.mark.parametrize(
    "place",
    ["../outside.safetensors", "/etc/outside.safetensors", "..\\outside.safetensors", "a/../../outside.safetensors",
     "sub/outside.safetensors", "C:\\outside.safetensors", ".", "..", ""],
)  # fmt: skip
def test_index_that_names_a_file_elsewhere(sharded, place):
    """Even where the file exists: a stranger's index must not reach files that were not downloaded with it."""
    (sharded / "sub").mkdir()
    for target in (sharded.parent / "outside.safetensors", sharded / "sub" / "outside.safetensors"):
        save_file({"a": torch.ones(2)}, target)
    index = read_json(sharded / INDEX)
    index["weight_map"]["model.norm.weight"] = place
    write_json(sharded / INDEX, index)
    refused(sharded, INDEX, "refusing to open it")


@pytest.mark.parametrize("place", ["pytorch_model.bin", 7, None, ["model.safetensors"], "model.safetensors\n"])
def test_index_that_names_no_safetensors_file(sharded, place):
    index = read_json(sharded / INDEX)
    index["weight_map"]["model.norm.weight"] = place
    write_json(sharded / INDEX, index)
    refused(sharded)


def test_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, shard.name, "missing")


def test_truncated_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(sharded, shard.name, "truncated")


def test_shard_of_another_checkpoint(sharded):
    """Names are right, contents are not: the index and the headers must agree."""
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    shutil.copyfile(first, second)
    refused(sharded, first.name, second.name)


def test_index_that_promises_more(sharded):
    index = read_json(sharded / INDEX)
    index["weight_map"]["model.layers.9.weight"] = index["weight_map"]["model.norm.weight"]
    write_json(sharded / INDEX, index)
    refused(sharded, INDEX, "model.layers.9.weight")


def test_index_that_mixes_up_shards(sharded):
    index = read_json(sharded / INDEX)
    files = sorted(set(index["weight_map"].values()))
    moved = next(name for name, file in index["weight_map"].items() if file == files[0])
    index["weight_map"][moved] = files[1]
    write_json(sharded / INDEX, index)
    refused(sharded, INDEX, moved, files[1])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "model.pkl"])
def test_pickles_only(single, name):
    (single / "model.safetensors").rename(single / name)
    message = refused(single, name, "pickle")
    assert "safetensors" in message


def test_no_weights(single):
    (single / "model.safetensors").unlink()
    refused(single, "model.safetensors", str(single))


def test_file_that_shrinks_after_it_was_opened(tmp_path):
    folder = save_random_llama(tmp_path / "model", 32, 32, 1)
    reader = CheckpointReader(folder)
    last = max(reader.tensors.values(), key=lambda info: info.offset)
    with last.file.open("r+b") as file:
        file.truncate(last.offset + 1)
    with pytest.raises(InputError, match=last.file.name):
        reader.tensor(last.name)


def test_file_that_vanishes_after_it_was_opened(tmp_path):
    folder = save_random_llama(tmp_path / "model", 32, 32, 1)
    reader = CheckpointReader(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        reader.tensor("model.norm.weight")


def test_names_and_shapes_come_in_the_order_of_the_shards(sharded):
    reader = CheckpointReader(sharded)
    assert [info.file for info in reader.tensors.values()] == sorted(info.file for info in reader.tensors.values())


def test_tensors_that_the_index_does_not_name_are_read_too(single):
    edit_tensors(single, lambda tensors: tensors.update(extra=torch.ones(2)))
    write_json(single / INDEX, {"metadata": {}, "weight_map": {"model.norm.weight": "model.safetensors"}})
    assert "extra" in CheckpointReader(single).tensors


@pytest.mark.parametrize("index", [-1, 128, 10**9])
def test_rows_that_are_not_there_are_refused(single, index):
    """Not the bytes of the tensors beside it."""
    reader = CheckpointReader(single)
    name = "model.embed_tokens.weight"
    assert torch.equal(reader.rows(name, [127, 0]), reader.tensor(name)[[127, 0]])
    with pytest.raises(InputError, match=f"{name} .* no row {index}"):
        reader.rows(name, [0, index])


@pytest.mark.parametrize("total_size", ["abc", [1], {}, True])
def test_index_of_another_type(sharded, total_size):
    index = read_json(sharded / INDEX)
    write_json(sharded / INDEX, {**index, "metadata": {"total_size": total_size}})
    refused(sharded, INDEX, "metadata.total_size", "expected a number")


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float8_e4m3fn, 0x7F), (torch.float8_e4m3fn, 0xFF), (torch.float8_e5m2, 0x7C)]
)
def test_values_of_8_bits_that_are_not_finite(tmp_path, dtype, bits):
    from lowbit.checkpoint.checked import read_checked

    (tmp_path / "config.json").write_text("{}")
    codes = torch.arange(0, 0x7C if dtype == torch.float8_e5m2 else 0x7F).to(torch.uint8)
    save_file({"x": codes.view(dtype)}, tmp_path / "model.safetensors")
    assert same_bits(read_checked(CheckpointReader(tmp_path), "x"), codes.view(dtype))
    codes[3] = bits
    save_file({"x": codes.view(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"x in model\.safetensors holds 1 NaN or infinite values"):
        read_checked(CheckpointReader(tmp_path), "x")
