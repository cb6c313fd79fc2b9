"""Our tensors and configs against the compressed-tensors package, which is the specification."""

import dataclasses
import json

import pytest
import torch
from compressed_tensors.compressors import IntQuantizationCompressor, PackedQuantizationCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.apply import apply_quantization_config
from covering import cover, covering
from weights import BITS, DTYPES, as_loaded, assert_same, matrix, random_quantized

from lowbit.errors import InputError, LowbitError
from lowbit.formats import compressed_tensors as ct
from lowbit.formats import detect_format
from lowbit.numerics.qweight import QuantWeight, input_grid
from lowbit.numerics.scheme import Scheme

# (N, K, group): rows that do not fill a word of zero points, inputs that do not fill a word of codes
SHAPES = [(1, 32, 32), (7, 172, -1), (33, 96, 32), (5, 43, -1), (31, 64, 16), (1, 1, -1), (16, 512, 512)]
# An asymmetric weight is stored as a symmetric one is, and has zero points beside it
CASES = [(Scheme(b, g, sym=False), n, k) for b in BITS for n, k, g in SHAPES]
CASES += [(Scheme(b, g), n, k) for b, (n, k, g) in cover(BITS, SHAPES, strength=1)]
cases = pytest.mark.parametrize(("scheme", "rows", "columns"), CASES, ids=[f"{s.name}-{n}x{k}" for s, n, k in CASES])


def signed(codes, bits):
    return (codes.int() - 2 ** (bits - 1)).to(torch.int8)


def their_scheme(scheme):
    channel = scheme.group_size == -1
    strategy, group = ("channel", None) if channel else ("group", scheme.group_size)
    args = QuantizationArgs(num_bits=scheme.bits, symmetric=scheme.sym, strategy=strategy, group_size=group)
    return QuantizationScheme(targets=["Linear"], weights=args)


@cases
def test_pack_writes_their_bits(scheme, rows, columns):
    qweight = random_quantized(scheme, rows, columns)
    tensors = ct.pack(qweight)
    assert torch.equal(tensors["weight_packed"], pack_to_int32(signed(qweight.codes, scheme.bits), scheme.bits))
    assert torch.equal(tensors["weight_scale"], qweight.scales)
    assert tensors["weight_shape"].tolist() == [rows, columns] and tensors["weight_shape"].dtype == torch.int64
    if not scheme.sym:
        zeros = signed(qweight.zeros, scheme.bits)
        assert torch.equal(tensors["weight_zero_point"], pack_to_int32(zeros, scheme.bits, packed_dim=0))
        assert torch.equal(
            unpack_from_int32(tensors["weight_zero_point"], scheme.bits, zeros.shape, packed_dim=0), zeros
        )
    assert tuple(tensors) == ct.suffixes(scheme)  # a symmetric file has no zero points
    assert all(tensor.is_contiguous() for tensor in tensors.values())


def with_activations(scheme, name):
    return dataclasses.replace(scheme, activations=Scheme.parse(f"W8A8{name}").activations)


@covering(
    bits=(4, 8), sym={"sym": True, "asym": False}, shape=SHAPES,
    name={"dynamic": "", "dynamic_asym": "-DYNAMIC_ASYM", "static": "-STATIC", "static_sym": "-STATIC_SYM"},
)  # fmt: skip
def test_integer_activations_are_stored_as_theirs(bits, sym, shape, name):
    """The layout that they would choose, and in it the same matrix and the same grid of inputs."""
    rows, columns, group = shape
    plain = random_quantized(Scheme(bits, group, sym), rows, columns)
    scheme = with_activations(plain.scheme, name)
    grid = {"input_scale": torch.tensor([0.25]), "input_zero": torch.tensor([-7], dtype=torch.int8)}
    qweight = plain.with_inputs(scheme, *(grid[field] if field in input_grid(scheme) else None for field in grid))
    tensors, config = ct.pack(qweight), ct.config(scheme, {}, [])
    theirs = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert infer_module_format(torch.nn.Linear, theirs).value == config["format"] or scheme.bits < 8
    compressor = IntQuantizationCompressor if scheme.bits == 8 else PackedQuantizationCompressor
    assert torch.equal(compressor.decompress(tensors, theirs)["weight"], matrix(plain).float())
    assert ("input_scale" in tensors) == scheme.is_static
    if "input_zero_point" in tensors:
        assert tensors["input_scale"] == 0.25 and tensors["input_zero_point"] == -7
        assert not theirs.input_activations.symmetric and not theirs.input_activations.dynamic
    assert ct.parse(config).lookup(["a"], "Linear") == scheme
    assert_same(ct.unpack_weight(as_loaded(tensors), scheme, rows, columns), qweight)
    meta = ct.pack(QuantWeight.meta(rows, columns, scheme, torch.float32))
    assert {key: (t.shape, t.dtype) for key, t in meta.items()} == {
        key: (t.shape, t.dtype) for key, t in tensors.items()
    }


