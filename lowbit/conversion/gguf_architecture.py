"""Names and layouts of a model's parts in a GGUF file, inverted from the tables that others read such files by.

The names of tensors are the gguf package's; the names of metadata and what each tensor goes through on its way in are
those of transformers' GGUF reader. What that reader would read back must be the model: a setting it would lose and a
transformation that cannot be undone are refused. (transformers has a second, newer reader for a few architectures,
whose rules are written for one direction only: those are refused too.)
"""

import copy
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from lowbit.conversion.export import Entry, ExportSource
from lowbit.discovery import skeleton
from lowbit.errors import InputError, first_line
from lowbit.formats.gguf import GENERAL_KEYS, import_gguf

# The gguf package's table has `rope_freqs` for more, whose loaders in llama.cpp stop at a tensor that they do not know
_TAKES_ROPE_FACTORS = "llama"
# Settings that no file says: llama.cpp takes them for equal to another one
_IMPLIED = {"query_pre_attn_scalar": "head_dim"}
# Settings of training, of generation, and those that others (layer_types, the shape of a tensor) repeat
_HARMLESS = re.compile(
    r".*dropout.*|.*_token_id|initializer_range|use_cache|pretraining_tp|router_aux_loss_coef|output_router_logits"
    r"|max_window_layers|use_sliding_window|num_local_experts|original_max_position_embeddings"
)


@dataclass(frozen=True)
class Arrangement:
    """What a file holds for a tensor w: (w - offset)[order], where None leaves the rows in order."""

    order: np.ndarray | None = None
    offset: float = 0.0


