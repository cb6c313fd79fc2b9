"""A GGUF file as a model folder: its config and tokenizer as transformers reads them, and a link to the file.

The folder is kept in the user's cache under a name that depends on the file and on who reads it: what is in it takes
seconds to make and a few megabytes. The weights stay where they are (`lowbit.checkpoint.gguf`).
"""

import hashlib
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from lowbit import __version__
from lowbit.checkpoint.gguf.blocks import decoded
from lowbit.checkpoint.gguf.header import PLAIN, read_head
from lowbit.checkpoint.gguf.index import INDEX_NAME, Index, write_index
from lowbit.checkpoint.gguf.rules import Rules, rules_of
from lowbit.checkpoint.gguf.tensors import read_blocks
from lowbit.checkpoint.layout import TensorInfo
from lowbit.checkpoint.writer import StagedFolder
from lowbit.discovery import CheckpointNames, Site, choose, find_sites, named_in_config, skeleton
from lowbit.errors import InputError, LowbitError, OutputError, first_line
from lowbit.folders.gguf_settings import with_all_settings
from lowbit.formats import compressed_tensors as packed_format
from lowbit.formats.gguf import SCHEMES, import_gguf
from lowbit.guards.records import shown
from lowbit.guards.safe_files import link, write_whole
from lowbit.numerics.scheme import HEAD_SCHEME, Recipe, Scheme
from lowbit.system.cache import cache_root
from lowbit.transformers_api import ignored_if_missing, tied_weights

logger = logging.getLogger("lowbit")

_SPLIT = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_MOST_FILES = 1_000
# Tensors that say what belongs into a config
_SETTINGS = ("rope_freqs.weight",)


def all_files(name: str) -> list[str]:
    """The names of the files that a model is split into of which `name` is one; of a whole file, itself."""
    match = _SPLIT.fullmatch(name)
    if match is None or not 1 <= int(match["count"]) <= _MOST_FILES:
        return [name]
    return [f"{match['name']}-{number:05}-of-{match['count']}.gguf" for number in range(1, int(match["count"]) + 1)]


def gguf_folder(file: Path) -> Path:
    """The model folder of a GGUF file, or of all that it is split into, made where it is not there yet.

    Raises:
        InputError: A file is missing or damaged, or no model that transformers reads from such a file.
        UsageError: The gguf package is not installed.
        OutputError: The cache cannot be written.
    """
    import_gguf()
    files = [file.with_name(name) for name in all_files(file.name)]
    for each in files:
        if not each.is_file():
            raise InputError(f"{each} is missing: {file.name} is one of {len(files)} files of a model")
    target = cache_root() / "gguf" / f"{files[0].stem[:80]}-{_fingerprint(files)}"
    if not (target / INDEX_NAME).is_file():
        try:
            with StagedFolder(target) as staged:
                _Maker(staged.path, files).make()
                staged.commit()
        except OutputError:
            if not (target / INDEX_NAME).is_file():  # made by another process meanwhile
                raise
    return target


