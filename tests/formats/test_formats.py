"""What every format promises, and the layouts of GPTQ and AWQ against packers that place one bit at a time."""

import pytest
import torch
from covering import cover
from weights import BITS, assert_same, old_words, random_quantized

from lowbit.errors import InputError, UsageError
from lowbit.formats import FORMATS, awq, compressed_tensors, detect_format, get_format, gptq
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme

SHAPES = [(32, 128), (96, 384)]  # of outputs and inputs


def holds(name, bits, group, sym, shape):
    scheme = Scheme(bits, group, sym)
    return get_format(name).refuse(scheme, shape, scheme) is None


CASES = [
    pytest.param(
        name, Scheme(bits, group, sym), shape, id=f"{name}-{Scheme(bits, group, sym).name}-{shape[0]}x{shape[1]}"
    )
    for name, bits, group, sym, shape in cover(
        FORMATS, BITS, (32, 128, -1), (True, False), SHAPES, where=holds, strength=3
    )
]


def read_back(name, tensors, config, scheme, shape):
    stored = get_format(name).parse(config)
    converted = stored.converted(tensors, scheme, shape)
    packed = {suffix: tensor for suffix, tensor in tensors.items() if suffix not in converted}
    packed |= dict(stored.to_packed(suffix, tensors[suffix], scheme, shape) for suffix in converted)
    assert set(converted.values()) <= set(packed)
    return packed, compressed_tensors.unpack_weight(packed, scheme, *shape)


def with_zeros(qweight):
    """Zeros that are the middle are the same as none."""
    zeros = qweight.zeros
    if zeros is None:
        zeros = torch.full_like(qweight.scales, qweight.scheme.middle, dtype=torch.uint8)
    return zeros


@pytest.mark.parametrize("name, scheme, shape", CASES)
def test_round_trip(name, scheme, shape):
    """Pack, describe, find the description, read: the same weight; and on the way the bytes of compressed-tensors."""
    module, qweight = get_format(name), random_quantized(scheme, *shape, torch.float16)
    tensors = module.pack(qweight)
    assert tuple(tensors) == tuple(s for s in module.SUFFIXES if s in tensors)
    config = module.config(scheme, {}, [])
    assert detect_format(config) == name
    stored = module.parse(config)
    found = stored.lookup(["a"], "Linear")
    assert (found.bits, found.group_size) == (scheme.bits, scheme.group_size)
    assert stored.silent_on_symmetry or found.sym == scheme.sym
    assert set(stored.required(scheme)) <= set(tensors)
    assert stored.shape(tensors, scheme) in (None, shape)
    packed, again = read_back(name, tensors, config, scheme, shape)
    assert torch.equal(again.codes, qweight.codes) and torch.equal(again.scales, qweight.scales)
    for suffix, tensor in compressed_tensors.pack(qweight).items():
        if suffix != "weight_shape":
            assert torch.equal(packed[suffix], tensor)
    if "weight_zero_point" in packed:
        zeros = compressed_tensors.unpack(packed["weight_zero_point"].T, scheme.bits, shape[0]).T
        assert torch.equal(zeros, with_zeros(qweight))


@pytest.mark.parametrize("name, scheme, shape", CASES)
def test_meta_tensors_have_the_shapes_of_real_ones(name, scheme, shape):
    module = get_format(name)
    real = module.pack(random_quantized(scheme, *shape, torch.bfloat16))
    planned = module.pack(QuantWeight.meta(*shape, scheme, torch.bfloat16))
    assert {s: (t.shape, t.dtype) for s, t in planned.items()} == {s: (t.shape, t.dtype) for s, t in real.items()}


