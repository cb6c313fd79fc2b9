"""What engines take, as one table: a row for each engine and format, from the engine's source or from runs of it."""

from dataclasses import dataclass, replace

from lowbit.numerics.scheme import PER_CHANNEL, TENSOR, Activations, Scheme

RANKS = (1, 2, 4, 8)  # sizes of tensor parallelism that a verdict is about
COLUMN, ROW = "column", "row"


@dataclass(frozen=True)
class Module:
    """A quantized weight [out_features, in_features] as an engine sees it.

    split: what tensor parallelism divides, COLUMN (out_features) or ROW (in_features); None: each rank holds it whole.
    merged: how many equal linears lie one below the other in it (gate and up of experts: 2). fused: it is stored as one
    3-D tensor of all experts of a layer. embedding: rows of it are looked up; tied: and the output embedding has no
    table but this one. heads: of attention on the side that is divided, 0 where there are none. planned: the plan of
    transformers is where `split` comes from.
    """

    scheme: Scheme
    out_features: int
    in_features: int
    act_order: bool = False
    split: str | None = None
    merged: int = 1
    expert: bool = False
    fused: bool = False
    embedding: bool = False
    tied: bool = False
    heads: int = 0
    planned: bool = True


@dataclass(frozen=True)
class Kernel:
    """What a kernel multiplies: bits by symmetry, group sizes (None: each that divides in_features), multiples that the
    sides of a rank's matrix have to be of; hidden: the same of that side of an expert which ranks do not divide.
    whole_words: the codes of a row have to fill int32 words.
    activations: what inputs it takes, None for those in floating point."""

    name: str
    sym: tuple[int, ...]
    asym: tuple[int, ...]
    groups: tuple[int, ...] | None = None
    in_multiple: int = 1
    out_multiple: int = 1
    hidden: int = 1
    whole_words: bool = False
    activations: tuple[Activations | None, ...] = (None,)
    capability: tuple[int, int] | None = None  # of the GPU, at least; None: runs without one


@dataclass(frozen=True)
class Rule:
    """What an engine takes of a format: the first kernel that fits a module runs it.

    fuses: linears that multiply the same input become one, so they need one scheme, or all stay dense; so do the
    experts of a layer. fused_experts: reads experts that are stored as one tensor. ranks: sizes of tensor parallelism.
    run: it was run by this project; otherwise its source was read.
    embeddings: kernels of input embeddings, none if it reads these dense only. tied_embeddings: a head may share the
    table. one_scheme: where an embedding is quantized, all is to be quantized as it is.
    by_plan: ranks have what the plan of transformers says, in whole heads and groups, cut out of words if need be.
    """

    engine: str
    version: str
    format: str
    linear: tuple[Kernel, ...]
    experts: tuple[Kernel, ...]
    act_order: bool = False
    fuses: bool = True
    fused_experts: bool = False
    ranks: tuple[int, ...] = RANKS
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    run: bool = False
    note: str = ""
    embeddings: tuple[Kernel, ...] = ()
    tied_embeddings: bool = False
    one_scheme: bool = False
    by_plan: bool = False


_TOKEN, _STATIC = Activations(), Activations(strategy=TENSOR)
_INTEGERS = (_TOKEN, replace(_TOKEN, sym=False), _STATIC, replace(_STATIC, sym=False))
_ALL, _GPTQ_BITS, _MARLIN_GROUPS = (2, 3, 4, 5, 6, 8), (2, 3, 4, 8), (PER_CHANNEL, 32, 64, 128)