def _fingerprint(files: Sequence[Path]) -> str:
    """Of files as they are now, and of what reads them."""
    facts = [(str(file.resolve()), (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
    readers = (__version__, version("transformers"), version("gguf"))
    return hashlib.sha256(repr((facts, readers)).encode()).hexdigest()[:16]


class _Maker:
    """Fills the folder at `path`, in which `files` are linked."""

    def __init__(self, path: Path, files: Sequence[Path]):
        self._path, self._file = path, files[0]
        self._names = tuple(file.with_suffix(".gguf").name for file in files)
        self._head, self._blocks = read_head(files[0]), read_blocks(files)
        self._tensors = [TensorInfo(name, torch.float32, each.values) for name, each in self._blocks.items()]
        for name, file in zip(self._names, files, strict=True):
            link(path / name, file.absolute())

    def make(self) -> None:
        architecture = self._architecture()
        config = self._config()
        model = skeleton(config, tensors=self._tensors)
        config.architectures = [type(model).__name__]
        index, schemes = self._index(architecture, config, model)
        if schemes:
            config.quantization_config = _quantization(model, index, schemes)
        write_index(self._path, index)
        config.save_pretrained(self._path)
        self._save_generation(config)
        self._save_tokenizer()

    def _architecture(self) -> str:
        """Raises InputError for a count that the file does not bear out: transformers makes lists as long as it."""
        architecture = self._head.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise InputError(f"{self._file.name} does not say its architecture: it holds no model")
        layers = self._head.metadata.get(f"{architecture}.block_count", 0)
        if type(layers) is not int or not 0 <= layers <= len(self._blocks):
            raise InputError(
                f"{self._file.name} says that it has {shown(layers)} layers, and holds {len(self._blocks)} tensors: it "
                "is damaged, download it again"
            )
        return architecture

    def _config(self):
        """The transformers config, as the file says it."""
        try:
            config = AutoConfig.from_pretrained(self._path, gguf_file=self._names[0])
        except Exception as error:  # transformers checks little: whatever it stumbles over comes from this file
            architecture = shown(self._head.metadata["general.architecture"])
            raise InputError(
                f"transformers cannot read the config of {self._file}, of architecture {architecture}: "
                f"{first_line(error)}"
            ) from None
        config = self._with_all_settings(config)
        config.dtype = _dtype({each.kind for each in self._blocks.values()})
        if len(self._names) > 1 and "output.weight" in self._blocks:  # it has looked at the first file only
            config.tie_word_embeddings = False
        ends = [self._head.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        ends = [end for end in dict.fromkeys(ends) if type(end) is int]
        if ends:
            config.eos_token_id = ends if len(ends) > 1 else ends[0]
        return config

    def _with_all_settings(self, config):
        if unread := next((name for name in self._blocks if name.startswith("rope_factors_")), None):
            raise InputError(f"{unread} of {self._file.name} scales its rotary positions, which lowbit does not read")
        factors = self._blocks.get("rope_freqs.weight")
        read = None if factors is None else decoded(factors.read().view(1, -1), factors.kind, torch.float32).view(-1)
        architecture = str(self._head.metadata["general.architecture"])
        try:
            return with_all_settings(config, self._head.metadata, architecture, read)
        except InputError as error:
            raise InputError(f"{self._file.name}: {error}") from None

    def _index(self, architecture: str, config, model: nn.Module) -> tuple[Index, dict[str, Scheme]]:
        """What the tensors of the file are in the model, and the schemes of those that stay in integers."""
        try:
            names = rules_of(architecture, config.to_dict(), {}).names_of(model, self._blocks)
        except LowbitError:
            raise
        except Exception as error:  # of an architecture that it does not know
            raise InputError(
                f"transformers cannot read the tensors of {self._file}, of architecture {shown(architecture)}: "
                f"{first_line(error)}"
            ) from None
        rules = rules_of(architecture, config.to_dict(), names)
        sources = defaultdict(list)
        for each in self._blocks.values():
            if (parameter := rules.parameter_of(each.name)) is not None:
                sources[parameter].append(each)
        state = model.state_dict()
        self._check_complete(architecture, model, names, sources)
        left_out = self._left_out(rules)
        shapes = {parameter: tuple(state[parameter].shape) for parameter in sources}
        checkpoint = CheckpointNames(model)
        experts = {name: tuple(parts) for name in shapes if (parts := checkpoint.parts_of_experts(name))}
        chosen, packed = choose(model, Recipe())[0], {}
        for parameter, site in _packable(model).items():
            kinds = {each.kind for each in sources.get(parameter, ())}
            scheme = SCHEMES.get(next(iter(kinds))) if len(kinds) == 1 else None
            moved = scheme and rules.order(parameter, sources[parameter], shapes[parameter]) is not None
            if scheme is not None and moved and not site.transposed:
                packed[parameter] = scheme
        linears = tuple(parameter for parameter in sources if parameter in chosen)
        return Index(self._names, architecture, names, shapes, experts, tuple(packed), linears, left_out), packed

    def _check_complete(self, architecture: str, model: nn.Module, names: Mapping[str, str], sources: Mapping) -> None:
        """Raise InputError for a parameter that nothing in the file is read into."""
        tied, computed = tied_weights(model), ignored_if_missing(model)
        stored = {parameter: name for name, parameter in names.items()}
        for parameter, _ in model.named_parameters():
            if parameter in sources or parameter in tied or any(re.search(known, parameter) for known in computed):
                continue
            if parameter in stored:
                raise InputError(
                    f"{stored[parameter]}, which {parameter} is made of, is not in {self._file.name}: the file is "
                    "damaged, or of another model than it says"
                )
            raise InputError(
                f"transformers knows no tensor of {self._file.name}, of architecture {shown(architecture)}, that "
                f"{parameter} could be made of: take the original model"
            )

    def _left_out(self, rules: Rules) -> tuple[str, ...]:
        """The names of tensors that nothing is made of, with a WARNING."""
        left = [name for name in self._blocks if rules.parameter_of(name) is None and name not in _SETTINGS]
        if left:
            more = f" (and {len(left) - 1} more such tensors)" if len(left) > 1 else ""
            logger.warning("%s of %s is left out%s: transformers has no use for it", left[0], self._file.name, more)
        return tuple(left)

    def _save_generation(self, config) -> None:
        ends = {name: value for name in ("bos_token_id", "eos_token_id", "pad_token_id")
                if (value := getattr(config, name, None)) is not None}  # fmt: skip
        write_whole(self._path / "generation_config.json", json.dumps(ends, indent=2) + "\n")

    def _save_tokenizer(self) -> None:
        """Where the file has one that transformers knows: a model can do without."""
        try:
            AutoTokenizer.from_pretrained(self._path, gguf_file=self._names[0]).save_pretrained(self._path)
        except Exception as error:  # whatever it stumbles over comes from this file
            logger.warning("transformers cannot read the tokenizer of %s: %s", self._file.name, first_line(error))


def _dtype(kinds: set[str]) -> str:
    """The dtype of a model: that of its matrices, where they are plain numbers."""
    if not kinds <= PLAIN.keys() or "BF16" in kinds:
        return "bfloat16"
    return "float16" if "F16" in kinds else "float32"


def _packable(model: nn.Module) -> dict[str, Site]:
    """The weights that lowbit runs in integers, the output embedding too where it is one of its own."""
    tied = model.config.get_text_config().tie_word_embeddings
    chosen, _ = choose(model, Recipe(lm_head=None if tied else HEAD_SCHEME))
    return {parameter: site for parameter, (site, _) in chosen.items()}


def _quantization(model: nn.Module, index: Index, schemes: Mapping[str, Scheme]) -> dict:
    """The `quantization_config` of compressed-tensors for what stays in integers."""
    usual, _ = Counter(schemes.values()).most_common(1)[0]
    tensors = [
        (name.replace("{}", "0"), 2 if parameter in index.experts else len(shape))
        for parameter, shape in index.shapes.items()
        for name in index.experts.get(parameter, (parameter,))
    ]
    named = named_in_config(model, CheckpointNames(model), find_sites(model), dict(schemes), tensors, usual)
    return packed_format.config(usual, *named)
