"""Whole weights are near their source, however coarse they are; damaged ones are not, however fine."""

from dataclasses import replace

import pytest
import torch
from covering import cover, covering
from weights import matrix

from lowbit.numerics.grid import quantize_nearest
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme
from lowbit.quantizers import checked_options, get_quantizer
from lowbit.verification.tolerance import difference

BITS, GROUPS, SYM = (2, 3, 4, 8), (16, 128, -1), {"sym": True, "asym": False}
SCHEMES = [Scheme(*case) for case in cover(BITS, GROUPS, (True, False))]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def heavy_tailed(out_features=64, in_features=1024, seed=0):
    rng = torch.Generator().manual_seed(seed)
    normal, squares = (torch.randn(6, out_features, in_features, generator=rng) for _ in range(2))
    return normal[0] / (squares[:5].square().mean(0)).sqrt()  # Student's t of 5 degrees


def gaussian(seed=0):
    return torch.randn(64, 1024, generator=torch.Generator().manual_seed(seed))


@covering(weight=(heavy_tailed, gaussian), bits=BITS, group=GROUPS, sym=SYM, search=("minmax", "mse"))
def test_rounding_is_near(weight, bits, group, sym, search):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        source = weight().to(dtype)
        assert difference(quantize_nearest(source, Scheme(bits, group, sym), search), source) is None, dtype


def test_rounding_of_heavy_tails_loses_most_of_them():
    """Which is why no number for each count of bits would do."""
    weight = heavy_tailed(256, 4096)
    for bits, least in ((2, 0.89), (3, 0.6)):
        dense = matrix(quantize_nearest(weight, Scheme(bits, -1)))
        assert float((dense - weight).norm() / weight.norm()) > least


@each_scheme
def test_error_compensation_is_near(scheme):
    """GPTQ on inputs that are alike, where it moves weights most."""
    weight = heavy_tailed(32, 256)
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(1)).cumsum(1) / 4
    stats = {"hessian": x.T @ x / len(x), "missing": None}
    qweight, notes = get_quantizer("gptq").quantize(weight, stats, scheme, checked_options("gptq", {}))
    assert "fallback" not in notes
    assert difference(qweight, weight) is None


def test_act_order_is_near():
    weight, scheme = gaussian(), Scheme(4, 128, sym=False)
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(2))
    assert difference(quantize_nearest(weight[:, order], scheme).in_input_order(order), weight) is None


def shifted_zeros(qweight: QuantWeight):
    return replace(qweight, zeros=(qweight.zeros.int() + 1).clamp(max=qweight.scheme.levels - 1).to(torch.uint8))


DAMAGE = {
    "another weight": lambda q: quantize_nearest(gaussian(seed=1), q.scheme),
    "rows in reverse": lambda q: replace(q, codes=q.codes.flip(0)),
    "columns moved by one": lambda q: replace(q, codes=q.codes.roll(1, 1)),
    "codes off by one": lambda q: replace(q, codes=(q.codes.int() + 1).clamp(max=q.scheme.levels - 1).to(torch.uint8)),
    "groups in reverse": lambda q: replace(q, codes=q.codes.view(64, q.scales.shape[1], -1).flip(1).reshape(64, -1)),
    "signs": lambda q: replace(q, scales=-q.scales),
    "no codes": lambda q: replace(q, codes=torch.zeros_like(q.codes)),
}


@each_scheme
def test_damage_is_found(scheme):
    weight = gaussian()
    qweight = quantize_nearest(weight, scheme)
    for kind, damage in DAMAGE.items():
        if (kind, scheme.group_size) != ("groups in reverse", -1):  # one group has no order
            assert difference(damage(qweight), weight) is not None, kind


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_off_by_one_are_found(bits):
    weight = gaussian()
    for group in GROUPS:
        qweight = quantize_nearest(weight, Scheme(bits, group, sym=False))
        assert "of rounding" in difference(shifted_zeros(qweight), weight), group


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.bits > 2], ids=lambda scheme: scheme.name)
def test_doubled_scales_are_found(scheme):
    qweight = quantize_nearest(gaussian(), scheme)
    assert "of rounding" in difference(replace(qweight, scales=2 * qweight.scales), gaussian())


def test_other_weights_of_heavy_tails_are_told_by_their_direction():
    """Where rounding itself is as far away as zeros are."""
    scheme = Scheme(2, -1)
    assert "cosine" in difference(quantize_nearest(heavy_tailed(seed=1, in_features=4096), scheme),
                                  heavy_tailed(in_features=4096))  # fmt: skip


def test_weights_that_are_on_their_grid():
    qweight = quantize_nearest(gaussian(), Scheme(4, 128))
    dense = matrix(qweight).float()
    assert difference(qweight, dense) is None
    assert difference(quantize_nearest(gaussian(), Scheme(8, 128)), torch.zeros(64, 1024)) is not None
    assert difference(quantize_nearest(torch.zeros(64, 1024), Scheme(4, 128)), torch.zeros(64, 1024)) is None


def test_drift_correction_is_allowed_for_and_damage_beside_it_is_not():
    """8 bits that make up for what others lost: a zero point off by one shows none the less."""
    scheme, source = Scheme(8, 32, sym=False), gaussian()
    move = 0.02 * source.norm() * torch.nn.functional.normalize(gaussian(seed=3).flatten(), dim=0).view_as(source)
    qweight = quantize_nearest(source + move, scheme)
    assert "of rounding" in difference(qweight, source)
    assert difference(qweight, source, moved=0.02) is None
    assert "and 0.020 for what" in difference(shifted_zeros(qweight), source, moved=0.02)


def test_unknown_drift_correction_is_bounded_by_coarser_weights():
    scheme, source = Scheme(8, 32), gaussian()
    qweight = quantize_nearest(source * 1.05, scheme)
    assert difference(qweight, source, None, [Scheme(4, 32)]) is None
    assert difference(qweight, source, None, [Scheme(8, 64)]) is not None
    assert difference(qweight, source, None) is not None
