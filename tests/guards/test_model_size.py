"""Configs that ask for more than the weight files hold: refused before anything is built."""

import json

import pytest
import torch
from folders import edit_config
from models import save_tiny

import lowbit
from lowbit.checkpoint import CheckpointReader, TensorInfo
from lowbit.discovery import skeleton
from lowbit.errors import InputError
from lowbit.folders.locate import load_config
from lowbit.guards.model_size import check_counts, no_larger_than
from lowbit.verification.checks import static_checks

TENSORS = [TensorInfo("embed", torch.bfloat16, (2048, 64)), TensorInfo("up", torch.int32, (128, 8))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where = tmp_path_factory.mktemp("models")
    plain = save_tiny(where / "plain")
    lowbit.quantize(plain, where / "packed", scheme="W4A16-G32")
    return {"plain": plain, "packed": where / "packed"}


@pytest.fixture(params=["plain", "packed"])
def folder(folders, request, tmp_path):
    import shutil

    return shutil.copytree(folders[request.param], tmp_path / "model")


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**6},
        {"n_layer": 2 * 10**9},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"depths": [2, 10**7]},
        {"vocab_size": 3 * 10**7},
        {"hidden_size": 10**6},
        {"vision_config": {"intermediate_size": 1e9}},
        {"num_labels": 10**9},
        {"hidden_size": float("inf")},
    ],
)
def test_numbers_that_the_files_do_not_bear_out(config):
    with pytest.raises(InputError, match=r"config\.json says .* but the weight files hold 2 tensors"):
        check_counts(config, TENSORS)


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 100, "vocab_size": 32_000, "max_position_embeddings": 10**7, "rope_theta": 5e6},
        {"image_token_id": 151_655, "model_max_length": 10**30, "n_positions": 10**6, "sliding_window": 2**20},
        {"num_hidden_layers": None, "hidden_size": "x", "layers": [None, {}], "hidden_dropout": 0.1},
    ],
)
def test_numbers_that_are_fine_need_no_files(config):
    check_counts(config, iter(lambda: pytest.fail("the files were asked for"), None))


def test_a_large_vocabulary_that_is_there():
    check_counts({"vocab_size": 262_144}, [TensorInfo("embed", torch.bfloat16, (262_144, 8))])


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 10**6}, {"num_hidden_layers": 2 * 10**9}, {"vocab_size": 3 * 10**7}], ids=str
)
def test_every_reader_refuses_at_once(folder, changes, tmp_path):
    edit_config(folder, **changes)
    refusal = next(str(check.detail) for check in static_checks(folder) if not check.ok)
    assert "config.json says" in refusal
    for call in (
        lambda: lowbit.load(folder),
        lambda: lowbit.plan(folder),
        lambda: lowbit.quantize(folder, tmp_path / "out"),
        lambda: lowbit.dequantize(folder, tmp_path / "out"),
    ):
        with pytest.raises(InputError, match=r"config\.json says|holds no quantized weights"):
            call()


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 900}, {"hidden_size": 2**14, "head_dim": 2**12}, {"intermediate_size": 2**16}],
    ids=str,
)
def test_models_that_grow_beyond_the_files_are_not_finished(folder, changes):
    """Numbers that look like those of other models: noticed while modules are made."""
    edit_config(folder, **changes)
    tensors = CheckpointReader(folder).tensors.values()
    with pytest.raises(InputError, match="the config of another model"):
        skeleton(load_config(folder), tensors=tensors)
    with pytest.raises(InputError, match="the config of another model"):
        lowbit.load(folder)


def test_models_beside_it_are_not_counted():
    """The limit ends with the block, and is one of its own thread."""
    import threading

    def build():
        return torch.nn.Linear(4096, 4096)

    with no_larger_than(TENSORS):
        other = threading.Thread(target=build)
        other.start()
        other.join()
        with pytest.raises(InputError, match="the weight files hold 2 tensors"):
            torch.nn.Sequential(*(torch.nn.Linear(4096, 4096, device="meta") for _ in range(3)))
    build()


def test_config_values_of_other_types_are_refused(folder):
    for changes in ({"architectures": 2}, {"architectures": [None]}, {"model_type": []}, {"quantization_config": "x"}):
        original = json.loads((folder / "config.json").read_text())
        edit_config(folder, **changes)
        for call in (CheckpointReader, load_config, lowbit.load):
            with pytest.raises(InputError, match=f"config.json: {next(iter(changes))}"):
                call(folder)
        (folder / "config.json").write_text(json.dumps(original))
