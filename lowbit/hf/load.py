"""Loading models: quantized or not, ours or other people's, strictly."""

from pathlib import Path

from lowbit.backends import get_backend
from lowbit.checkpoint import CheckpointReader
from lowbit.discovery import model_class
from lowbit.errors import InputError, LowbitError, first_line
from lowbit.formats import detect_format
from lowbit.hf.head import quantize_head
from lowbit.hf.quiet import quiet_transformers
from lowbit.read_ahead import read_ahead
from lowbit.scheme import Scheme
from lowbit.sources import load_config, resolve

# Tensors that many writers add and that carry nothing: zero points of symmetric weights, g_idx in natural order
_HARMLESS = ("_zero_point", "_g_idx")


def loading_config(
    path: str | Path,
    backend: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    fuse: bool = True,
):
    """The config that makes `from_pretrained` load a quantized checkpoint into lowbit's layers:

    AutoModelForCausalLM.from_pretrained(path, config=loading_config(path))
    """
    config = load_config(resolve(path, revision), trust_remote_code)
    source = getattr(config, "quantization_config", None)
    if source is not None:
        source = source if isinstance(source, dict) else source.to_dict()
        detect_format(source)
        config.quantization_config = {"quant_method": "lowbit", "source": source, "backend": backend, "fuse": fuse}
    return config


@quiet_transformers()  # `_check` says it in one line
def load(
    path: str | Path,
    *,
    device_map=None,
    dtype="auto",
    backend: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    fuse: bool = True,
    lm_head: str | Scheme | None = None,
    **kwargs,
):
    """A transformers model from a folder, a Hub id or "reference", on lowbit's kernels where it is quantized.

    device_map, dtype and further keywords are those of `from_pretrained`. backend: run on this one or fail.
    fuse: linears that share an input share one product (lowbit.fusion), which saves launches and changes no result.
    lm_head: a scheme such as "W8A16-G128" for an output embedding that the checkpoint holds dense, tied or not.
    Raises InputError if a tensor is missing, unexpected or of another shape: nothing is ever filled in.
    """
    if backend is not None:
        get_backend(backend)  # also where nothing is quantized: a name that does not exist is a mistake
    head_scheme = Scheme.parse(lm_head) if isinstance(lm_head, str) else lm_head
    folder = resolve(path, revision)
    CheckpointReader(folder)  # headers only: transformers follows an index anywhere and trips over damaged files
    read_ahead(folder)
    config = loading_config(folder, backend, trust_remote_code=trust_remote_code, fuse=fuse)
    try:
        model, info = model_class(config, trust_remote_code).from_pretrained(
            folder,
            config=config,
            device_map=device_map,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported by name below; transformers only says that there are some
            **kwargs,
        )
    except LowbitError:
        raise
    except Exception as error:
        raise InputError(f"cannot load {folder}: {first_line(error)}") from error
    _check(folder, info)
    if head_scheme is not None:
        quantize_head(model, head_scheme, folder, backend)
    return model


def _check(folder: Path, info: dict) -> None:
    unexpected = sorted(k for k in info.get("unexpected_keys", ()) if not k.endswith(_HARMLESS))
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


def check_vocabulary(model, ids) -> None:
    """Raise InputError for tokens that the model does not have; the error would be an index deep inside."""
    known = model.get_input_embeddings().num_embeddings
    if ids.numel() and int(ids.max()) >= known:
        raise InputError(
            f"token {int(ids.max())} is not in the model's vocabulary of {known}: the tokenizer is another model's"
        )
