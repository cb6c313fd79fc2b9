"""What the commands share: options, and the checks of them that need nothing else."""

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import flag
from lowbit.errors import OutputError, UsageError
from lowbit.guards.safe_files import refuse_where_we_are
from lowbit.options import SourceOptions, option

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a GGUF file, a Hub id, or 'reference' for the embedded model.",
        show_default=False,
    ),
]
ModelOption = Annotated[str | None, typer.Option("--model", "-m", help="MODEL as an option.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
TrustOption = flag(SourceOptions, "trust_remote_code")
RevisionOption = flag(SourceOptions, "revision")
OutputOption = Annotated[Path | None, typer.Option("-o", "--output-dir", help="Folder to write.", show_default=False)]


@dataclass(frozen=True)
class HeadFlags:
    """The scheme of the output embedding, by two flags."""

    lm_head: bool = option(False, "Quantize the output embedding too, to 8 bits unless --lm-head-scheme says else.")
    lm_head_scheme: str | None = option(None, "Of --lm-head (default W8A16-G128).")

    def scheme(self) -> str | None:
        """What both stand for; None: leave it alone. Raises UsageError."""
        if self.lm_head_scheme is not None and not self.lm_head:
            raise UsageError("--lm-head-scheme says how --lm-head quantizes: pass both")
        from lowbit.numerics.scheme import HEAD_SCHEME

        return (self.lm_head_scheme or HEAD_SCHEME.name) if self.lm_head else None


@dataclass(frozen=True)
class HeadChoice:
    """What becomes of an output embedding that a model holds dense."""

    lm_head: str = option(
        "auto",
        "Scheme of an output embedding that MODEL holds dense; none leaves it so, auto is W8A16-G128 on CPUs where it "
        "is large.",
    )

    def scheme(self) -> str | None:
        """As `lowbit.load` has it. Raises UsageError for what is no scheme."""
        from lowbit.numerics.scheme import Scheme

        if self.lm_head in ("auto", "none"):
            return None if self.lm_head == "none" else self.lm_head
        return Scheme.parse(self.lm_head).name

    def tell(self, model, say) -> None:
        """Say a line about one that is quantized without having been asked for."""
        from lowbit.hf.head import AUTO_KL, added_scheme

        if self.lm_head == "auto" and (scheme := added_scheme(model)) is not None:
            say(f"the output embedding runs in {scheme.name} (KL {AUTO_KL} or less): --lm-head none leaves it dense")


_KV_CACHES = ("full", "int8")
_DTYPES = ("auto", "bfloat16", "float16", "float32")


def one_model(argument: str | None, option: str | None) -> str:
    if (argument is None) == (option is None):
        raise UsageError("expected one MODEL: a folder, a Hub id, or 'reference'")
    return argument if argument is not None else option


def one_output(folder: Path | None, overwrite: bool = False) -> Path:
    """What can be said of an output folder at once. Writing it checks again, and more."""
    if folder is None:
        raise UsageError("no output folder: pass -o DIR")
    try:
        target = Path(os.path.realpath(folder))
        refuse_where_we_are(folder)
        occupied = folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}") from None
    if occupied and not overwrite:
        raise OutputError(f"{target} exists already: choose another output folder, or pass --overwrite")
    return folder


def check_known(**names: str) -> None:
    """`format` and `method` against the tables of lowbit, before anything that takes long to import is."""
    from lowbit.formats import FORMATS, get_format
    from lowbit.quantizers import QUANTIZERS, get_quantizer

    for kind, (table, get) in {"format": (FORMATS, get_format), "method": (QUANTIZERS, get_quantizer)}.items():
        if kind in names and names[kind] not in table:
            get(names[kind])


def checked_dtype(name: str) -> str:
    if name not in _DTYPES:
        raise UsageError(f"dtype is {name!r}; allowed: {', '.join(_DTYPES)}")
    return name


def checked_kv_cache(name: str) -> str:
    if name not in _KV_CACHES:
        raise UsageError(f"kv-cache is {name!r}; allowed: {', '.join(_KV_CACHES)}")
    return name


def default_device_map(device_map: str | None) -> str | None:
    import torch

    if device_map is None and torch.cuda.is_available():
        return "cuda"
    return device_map


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Around the imports of a command that needs models: torch, transformers and what is built on them.

    transformers is quiet from then on: its warnings and bars would run into ours; what matters is raised as an error.
    """
    with _uncollected() if "transformers" not in sys.modules else nullcontext():
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        for needed in ("PreTrainedModel", "GenerationMixin"):  # by every model; imported when it is asked for
            getattr(transformers, needed)
        yield


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collections inside, and none later of what was made there. Modules stay: going through all of their
    objects again and again takes a fifth of the time of importing torch and transformers, and frees nothing."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # or extensions complain of leaks when the process ends
        if collecting:
            gc.enable()


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
