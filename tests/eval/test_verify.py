"""Each corruption of a finished folder is found, and the line that says so names it."""

import json
import shutil

import pytest
import torch
from folders import edit_config, edit_tensors, read_json, save_chat_model, write_json
from models import save_tiny
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.errors import InputError

UP = "model.layers.0.mlp.up_proj"
SCALE = f"{UP}.weight_scale"
NORM = "model.layers.1.input_layernorm.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model, and its quantized folder in several shards."""
    root = tmp_path_factory.mktemp("verify")
    save_chat_model(root / "dense")
    (root / "dense" / "LICENSE").write_text("anybody may do anything")
    lowbit.quantize(root / "dense", root / "q", scheme="W4A16_ASYM-G32", max_shard_size="60kB")
    return root


@pytest.fixture
def copy(folders, tmp_path):
    shutil.copytree(folders / "q", tmp_path / "q")
    return tmp_path / "q"


def shard_of(folder, name):
    return folder / read_json(folder / INDEX)["weight_map"][name]


def edit(name, change):
    """Rewrite the shard of a tensor after `change(tensors)`."""

    def run(folder):
        file = shard_of(folder, name)
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return run


def flip_byte(folder):
    """One bit of one code, in place."""
    file = shard_of(folder, f"{UP}.weight_packed")
    data = bytearray(file.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = 8 + int.from_bytes(data[:8], "little") + header[f"{UP}.weight_packed"]["data_offsets"][0]
    data[start + 5] ^= 1
    file.write_bytes(data)


def drop(name):
    def run(folder):
        edit(name, lambda tensors: tensors.pop(name))(folder)
        index = read_json(folder / INDEX)
        del index["weight_map"][name]
        write_json(folder / INDEX, index)

    return run


def swap_shards(folder):
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    first.rename(folder / "third")
    second.rename(first)
    (folder / "third").rename(second)


def change_json(name, change):
    def run(folder):
        data = read_json(folder / name)
        change(data)
        write_json(folder / name, data)

    return run


def quantization(**changes):
    def change(config):
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)

    return change_json("config.json", change)


def truncate(folder):
    file = shard_of(folder, NORM)
    file.write_bytes(file.read_bytes()[:-8])


