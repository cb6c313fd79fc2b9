"""What running a quantized model takes: its weights, its cache, and what a forward pass holds."""

import copy
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from lowbit.discovery import skeleton
from lowbit.errors import UsageError
from lowbit.layers.size import bytes_in_memory
from lowbit.options import LoadedOptions
from lowbit.quantization.opened import Source
from lowbit.quantization.plan import Plan, Step

if TYPE_CHECKING:  # it imports what generates, which most plans do without
    from lowbit.generation.memory import BesideWeights

# What is foreseen where nothing is named, unless the model was made for less
_CONTEXT = 4096
# Bytes of a bias beside each scale in MLX's files: in the dtype of scales, or in float32 (`formats.mlx`)
_MLX_ASYMMETRIC_BIAS = 4


@dataclass(frozen=True)
class Running:
    """How a model runs, and what that takes beside its weights.

    engine: what runs it; None: lowbit, on this machine. context, batch, kv_cache: as `LoadedOptions` has them.
    """

    engine: str | None
    context: int
    batch: int
    kv_cache: str
    beside: "BesideWeights"

    def __str__(self) -> str:
        cache, working = (f"{part:,}" for part in (self.beside.cache, self.beside.working))
        return (
            f"{cache} of them for the {self.kv_cache} cache of {self.batch} x {self.context} tokens and {working} to "
            "compute with"
        )

    def memory(self, plan: Plan) -> dict:
        """Bytes, for reports: "peak" is "weights", "cache" and "working" together."""
        weights = sum(self.of_step(step) for step in plan.steps)
        parts = {"weights": weights, **asdict(self.beside)}
        load = {"context": self.context, "batch": self.batch, "kv_cache": self.kv_cache}
        return {"peak": sum(parts.values()), **parts, **load}

    def of_step(self, step: Step) -> int:
        """Bytes of a weight in memory: as lowbit's backend on this machine holds it; as the files do elsewhere."""
        stored = sum(info.nbytes for info in step.outputs)
        if step.scheme is None or step.scheme.activations is not None or step.site.kind == "embedding":
            return stored
        if self.engine == "mlx":
            scales = step.source.numel // step.scheme.group_of(step.site.in_features)
            return stored + scales * (step.source.dtype.itemsize if step.scheme.sym else _MLX_ASYMMETRIC_BIAS)
        if self.engine not in (None, "lowbit"):
            return stored
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rows = step.source.numel // step.site.in_features
        return bytes_in_memory(step.scheme, rows, step.site.in_features, step.source.dtype, device)


def running(start: Source, asked: LoadedOptions, engine: str | None, trust_remote_code: bool = False) -> Running:
    """What running a model would take beside its weights.

    Args:
        start: The model.
        asked: Context, batch and cache.
        engine: What runs it.
        trust_remote_code: Of its repository.

    Raises:
        UsageError: A context that the model was not made for; an engine that runs the model dense.
        InputError: It cannot be told.
    """
    from lowbit.generation.memory import Load, beside_weights

    if engine == "transformers":
        raise UsageError("transformers dequantizes the whole model at its first call: what runs there has no --fit")
    config = start.config
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    context = asked.tokens or min(_CONTEXT, most or _CONTEXT)
    if most is not None and context > most:
        raise UsageError(f"the model was made for {most} tokens: --context {context} is more")
    # not the dtype of the config, which names that of the last model made of it
    sizes: Counter[torch.dtype] = Counter()
    for info in start.reader.tensors.values():
        sizes[info.dtype] += info.numel * info.dtype.is_floating_point
    dtype = max(sizes, key=lambda each: sizes[each])
    model = skeleton(copy.deepcopy(config), trust_remote_code, dtype=dtype)
    load = Load(context, asked.batch, asked.kv_cache == "int8", here=engine in (None, "lowbit"))
    return Running(engine, context, asked.batch, asked.kv_cache, beside_weights(model, load))
