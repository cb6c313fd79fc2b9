"""Calibration samples: windows of tokens, packed and without padding, from a file, a data set or the model itself."""

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit.checkpoint.layout import read_header
from lowbit.errors import InputError, UsageError, first_line
from lowbit.options import DrawnSampleOptions, keywords, takes_options
from lowbit.text.datasets import DEFAULT_CALIBRATION, Texts, chat_tokens, ended, shuffled
from lowbit.text.selfmade import sample_from_model

SELF = "self"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".npz")
# A text with less cannot say anything about a model
_FEWEST_TOKENS = 32
# No document gives more than this part of the tokens before the others had their turn: one long one is not the language
_LARGEST_SHARE = 16
# Characters that surely hold a token each, with a wide margin: most texts have four
_CHARACTERS = 16
# After so many rejected conversations and not one accepted, the chat template does not fit the data set
_REFUSED_CHATS = 100


@dataclass(frozen=True)
class Samples:
    """Calibration tokens. input_ids: int64 [samples, seqlen], packed, no padding. source: what they are, for people."""

    input_ids: torch.Tensor
    source: str

    @property
    def digest(self) -> str:
        """sha256 of shape and ids: samples with the same digest give the same statistics."""
        ids = self.input_ids.contiguous().numpy().astype("<i8")
        return hashlib.sha256(repr(ids.shape).encode() + ids.tobytes()).hexdigest()

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()