# vLLM 0.33.0, paths below vllm/model_executor. The order of kernels: kernels/linear/__init__.py `_POSSIBLE_KERNELS`.
# Marlin pads its tiles (kernels/linear/mixed_precision/marlin.py), Humming takes what is left (humming.py beside it);
# capability: layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py
_VLLM_MARLIN = Kernel("Marlin", (4, 8), (4,), _MARLIN_GROUPS, capability=(7, 5))
_VLLM_HUMMING = Kernel("Humming", _ALL, _ALL, capability=(7, 5))
# layers/quantization/compressed_tensors/compressed_tensors_embedding.py: it has no zero points, and takes codes out of
# single words; `tie_weights` of layers/quantization/base_config.py looks for a dense table
_VLLM_EMBEDDING = Kernel("EmbeddingWNA16Int", (2, 4, 8), (), whole_words=True)
# layers/quantization/compressed_tensors/compressed_tensors.py `_is_dynamic_token_w8a8`, `_is_static_tensor_w8a8` and
# schemes/compressed_tensors_w8a8_int8.py there: one scale for each output; schemes/compressed_tensors_wNa8.py: inputs
# by token, around zero
_VLLM_INT8 = Kernel("W8A8Int8", (8,), (), (PER_CHANNEL,), activations=_INTEGERS, capability=(7, 5))
_VLLM_WNA8 = Kernel("WNA8Int", (2, 3, 4), (), activations=(_TOKEN,), capability=(7, 5))
# layers/quantization/utils/marlin_utils.py `check_moe_marlin_supports_config`; other kernels of experts take groups
# only (layers/quantization/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe_wna16.py)
_VLLM_MARLIN_EXPERTS = replace(_VLLM_MARLIN, hidden=128)
_VLLM_HUMMING_EXPERTS = replace(_VLLM_HUMMING, groups=(16, 32, 64, 128, 256, 512, 1024))
# layers/quantization/moe_wna16.py: 4 and 8 bits of GPTQ, 4 of AWQ; groups are halved until they divide, down to 32
_VLLM_WNA16_EXPERTS = Kernel("WNA16", (4, 8), (4,), (32, 64, 128, 256, 512, 1024), capability=(7, 5))
# layers/quantization/auto_awq.py `AutoAWQLinearMethod`
_VLLM_AWQ = Kernel("AWQ", (4,), (4,), (16, 32, 64, 128, 256, 512, 1024), out_multiple=8, capability=(7, 5))

# SGLang 0.5.23, paths below sglang/srt/layers/quantization: marlin_utils.py `verify_marlin_supports_shape`, and for
# experts `check_moe_marlin_supports_layer` there
_SGLANG_MARLIN = Kernel("Marlin", (4, 8), (4,), _MARLIN_GROUPS, in_multiple=128, out_multiple=64, capability=(8, 0))
# compressed_tensors/schemes/compressed_tensors_w8a8_int8.py
_SGLANG_INT8 = _VLLM_INT8
_SGLANG_MARLIN_EXPERTS = replace(_SGLANG_MARLIN, in_multiple=64, out_multiple=128)

_ANY, _ANY_GPTQ, _ANY_AWQ = (
    (Kernel("", bits, bits),) for bits in (_ALL, _GPTQ_BITS, (4,))
)  # fmt: skip
_ANY_INPUTS = (Kernel("", _ALL, _ALL, activations=(None, *_INTEGERS)),)
# transformers 5.23: quantizers/quantizer_compressed_tensors.py and integrations/compressed_tensors.py
_TRANSFORMERS_EXPERTS = (Kernel("", _ALL, ()),)
_TRANSFORMERS = (replace(_TRANSFORMERS_EXPERTS[0], activations=(None, *_INTEGERS)),)
# GPTQModel 7.6: nn_modules/qlinear/torch.py and torch_awq.py
_GPTQMODEL = (Kernel("", _GPTQ_BITS, _GPTQ_BITS, (PER_CHANNEL, 16, 32, 64, 128, 256, 512, 1024)),)
_GPTQMODEL_AWQ = (Kernel("", (4,), (4,), (PER_CHANNEL, 16, 32, 64, 128), out_multiple=8),)

