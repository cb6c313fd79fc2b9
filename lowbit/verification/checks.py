"""The release gate on a saved folder: what can be told from its files, without running the model.

Every check reads the folder as a stranger would, from the disk, and says in one line what it found. The first line of a
failure names the tensor or file.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lowbit.calibration.recorded import recorded_edits, scaled
from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.computed import as_loaded
from lowbit.checkpoint.layout import StoredTensor
from lowbit.checkpoint.manifest import Manifest, digest, file_digest, read_manifest
from lowbit.checkpoint.reader import INDEX_NAME
from lowbit.checkpoint.report_file import converted_dtype, load_report
from lowbit.checkpoint.side_files import foreign_links, is_own, side_files, visible
from lowbit.discovery import choose
from lowbit.errors import InputError, OutputError, UsageError
from lowbit.folders.opened import OpenedFolder, without_parameter
from lowbit.folders.stored import StoredWeight
from lowbit.formats import compressed_tensors as packed_format
from lowbit.numerics.dtypes import cast
from lowbit.numerics.scheme import Recipe
from lowbit.transformers_api import ignored_if_missing, tied_weights
from lowbit.verification.tolerance import difference

# Share of the bytes that could be quantized and are not, beyond which a folder is hardly a quantized model
MAX_UNQUANTIZED = 0.05
_LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "spiece.model")


@dataclass(frozen=True)
class Check:
    """One question that was asked of a folder. ok None: it could not be asked, `detail` says why."""

    name: str
    ok: bool | None
    detail: str


class _Problems:
    """What is wrong, as it is found; the first ones by name, all of them by number."""

    def __init__(self):
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        self.found.append(problem)

    def check(self, name: str, otherwise: str) -> Check:
        if not self.found:
            return Check(name, True, otherwise)
        more = f" (and {len(self.found) - 1} more)" if len(self.found) > 1 else ""
        return Check(name, False, self.found[0] + more)


class Folder(OpenedFolder):
    """A saved folder, opened once for all checks. Raises InputError if it cannot be opened at all."""

    def __init__(self, path: Path, trust_remote_code: bool = False):
        super().__init__(path, trust_remote_code)
        self.trust_remote_code = trust_remote_code
        self.manifest: Manifest | None = read_manifest(path)
        self.dtype = None if self.stored.weights else converted_dtype(path)  # of a plain model that was converted to it
        self.moved, self.moved_otherwise = _moved(_report(path))


def check_structure(path: Path, trust_remote_code: bool = False) -> None:
    """What costs next to nothing, before a folder is said to be done: it opens, and its index and shapes are right.

    Raises OutputError."""
    try:
        check = _index(Folder(path, trust_remote_code))
    except InputError as error:
        check = Check("opens", False, str(error))
    if not check.ok:
        raise OutputError(f"what was written does not read back, nothing is kept: {check.detail}")


def static_checks(
    path: Path,
    reference: Path | None = None,
    *,
    max_unquantized: float = MAX_UNQUANTIZED,
    trust_remote_code: bool = False,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Check]:
    """Checks of the folder `path`, against the model it was made from where that is given. on_tensor(done, total) is
    called as tensors are read, each once."""
    try:
        folder = Folder(path, trust_remote_code)
    except InputError as error:
        yield Check("opens", False, str(error))
        return
    kind = folder.stored.format or folder.dtype or "not quantized"
    yield Check("opens", True, f"{len(folder.reader.files)} weight file(s), {kind}")
    if not folder.stored.weights and folder.dtype is None:
        yield Check("quantized", False, f"{path} holds no quantized weights: nothing to verify")
        return
    yield _index(folder)
    yield _tensors(folder)
    yield _ties(folder)
    yield _budget(folder, max_unquantized) if folder.dtype is None else _dtypes(folder)
    yield from _contents(folder, on_tensor)
    yield _side_files(folder, reference)
    if reference is not None:
        yield _source(folder, reference)


def _index(folder: Folder) -> Check:
    """The index says what the headers say, and no weight file lies beside those it names."""
    problems = _Problems()
    used = {file.name for file in folder.reader.files}
    for file in sorted(folder.path.glob("*.safetensors")):
        if file.name not in used:
            problems.add(f"{file.name} is in the folder, but no index names it")
    if folder.reader.index is None and (folder.path / INDEX_NAME).is_file():
        problems.add(f"{INDEX_NAME} is in the folder, but lies beside the single file that is read in its place")
    unlisted = folder.reader.unlisted
    for name in unlisted:
        problems.add(f"{name} is in {folder.reader.tensors[name].file.name}, but not in {folder.reader.index}")
    size = sum(tensor.nbytes for tensor in folder.reader.tensors.values())
    said = folder.reader.index_size
    if said is not None and said != size:
        problems.add(f"{folder.reader.index} says {said:,} bytes of tensors, the files hold {size:,}")
    return problems.check("index", f"{len(folder.reader.tensors)} tensors, {size:,} bytes")


def _tensors(folder: Folder) -> Check:
    """Every parameter of the model is there, and nothing that it does not know but what changes no result."""
    problems, found, parts = _Problems(), set(), {}
    for base in folder.stored.weights:
        parameter = folder.parameter_of(base)
        parts[parameter] = parts.get(parameter, 0) + max(folder.stored.weights[base].experts, 1)
        found.add(parameter)
        if parameter not in folder.sites:
            problems.add(f"{base} is stored quantized, but is no linear layer of the model")
    for info in folder.stored.plain:
        found.update(folder.parameters_of(info.name))
    for name, reason in folder.refused.items():
        problems.add(f"{name} is in the files: {reason}")
    for parameter in _missing(folder, found):
        problems.add(f"{parameter} is in no file")
    for parameter, count in parts.items():
        site = folder.sites.get(parameter)
        wanted = site.experts * folder.names.merged(parameter) if site is not None and site.kind == "experts" else 1
        if count not in (wanted, site.experts if site is not None else 1):
            problems.add(f"{parameter} has {count} of {wanted} stored matrices of its experts")
    known = len(found & folder.state.keys())
    return problems.check("tensors", f"{known} parameters of the model, none missing, none unknown")


def _missing(folder: Folder, found: set[str]) -> list[str]:
    """Parameters that are neither stored, nor computed, nor tied to one that is, under whichever of their names."""
    tied = tied_weights(folder.model)
    with_names = {target: {target} for target in tied.values()}
    for name, target in tied.items():
        with_names[target].add(name)
    computed = ignored_if_missing(folder.model)
    return [
        parameter
        for parameter in folder.state
        if with_names.get(tied.get(parameter, parameter), {parameter}).isdisjoint(found)
        and not any(re.search(pattern, parameter) for pattern in computed)
    ]


def _ties(folder: Folder) -> Check:
    tied = tied_weights(folder.model)
    quantized = {folder.parameter_of(base): base for base in folder.stored.weights}
    for name in (*tied, *tied.values()):
        if name in quantized:
            return Check("ties", False, f"{quantized[name]} is quantized, but tied to another weight of the model")
    return Check("ties", True, f"{len(tied)} tied weights" if tied else "no tied weights")


def _budget(folder: Folder, max_unquantized: float) -> Check:
    """What could be quantized, is; what somebody asked to leave alone is not counted."""
    wanted, _ = choose(folder.model, Recipe())
    asked = _left_on_purpose(folder.path)
    total, left, largest = 0, 0, ("", 0)
    for weight in folder.stored.weights.values():
        total += math.prod(weight.shape) * max(weight.experts, 1)
    for info in folder.stored.plain:
        if folder.parameter_of(info.name) in wanted and info.name not in asked:
            total, left = total + info.numel, left + info.numel
            largest = max(largest, (info.name, info.numel), key=lambda entry: entry[1])
    share = left / max(total, 1)
    if share > max_unquantized:
        return Check(
            "coverage", False, f"{largest[0]} and others are not quantized: {share:.1%} of what could be, more than "
            f"{max_unquantized:.0%}"
        )  # fmt: skip
    return Check("coverage", True, f"{1 - share:.1%} of the weights of linear layers are quantized")


def _dtypes(folder: Folder) -> Check:
    """What was converted to a dtype has no other."""
    problems = _Problems()
    for info in folder.stored.plain:
        if info.dtype.is_floating_point and info.dtype != folder.dtype:
            problems.add(f"{info.name} is {info.dtype}, expected {folder.dtype}")
    return problems.check("coverage", f"every floating tensor is {folder.dtype}")


def _left_on_purpose(path: Path) -> dict[str, str]:
    """Tensors that the run which wrote the folder left alone, and why, where it has a report."""
    left = _report(path).get("left_alone")
    return left if isinstance(left, dict) else {}


def _report(path: Path) -> dict:
    """Of the run that wrote the folder; empty, where there is none that can be read."""
    try:
        return load_report(path)
    except InputError:
        return {}


def _moved(report: dict) -> tuple[dict[tuple[str, int | None], float], float | None]:
    """How far the run moved weights before it rounded them: (name of the source, expert) -> relative to the weight, and
    of all others; None for unknown."""
    found = {}
    layers = report.get("layers")
    for layer in layers if isinstance(layers, list) else ():
        moved = layer.get("moved") if isinstance(layer, dict) else None
        if type(moved) is float and math.isfinite(moved) and moved >= 0:
            expert = layer.get("expert")
            name = str(layer.get("name"))
            found[name, expert if type(expert) is int else None] = moved
            found.setdefault((name, None), moved)  # an expert that is stored as a tensor of its own
    recipe = report.get("recipe")
    rounded = isinstance(recipe, dict) and recipe.get("method") == "rtn"
    return found, 0.0 if rounded else None


def _contents(folder: Folder, on_tensor) -> Iterator[Check]:
    """Reads every tensor once: checksums, finite values, scales, and codes that survive unpacking and packing."""
    sums, finite, scales, trips = _Problems(), _Problems(), _Problems(), _Problems()
    recorded = None if folder.manifest is None else dict(folder.manifest.tensors)
    done, total = 0, len(folder.reader.tensors)

    def read(info: StoredTensor) -> torch.Tensor:
        nonlocal done
        tensor = folder.reader.tensor(info.name)
        if recorded is not None:
            expected = recorded.pop(info.name, None)
            if expected is None:
                sums.add(f"{info.name} was not there when the folder was written")
            elif digest(tensor.view(-1).view(torch.uint8).numpy()) != expected:
                sums.add(f"{info.name} in {info.file.name} is not what was written: its bytes changed")
        done += 1
        on_tensor(done, total)
        return tensor

    for info in folder.stored.plain:
        tensor = read(info)
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
    yield trips.check("codes", f"{len(folder.stored.weights)} weights unpack and pack to the same bytes")


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


def _scales(weight: StoredWeight, tensors: dict[str, torch.Tensor], problems: _Problems) -> None:
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


def _trip(folder: Folder, weight: StoredWeight, tensors: dict[str, torch.Tensor], problems: _Problems) -> None:
    fmt = folder.stored.fmt
    if fmt is packed_format and folder.stored.config.converted(weight.tensors, weight.scheme, weight.shape):
        return  # of an older layout, which is read and never written
    packed = [fmt.pack(qweight) for qweight in folder.stored.unpacked(weight, tensors)]
    for suffix, info in weight.tensors.items():
        again = [matrix[suffix] for matrix in packed if suffix in matrix]
        stored = tensors[suffix]
        if again and not torch.equal((torch.stack(again) if weight.experts else again[0]).to(stored.dtype), stored):
            problems.add(f"{info.name} has bits outside of its codes, or codes that its config does not allow")


def _side_files(folder: Folder, reference: Path | None) -> Check:
    """Files that are listed and gone; a tokenizer that loads; what the model it was made from has."""
    problems, changed = _Problems(), []
    foreign = foreign_links(folder.path, visible(folder.path))
    for path in foreign:
        problems.add(f"{path.relative_to(folder.path)} is a link to something that is no file of the folder")
    for name, expected in (folder.manifest.files if folder.manifest else {}).items():
        path = folder.path / name
        if path in foreign:
            continue
        if not is_own(path, folder.path):
            problems.add(f"{name} was there when the folder was written, and is not now")
        elif file_digest(path) != expected:
            changed.append(name)
    if reference is not None:
        for relative in side_files(reference):
            if not (folder.path / relative).is_file():
                problems.add(f"{relative} of {reference.name} is missing")
    if any((folder.path / name).is_file() for name in _TOKENIZERS):
        problem = _tokenizer_problem(folder)
        if problem:
            problems.add(problem)
    if "config.json" in changed:
        problems.add("config.json was changed after the folder was written")
    detail = f"changed since: {', '.join(changed)}" if changed else "all that were written are in place"
    if not any((folder.path / name).is_file() for name in _LICENSES):
        detail += "; no LICENSE file"
    return problems.check("side files", detail)


def _tokenizer_problem(folder: Folder) -> str | None:
    from transformers import AutoTokenizer, GenerationConfig

    try:
        AutoTokenizer.from_pretrained(folder.path, trust_remote_code=folder.trust_remote_code)
    except Exception as error:  # of any tokenizer class
        return f"the tokenizer does not load: {type(error).__name__}"
    if (folder.path / "generation_config.json").is_file():
        try:
            GenerationConfig.from_pretrained(folder.path)
        except Exception as error:
            return f"generation_config.json does not load: {type(error).__name__}"
    return None


def _source(folder: Folder, reference: Path) -> Check:
    """Every tensor of the source is here: the same, or quantized, and near to what it was. What the report says was
    smoothed is compared with the source scaled alike."""
    problems, source = _Problems(), CheckpointReader(reference)
    if source.quantization_config:
        raise UsageError(f"{reference} is quantized itself: expected the model that the folder was made from")
    try:
        layers = _report(folder.path).get("decoder_layers", ())
        unknown = without_parameter(folder.model, folder.names, source.tensors.values())
        quantized = {folder.parameter_of(base) for base in folder.stored.weights}
        source = source.with_tensors(as_loaded(source.tensors, folder.names, quantized))
        edits = recorded_edits(layers, folder.names, source.tensors, source.tensor)
    except InputError as error:
        return Check("source", False, str(error))
    plain = {info.name for info in folder.stored.plain}
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
    return problems.check("source", f"{len(source.tensors)} tensors of {reference.name}: the same, or near")


def _too_far(folder: Folder, weight: StoredWeight, source: torch.Tensor) -> str | None:
    """What is wrong with a quantized weight that is further from its source than its scheme explains."""
    site = folder.sites[folder.parameter_of(weight.base)]
    name = weight.base if weight.experts else f"{weight.base}.weight"
    if site.transposed != folder.names.transposes(name, tuple(source.shape)):
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
