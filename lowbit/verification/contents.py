"""What is in the tensors: finite numbers, scales and codes that a grid can have, and what the source had."""

from collections.abc import Iterator
from pathlib import Path

import torch

from lowbit.calibration.recorded import recorded_edits, scaled
from lowbit.checkpoint import CheckpointReader, TensorInfo
from lowbit.checkpoint.computed import as_loaded
from lowbit.checkpoint.decoded import DecodedTensor
from lowbit.checkpoint.layout import StoredTensor
from lowbit.checkpoint.manifest import digest
from lowbit.checkpoint.untied import untied
from lowbit.errors import InputError, UsageError
from lowbit.folders.dense import as_dense
from lowbit.folders.opened import without_parameter
from lowbit.folders.stored import StoredWeight
from lowbit.formats import compressed_tensors as packed_format
from lowbit.numerics.dtypes import cast
from lowbit.transformers_api import tied_weights
from lowbit.verification.folder import Check, Folder, Problems, report_of
from lowbit.verification.tolerance import difference


def contents(folder: Folder, on_tensor) -> Iterator[Check]:
    """Reads every tensor once: checksums, finite values, scales, and codes that survive unpacking and packing."""
    sums, finite, scales, trips = Problems(), Problems(), Problems(), Problems()
    recorded = None if folder.manifest is None else dict(folder.manifest.tensors)
    done, total = 0, len(folder.reader.tensors)

    def read(info: StoredTensor) -> torch.Tensor:
        nonlocal done
        tensor = folder.reader.tensor(info.name)
        if recorded is not None and not isinstance(info, DecodedTensor):
            expected = recorded.pop(info.name, None)
            if expected is None:
                sums.add(f"{info.name} was not there when the folder was written")
            elif digest(tensor.view(-1).view(torch.uint8).numpy()) != expected:
                sums.add(f"{info.name} in {info.file.name} is not what was written: its bytes changed")
        done += 1
        on_tensor(done, total)
        return tensor

    for info in folder.stored.plain:
        try:
            tensor = read(info)
        except InputError as error:  # codes or scales that cannot be decoded
            finite.add(str(error))
            continue
        if tensor.is_floating_point() and not _is_finite(tensor):
            finite.add(f"{info.name} holds NaN or infinite values")
    for weight in folder.stored.weights.values():
        tensors = {suffix: read(info) for suffix, info in weight.tensors.items()}
        _scales(weight, tensors, scales)
        _trip(folder, weight, tensors, trips)
    for name in recorded or ():
        sums.add(f"{name} was there when the folder was written, and is not now")
    if recorded is None:
        yield Check("checksums", None, "no lowbit_manifest.json: written by another tool, or an older lowbit")
    else:
        yield sums.check("checksums", f"{total} tensors are what was written")
    yield finite.check("values", f"{len(folder.stored.plain)} plain tensors are finite")
    yield scales.check("scales", "all finite, none zero, none negative but of symmetric weights")
    decodes = f"; {len(folder.encoded)} weights in {folder.files.method} decode" if folder.encoded else ""
    yield trips.check("codes", f"{len(folder.stored.weights)} weights unpack and pack to the same bytes{decodes}")


def _is_finite(tensor: torch.Tensor) -> bool:
    # torch has no isfinite of some types of 8 bits, each value of which float16 has
    return bool(torch.isfinite(tensor.half() if tensor.element_size() == 1 else tensor).all())


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    # as numbers, so that -0 is 0; torch compares no floats of 8 bits
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if first.is_floating_point() and first.element_size() == 1:
        first, second = first.view(torch.uint8), second.view(torch.uint8)
    return torch.equal(first, second)


def _scales(weight: StoredWeight, tensors: dict[str, torch.Tensor], problems: Problems) -> None:
    for suffix, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        name, values = weight.tensors[suffix].name, tensor.float()
        if not torch.isfinite(values).all():
            problems.add(f"{name} holds NaN or infinite values")
        elif (values == 0).any():
            problems.add(f"{name} holds zeros: those groups are lost")
        elif not weight.scheme.sym and (values < 0).any():
            # a symmetric grid has one more code on one side, and a negative scale says which
            problems.add(f"{name} holds negative scales, which an asymmetric grid does not have")