RULES = (
    Rule("lowbit", "this", "compressed-tensors", _ANY_INPUTS, _ANY, fuses=False, fused_experts=True, by_plan=True,
         dtypes=("float16", "bfloat16", "float32"), run=True, embeddings=_ANY, tied_embeddings=True),
    Rule("transformers", "5.23 with compressed-tensors 0.20", "compressed-tensors", _TRANSFORMERS,
         _TRANSFORMERS_EXPERTS, fuses=False, ranks=(1,), run=True, dtypes=("float16", "bfloat16", "float32"),
         note="dequantizes the whole model at its first call; asymmetric linears of one scheme load with "
              "quantization_config=CompressedTensorsConfig(dequantize=True), and so do quantized embeddings",
         embeddings=_ANY, tied_embeddings=True, one_scheme=True),
    Rule("vLLM", "0.33", "compressed-tensors", (_VLLM_MARLIN, _VLLM_HUMMING, _VLLM_INT8, _VLLM_WNA8),
         (_VLLM_MARLIN_EXPERTS, _VLLM_HUMMING_EXPERTS), embeddings=(_VLLM_EMBEDDING,)),
    # compressed_tensors/schemes/compressed_tensors_wNa16.py and compressed_tensors_wNa16_moe.py, whose zero points of
    # experts are laid out wrongly (pull request 39510)
    Rule("SGLang", "0.5.23", "compressed-tensors", (_SGLANG_MARLIN, _SGLANG_INT8),
         (replace(_SGLANG_MARLIN_EXPERTS, asym=()),)),
    Rule("lowbit", "this", "gptq", _ANY_GPTQ, _ANY_GPTQ, act_order=True, fuses=False, by_plan=True,
         dtypes=("float16", "bfloat16", "float32"), run=True, note="experts without act-order only"),
    Rule("GPTQModel", "7.6", "gptq", _GPTQMODEL, _GPTQMODEL, act_order=True, fuses=False, ranks=(1,), run=True,
         note="asymmetric checkpoints only as gptq_v2"),
    # layers/quantization/auto_gptq.py; act-order is refused in layers/quantization/utils/gptq_utils.py
    Rule("vLLM", "0.33", "gptq", (replace(_VLLM_MARLIN, asym=()),),
         (replace(_VLLM_MARLIN_EXPERTS, asym=()), replace(_VLLM_WNA16_EXPERTS, asym=()))),
    # gptq/gptq.py `GPTQMarlinConfig`; gptq/schemes/gptq_linear.py: the kernel for other schemes was removed
    Rule("SGLang", "0.5.23", "gptq", (replace(_SGLANG_MARLIN, asym=()),), (replace(_SGLANG_MARLIN_EXPERTS, asym=()),),
         act_order=True),
    Rule("lowbit", "this", "awq", _ANY_AWQ, _ANY_AWQ, fuses=False, by_plan=True,
         dtypes=("float16", "bfloat16", "float32"), run=True),
    Rule("GPTQModel", "7.6", "awq", _GPTQMODEL_AWQ, _GPTQMODEL_AWQ, fuses=False, ranks=(1,), run=True),
    # layers/quantization/auto_awq.py; symmetric data is stored with its zero points, so it counts as asymmetric
    Rule("vLLM", "0.33", "awq", (replace(_VLLM_MARLIN, sym=(4,)), _VLLM_AWQ),
         (replace(_VLLM_MARLIN_EXPERTS, sym=(4,)), replace(_VLLM_WNA16_EXPERTS, sym=(4,)))),
    # awq/awq.py `AWQMarlinConfig`
    Rule("SGLang", "0.5.23", "awq", (replace(_SGLANG_MARLIN, sym=(4,)),), (replace(_SGLANG_MARLIN_EXPERTS, sym=(4,)),)),
)  # fmt: skip


def _packed_sides(scheme: Scheme) -> tuple[str, ...]:
    if scheme.bits == 8 and scheme.activations is not None:
        return ()  # stored as bytes
    return ("in_features",) if scheme.sym else ("in_features", "out_features")


# Scheme -> the sides along which a format packs codes or zero points into int32 words: where a matrix is cut or joined
# along one of them, every part has to be whole words
PACKED = {
    "compressed-tensors": _packed_sides,
    "gptq": lambda scheme: ("in_features", "out_features"),
    "awq": lambda scheme: ("out_features",),
}