class Architecture:
    """The architecture of a model among those of GGUF. Raises InputError if it is not one that can be written."""

    def __init__(self, source: ExportSource):
        from lowbit.transformers_api import (
            GGUF_CONFIG_DEFAULTS_MAPPING,
            GGUF_CONFIG_MAPPING,
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
            is_gguf_arch_supported,
        )

        gguf = import_gguf()
        self.config, self._skeleton = source.config, source.skeleton
        if self.config.get_text_config() is not self.config:
            raise InputError(f"model type {self.config.model_type!r} is not a language model alone: expected text only")
        key = self.config.model_type.removesuffix("_text")
        known = {_plain(name): arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        arch = known.get(_plain(key))
        if arch is None or key not in GGUF_CONFIG_MAPPING:
            raise InputError(f"model type {key!r} is not one that both the gguf package and transformers can name")
        self.name = gguf.MODEL_ARCH_NAMES[arch]
        if is_gguf_arch_supported(self.name):
            raise InputError(f"transformers has no rules for model type {key!r} that could be followed backwards")
        self._keys = {k: attribute for k, attribute in GGUF_CONFIG_MAPPING[key].items() if attribute}
        self._assumed = GGUF_CONFIG_DEFAULTS_MAPPING.get(key, {})
        self._names = gguf.get_tensor_name_map(arch, self.config.num_hidden_layers)
        self._processor = TENSOR_PROCESSORS.get(self.name, TensorProcessor)(config=self.config.to_dict())
        self._read_into = get_gguf_hf_weights_map(source.skeleton, self._processor)

    def tensor_name(self, entry: Entry) -> str:
        """The name in the file. Raises InputError if there is none, or transformers would read it as another tensor."""
        name = self._names.get_name(entry.base)
        if name is None:
            raise InputError(f"{entry.name} has no name in a GGUF file of architecture {self.name}")
        read_into = self._read_into.get(name + entry.suffix, self._read_into.get(name))
        if read_into != entry.parameter:
            raise InputError(f"{entry.name} is {name} in a GGUF file, which transformers reads into {read_into}")
        return name + entry.suffix

    def arrangement(self, name: str, shape: tuple[int, ...]) -> Arrangement:
        """How the tensor `name` is kept, found from what the reader does to one whose rows are numbered."""
        rows = np.arange(shape[0], dtype=np.float64).reshape(-1, *(1 for _ in shape[1:]))
        probe = np.broadcast_to(rows, (shape[0], *(2 for _ in shape[1:]))).copy()
        offset, numbered = self._read(np.zeros_like(probe), name), self._read(probe, name)
        if numbered is not None and offset is not None and np.isfinite(offset).all():
            constant = offset.flat[0]
            columns = numbered.reshape(shape[0], -1) - constant
            order, unmoved = columns[:, 0], np.arange(shape[0])
            whole_rows = (columns == order[:, None]).all() and (offset == constant).all()
            if whole_rows and np.array_equal(np.sort(order), unmoved):
                moved = not np.array_equal(order, unmoved)
                return Arrangement(np.argsort(order) if moved else None, float(constant))
        raise InputError(f"{name} is read through a transformation that cannot be undone on blocks")

    def _read(self, stored: np.ndarray, name: str) -> np.ndarray | None:
        """What the reader makes of a tensor, None if that has another shape (dimensions of one aside)."""
        try:
            with np.errstate(all="ignore"):
                read = self._processor.process(weights=stored, name=name).weights
        except Exception as error:  # a reader for tensors of one shape only
            raise InputError(f"{name} cannot be traced through transformers' reader: {first_line(error)}") from None
        return read.reshape(stored.shape) if np.squeeze(read).shape == np.squeeze(stored).shape else None

    @cached_property
    def metadata(self) -> dict[str, int | float | str | bool]:
        """Key -> value, without the architecture's prefix."""
        keys = self._keys | {k: a for k, a in self._general.items() if k not in self._keys}
        values = {key: self._setting(attribute) for key, attribute in keys.items()}
        if "rope.dimension_count" not in keys and (share := self._rope.get("partial_rotary_factor", 1)) != 1:
            values["rope.dimension_count"] = int(self._head_dim * share)
        if self._rope_type == "linear":
            values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(self._rope["factor"])}
        return {key: value for key, value in values.items() if value is not None}

    @property
    def _general(self) -> dict[str, str]:
        return {key: attribute for key, attribute in GENERAL_KEYS.items() if hasattr(self.config, attribute)}

    @property
    def _rope(self) -> dict:
        """The rope parameters, those of full attention where layers differ."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        return rope.get("full_attention", rope)

    @property
    def _head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self._usual_head_dim

    @property
    def _usual_head_dim(self) -> int:
        return self.config.hidden_size // self.config.num_attention_heads

    def _setting(self, attribute: str):
        return getattr(self.config, attribute, None) if attribute != "rope_theta" else self._rope.get(attribute)

    @property
    def _rope_type(self) -> str:
        return self._rope.get("rope_type", "default")

    def rope_factors(self) -> np.ndarray | None:
        """float32 [head_dim / 2], by which the frequencies of a rope like Llama 3's are divided; None for simpler ones.
        Raises InputError for a rope that can be said neither by them nor by metadata."""
        from transformers import ROPE_INIT_FUNCTIONS

        if self._rope_type in ("default", "linear"):
            return None
        if self._rope_type != "llama3" or self.name != _TAKES_ROPE_FACTORS:
            raise InputError(f"rope_type {self._rope_type!r} cannot be said in a GGUF file of architecture {self.name}")
        scaled = ROPE_INIT_FUNCTIONS["llama3"](self.config, "cpu")[0].double().numpy()
        plain = self._rope["rope_theta"] ** -(np.arange(len(scaled)) / len(scaled))
        return (plain / scaled).astype(np.float32)

    def lost_settings(self, tied: bool) -> list[str]:
        """Settings that llama.cpp reads and transformers does not: it takes its defaults for them.

        tied: no output matrix is written. Raises InputError for settings that nobody would read back.
        """
        for setting, other in _IMPLIED.items():
            value, implied = getattr(self.config, setting, None), getattr(self.config, other, None)
            if value is not None and value != implied:
                raise InputError(
                    f"{setting} is {value!r} in config.json, llama.cpp takes {other}, which is {implied!r}"
                )
        config, read = self.config.to_dict(), self._read_back(tied)
        lost = [setting for setting in config if self._is_lost(setting, config[setting], read.get(setting))]
        for setting in lost:
            one_rope = setting == "rope_parameters" and "rope_theta" in config[setting]
            if setting in self._assumed or not (one_rope or setting in self._general.values()):
                raise InputError(
                    f"{setting} is {config[setting]!r} in config.json, which a GGUF file of architecture {self.name} "
                    f"cannot say (its readers take {read.get(setting)!r})"
                )
        return lost

    def _read_back(self, tied: bool) -> dict:
        """The config that transformers makes of the metadata."""
        said = {attribute: self._setting(attribute) for attribute in self._keys.values()}
        said = {attribute: value for attribute, value in said.items() if value is not None}
        return type(self.config)(**(said | self._assumed | {"tie_word_embeddings": tied})).to_dict()

    @cached_property
    def _declared(self) -> frozenset[str]:
        return frozenset(type(self.config)().to_dict())

    @cached_property
    def _settings(self) -> frozenset[str]:
        """The settings that the model computes with; all of them, where that cannot be found out."""
        found = settings_read(self._skeleton, self.config)
        return frozenset(self.config.to_dict()) if found is None else found

    def _is_lost(self, setting: str, value, read) -> bool:
        from transformers import PreTrainedConfig

        if setting in PreTrainedConfig().to_dict() or _HARMLESS.fullmatch(setting) or _same(value, read):
            return False
        if setting not in self._declared and setting not in self._settings:
            return False  # of other tools, or of another version of transformers: nothing computes with it
        return setting != "head_dim" or read is not None or value != self._usual_head_dim


def settings_read(model, config) -> frozenset[str] | None:
    """The settings that a model of the class of `model` reads while it is built and runs on two tokens; None where it
    does not run on them."""
    kind, seen = type(config), set()

    def note(self, name: str):
        seen.add(name)
        return kind.__getattribute__(self, name)

    spied = copy.deepcopy(config)
    spied.architectures = [type(model).__name__]
    spied.__class__ = type(kind.__name__, (kind,), {"__getattribute__": note})
    try:
        built = skeleton(spied, dtype=torch.bfloat16).eval()
        built(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"))
    except Exception:  # of any model's own code
        return None
    return frozenset(seen)


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "")


def _same(first, second) -> bool:
    """Equal as a GGUF file keeps them: floats in float32."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, float) and isinstance(second, (int, float)):
        return np.float32(first) == np.float32(second)
    return first == second
