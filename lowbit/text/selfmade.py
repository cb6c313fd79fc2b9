"""Calibration tokens sampled from the model itself: no text, no tokenizer and no network are needed for them.

Consistently competitive with real text, and sometimes better, in Williams et al., "Self-calibration for Language Model
Quantization and Pruning" (arXiv 2410.17170).
"""

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from lowbit.checkpoint import CheckpointReader
from lowbit.discovery import require_language_head
from lowbit.errors import InputError, first_line
from lowbit.numerics.dense import gemm_dtype

# Sample i has temperature i % 8: from text that is likely to text that is not, both of which real text is made of
_TEMPERATURES = tuple(step / 10 for step in range(6, 14))
_LARGEST_BATCH = 64
# Memory for the keys and values of a batch; on a GPU this part of what it has, free or not: the same batches every time
_CACHE_BYTES, _CACHE_PART_OF_GPU = 2 * 2**30, 8
_NARROW = (torch.bfloat16, torch.float16)


def sample_from_model(
    folder: Path,
    *,
    num_samples: int,
    seqlen: int,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> torch.Tensor:
    """int64 [num_samples, seqlen] on the CPU: random text of the model in `folder`.

    Each sample begins with the BOS token (a random one where there is none) and runs on where a text ends. The same for
    the same seed on the same machine; the caller's random state is left alone. progress: tokens done and to do.
    """
    reader = CheckpointReader(folder)  # pickles and damaged files get their errors here
    done: list[torch.Tensor] = []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.inference_mode():
        model = _load(folder, reader, trust_remote_code)
        bos, ordinary = _first_tokens(model)
        batch = _batch_size(model, seqlen)
        for start in range(0, num_samples, batch):
            # a seed for each batch: where there are to be more, the batches before them stay as they are
            torch.manual_seed((seed * 1_000_003 + start) % 2**63)
            count = min(batch, num_samples - start)
            first = torch.full((count,), bos) if bos is not None else ordinary[torch.randint(len(ordinary), (count,))]
            done.append(_continue(model, first, range(start, start + count), seqlen).cpu())
            progress((start + count) * seqlen, num_samples * seqlen)
    del model
    gc.collect()  # cycles in it would keep its memory while the next step wants it
    torch.cuda.empty_cache()
    return torch.cat(done)


def _load(folder: Path, reader: CheckpointReader, trust_remote_code: bool):
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever is wrong with the file
        raise InputError(f"cannot load {folder} to sample text from it: {first_line(error)}") from None
    require_language_head(config, folder, trust_remote_code)
    dtype, on_gpu = "auto", torch.cuda.is_available()
    if not on_gpu and any(_is_slow(tensor.dtype) for tensor in reader.tensors.values()):
        dtype = torch.float32
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map="auto" if on_gpu else None,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by name below
        )
    except Exception as error:  # transformers stumbles in many ways over a folder that is not what its config says
        raise InputError(f"cannot load {folder} to sample text from it: {first_line(error)}") from error
    # transformers fills what is missing with random numbers, and random weights would make up the text
    for what in ("missing_keys", "mismatched_keys"):
        if info.get(what):
            name = min(map(str, info[what]))
            raise InputError(f"{folder} does not fit its config ({what.replace('_', ' ')}: {name}): download it again")
    return model.eval()


def _is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of this dtype without instructions for it: hundreds of times slower."""
    return dtype in _NARROW and gemm_dtype(dtype) != dtype


def _first_tokens(model) -> tuple[int | None, torch.Tensor]:
    """The BOS token, and the tokens that have no meaning of their own in the configs."""
    found = {}
    for name in ("bos", "eos", "pad"):
        for config in (model.generation_config, model.config.get_text_config()):
            value = getattr(config, f"{name}_token_id", None)
            if value is not None:
                found.setdefault(name, value if isinstance(value, list) else [value])
    special = {token for tokens in found.values() for token in tokens}
    vocabulary = model.get_input_embeddings().num_embeddings
    ordinary = [token for token in range(vocabulary) if token not in special]
    bos = found.get("bos", [None])[0]
    return bos if bos is not None and 0 <= bos < vocabulary else None, torch.tensor(ordinary)


def _batch_size(model, seqlen: int) -> int:
    """As many samples as have room for their keys and values; where a config does not say, 1 is always right."""
    config = model.config.get_text_config()
    layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    heads = getattr(config, "num_attention_heads", None)
    if not (isinstance(layers, int) and isinstance(width, int) and isinstance(heads, int)):
        return 1
    groups = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or width // heads
    sample = 2 * layers * groups * head * seqlen * model.dtype.itemsize
    room = _CACHE_BYTES
    if model.device.type == "cuda":
        room = torch.cuda.get_device_properties(model.device).total_memory // _CACHE_PART_OF_GPU
    return max(1, min(_LARGEST_BATCH, room // sample))


class _Temperatures:
    """A logits processor: each row has a temperature of its own, by the number of its sample."""

    def __init__(self, numbers: range):
        self.values = torch.tensor([_TEMPERATURES[number % len(_TEMPERATURES)] for number in numbers]).unsqueeze(1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.float() / self.values.to(scores.device)


def _continue(model, first: torch.Tensor, numbers: range, seqlen: int) -> torch.Tensor:
    from transformers import GenerationConfig, LogitsProcessorList

    # in place of the model's own, which `generate` would take over in part: its EOS, top-k, penalties, ...
    model.generation_config = settings = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_length=seqlen, pad_token_id=0, eos_token_id=None
    )
    ids = first.unsqueeze(1).to(model.device)
    try:
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Temperatures(numbers)]),
        )
    except RuntimeError as error:
        if "nan" not in str(error):
            raise
        raise InputError(
            "the model gives NaN or infinite logits: its weights are damaged or its dtype overflows"
        ) from None
