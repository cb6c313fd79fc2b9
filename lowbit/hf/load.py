"""Loading models: quantized or not, ours or other people's, strictly."""

from pathlib import Path

import torch

from lowbit.backends import get_backend
from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.checked import read_checked
from lowbit.checkpoint.decoded import decoded, decoded_to
from lowbit.checkpoint.layout import StoredTensor
from lowbit.discovery import model_class
from lowbit.errors import InputError, LowbitError, UsageError, first_line
from lowbit.folders.locate import load_config, resolve
from lowbit.folders.opened import OpenedFolder
from lowbit.formats import detect_format
from lowbit.guards.model_size import no_larger_than
from lowbit.hf.config import LowbitConfig
from lowbit.hf.divided import cut_dense
from lowbit.hf.head import AUTO, set_head, wanted_head
from lowbit.hf.quiet import quiet_transformers
from lowbit.hf.shares import Wanted, shares_of
from lowbit.layers.inputs import choose_inputs, wanted_exactness
from lowbit.options import LoadOptions, SourceOptions, takes_options
from lowbit.parallel import Ranks, ranks_of
from lowbit.system.read_ahead import read_ahead

# Keywords of `from_pretrained` by which it reads other files than those of the folder -> what to do
_ELSEWHERE = {
    "config": "edit config.json, or pass config=lowbit.hf.loading_config(path) to from_pretrained",
    "gguf_file": "pass the file itself",
    "state_dict": "use from_pretrained of transformers",
    "subfolder": "pass the folder itself",
    "variant": "name the files as transformers expects those of no variant: model.safetensors",
}
# Keywords that say how a repository is reached
_OF_HUB = ("cache_dir", "force_download", "local_files_only", "token")


def loading_config(
    path: str | Path,
    backend: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    fuse: bool = True,
    exact: bool | None = None,
    tp_plan: Wanted | None = None,
):
    """The config that makes `from_pretrained` load a quantized checkpoint into lowbit's layers:

    AutoModelForCausalLM.from_pretrained(path, config=loading_config(path))

    Raises InputError for weights that `from_pretrained` would take for plain numbers: `load` decodes them.
    """
    folder = resolve(path, revision)
    reader = decoded(CheckpointReader(folder))
    if (encoded := next((info for info in reader.tensors.values() if info.is_encoded), None)) is not None:
        raise InputError(
            f"{encoded.name} of {reader.place} is stored as {encoded.stored_as}, which from_pretrained does not decode"
            ": load it with lowbit.load, or `lowbit dequantize` it"
        )
    return _loading_config(reader, backend, trust_remote_code, fuse, exact, tp_plan)


def _loading_config(
    reader: CheckpointReader, backend: str | None, trust_remote_code: bool, fuse: bool, exact: bool | None,
    tp_plan: Wanted | None,
):  # fmt: skip
    """reader: of a folder, decoded; its integers are what lowbit's layers hold."""
    config = load_config(reader.folder, trust_remote_code)
    source = reader.quantization_config
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    if source is not None:
        detect_format(source)
        config.quantization_config = {
            "quant_method": "lowbit", "source": source, "backend": backend, "fuse": fuse, "exact": exact,
            "tp_plan": tp_plan,
        }  # fmt: skip
    return config


@takes_options
@quiet_transformers()  # `_check` says it in one line
def load(path: str | Path, *, run: LoadOptions, source: SourceOptions, **kwargs):
    """A transformers model from a folder, GGUF file, Hub id or "reference", on lowbit's kernels where it is quantized.

    Args:
        path: The folder, GGUF file, Hub id, GGUF file of a repository ("org/name:file.gguf"), or "reference".
        **kwargs: Those of `from_pretrained`. quantization_config= quantizes a dense model while it is loaded.

    Returns:
        The model; with output_loading_info=True, (the model, what `from_pretrained` says of its keys).

    Raises:
        InputError: A tensor is missing, unexpected or of another shape: nothing is ever filled in.
        UsageError: A keyword that has no effect here, or the opposite of what is promised here.
    """
    if run.backend is not None:
        get_backend(run.backend)  # also where nothing is quantized: a name that does not exist is a mistake
    wanted_exactness(run.exact)  # a variable that nothing understands is a mistake, too
    head, ranks = wanted_head(run.lm_head), _ranks(run)
    kwargs, dtype, hub, wants_info = _keywords(kwargs, run.dtype)
    folder = resolve(path, source.revision, **hub)
    # headers only: transformers follows an index anywhere and trips over damaged files
    reader = decoded(CheckpointReader(folder))
    shared = run.tp_plan if ranks.world > 1 else None
    config = _loading_config(reader, run.backend, source.trust_remote_code, run.fuse, run.exact, shared)
    if kwargs.get("quantization_config") is not None and getattr(config, "quantization_config", None):
        raise UsageError(f"quantization_config= quantizes a dense model, {folder} is quantized already: leave it out")
    if kwargs.get("quantization_config") is not None and shared is not None:
        kwargs["quantization_config"].tp_plan = shared
    for name in [name for name in kwargs if name != "quantization_config" and hasattr(config, name)]:
        setattr(config, name, kwargs.pop(name))  # as from_pretrained does where it reads the config itself
    read_ahead(folder)
    weights = _decoded(reader, config, dtype, kwargs)
    build = no_larger_than(reader.tensors.values())(model_class(config, source.trust_remote_code).from_pretrained)
    try:
        model, info = build(
            folder if weights is None else None,
            config=config,
            state_dict=weights,
            device_map=run.device_map if shared is None else {"": ranks.device},
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported by name below; transformers only says that there are some
            **kwargs,
        )
    except LowbitError:
        raise
    except Exception as error:
        raise InputError(f"cannot load {folder}: {first_line(error)}") from error
    _check(folder, info, source.trust_remote_code)
    if shared is not None and ranks_of(model) is None:  # it is dense: no quantizer has done it
        cut_dense(model, shares_of(model, shared, ranks))
    if head is not None and shared is None:
        set_head(model, head, folder, run.backend)
        choose_inputs(model, run.exact)
    return (model, info) if wants_info else model