@takes_options
def calibration_samples(
    dataset: Any,
    folder: Path,
    *,
    amount: DrawnSampleOptions,
    vocabulary: int,
    context: int | None,
    trust_remote_code: bool = False,
    announce: Callable[[str], None] = lambda sentence: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Samples:
    """Samples for the model in `folder`, the same ones for the same seed; where there are too few texts, fewer.

    Args:
        dataset: Token ids [samples, seqlen] as a tensor, array or nested list, or in a .safetensors or .npy file; a
            file of text (.txt), or of rows of texts or chats (.jsonl, .json, .parquet);
            `org/name[:config[:split[:column]]]`, or a folder of data; "stdlib-train"; "self": text sampled from the
            model; None: a data set of the Hub where it can be reached, else "self".
        vocabulary: Ids are below it.
        context: The longest sample that the model can take.
        announce: Told in a sentence what is not as it was asked for.
        progress: Called with the tokens that are done and those to do, for "self".

    Raises:
        InputError: There is less than one sample to be had.
    """
    _check(amount)
    given = _given(dataset)
    if given is not None:
        return _as_given(*given, amount.num_samples, vocabulary, context, announce)
    if context is not None and amount.seqlen > context:
        announce(f"calibration samples have {context} tokens, the model's context, instead of {amount.seqlen}")
        amount = replace(amount, seqlen=context)
    source = _source(dataset, folder, amount.seed, trust_remote_code, announce)
    if source is None:
        ids = sample_from_model(folder, **keywords(amount), trust_remote_code=trust_remote_code, progress=progress)
        ids = checked_ids(ids, vocabulary, "text sampled from the model")
        return Samples(ids, f"sampled from the model, seed {amount.seed}")
    texts, encode = source
    if texts.whole is not None:
        stream = _spread(texts.whole, encode, amount.num_samples, amount.seqlen, amount.seed)
    else:
        stream = _packed(encode.documents(texts), amount.num_samples * amount.seqlen, amount.seqlen, encode.end)
    if encode.refused:
        if not stream:
            raise encode.refused[0]
        announce(f"{len(encode.refused)} chats were left out: {encode.refused[0]}")
    ids = _windows(stream, amount.num_samples, amount.seqlen, texts.name, announce)
    return Samples(checked_ids(ids, vocabulary, f"{texts.name} in the tokens of {folder}"), texts.name)


def _check(amount: DrawnSampleOptions) -> None:
    if amount.num_samples < 1:
        raise UsageError(f"number of calibration samples {amount.num_samples}; expected 1 or more")
    if amount.seqlen < 2:
        raise UsageError(f"calibration samples of {amount.seqlen} tokens; expected 2 or more")
    if not 0 <= amount.seed < 2**32:
        raise UsageError(f"seed {amount.seed}; expected 0 to {2**32 - 1}")


def _source(
    dataset: Any, folder: Path, seed: int, trust_remote_code: bool, announce: Callable[[str], None]
) -> tuple[Texts, "_Encoder"] | None:
    """The texts of a data set and what makes tokens of them, None for text that the model itself writes."""
    if dataset is not None:
        if str(dataset) == SELF:
            return None
        encode = _Encoder(folder, trust_remote_code)
        return shuffled(str(dataset), seed), encode
    try:
        encode = _Encoder(folder, trust_remote_code)
        return shuffled(DEFAULT_CALIBRATION, seed), encode
    except InputError as error:
        announce(
            "calibrating on text sampled from the model itself: no data set was named, and the default cannot be "
            f"used ({error})"
        )
        return None


# Token ids that are given


def _given(dataset) -> tuple[torch.Tensor, str] | None:
    """(ids, what they are) if `dataset` is ids and not the name of a text."""
    if isinstance(dataset, torch.Tensor):
        return dataset.detach().cpu(), "token ids"
    if isinstance(dataset, (list, tuple, np.ndarray)):
        if len(dataset) and all(isinstance(text, str) for text in dataset):
            raise InputError(
                "calibration data is a list of texts; expected integers [samples, seqlen], or the name of a file "
                "of texts (.txt, .jsonl, .parquet)"
            )
        try:
            return _from_numpy(np.asarray(dataset), "the token ids"), "token ids"
        except (ValueError, TypeError):
            raise InputError("the token ids are rows of different lengths: expected [samples, seqlen]") from None
    if dataset is not None and not isinstance(dataset, (str, Path)):
        raise UsageError(
            f"calibration data is a {type(dataset).__name__}; expected token ids [samples, seqlen], a file or a name"
        )
    path = Path(dataset or "")
    suffix = path.suffix.lower()
    if suffix in _PICKLES and path.is_file():
        raise InputError(f"{path} is not read, because such files can run code: save the ids as .safetensors or .npy")
    if suffix not in (".safetensors", ".npy"):
        return None
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        return (_from_safetensors if suffix == ".safetensors" else _from_npy)(path), path.name
    except OSError as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from None


def _from_safetensors(path: Path) -> torch.Tensor:
    from safetensors import safe_open

    names = [tensor.name for tensor in read_header(path)]  # before the package maps a file that may be damaged
    if len(names) != 1 and "input_ids" not in names:
        raise InputError(f"{path} has {len(names)} tensors; expected one, or one called input_ids")
    with safe_open(path, "pt") as file:
        return file.get_tensor("input_ids" if "input_ids" in names else names[0])


def _from_npy(path: Path) -> torch.Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"cannot read {path} as an array of token ids: {first_line(error)}") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} is an archive of arrays; expected one array, written by numpy.save")
    return _from_numpy(array, str(path))


def _from_numpy(array: np.ndarray, what: str) -> torch.Tensor:
    if array.dtype.kind not in "iu":
        raise InputError(f"{what} hold {array.dtype}; expected integers [samples, seqlen]")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=True))


def _as_given(ids, what, num_samples, vocabulary, context, announce) -> Samples:
    ids = checked_ids(ids, vocabulary, what)
    if context is not None and ids.shape[1] > context:
        announce(f"only the first {context} of {ids.shape[1]} tokens of each sample are used, the model's context")
    if ids.shape[0] > num_samples:
        announce(f"only the first {num_samples} of {ids.shape[0]} samples are used")
    return Samples(ids[:num_samples, :context].clone(), what)


def checked_ids(ids: torch.Tensor, vocabulary: int, what: str) -> torch.Tensor:
    """int64 [samples, seqlen]. Beyond its range (uint64) ids wrap around to negative ones, which are refused.

    Raises InputError for what is no such ids, naming `what` they are of."""
    if ids.dtype not in _INTEGERS:
        raise InputError(f"{what}: the ids are {str(ids.dtype).removeprefix('torch.')}; expected integers")
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise InputError(
            f"{what}: the ids are {list(ids.shape)}; expected [samples, seqlen] with 2 or more tokens each"
        )
    ids = ids.to(torch.int64)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise InputError(
            f"{what}: token {low if low < 0 else high} is not in the model's vocabulary of {vocabulary}; "
            "expected ids of its own tokenizer"
        )
    return ids