def _trip(folder: Folder, weight: StoredWeight, tensors: dict[str, torch.Tensor], problems: Problems) -> None:
    fmt = folder.stored.fmt
    if fmt is packed_format and folder.stored.config.converted(weight.tensors, weight.scheme, weight.shape):
        return  # of an older layout, which is read and never written
    packed = [fmt.pack(qweight) for qweight in folder.stored.unpacked(weight, tensors)]
    for suffix, info in weight.tensors.items():
        again = [matrix[suffix] for matrix in packed if suffix in matrix]
        stored = tensors[suffix]
        if again and not torch.equal((torch.stack(again) if weight.experts else again[0]).to(stored.dtype), stored):
            problems.add(f"{info.name} has bits outside of its codes, or codes that its config does not allow")


def compared_with_source(folder: Folder, reference: Path) -> Check:
    """Every tensor of the source is here: the same, or quantized, and near to what it was. What the report says was
    smoothed is compared with the source scaled alike."""
    problems, source = Problems(), as_dense(CheckpointReader(reference))
    if source.quantization_config:
        raise UsageError(f"{reference} is quantized in a way that nothing here reads: expected the original model")
    try:
        layers = report_of(folder.path).get("decoder_layers", ())
        unknown = without_parameter(folder.model, folder.names, source.tensors.values())
        quantized = {folder.parameter_of(base) for base in folder.stored.weights}
        tensors = as_loaded(source.tensors, folder.names, quantized)
        source = source.with_tensors(_with_head(tensors, folder))
        edits = recorded_edits(layers, folder.names, source.tensors, source.tensor)
    except InputError as error:
        return Check("source", False, str(error))
    plain = {info.name for info in folder.stored.plain}
    encoded = {info.name for info in folder.encoded}
    for name in source.tensors:
        base = name.removesuffix(".weight")
        if name in unknown and name not in plain:
            continue
        if name not in plain and base not in folder.stored.weights:
            problems.add(f"{name} of {reference.name} is missing")
            continue
        try:
            expected = scaled(name, source.tensor(name), edits, folder.names)
        except InputError as error:
            return Check("source", False, str(error))
        if name in encoded:
            continue
        if name in plain:
            here = folder.reader.tensor(name)
            if folder.dtype is not None:
                expected, *_ = cast(expected, folder.dtype)
            if not _same(here, expected):
                problems.add(f"{name} is not what it is in {reference.name}")
        elif problem := _too_far(folder, folder.stored.weights[base], expected):
            problems.add(f"{base} {problem}")
    for name in sorted(plain - source.tensors.keys()):
        problems.add(f"{name} is not in {reference.name}")
    found = f"{len(source.tensors) - len(encoded)} tensors of {reference.name}: the same, or near"
    if encoded:
        found += f"; {len(encoded)} in {folder.files.method} are not compared: no grid says how near they should be"
    return problems.check("source", found)


def _with_head(tensors: dict[str, TensorInfo], folder: Folder) -> dict[str, TensorInfo]:
    """The tensors of a source, whose output embedding may be tied to the input embedding where that of the folder is
    not."""
    heads = [site.parameter for site in folder.sites.values() if site.is_head]
    tables = [site.parameter for site in folder.sites.values() if site.kind == "embedding"]
    names = {folder.names.locate(name)[0]: name for name in tensors}
    if not heads or not tables or heads[0] in names or tables[0] not in names or heads[0] in tied_weights(folder.model):
        return tensors
    return untied(tensors, names[tables[0]], heads[0])


def _too_far(folder: Folder, weight: StoredWeight, source: torch.Tensor) -> str | None:
    """What is wrong with a quantized weight that is further from its source than its scheme explains."""
    site = folder.sites.get(folder.parameter_of(weight.base))  # None: of a layer that predicts further tokens
    name = weight.base if weight.experts else f"{weight.base}.weight"
    if site is not None and site.transposed != folder.names.transposes(name, tuple(source.shape)):
        source = source.transpose(-1, -2)
    if source.shape != ((weight.experts,) if weight.experts else ()) + weight.shape:
        return f"is {list(weight.shape)}, {name} is not"
    matrices = list(source) if weight.experts else [source]
    others = {other.scheme for other in folder.stored.weights.values()} - {weight.scheme}
    try:
        stored = folder.stored.quantized(weight)
    except InputError as error:
        return f"cannot be compared: {error}"
    for expert, (qweight, matrix) in enumerate(zip(stored, matrices, strict=True)):
        moved = folder.moved.get((name, expert if weight.experts else None), folder.moved_otherwise)
        if found := difference(qweight, matrix, moved, others):
            return f"is far from {name}: {found}"
    return None
