"""An adapter folder of PEFT: checked as what strangers wrote, and put on a model that takes no memory.

PEFT itself decides what an adapter changes, and how: it is put on the modules of the model, each of which then merges
one weight at a time. The weights of the model are stand-ins until their turn comes: NaN that takes no memory, so that
nothing can be made of them by mistake.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.checkpoint.checked import check_finite
from lowbit.checkpoint.layout import StoredTensor, read_header
from lowbit.checkpoint.reader import PICKLE_SUFFIXES
from lowbit.errors import InputError, UsageError, first_line
from lowbit.guards.patterns import Patterns
from lowbit.guards.reading import check_regular_files, read_json
from lowbit.guards.records import record, shown
from lowbit.hf.lora import PLAIN_STARTS

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
# What an adapter is called on a model
ADAPTER = "default"
# Fields of a config -> what an adapter with them is or does, and no weight can hold
_NOT_MERGED = {
    "alora_invocation_tokens": "works from certain tokens on only",
    "arrow_config": "chooses between adapters for each token",
    "kasa_config": "changes the weights that it is put on when it is loaded",
    "layer_replication": "makes a model with more layers",
    "megatron_config": "is of Megatron's layers",
    "use_bdlora": "is of layers that are split over GPUs",
    "use_qalora": "is of layers with grouped inputs",
}
# Beside the fields of PEFT's config
_ALSO_WRITTEN = {"peft_version"}


@dataclass(frozen=True)
class _Config:
    """What lowbit itself reads of adapter_config.json."""

    peft_type: str
    r: int = 8
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str = True


def require_peft() -> None:
    """Raise UsageError where PEFT is not installed."""
    if find_spec("peft") is None:
        raise UsageError("adapters are merged by PEFT, which is not installed: pip install peft")


def read_adapter(folder: Path) -> tuple[Any, dict[str, StoredTensor]]:
    """The `LoraConfig` and the tensors of an adapter folder.

    Raises InputError for an adapter that cannot be merged, that lowbit does not open, or that PEFT does not know.
    """
    check_regular_files(folder)
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise InputError(f"{folder} holds no adapter of PEFT: expected {CONFIG_NAME} there")
    raw = record(dict, read_json(path), str(path))
    _check_config(raw, record(_Config, raw, str(path)), path)
    tensors = _tensors(folder)
    from peft import PeftConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that it does not know: refused already
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except Exception as error:  # of any field
            raise InputError(f"PEFT cannot read {path}: {first_line(error)}") from None
    config.inference_mode = True
    return config, tensors


def _check_config(raw: dict, config: _Config, path: Path) -> None:
    from peft import LoraConfig

    if config.peft_type != "LORA":
        raise InputError(f"{path}: peft_type is {shown(config.peft_type)}; expected LORA: no other adapter is merged")
    for name, what in _NOT_MERGED.items():
        if raw.get(name):
            raise InputError(f"{path} has {name}: such an adapter {what}, it cannot be merged into a model")
    if config.init_lora_weights not in PLAIN_STARTS:
        raise InputError(
            f"{path}: init_lora_weights is {shown(config.init_lora_weights)}, which changes the weights that it is put "
            "on: save the adapter again with path_initial_model_for_weight_conversion, which makes it a plain one"
        )
    known = {each.name for each in fields(LoraConfig)} | _ALSO_WRITTEN
    for name in raw.keys() - known:
        if raw[name]:
            raise InputError(f"{path} has {shown(name)}, which the installed PEFT does not know: pip install -U peft")
    patterns = [*(config.rank_pattern or ()), *(config.alpha_pattern or ())]
    patterns += [said for said in (config.target_modules, config.exclude_modules) if isinstance(said, str)]
    Patterns(patterns, str(path))


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLE_SUFFIXES]
        if pickles:
            raise InputError(
                f"{folder} holds its adapter as a pickle ({pickles[0]}), which can run code when loaded: save it again "
                "with safe_serialization=True, which is the default of PEFT"
            )
        raise InputError(f"{folder} has no {WEIGHTS_NAME}: the adapter is incomplete")
    return {info.name: info for info in read_header(path)}


def put_on(model: nn.Module, folder: Path) -> tuple[nn.Module, Any]:
    """Put the adapter in a folder on a model.

    Args:
        model: A skeleton on the meta device, in float32; it is changed, and gets stand-ins for weights.
        folder: The adapter.

    Returns:
        The model with the layers of PEFT in it, of which the weights of the adapter are there, and its `LoraConfig`.

    Raises:
        InputError: It is the adapter of another model, or damaged.
    """
    config, stored = read_adapter(folder)
    _add_stand_ins(model)
    tensors = {}
    for name, info in stored.items():
        tensors[name] = info.read()
        check_finite(tensors[name], info)
    from peft import PeftModel, set_peft_model_state_dict

    with quietly():
        try:
            peft = PeftModel(model, config, ADAPTER, low_cpu_mem_usage=True)
            found = set_peft_model_state_dict(peft, tensors, ADAPTER, low_cpu_mem_usage=True)
        except Exception as error:  # of any of PEFT's checks
            raise InputError(f"the adapter in {folder} does not fit the model: {_reason(error)}") from None
    if found.unexpected_keys:
        more = f" (and {len(found.unexpected_keys) - 1} more)" if len(found.unexpected_keys) > 1 else ""
        raise InputError(
            f"{found.unexpected_keys[0]}{more} in {folder} belongs to no module of the model: the adapter is of another"
        )
    for name, parameter in peft.named_parameters():
        if parameter.is_meta:  # what PEFT has made and nothing has filled
            raise InputError(f"{name} is not in {folder / WEIGHTS_NAME}: the adapter is incomplete")
    return peft.get_base_model(), config


def _add_stand_ins(model: nn.Module) -> None:
    nothing, made = torch.full((), torch.nan), dict[int, nn.Parameter]()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:  # tied ones stay tied
                made[id(parameter)] = nn.Parameter(nothing.expand(parameter.shape), requires_grad=False)
            module.register_parameter(name, made[id(parameter)])


def is_stand_in(parameter: torch.Tensor) -> bool:
    """Whether it is one of the weights that `put_on` leaves out."""
    return parameter.numel() > 0 and not any(parameter.stride()) and bool(parameter.view(-1)[0].isnan())


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters is checked by us, and is an error
        yield


def _reason(error: Exception) -> str:
    """What PEFT says, in one line; where torch lists shapes that do not fit, the first of them."""
    found = re.search(r"size mismatch for (\S+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]", str(error))
    if found is None:
        return first_line(error)
    return f"{found[1].removesuffix(':')} has shape [{found[2]}], expected [{found[3]}]"