@cases
def test_they_read_our_weight_and_write_our_bits(scheme, rows, columns):
    """In float32, where both sides round (code - zero) * scale once."""
    qweight = random_quantized(scheme, rows, columns)
    tensors, theirs = ct.pack(qweight), their_scheme(scheme)
    weight = PackedQuantizationCompressor.decompress(tensors, theirs)["weight"]
    assert torch.equal(weight, matrix(qweight).float())

    dense = {"weight": weight, "weight_scale": qweight.scales}
    if not scheme.sym:
        dense["weight_zero_point"] = signed(qweight.zeros, scheme.bits)
    written = PackedQuantizationCompressor.compress(dense, theirs)
    for name in tensors:
        assert torch.equal(written[name], tensors[name]), name


@cases
def test_unpack_inverts_pack(scheme, rows, columns):
    for dtype in DTYPES.values():
        qweight, twin = (random_quantized(scheme, rows, columns, dtype) for _ in range(2))
        tensors = ct.pack(qweight)
        assert_same(qweight, twin)
        copies = as_loaded(tensors)
        for stored in (tensors, copies):
            assert_same(ct.unpack_weight(stored, scheme, rows, columns), qweight)
        assert all(torch.equal(tensors[name], copies[name]) for name in tensors)


@cases
def test_planned_shapes_are_those_written(scheme, rows, columns):
    real = ct.pack(random_quantized(scheme, rows, columns, torch.bfloat16))
    meta = ct.pack(QuantWeight.meta(rows, columns, scheme, torch.bfloat16))
    planned = ct.shapes(scheme, rows, columns)
    assert list(real) == list(meta) == list(planned)
    for name, tensor in real.items():
        assert (meta[name].shape, meta[name].dtype) == (tensor.shape, tensor.dtype)
        shape, dtype = planned[name]
        assert (shape, dtype or torch.bfloat16) == (tuple(tensor.shape), tensor.dtype)
        assert meta[name].device.type == "meta" or name == "weight_shape"


def test_inputs_scattered_over_groups_are_not_written_as_if_in_order():
    """The format has no g_idx; dropping it would be another matrix."""
    plain = random_quantized(Scheme(4, 16), 16, 64)
    scattered = QuantWeight(plain.codes, plain.scales, plain.scheme, None, torch.arange(64, dtype=torch.int32) % 4)
    with pytest.raises((ValueError, LowbitError), match="g_idx"):
        ct.pack(scattered)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_packed": lambda t: t[:, :-1]}, "weight_packed has 8 words a row, expected 9"),
        # three bits as compressed-tensors <= 0.17.1 stored them: ten codes a word
        ({"weight_packed": lambda t: t.new_zeros(33, 10)}, "weight_packed has 10 words a row, expected 9"),
        ({"weight_scale": lambda t: t[:, :2]}, "scale"),
        ({"weight_packed": lambda t: t[:-1]}, "(scale|packed)"),
        ({"weight_zero_point": lambda t: t[:-1]}, "zero"),
        ({"weight_zero_point": lambda t: t[:, :2]}, "zero"),
    ],
    ids=["short-packed", "legacy-3-bit", "short-scale", "missing-rows", "short-zeros", "missing-zero-groups"],
)
def test_damaged_tensors_are_refused(change, message):
    scheme = Scheme(3, 32, False)
    tensors = ct.pack(random_quantized(scheme, 33, 96))
    damaged = tensors | {name: f(tensors[name]) for name, f in change.items()}
    with pytest.raises((InputError, ValueError), match=message):
        ct.unpack_weight(damaged, scheme, 33, 96)


# --- configs ---


EXCEPTIONS = {"model.layers.0.q": Scheme(8, 32), "model.layers.1.q": Scheme(4, 16, False), "model.x": Scheme(8, 32)}


