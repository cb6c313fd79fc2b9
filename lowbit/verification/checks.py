"""The release gate on a saved folder: what can be told from its files, without running the model.

Every check reads the folder as a stranger would, from the disk, and says in one line what it found. The first line of a
failure names the tensor or file.
"""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from lowbit.checkpoint.decoded import DecodedTensor
from lowbit.checkpoint.gguf.header import is_gguf
from lowbit.checkpoint.manifest import file_digest
from lowbit.checkpoint.reader import INDEX_NAME
from lowbit.checkpoint.side_files import foreign_links, is_own, side_files, visible
from lowbit.discovery import choose
from lowbit.errors import InputError, OutputError
from lowbit.numerics.scheme import Recipe
from lowbit.options import VerifyOptions
from lowbit.transformers_api import ignored_if_missing, tied_weights
from lowbit.verification.contents import compared_with_source, contents
from lowbit.verification.folder import Check, Folder, Problems, report_of

_LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "spiece.model")


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
    max_unquantized: float = VerifyOptions.max_unquantized,
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
    kind = folder.stored.format or folder.dtype or folder.files.method or "not quantized"
    yield Check("opens", True, f"{len(folder.files.files)} weight file(s), {kind}")
    if not folder.stored.weights and not folder.encoded and folder.dtype is None:
        yield Check("quantized", False, f"{path} holds no quantized weights: nothing to verify")
        return
    yield _index(folder)
    yield _tensors(folder)
    yield _ties(folder)
    yield _budget(folder, max_unquantized) if folder.dtype is None else _dtypes(folder)
    yield from contents(folder, on_tensor)
    yield _side_files(folder, reference)
    if reference is not None:
        yield compared_with_source(folder, reference)


def _index(folder: Folder) -> Check:
    """The index says what the headers say, and no weight file lies beside those it names."""
    problems = Problems()
    used = {file.name for file in folder.files.files}
    for file in sorted(folder.path.glob("*.safetensors")):
        if file.name not in used:
            problems.add(f"{file.name} is in the folder, but no index names it")
    if folder.files.index is None and (folder.path / INDEX_NAME).is_file():
        problems.add(f"{INDEX_NAME} is in the folder, but lies beside the single file that is read in its place")
    unlisted = folder.files.unlisted
    for name in unlisted:
        problems.add(f"{name} is in {folder.files.tensors[name].file.name}, but not in {folder.files.index}")
    size = sum(tensor.nbytes for tensor in folder.files.tensors.values())
    said = folder.files.index_size
    if said is not None and said != size:
        problems.add(f"{folder.files.index} says {said:,} bytes of tensors, the files hold {size:,}")
    return problems.check("index", f"{len(folder.files.tensors)} tensors, {size:,} bytes")


def _tensors(folder: Folder) -> Check:
    """Every parameter of the model is there, and nothing that it does not know but what changes no result."""
    problems, found, parts = Problems(), set(), {}
    for base in folder.stored.weights:
        if base in folder.for_others:
            continue
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
    others = (
        f"; {len(folder.for_others)} tensors that no module of it has, for other programs" if folder.for_others else ""
    )
    return problems.check("tensors", f"{known} parameters of the model, none missing, none unknown{others}")


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
    """Nothing is tied that is quantized, but an output embedding to a table that is stored once for both."""
    tied = tied_weights(folder.model)
    quantized = {folder.parameter_of(base): base for base in folder.stored.weights}
    for name, target in tied.items():
        if name in quantized or (target in quantized and not _shared(folder, name, target)):
            base = quantized.get(name) or quantized[target]
            return Check("ties", False, f"{base} is quantized, but tied to another weight of the model")
    return Check("ties", True, f"{len(tied)} tied weights" if tied else "no tied weights")


def _shared(folder: Folder, head: str, table: str) -> bool:
    return folder.sites[table].kind == "embedding" and head in folder.sites and folder.sites[head].is_head


def _budget(folder: Folder, max_unquantized: float) -> Check:
    """What could be quantized, is; what somebody asked to leave alone is not counted."""
    wanted, _ = choose(folder.model, Recipe())
    asked = _left_on_purpose(folder.path)
    total, left, largest = 0, 0, ("", 0)
    for weight in folder.stored.weights.values():
        total += math.prod(weight.shape) * max(weight.experts, 1)
    total += sum(info.numel for info in folder.encoded)
    for info in folder.stored.plain:
        if isinstance(info, DecodedTensor):
            continue
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
    problems = Problems()
    for info in folder.stored.plain:
        if info.dtype.is_floating_point and info.dtype != folder.dtype:
            problems.add(f"{info.name} is {info.dtype}, expected {folder.dtype}")
    return problems.check("coverage", f"every floating tensor is {folder.dtype}")


def _left_on_purpose(path: Path) -> dict[str, str]:
    """Tensors that the run which wrote the folder left alone, and why, where it has a report."""
    left = report_of(path).get("left_alone")
    return left if isinstance(left, dict) else {}


def _side_files(folder: Folder, reference: Path | None) -> Check:
    """Files that are listed and gone; a tokenizer that loads; what the model it was made from has."""
    problems, changed = Problems(), []
    # a GGUF file is opened by a folder with a link to it
    opened = {path for path in folder.files.files if is_gguf(path)}
    foreign = [path for path in foreign_links(folder.path, visible(folder.path)) if path not in opened]
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