def _ranks(run: LoadOptions) -> Ranks:
    """The processes that share the model. Raises UsageError for what does not go together with sharing."""
    if run.tp_plan is None:
        return Ranks.alone()
    ranks = Ranks()
    if ranks.world > 1:
        ranks.stay()
        if run.device_map not in (None, ranks.device.type):
            raise UsageError(f"device_map={run.device_map!r} and tp_plan= do not go together: each has its device")
        if run.lm_head not in (None, AUTO):
            raise UsageError("lm_head= and tp_plan= do not go together: `quantize --lm-head` writes such a model")
    return ranks


def _decoded(reader: CheckpointReader, config, dtype, given: dict) -> dict[str, torch.Tensor] | None:
    """The weights of a checkpoint that transformers cannot read, in the dtype that is asked for; `config` is told where
    its integers are. None for one whose folder it reads itself. given: keywords of `from_pretrained`."""
    if all(isinstance(info, StoredTensor) for info in reader.tensors.values()):
        return None
    if given.get("quantization_config") is not None:
        raise UsageError(
            f"{reader.place} is none of safetensors in plain numbers: `lowbit quantize` it, or leave "
            "quantization_config out"
        )
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if isinstance(wanted, torch.dtype):
        reader = decoded_to(reader, wanted)
    if hasattr(config, "quantization_config"):
        config.quantization_config = LowbitConfig.from_dict(config.quantization_config)
        config.quantization_config.folder = reader.folder
    return {name: read_checked(reader, name) for name in reader.tensors}


def _keywords(given: dict, dtype) -> tuple[dict, object, dict, bool]:
    """What `load` does with keywords of `from_pretrained`: (those that go there, the dtype, those that say how the Hub
    is reached, whether the loading info is asked for). Raises UsageError for those that it cannot obey."""
    kept = {name: value for name, value in given.items() if value is not None}
    for name, instead in _ELSEWHERE.items():
        if name in kept:
            raise UsageError(f"{name}= is no keyword of lowbit.load, which reads the folder as it is: {instead}")
    older = kept.pop("torch_dtype", None)
    if older is not None:
        if dtype not in ("auto", None, older):
            raise UsageError(f"dtype={dtype} and torch_dtype={older} say different things: pass dtype alone")
        dtype = older
    if not kept.pop("use_safetensors", True):
        raise UsageError("use_safetensors=False: lowbit reads safetensors only, pickles can run code when loaded")
    if kept.pop("ignore_mismatched_sizes", False):
        raise UsageError("ignore_mismatched_sizes=True: lowbit.load never fills in weights that do not fit")
    hub = {name: kept.pop(name) for name in _OF_HUB if name in kept}
    return kept, dtype, hub, bool(kept.pop("output_loading_info", False))


def _check(folder: Path, info: dict, trust_remote_code: bool) -> None:
    unexpected = _unknown(folder, set(info.get("unexpected_keys", ())), trust_remote_code)
    mismatched = sorted(info.get("mismatched_keys", ()))
    missing = sorted(info.get("missing_keys", ()))
    for what, names in (
        ("missing from", missing),
        ("of another shape in", mismatched),
        ("unknown to the model but in", unexpected),
    ):
        if names:
            first = (
                names[0]
                if isinstance(names[0], str)
                else f"{names[0][0]} {list(names[0][1])} (expected {list(names[0][2])})"
            )
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{first}{more}: {what} {folder}; the checkpoint does not belong to its config")


def _unknown(folder: Path, unexpected: set[str], trust_remote_code: bool) -> list[str]:
    """Those of the keys that transformers did not expect which are not known to be harmless."""
    if not unexpected:
        return []
    opened = OpenedFolder(folder, trust_remote_code)
    opened.require_known()
    judged = [info.name for weight in opened.stored.weights.values() for info in weight.tensors.values()]
    judged += opened.harmless
    unknown = unexpected - {opened.names.locate(name)[0] for name in judged} - set(judged)
    return sorted(name for name in unknown if not opened.is_for_others(name))


def check_vocabulary(model, ids) -> None:
    """Raise InputError for tokens that the model does not have; the error would be an index deep inside."""
    known = model.get_input_embeddings().num_embeddings
    if ids.numel() and int(ids.max()) >= known:
        raise InputError(
            f"token {int(ids.max())} is not in the model's vocabulary of {known}: the tokenizer is another model's"
        )
