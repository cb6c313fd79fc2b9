"""What travels with the weights, what does not, and links that lead elsewhere."""

import pytest
from folders import contents

from lowbit.checkpoint.side_files import copy_side_files, side_files

CARRIED = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json", "merges.txt",
    "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "LICENSE", "LICENSE.txt", "NOTICE", "README.md",
    "modeling_custom.py", "configuration_custom.py", "code/helper.py", "assets/logo.png", "a folder/and more/x.txt",
]  # fmt: skip
LEFT_BEHIND = [
    "config.json", "lowbit_report.json",
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "model.fp16.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "training_args.bin", "optimizer.pt",
    "consolidated.00.pth", "x.ckpt", "x.pkl", "model.gguf", "onnx/model.onnx", "onnx/model.onnx_data", "tf_model.h5",
    "flax_model.msgpack", "rust_model.ot", "model.tflite", "sub/pytorch_model.bin", ".gitattributes", ".git/HEAD",
    ".cache/huggingface/x.lock", "__pycache__/modeling_custom.cpython-311.pyc",
]  # fmt: skip


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"this is {name}")
    return folder


def copied(source, target) -> dict[str, bytes]:
    target.mkdir()
    names = copy_side_files(source, target)
    files = {name: data for name, data in contents(target).items() if not (target / name).is_dir()}
    assert files.keys() == set(names)
    return files


def test_everything_but_weights_is_carried_over(tmp_path):
    source = fill(tmp_path / "source", CARRIED + LEFT_BEHIND)
    assert copied(source, tmp_path / "target") == {name: f"this is {name}".encode() for name in CARRIED}


def test_weights_under_other_spellings_stay_behind(tmp_path):
    source = fill(tmp_path / "source", ["PYTORCH_MODEL.BIN", "model.Safetensors", "x.GGUF"])
    assert copied(source, tmp_path / "target") == {}


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path, caplog):
    """A model folder from a stranger must not pull a secret into what is published."""
    secret = fill(tmp_path / "private", ["secret.txt", "deep/key.txt"])
    source = fill(tmp_path / "source", ["LICENSE", "sub/a.txt"])
    (source / "notes.txt").symlink_to(secret / "secret.txt")
    (source / "relative.txt").symlink_to("../private/secret.txt")
    (source / "sub" / "chain.txt").symlink_to("../notes.txt")
    (source / "folder").symlink_to(secret)
    (source / "broken.txt").symlink_to("nowhere")
    (source / "loop.txt").symlink_to("loop.txt")
    (source / "model.bin").symlink_to("../private/secret.txt")  # stays behind in any case
    assert copied(source, tmp_path / "target").keys() == {"LICENSE", "sub/a.txt"}
    (record,) = caplog.records
    assert record.message.endswith("lead out of it: ['notes.txt', 'relative.txt', 'chain.txt']")


def test_links_within_the_folder_are_copied_as_files(tmp_path):
    source = fill(tmp_path / "source", ["LICENSE"])
    (source / "LICENSE.txt").symlink_to("LICENSE")
    assert copied(source, tmp_path / "target")["LICENSE.txt"] == b"this is LICENSE"
    assert not (tmp_path / "target" / "LICENSE.txt").is_symlink()


@pytest.mark.parametrize("through_link", [False, True])
def test_layout_of_the_hub_cache_is_followed(tmp_path, through_link):
    """snapshots/<revision>/file -> ../../blobs/<hash>, and nothing else outside of the snapshot."""
    repository = tmp_path / "models--org--name"
    fill(repository / "blobs", ["0123", "4567", "89ab"])
    fill(tmp_path, ["secret.txt", "models--org--other/blobs/cdef"])
    snapshot = repository / "snapshots" / "abcdef"
    (snapshot / "sub").mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0123")
    (snapshot / "sub" / "x.json").symlink_to("../../../blobs/4567")
    (snapshot / "model.safetensors").symlink_to("../../blobs/89ab")
    (snapshot / "stolen.txt").symlink_to("../../../secret.txt")
    (snapshot / "foreign.txt").symlink_to("../../../models--org--other/blobs/cdef")
    source = snapshot
    if through_link:
        source = tmp_path / "my-model"
        source.symlink_to(snapshot)
    assert copied(source, tmp_path / "target") == {"tokenizer.json": b"this is 0123", "sub/x.json": b"this is 4567"}


def test_blobs_beside_an_ordinary_folder_are_not_special(tmp_path):
    fill(tmp_path / "blobs", ["0123"])
    source = fill(tmp_path / "models" / "mine", ["LICENSE"])
    (source / "x.txt").symlink_to("../../blobs/0123")
    assert [path.as_posix() for path in side_files(source)] == ["LICENSE"]
