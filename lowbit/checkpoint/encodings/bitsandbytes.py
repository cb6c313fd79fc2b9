"""Checkpoints of bitsandbytes: NF4 and FP4 (`load_in_4bit`), and LLM.int8 (`load_in_8bit`).

Four bits: `x.weight` holds two codes in a byte, the first in the high four bits, row after row; `x.weight.quant_map`
is what the 16 codes stand for, `x.weight.absmax` the scale of each block of them. With double quantization `absmax` is
bytes, numbers of `nested_quant_map` times `nested_absmax` of a block, plus an offset. Shape, block sizes and offset are
JSON in `x.weight.quant_state.bitsandbytes__nf4` (`QuantState.as_dict` of bitsandbytes).

Eight bits: `x.weight` is int8, `x.SCB` the largest magnitude of each row, which 127 stands for.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from lowbit.checkpoint.encodings import EncodedWeight
from lowbit.checkpoint.encodings.blocks import companion, of_pairs, require_dtype, scale_values
from lowbit.checkpoint.layout import StoredTensor, TensorInfo
from lowbit.errors import InputError
from lowbit.guards.reading import parse_json
from lowbit.guards.records import record

_STATE = ".quant_state.bitsandbytes__"
_PER_CODE = 7.874015718698502e-3  # 1 / 127, as bitsandbytes multiplies by it
_LONGEST_STATE = 10_000  # bytes of JSON; real ones have about 150
_AT_ONCE = 2**19  # elements that are decoded at a time, in whole blocks
_LONGEST_BLOCK = 2**16  # codes; bitsandbytes has 32 to 4096, and 256 scales to a nested one


@dataclass(frozen=True)
class _State:
    shape: tuple[int, ...]
    blocksize: int
    nested_blocksize: int | None = None
    nested_offset: float = 0.0


def weights(tensors: Mapping[str, TensorInfo], config: Mapping) -> Iterator[EncodedWeight]:
    states = {name.partition(_STATE)[0]: info for name, info in tensors.items() if _STATE in name}
    for name, codes in tensors.items():
        if name in states:
            yield _four_bits(name, codes, states[name], tensors)
        elif codes.dtype == torch.int8 and name.endswith(".weight"):
            yield _eight_bits(name, codes, tensors)


def _eight_bits(name: str, codes: TensorInfo, tensors: Mapping[str, TensorInfo]) -> EncodedWeight:
    base = name.removesuffix("weight")
    rows = companion(tensors, codes, f"{base}SCB")
    if len(codes.shape) != 2 or rows.numel != codes.shape[0]:
        raise InputError(
            f"{rows.name} has shape {list(rows.shape)}, expected one number for each row of {name}, which is "
            f"{list(codes.shape)}: the checkpoint is damaged"
        )

    def decode(read: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        scales = scale_values(read["scales"], rows.name).view(-1, 1)
        made = torch.empty(codes.shape, dtype=dtype)
        at_once = max(1, _AT_ONCE // max(1, codes.shape[1]))  # rows
        for part, some, of_rows in zip(*(t.split(at_once) for t in (made, read["codes"], scales)), strict=True):
            part.copy_(some.float().mul_(of_rows).mul_(_PER_CODE))
        return made

    parts = {"codes": codes, "scales": rows}
    return EncodedWeight(name, codes.shape, parts, decode, (f"{base}weight_format",), "LLM.int8")


def _four_bits(
    name: str, codes: TensorInfo, state_info: TensorInfo, tensors: Mapping[str, TensorInfo]
) -> EncodedWeight:
    state = _read_state(state_info)
    nested = () if state.nested_blocksize is None else ("nested_absmax", "nested_quant_map")
    parts = {part: companion(tensors, codes, f"{name}.{part}") for part in ("absmax", "quant_map", *nested)}
    parts = {"codes": codes} | parts
    require_dtype(codes, torch.uint8)
    if nested:
        require_dtype(parts["absmax"], torch.uint8)
    count = state.shape[0] * state.shape[1]
    blocks = -(-count // state.blocksize)
    expected = {
        "codes": -(-count // 2),
        "absmax": blocks,
        "quant_map": 16,
        "nested_quant_map": 256,
        "nested_absmax": -(-blocks // (state.nested_blocksize or 1)),
    }
    for part, info in parts.items():
        if info.numel != expected[part]:
            raise InputError(
                f"{info.name} has {info.numel} numbers, expected {expected[part]} for a weight of "
                f"{list(state.shape)}: the checkpoint is damaged"
            )

    def decode(read: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        scales, values = _absmax(read, state, parts), scale_values(read["quant_map"], parts["quant_map"].name)
        packed, made = read["codes"].view(-1), torch.empty(count, dtype=dtype)
        at_once = max(1, _AT_ONCE // state.blocksize)
        for first in range(0, blocks, at_once):
            start, stop = first * state.blocksize, min((first + at_once) * state.blocksize, count)
            pairs = packed[start // 2 : -(-stop // 2)]
            numbers = of_pairs(pairs, values, first_is_high=True).view(-1)[: stop - start]
            some = scales[first : first + at_once]
            if len(numbers) == len(some) * state.blocksize:
                numbers.view(-1, state.blocksize).mul_(some.unsqueeze(1))
            else:  # the last block is cut
                numbers.mul_(some.repeat_interleave(state.blocksize)[: len(numbers)])
            made[start:stop] = numbers
        return made.view(state.shape)

    kind = state_info.name.rpartition("__")[2].upper()
    return EncodedWeight(name, state.shape, parts, decode, (state_info.name,), kind)


def _absmax(read: dict[str, torch.Tensor], state: _State, parts: Mapping[str, TensorInfo]) -> torch.Tensor:
    """float32: the scale of each block."""
    if state.nested_blocksize is None:
        return scale_values(read["absmax"], parts["absmax"].name).view(-1)
    values = scale_values(read["nested_quant_map"], parts["nested_quant_map"].name).view(-1)
    scales = scale_values(read["nested_absmax"], parts["nested_absmax"].name).view(-1)
    codes = read["absmax"].view(-1)
    wide = scales.repeat_interleave(state.nested_blocksize)[: len(codes)]
    return values[codes.int()].mul_(wide).add_(state.nested_offset)


def _read_state(info: TensorInfo) -> _State:
    if not isinstance(info, StoredTensor):
        raise InputError(f"{info.name} holds the shape of its weight, which headers do not tell: download the model")
    require_dtype(info, torch.uint8)
    if info.numel > _LONGEST_STATE:
        raise InputError(f"{info.name} has {info.numel} bytes, expected a short JSON object: the checkpoint is damaged")
    state = record(_State, parse_json(bytes(info.read().tolist()), info.name), info.name)
    blocks = (state.blocksize, state.blocksize if state.nested_blocksize is None else state.nested_blocksize)
    if len(state.shape) != 2 or min(*state.shape, *blocks) < 1 or max(blocks) > _LONGEST_BLOCK or state.blocksize % 2:
        raise InputError(
            f"{info.name} says shape {list(state.shape)} in blocks of {blocks[0]} and {blocks[1]}: expected a matrix, "
            f"and an even number of codes in a block, {_LONGEST_BLOCK} at most"
        )
    return state