CORRUPTIONS = {
    "a code byte": (flip_byte, f"{UP}.weight_packed"),
    "a dropped tensor": (drop(NORM), NORM),
    "a dropped scale": (drop(f"{UP}.weight_scale"), f"{UP}.weight_scale"),
    "swapped shards": (swap_shards, INDEX),
    "negative scale": (edit(SCALE, lambda t: t[SCALE][3, 1].neg_()), f"scales: {SCALE} holds negative"),
    "zero scale": (edit(SCALE, lambda t: t[SCALE][3, 1].zero_()), f"scales: {SCALE} holds zeros"),
    "infinite scale": (edit(SCALE, lambda t: t[SCALE].fill_(torch.inf)), f"scales: {SCALE} holds NaN or infinite"),
    "a zero point": (edit(f"{UP}.weight_zero_point", lambda t: t[f"{UP}.weight_zero_point"][0].neg_()), "zero_point"),
    "NaN norm": (edit(NORM, lambda t: t[NORM][0].fill_(torch.nan)), NORM),
    "index size": (change_json(INDEX, lambda i: i["metadata"].update(total_size=1)), f"{INDEX} says 1 bytes"),
    "index entry": (change_json(INDEX, lambda i: i["weight_map"].pop(NORM)), NORM),
    "index of elsewhere": (change_json(INDEX, lambda i: i["weight_map"].update({NORM: "../x.safetensors"})), "../x"),
    "an orphan tensor": (edit(NORM, lambda t: t.update(orphan=torch.ones(3))), "orphan"),
    "an orphan file": (lambda f: save_file({"x": torch.ones(1)}, f / "old.safetensors"), "old.safetensors"),
    "a missing shard": (lambda f: shard_of(f, NORM).unlink(), "safetensors"),
    "a truncated shard": (truncate, "truncated"),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), "chat_template.jinja"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer"),
    "no licence": (lambda f: (f / "LICENSE").unlink(), "LICENSE"),
    "bits": (quantization(num_bits=8), UP.rpartition(".")[0].rpartition(".")[0]),
    "symmetry": (quantization(symmetric=True), "weight_zero_point is not expected of W4A16-G32"),
    "group size": (quantization(group_size=64), "model.layers"),
    "an ignored layer": (change_json("config.json", lambda c: c["quantization_config"]["ignore"].append(UP)), UP),
    "no quantization": (change_json("config.json", lambda c: c.pop("quantization_config")), "no quantized weights"),
    "hidden size": (lambda f: edit_config(f, hidden_size=128), "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "the manifest": (lambda f: (f / "lowbit_manifest.json").write_text("{"), "lowbit_manifest.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_are_named(name, copy):
    corrupt, named = CORRUPTIONS[name]
    corrupt(copy)
    done = lowbit.verify(copy, run=False)
    assert not done.ok
    assert any(named in failure for failure in done.failures), done.failures


def test_a_whole_folder_passes(folders):
    done = lowbit.verify(folders / "q", folders / "dense")
    assert done.ok and not done.failures, done.failures
    assert all(check.ok for check in done.checks), [check for check in done.checks if not check.ok]
    assert {check.name for check in done.checks} >= {"checksums", "codes", "source", "generates", "near the reference"}


@pytest.mark.parametrize("format", ("compressed-tensors", "gptq", "awq"))
@pytest.mark.parametrize("name", ("qwen3_moe", "gpt2", "qwen3"))
def test_every_format_and_kind_of_model_passes(name, format, tmp_path):
    """Experts, transposed weights, tied embeddings, without a tokenizer."""
    save_tiny(tmp_path / "dense", name)
    lowbit.quantize(tmp_path / "dense", tmp_path / "q", scheme="W4A16-G32", format=format)
    done = lowbit.verify(tmp_path / "q", tmp_path / "dense", run=False)
    assert done.ok, done.failures


@pytest.mark.parametrize("change", ("weight", "expert"))
def test_the_source_is_compared(change, tmp_path):
    """Folders that are whole, of another model: no checksum tells, the weights do."""
    name = "qwen3_moe" if change == "expert" else "llama"
    save_tiny(tmp_path / "dense", name)
    lowbit.quantize(tmp_path / "dense", tmp_path / "q", scheme="W4A16-G32")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    changed = next(
        t for t in sorted(tensors) if t.endswith("experts.2.up_proj.weight" if change == "expert" else "o_proj.weight")
    )
    tensors[changed] = tensors[changed].flip(0).contiguous()
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    failures = lowbit.verify(tmp_path / "q", tmp_path / "dense", run=False).failures
    assert len(failures) == 1 and changed in failures[0]


@pytest.mark.parametrize("bits", (2, 3))
def test_coarse_folders_are_whole(bits, tmp_path):
    """Heavy tails in groups of 8192: rounding itself is 0.93 away at 2 bits, and 0.66 at 3."""
    save_tiny(tmp_path / "dense", intermediate_size=8192)

    def heavy_tailed(tensors):
        for tensor in tensors.values():
            if tensor.ndim == 2:
                rng = torch.Generator().manual_seed(tensor.numel())
                squares = torch.randn(5, *tensor.shape, generator=rng).square().mean(0)
                tensor.copy_(torch.randn(tensor.shape, generator=rng) / squares.sqrt() / 8)

    edit_tensors(tmp_path / "dense", heavy_tailed)
    lowbit.quantize(tmp_path / "dense", tmp_path / "q", scheme=f"W{bits}A16-CHANNEL")
    done = lowbit.verify(tmp_path / "q", tmp_path / "dense", run=False)
    assert done.ok, done.failures


def test_share_of_unquantized_bytes_is_limited(folders, tmp_path):
    lowbit.quantize(folders / "dense", tmp_path / "q", scheme="W4A16-G32", ignore=[".*mlp"])
    (tmp_path / "q" / "lowbit_report.json").unlink(missing_ok=True)  # which says that somebody asked for it
    failures = lowbit.verify(tmp_path / "q", run=False).failures
    assert len(failures) == 1 and "are not quantized" in failures[0] and "mlp" in failures[0]
    assert lowbit.verify(tmp_path / "q", run=False, max_unquantized=0.9).ok


def test_folders_of_other_tools(folders, copy):
    """Without a manifest there is one question less to ask."""
    (copy / "lowbit_manifest.json").unlink()
    done = lowbit.verify(copy, folders / "dense", run=False)
    assert done.ok and [check.name for check in done.checks if check.ok is None] == ["checksums"]
    (copy / "chat_template.jinja").unlink()
    assert "chat_template.jinja of dense is missing" in lowbit.verify(copy, folders / "dense", run=False).failures[0]


def test_a_model_that_gives_nonsense(copy):
    """Finite weights whose logits are not."""
    edit(NORM, lambda tensors: tensors[NORM].fill_(3e38))(copy)
    (copy / "lowbit_manifest.json").unlink()
    done = lowbit.verify(copy)
    assert done.failures == ["generates: the model gives NaN or infinite logits"]


def test_wrong_input(tmp_path, folders):
    with pytest.raises(InputError, match="no such model folder"):
        lowbit.verify(tmp_path / "nothing")
    assert "no quantized weights" in lowbit.verify(folders / "dense").failures[0]


@pytest.mark.parametrize("name", ["/etc/passwd", "../dense/config.json", "/proc/self/mem", "a/../../dense/LICENSE", ""])
def test_a_manifest_names_files_of_its_folder(copy, name):
    """What lies elsewhere is neither opened nor compared."""
    manifest = read_json(copy / "lowbit_manifest.json")
    write_json(copy / "lowbit_manifest.json", {**manifest, "files": {**manifest["files"], name: "0" * 64}})
    (failure,) = lowbit.verify(copy, run=False).failures
    assert "lowbit_manifest.json names" in failure and "which is no file of" in failure


def test_a_listed_file_that_leads_elsewhere(copy, tmp_path):
    (tmp_path / "elsewhere").write_bytes((copy / "LICENSE").read_bytes())
    (copy / "LICENSE").unlink()
    (copy / "LICENSE").symlink_to(tmp_path / "elsewhere")
    (failure,) = lowbit.verify(copy, run=False).failures
    assert "LICENSE is a link to something that is no file of the folder" in failure


@pytest.mark.parametrize(
    "manifest", [[], {"tensors": {}}, {"tensors": {}, "files": {"a": 1}}, {"tensors": [], "files": {}}]
)
def test_a_manifest_of_another_type(copy, manifest):
    write_json(copy / "lowbit_manifest.json", manifest)
    (failure,) = lowbit.verify(copy, run=False).failures
    assert "lowbit_manifest.json: " in failure and "expected" in failure
