"""What to try with a weight that came out badly: options of `lowbit quantize`, and what they cost."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lowbit.errors import UsageError
from lowbit.numerics.scheme import PER_CHANNEL, Scheme
from lowbit.report_page.facts import Facts, Layer

# Bits that kernels on GPUs have: what needs more bits is to run everywhere
_BITS = (2, 3, 4, 8)
# No smaller groups than this are proposed: to halve them again costs half a bit for each weight
_SMALL_GROUP = 32
# What a calibrated run calls a cold expert
FEW_TOKENS = 256
_LARGEST_RAISE = 8


@dataclass(frozen=True)
class Advice:
    """why: a few words. options: to be added to the command. extra_bytes: what the output grows by, if it does."""

    why: str
    options: str
    extra_bytes: float | None = None


def advice(layer: Layer, samples: float | None, weights: float | None) -> Iterator[Advice]:
    """What to try with one weight, the surest first: more bits for the three worst weights of the embedded model at 4
    bits lowered KL divergence by 34 %, smaller groups by 10 %; at 3 bits by 24 and by 0.2 %. In a model of hundreds of
    weights three are too few to be seen: see `advice_by_kind`. samples: of the calibration. weights: that the options
    concern, all experts'."""
    if layer.note.startswith("rtn:"):
        yield Advice("the method gave up on it: more damping", "--option damping=0.1")
    seen = layer.tokens if layer.routed is None else layer.routed
    if samples and seen is not None and seen < FEW_TOKENS:
        more = min(_LARGEST_RAISE, -(-FEW_TOKENS // max(int(seen), 1)))
        yield Advice(f"it saw {seen:,.0f} tokens of its own: more samples", f"--num-samples {samples * more:.0f}")
    try:
        scheme = Scheme.parse(layer.scheme)
    except UsageError:
        return
    more_bits = [bits for bits in _BITS if bits > scheme.bits]
    if more_bits:
        wider = replace(scheme, bits=more_bits[0])
        yield _override(f"{wider.bits} bits", layer, scheme, wider, weights)
    if not 0 < scheme.group_size <= _SMALL_GROUP:
        finer = replace(scheme, group_size=_SMALL_GROUP)
        yield _override("smaller groups", layer, scheme, finer, weights)
    if scheme.bits == max(_BITS):
        yield Advice("leave it as it was", f"--ignore {shlex.quote(_pattern(layer))}")


@dataclass(frozen=True)
class KindAdvice:
    """More bits for all weights of a kind. share: of the sum of squared errors that goes away. options, extra_bytes: as
    of `Advice`."""

    kind: str
    share: float
    options: str
    extra_bytes: float


def advice_by_kind(facts: Facts) -> list[KindAdvice]:
    """What to try with the weights of a kind, what gains most for its bytes first."""
    total, found = facts.squares(facts.known), []
    for kind, layers in facts.by_kind.items():
        schemes, weights = {layer.scheme for layer in layers}, [layer.weights for layer in layers]
        try:
            (scheme,) = map(Scheme.parse, schemes)
        except (UsageError, ValueError):  # none, or several
            continue
        wider = [bits for bits in _BITS if bits > scheme.bits]
        if not wider or None in weights or not re.fullmatch(r"[\w.]+", kind):
            continue
        then, inputs = replace(scheme, bits=wider[0]), layers[0].shape[-1]
        share = facts.squares(layers) / total * (1 - 4.0 ** (scheme.bits - then.bits))
        extra = (_stored_bits(then, inputs) - _stored_bits(scheme, inputs)) * sum(weights) / 8
        found.append(KindAdvice(kind, share, f"--override {shlex.quote(f'{kind}={then.name}')}", extra))
    return sorted(found, key=lambda each: -each.share / each.extra_bytes)


def _override(why: str, layer: Layer, now: Scheme, then: Scheme, weights: float | None) -> Advice:
    options = f"--override {shlex.quote(f'{_pattern(layer)}={then.name}')}"
    if weights is None or layer.shape is None:
        return Advice(why, options)
    more_bits = _stored_bits(then, layer.shape[-1]) - _stored_bits(now, layer.shape[-1])
    return Advice(why, options, more_bits * weights / 8)


def _pattern(layer: Layer) -> str:
    return re.escape(layer.module)


def _stored_bits(scheme: Scheme, in_features: float) -> float:
    """For each weight, with a 16-bit scale and a zero point for each group."""
    per_group = 16 + (0 if scheme.sym else scheme.bits)
    return scheme.bits + per_group / (in_features if scheme.group_size == PER_CHANNEL else scheme.group_size)