def fields(words, bits, length):
    """The first `length` fields of a row of int32 words, one bit at a time."""
    number = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return [number >> (bits * place) & (2**bits - 1) for place in range(length)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", (True, False))
def test_gptq_layout(bits, sym):
    scheme = Scheme(bits, 32, sym)
    qweight = random_quantized(scheme, 32, 96, torch.float16)
    tensors = gptq.pack(qweight)
    for n in (0, 5, 31):
        assert fields(tensors["qweight"][:, n], bits, 96) == qweight.codes[n].tolist()
    stored = with_zeros(qweight).int() - (1 if sym else 0)  # version 1 for symmetric weights
    for group in range(3):
        assert fields(tensors["qzeros"][group], bits, 32) == stored[:, group].tolist()
    assert torch.equal(tensors["scales"], qweight.scales.T)
    assert tensors["g_idx"].tolist() == [k // 32 for k in range(96)]
    form = gptq.config(scheme, {}, [])["checkpoint_format"]
    assert form == ("gptq" if sym else "gptq_v2")


SYMMETRIC_WORDS = {2: ["55555555"], 3: ["db6db6db", "b6db6db6", "6db6db6d"], 4: ["77777777"], 8: ["7f7f7f7f"]}


@pytest.mark.parametrize("bits", SYMMETRIC_WORDS)
def test_gptq_symmetric_zeros_are_the_words_that_everybody_writes(bits):
    qzeros = gptq.pack(random_quantized(Scheme(bits, 32), 32, 32))["qzeros"][0]
    words = [f"{int(word) & 0xFFFFFFFF:08x}" for word in qzeros]
    assert words == SYMMETRIC_WORDS[bits] * (len(words) // len(SYMMETRIC_WORDS[bits]))


@pytest.mark.parametrize("bits", SYMMETRIC_WORDS)
def test_gptq_version_1_zeros_are_read_field_by_field(bits):
    """All values: a true zero of 0 is stored as all ones, and must not carry into the field beside it."""
    scheme, shape = Scheme(bits, 32, False), (32, 32)
    qweight = random_quantized(scheme, *shape)
    config = {**gptq.config(scheme, {}, []), "checkpoint_format": "gptq"}
    for values in (torch.arange(32), torch.arange(32) // 2):  # beside a 0 is a 1, which hides a carry, or another 0
        zeros = (values % 2**bits)[:, None].byte()
        tensors = gptq.pack(QuantWeight(qweight.codes, qweight.scales, scheme, zeros))
        older = gptq.pack(QuantWeight(qweight.codes, qweight.scales, scheme, (zeros - 1) & (2**bits - 1)))
        tensors["qzeros"] = older["qzeros"]
        _, read = read_back("gptq", tensors, config, scheme, shape)
        assert torch.equal(read.zeros, zeros)


@pytest.mark.parametrize("sym", (True, False))
def test_awq_layout(sym):
    """Nibble 0 of a word holds column 0, nibble 1 column 2, ..., nibble 4 column 1: AutoAWQ's order."""
    scheme = Scheme(4, 32, sym)
    qweight = random_quantized(scheme, 24, 64, torch.float16)
    tensors, zeros = awq.pack(qweight), with_zeros(qweight)
    assert tensors["qweight"].shape == (64, 3) and tensors["qzeros"].shape == (2, 3)
    for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        for word in range(3):
            n = 8 * word + column
            assert torch.equal(tensors["qweight"][:, word] >> 4 * place & 15, qweight.codes[n].int())
            assert torch.equal(tensors["qzeros"][:, word] >> 4 * place & 15, zeros[n].int())


def test_act_order_survives():
    scheme, g_idx = Scheme(4, 32), torch.randperm(128) // 32
    plain = random_quantized(scheme, 32, 128)
    qweight = QuantWeight(plain.codes, plain.scales, scheme, None, g_idx.int())
    config = gptq.config(scheme, {}, [], act_order=True)
    assert config["desc_act"] is True
    _, again = read_back("gptq", gptq.pack(qweight), config, scheme, (32, 128))
    assert torch.equal(again.g_idx, qweight.g_idx)
    for module in (awq, compressed_tensors):
        with pytest.raises(ValueError, match="act-order"):
            module.pack(qweight)


@pytest.mark.parametrize("sym", (True, False))
@pytest.mark.parametrize("shape", [(48, 96), (32, 128), (37, 64)])
def test_old_three_bit_layout_is_read(sym, shape):
    scheme = Scheme(3, 32, sym)
    qweight = random_quantized(scheme, *shape)
    tensors = compressed_tensors.pack(qweight) | {"weight_packed": old_words(qweight.codes)}
    if not sym:
        tensors["weight_zero_point"] = old_words(qweight.zeros.T).T.contiguous()
    config = compressed_tensors.config(scheme, {}, [])
    stored = compressed_tensors.parse(config)
    assert set(stored.converted(tensors, scheme, shape)) == {"weight_packed", "weight_zero_point"} & set(tensors)
    assert not stored.converted(compressed_tensors.pack(qweight), scheme, shape)
    _, again = read_back("compressed-tensors", tensors, config, scheme, shape)
    assert_same(again, qweight)


REFUSED = [
    ("awq", Scheme(3, 32), (32, 64), None, "awq has 4 bits, not 3"),
    ("awq", Scheme(8, 32), (32, 64), None, "awq has 4 bits, not 8"),
    ("awq", Scheme(4, 32), (36, 64), None, "8 outputs together, which do not divide 36"),
    ("awq", Scheme(4, 32), (32, 64), Scheme(4, 128), "one group_size for all layers: 128, here 32"),
    ("gptq", Scheme(4, 32), (36, 64), None, "packs 8 codes of 4 bits together, which do not divide 36 x 64"),
    ("gptq", Scheme(3, 16), (32, 48), None, "packs 32 codes of 3 bits together, which do not divide 32 x 48"),
    ("gptq", Scheme(4, 32), (32, 64), Scheme(4, 32, False), "symmetric as a whole or not at all"),
]  # fmt: skip


@pytest.mark.parametrize("name, scheme, shape, default, reason", REFUSED)
def test_refusals(name, scheme, shape, default, reason):
    assert reason in get_format(name).refuse(scheme, shape, default or scheme)


def test_gptq_dynamic():
    """Exceptions and what is left are written as regexes that match nothing else, and are read in order."""
    default, other = Scheme(4, 128), Scheme(8, -1)
    config = gptq.config(default, {"model.layers.1.up_proj": other}, ["model.layers.0.gate", "lm_head"])
    stored = gptq.parse(config)
    assert stored.lookup(["model.layers.1.up_proj"], "Linear") == other
    assert stored.lookup(["model.layers.0.gate"], "Linear") is None is stored.lookup(["lm_head"], "Linear")
    for name in ("model.layers.0.gate_proj", "modelxlayers.1.up_proj", "model.layers.11.up_proj"):
        assert stored.lookup([name], "Linear") == default
    foreign = {**gptq.config(default, {}, []), "dynamic": {"-:.*a": {}, r"+:.*\.b": {"bits": 8}, ".*b": {"bits": 2}}}
    stored = gptq.parse(foreign)
    assert stored.lookup(["xa.b"], "Linear") is None
    assert stored.lookup(["x.b"], "Linear") == Scheme(8, 128) and stored.lookup(["xb"], "Linear") == Scheme(2, 128)


def test_gptq_writes_the_file_of_older_tools():
    config = gptq.config(Scheme(), {}, [])
    assert gptq.companions(config) == {"quantize_config.json": config}


GPTQ, AWQ = gptq.config(Scheme(), {}, []), awq.config(Scheme(), {}, [])
WRONG = [
    (GPTQ, {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' cannot be read; expected 'gptq' or 'gptq_v2'"),
    (GPTQ, {"checkpoint_format": None, "format": "gptq_p"}, "checkpoint_format 'gptq_p' cannot be read"),
    (GPTQ, {"pack_dtype": "int16"}, "pack_dtype 'int16' cannot be read; expected 'int32'"),
    (GPTQ, {"bits": 7}, "bits is 7; allowed: 2, 3, 4, 5, 6, 8"),
    (GPTQ, {"bits": 5}, "gptq with 5 bits cannot be read; expected 2, 3, 4, 8"),
    (GPTQ, {"bits": None}, "bits is None"),
    (GPTQ, {"group_size": 48}, "group_size is 48"),
    (GPTQ, {"sym": "yes"}, "sym is 'yes'"),
    (GPTQ, {"dynamic": ["x"]}, r"dynamic is \['x'\]"),
    (GPTQ, {"dynamic": {"+:(": {}}}, "is not a regular expression"),
    (GPTQ, {"dynamic": {"+:a": {"bits": 7}}}, "bits is 7"),
    (AWQ, {"version": "gemv"}, "awq version 'gemv' cannot be read; expected 'gemm'"),
    (AWQ, {"bits": 8}, "awq with 8 bits cannot be read; expected 4"),
    (AWQ, {"group_size": 100}, "group_size is 100"),
]  # fmt: skip


@pytest.mark.parametrize("config, changes, message", WRONG)
def test_configs_that_cannot_be_read(config, changes, message):
    with pytest.raises(InputError, match=message):
        get_format(detect_format(config)).parse({**config, **changes})


def test_awq_older_names():
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}
    assert awq.parse(config).lookup(["a"], "Linear") == Scheme(4, 64, False)


def test_unknown_format():
    with pytest.raises(UsageError, match="format 'ggml' is not known; allowed: compressed-tensors, gptq, awq"):
        get_format("ggml")