@pytest.mark.parametrize("default", [Scheme(b, g, s) for b in BITS for g in (128, -1) for s in (True, False)])
def test_config_passes_their_validation(default):
    config = ct.config(default, EXCEPTIONS, ["lm_head", "re:.*gate$"])
    assert json.loads(json.dumps(config)) == config
    theirs = QuantizationConfig.model_validate(config)
    assert theirs.quant_method == "compressed-tensors" and theirs.format == "pack-quantized"
    assert theirs.quantization_status == "compressed" and theirs.ignore == ["lm_head", "re:.*gate$"]
    groups = list(theirs.config_groups.values())
    assert groups[0].targets == ["Linear"]
    expected = {default: {"Linear"}, Scheme(8, 32): {"model.layers.0.q", "model.x"}}
    expected[EXCEPTIONS["model.layers.1.q"]] = {"model.layers.1.q"}
    for group in groups:
        args = group.weights
        size = -1 if args.strategy == "channel" else args.group_size
        assert set(group.targets) == expected.pop(Scheme(args.num_bits, size, args.symmetric))
        assert args.type == "int" and not args.dynamic and args.actorder is None
        assert group.input_activations is None and group.output_activations is None
        assert group.format == "pack-quantized"
    assert not expected


def test_config_reads_back():
    default = Scheme(3, 64, False)
    config = ct.config(default, EXCEPTIONS, ["lm_head"])
    assert ct.detect(config) and detect_format(config) == "compressed-tensors"
    schemes = ct.parse(config)
    for name, scheme in EXCEPTIONS.items():
        assert schemes.lookup([name], "Linear") == scheme
    assert schemes.lookup(["other"], "Linear") == default
    assert schemes.lookup(["other"], "Embedding") is None
    assert schemes.lookup(["lm_head"], "Linear") is None


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def written(*groups, ignore=(), **top):
    """A config whose groups are (targets, bits)."""
    config_groups = {
        f"group_{i}": {"targets": targets, "weights": WEIGHTS | {"num_bits": bits}}
        for i, (targets, bits) in enumerate(groups)
    }
    base = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    return base | {"config_groups": config_groups, "ignore": list(ignore)} | top


RULES = {
    "class-only": written((["Linear"], 4)),
    "name-beats-regex-beats-class": written((["Linear"], 2), (["re:.*q$"], 3), (["layers.0.q"], 4)),
    "whatever-the-order": written((["layers.0.q"], 4), (["re:.*q$"], 3), (["Linear"], 2)),
    "regexes-in-alphabetical-order": written((["re:lay.*q"], 4), (["re:.*q$"], 3), (["re:.*"], 2)),
    "regexes-start-at-the-start": written((["re:q"], 4), (["Linear"], 8)),
    "regexes-need-not-reach-the-end": written((["re:layers.0"], 4), (["Linear"], 8)),
    "names-are-whole": written((["layers.0"], 4), (["q"], 2)),
    "ignored-name": written((["Linear"], 4), ignore=["layers.0.q"]),
    "ignore-beats-a-name": written((["layers.0.q"], 4), ignore=["re:.*q"]),
    "ignored-class": written((["layers.0.q"], 4), ignore=["Linear"]),
    "ignored-name-is-whole": written((["Linear"], 4), ignore=["layers", "q"]),
    "the-last-of-equal-targets": written((["Linear"], 4), (["Linear"], 8)),
}


@pytest.mark.parametrize("rule", RULES)
def test_lookup_agrees_with_their_matching(rule):
    def layer():
        return torch.nn.ModuleDict({leaf: torch.nn.Linear(32, 2) for leaf in ("q", "gate", "q_proj")})

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([layer(), layer()])
    apply_quantization_config(model, QuantizationConfig.model_validate(RULES[rule]))
    schemes, found = ct.parse(RULES[rule]), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            theirs = getattr(module, "quantization_scheme", None)
            found[name] = theirs and theirs.weights.num_bits
            ours = schemes.lookup([name], "Linear")
            assert (ours and ours.bits) == found[name], name
    assert len(found) == 6
    nothing = rule in ("names-are-whole", "ignored-class", "ignore-beats-a-name")
    assert any(found.values()) != nothing


def test_lookup_under_several_names():
    schemes = ct.parse(written((["a.gate_proj"], 8), (["Linear"], 4), ignore=["b.up"]))
    assert schemes.lookup(["a.gate_up", "a.gate_proj"], "Linear").bits == 8
    assert schemes.lookup(["b.gate", "b.up"], "Linear") is None


