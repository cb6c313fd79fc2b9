"""Writes a quantized model as one GGUF file: exact, or refused.

The container is the gguf package's. Types and sizes of all tensors stand at the front of the file, so those weights
whose type depends on their numbers (asymmetric ones) are read twice; no more than one tensor is in memory.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lowbit.checkpoint.writer import StagedFolder
from lowbit.conversion.export import Entry, ExportSource, OnPlan, entries, refuse_transposed
from lowbit.conversion.gguf_architecture import Architecture, Arrangement
from lowbit.conversion.gguf_vocabulary import add_vocabulary
from lowbit.errors import InputError, OutputError
from lowbit.formats import gguf as blocks

# What llama.cpp's own converter keeps in float32 beside norms and biases: routers
_FLOAT32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class _Tensor:
    """An entry as the file holds it. type: the name of a GGML type."""

    entry: Entry
    name: str
    type: str
    arrangement: Arrangement
    shape: tuple[int, ...]


def export_gguf(
    source: ExportSource,
    output: str | Path,
    *,
    pre: str | None = None,
    overwrite: bool = False,
    on_plan: OnPlan | None = None,
) -> list[str]:
    """Write `source` to the file `output`, which appears whole or not at all. Returns what a user should know.

    pre: llama.cpp's name of the tokenizer's splitting rules, where it is not found. Raises UsageError without the gguf
    package, InputError for a model that a GGUF file cannot hold exactly (naming the tensor or setting), OutputError.
    """
    output = Path(os.path.abspath(output))
    if output.exists() and not (overwrite and output.is_file()):
        raise OutputError(f"{output} exists already: choose another output file, or pass --overwrite")
    architecture = Architecture(source)
    plan = entries(source)
    refuse_transposed(source, plan, "a GGUF reader")
    tensors = [_place(source, entry, architecture) for entry in plan]
    names = {tensor.name for tensor in tensors}
    lost = architecture.lost_settings(tied="output.weight" not in names)
    notes = _notes(tensors, lost)
    with StagedFolder(output.with_name(f"{output.name}.folder")) as staged:
        progress = on_plan(plan) if on_plan else None
        try:
            notes += _write(source, architecture, tensors, staged.path / output.name, output.stem, pre, progress)
            os.replace(staged.path / output.name, output)
        except OSError as error:
            raise OutputError(f"cannot write {output}: {error.strerror or error}") from None
    return notes


def _place(source: ExportSource, entry: Entry, architecture: Architecture) -> _Tensor:
    name = architecture.tensor_name(entry)
    if entry.scheme is None:
        shape = entry.full_shape if entry.stacked else tuple(n for n in entry.shape if n != 1) or (1,)
        arrangement = architecture.arrangement(name, shape)
        if entry.dtype not in _DENSE:
            raise InputError(f"{entry.name} is stored as {entry.dtype}, expected bfloat16, float16 or float32")
        wide = len(shape) == 1 or arrangement.offset or name.endswith(_FLOAT32)
        kind = "F32" if wide else _DENSE[entry.dtype]
        return _Tensor(entry, name, kind, arrangement, shape)
    if reason := blocks.refuse(entry.scheme, entry.shape[1]):
        raise InputError(f"{entry.name}: {reason}")
    arrangement = architecture.arrangement(name, entry.full_shape)
    if arrangement.offset:
        raise InputError(f"{entry.name} is shifted by {arrangement.offset} in a GGUF file, which its blocks cannot be")
    return _Tensor(entry, name, _block_type(source, entry), arrangement, entry.full_shape)


def _block_type(source: ExportSource, entry: Entry) -> str:
    """The type that holds all members; of an asymmetric weight that is for its numbers to say."""
    if entry.scheme.sym:
        return blocks.symmetric_type(entry.scheme)
    types = {_named(name, blocks.asymmetric_type, source.read(name)) for name in entry.members}
    return max(types, key=("Q4_1", "Q5_1", "Q8_0").index)


def _named(module: str, function, *args):
    try:
        return function(*args)
    except InputError as error:
        raise InputError(f"{module}: {error}") from None


def _write(
    source: ExportSource, architecture: Architecture, tensors, path: Path, title: str, pre, progress
) -> list[str]:
    gguf = blocks.import_gguf()
    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        _add_metadata(gguf, writer, architecture, tensors, title)
        notes = add_vocabulary(writer, source.folder, architecture.config.vocab_size, pre)
        factors = architecture.rope_factors()
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for tensor in tensors:
            _add_info(gguf, writer, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for tensor in tensors:
            writer.write_tensor_data(_data(source, tensor))
            if progress:
                progress(tensor.entry, "")
        writer.flush()
        for file in writer.fout:
            os.fsync(file.fileno())
    finally:
        writer.close()
    return notes


def _add_metadata(gguf, writer, architecture: Architecture, tensors: list[_Tensor], title: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(title)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    most = Counter(tensor.type for tensor in tensors if tensor.entry.scheme).most_common(1)[0][0]
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{most}"])
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in architecture.metadata.items():
        adders.get(type(value), writer.add_array)(f"{architecture.name}.{key}", value)


def _add_info(gguf, writer, tensor: _Tensor) -> None:
    kind = gguf.GGMLQuantizationType[tensor.type]
    if tensor.entry.scheme is None:
        itemsize = 4 if tensor.type == "F32" else 2
        writer.add_tensor_info(tensor.name, tensor.shape, np.float32, int(np.prod(tensor.shape)) * itemsize, kind)
    else:
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        writer.add_tensor_info(tensor.name, shape, np.uint8, int(np.prod(shape)), kind)


def _data(source: ExportSource, tensor: _Tensor) -> np.ndarray:
    """The bytes of a tensor, uint8."""
    read = _dense if tensor.entry.scheme is None else _packed
    parts = [read(source, tensor, name) for name in tensor.entry.members]
    data = torch.stack(parts).view(tensor.shape[0], -1) if tensor.entry.stacked else parts[0]
    order = tensor.arrangement.order
    data = data if order is None else data[torch.from_numpy(order)]
    return data.contiguous().view(-1).view(torch.uint8).numpy()


def _dense(source: ExportSource, tensor: _Tensor, name: str) -> torch.Tensor:
    values = source.tensor(name)
    if tensor.type == "F32":
        # where a file has 1 + w for a norm, float32 rounds it as the model does that computes it
        values = values.float() - tensor.arrangement.offset
    return values if tensor.entry.stacked else values.view(tensor.shape)


def _packed(source: ExportSource, tensor: _Tensor, module: str) -> torch.Tensor:
    return _named(module, blocks.pack, source.read(module), tensor.type)


def _notes(tensors: list[_Tensor], lost: list[str]) -> list[str]:
    notes = []
    wide = sum(bool(t.entry.scheme) and not t.entry.scheme.sym and t.type == "Q8_0" for t in tensors)
    if wide:
        notes.append(f"{wide} asymmetric weights are held as Q8_0, 8.5 bits a weight: others would round their minima")
    if lost:
        notes.append(f"transformers' GGUF reader takes its own defaults for {', '.join(lost)}; llama.cpp reads them")
    return notes
