"""Everything in a model folder that is not weights: tokenizer, chat template, processor, LICENSE, remote code, ..."""

import shutil
from pathlib import Path

from lowbit.checkpoint.manifest import MANIFEST_NAME, REPORT_NAME
from lowbit.checkpoint.reader import PICKLE_SUFFIXES

# Weights in other formats are not side files: the quantized folder would be larger than the source
WEIGHT_SUFFIXES = (
    *PICKLE_SUFFIXES,
    ".safetensors",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".h5",
    ".msgpack",
    ".tflite",
    ".ot",
)
# In any of the formats; a report says nothing about a model that is made from the output of its run
WRITTEN_ANEW = ("config.json", "quantize_config.json", "quant_config.json", MANIFEST_NAME, REPORT_NAME)


def side_files(folder: Path) -> list[Path]:
    """Paths relative to `folder`, hidden files and folders left out."""
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        if hidden or not path.is_file() or path.suffix.lower() in WEIGHT_SUFFIXES:
            continue
        if relative.as_posix() in WRITTEN_ANEW or path.name.endswith((".safetensors.index.json", ".bin.index.json")):
            continue
        if path.is_symlink() and not is_inside(path.resolve(), folder):
            continue
        found.append(relative)
    return found


def is_inside(target: Path, folder: Path) -> bool:
    """Links within the folder, and those of the Hub cache (snapshots/<revision>/file -> blobs/<hash>), are followed."""
    folder = folder.resolve()
    blobs = folder.parent.parent / "blobs"
    return target.is_relative_to(folder) or (folder.parent.name == "snapshots" and target.is_relative_to(blobs))


def copy_side_files(source: Path, target: Path) -> list[str]:
    copied = []
    for relative in side_files(source):
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target / relative)
        copied.append(relative.as_posix())
    return copied