@pytest.mark.parametrize(
    ("fields", "scheme"),
    [
        ({"strategy": "channel", "group_size": None}, Scheme(4, -1)),
        ({"strategy": "channel", "group_size": -1}, Scheme(4, -1)),
        ({"symmetric": False, "actorder": "static"}, Scheme(4, 32, False)),
        ({"actorder": "weight", "observer": "mse", "observer_kwargs": {"a": 1}, "dynamic": False}, Scheme(4, 32)),
    ],
    ids=str,
)
def test_weights_that_are_read(fields, scheme):
    config = written()
    config["config_groups"] = {"g": {"targets": ["Linear"], "weights": WEIGHTS | fields}}
    assert ct.parse(config).lookup(["a"], "Linear") == scheme
    del config["config_groups"]["g"]["weights"]["symmetric"]  # true unless said otherwise
    assert ct.parse(config).lookup(["a"], "Linear").sym


INT8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
REFUSED = {
    "int-quantized": ({"format": "int-quantized"}, {}, {}, "W4A16-.* is stored as 'int-quantized'.*'pack-quantized'"),
    "packed-W8A8": ({}, {"input_activations": INT8}, {"num_bits": 8}, "W8A8-.* 'pack-quantized'.*'int-quantized'"),
    "float-quantized-group": ({}, {"format": "float-quantized"}, {}, "'float-quantized' is not of integers"),
    "no-format": ({"format": None}, {}, {}, "format None is not of integers"),
    "mixed-precision": ({"format": "mixed-precision"}, {}, {}, "'mixed-precision' is not of integers"),
    "float-weights": ({}, {}, {"type": "float"}, "type 'float' cannot be read; expected 'int'"),
    "float-activations": ({}, {"input_activations": INT8 | {"type": "float"}}, {}, "type 'float' cannot be read"),
    "activations-of-4-bits": (
        {},
        {"input_activations": INT8 | {"num_bits": 4}},
        {},
        "activation bits is 4",
    ),
    "activation-groups": (
        {},
        {"input_activations": INT8 | {"strategy": "group"}},
        {},
        "strategy is 'group'",
    ),
    "static-tokens": ({}, {"input_activations": INT8 | {"dynamic": False}}, {}, "'token' are expected to be dynamic"),
    "dynamic-tensor": (
        {},
        {"input_activations": INT8 | {"strategy": "tensor"}},
        {},
        "expected to be static",
    ),
    "outputs": ({}, {"output_activations": INT8}, {}, "output_activations"),
    "actorder-group": ({}, {}, {"actorder": "group"}, "actorder 'group'.*expected null or 'static'"),
    "actorder-dynamic": ({}, {}, {"actorder": "dynamic"}, "actorder.*expected null or 'static'"),
    "no-status": ({"quantization_status": None}, {}, {}, "quantization_status is None, expected 'compressed'"),
    "frozen": ({"quantization_status": "frozen"}, {}, {}, "quantization_status is 'frozen', expected 'compressed'"),
    "tensor": ({}, {}, {"strategy": "tensor", "group_size": None}, "strategy 'tensor'.*expected 'group' or 'channel'"),
    "block": ({}, {}, {"strategy": "block"}, "strategy 'block' cannot be read"),
    "no-weights": ({}, {"weights": None}, {}, "cannot be read"),
    "7-bits": ({}, {}, {"num_bits": 7}, "bits is 7; allowed: 2, 3, 4, 5, 6, 8"),
    "group-48": ({}, {}, {"group_size": 48}, "group_size is 48; allowed"),
    "no-group-size": ({}, {}, {"group_size": None}, "group_size"),
    "no-config-groups": ({"config_groups": None}, {}, {}, "config_groups"),
    "preset": ({"config_groups": {"W4A16": ["Linear"]}}, {}, {}, "W4A16"),
    "bad-regex": ({}, {"targets": ["re:("]}, {}, "regular expression"),
    "rotated": ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, {}, {}, "transform"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_was_found_and_expected(case):
    top, group, weights, message = REFUSED[case]
    config = written(ignore=["lm_head"])
    config["config_groups"] = {"g": {"targets": ["Linear"], "weights": WEIGHTS | weights} | group}
    with pytest.raises(LowbitError, match=message) as error:
        ct.parse(config | top).lookup(["a"], "Linear")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [{}, {"quant_method": "bitsandbytes"}, {"quant_method": None}], ids=str)
def test_other_methods_are_named(config):
    assert not ct.detect(config)
    with pytest.raises(InputError, match=f"{config.get('quant_method')!r}.*expected one of: compressed-tensors"):
        detect_format(config)