# Text


class _Encoder:
    """Documents to token ids, with what the tokenizer adds by itself (a BOS token, where it uses one).

    refused: why chats were left out. Some data sets have a few among thousands that no template takes.
    """

    def __init__(self, folder: Path, trust_remote_code: bool):
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever transformers stumbles over comes from the files of this folder
            raise InputError(
                f"cannot load the tokenizer of {folder} ({first_line(error).rstrip(' .:')}): pass token ids as "
                f".safetensors or .npy, or the data set '{SELF}', which needs no tokenizer"
            ) from None
        eos = self.tokenizer.eos_token_id
        self.end = [] if eos is None else [eos]
        self.refused: list[InputError] = []

    def text(self, text: str) -> list[int]:
        return self.tokenizer(text, verbose=False)["input_ids"]

    def documents(self, texts: Texts) -> Iterator[list[int]]:
        accepted = False
        for document in texts.documents:
            if isinstance(document, str):
                if document.strip():
                    yield self.text(document)
                continue
            try:
                ids = chat_tokens(self.tokenizer, document, texts.name)
            except InputError as error:
                self.refused.append(error)
                if not self.tokenizer.chat_template or (not accepted and len(self.refused) >= _REFUSED_CHATS):
                    raise
                continue
            accepted = True
            yield ids


def _packed(documents: Iterable[list[int]], need: int, seqlen: int, end: list[int]) -> list[int]:
    """The documents one after another, each ended by `end`: the first `need` tokens, or all there are.

    What is too long of a document waits until the others had their turn.
    """
    limit = max(seqlen, need // _LARGEST_SHARE)
    stream: list[int] = []
    rests: deque[list[int]] = deque()

    def take(ids: list[int]) -> None:
        stream.extend(ended(ids[:limit], end))
        if len(ids) > limit:
            rests.append(ids[limit:])

    for ids in documents:
        if ids:
            take(ids)
        if len(stream) >= need:
            break
    while rests and len(stream) < need:
        take(rests.popleft())
    return stream[:need]


def _spread(text: str, encode: _Encoder, num_samples: int, seqlen: int, seed: int) -> list[int]:
    """Windows of one text, from all over it: one at a random place in each of `num_samples` equal parts."""
    places = random.Random(seed)
    excerpt = _CHARACTERS * seqlen
    if len(text) <= num_samples * excerpt:
        ids = encode.text(text)
        count = len(ids) // seqlen
        if count <= num_samples:
            return ids
        edges = [part * count // num_samples for part in range(num_samples + 1)]
        chosen = [places.randrange(low, high) for low, high in pairwise(edges)]
        return [token for window in chosen for token in ids[window * seqlen : (window + 1) * seqlen]]
    # too long to tokenize for the few windows: only where they are
    stream: list[int] = []
    edges = [part * len(text) // num_samples for part in range(num_samples + 1)]
    for low, high in pairwise(edges):
        start = places.randint(low, high - excerpt)
        ids = encode.text(text[start : start + excerpt])
        if len(ids) >= seqlen:
            stream += ids[:seqlen]
    return stream


def _windows(stream: list[int], num_samples: int, seqlen: int, name: str, announce) -> torch.Tensor:
    """int64 [samples, seqlen]: the stream, cut. A stream that is shorter than one sample is one as it is."""
    count = min(num_samples, len(stream) // seqlen)
    if count == 0:
        if len(stream) < _FEWEST_TOKENS:
            raise InputError(
                f"{name} has {len(stream)} tokens of text; expected at least {min(seqlen, _FEWEST_TOKENS)}: "
                "calibrate on a longer text"
            )
        announce(f"{name} has text for 1 sample of {len(stream)} tokens only; {num_samples} of {seqlen} were asked for")
        return torch.tensor([stream])
    if count < num_samples:
        announce(
            f"{name} has text for {count} samples of {seqlen} tokens only ({len(stream):,} tokens); {num_samples} were "
            "asked for"
        )
    return torch.tensor(stream[: count * seqlen]).view(count, seqlen)
