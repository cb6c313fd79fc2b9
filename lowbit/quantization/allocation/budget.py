"""A budget, and what it leaves for the units of a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lowbit.checkpoint.writer import file_bytes, parse_size
from lowbit.errors import UsageError
from lowbit.numerics.scheme import Recipe, Scheme
from lowbit.options import RecipeOptions
from lowbit.quantization.allocation.units import Allocation, Unit
from lowbit.quantization.plan import Plan, Step
from lowbit.quantization.running import Running


@dataclass(frozen=True)
class Budget:
    """One of: average `bits` of quantized weights, `size` of the weight files in bytes, `fit`, memory of running in
    bytes, `max_kl` in nats per token. running: how the model runs, where that is in question."""

    bits: float | None = None
    size: int | None = None
    max_kl: float | None = None
    fit: int | None = None
    running: Running | None = None

    @classmethod
    def of(cls, asked: RecipeOptions, running: Running | None = None) -> "Budget":
        """Of what a user typed; raises UsageError for a size that is none."""
        size, fit = (None if text is None else parse_size(text) for text in (asked.size, asked.fit))
        return cls(asked.average_bits, size, asked.max_kl, fit, running)

    def to_dict(self) -> dict:
        """What was asked for, for reports."""
        named = {"bits": self.bits, "size": self.size, "max_kl": self.max_kl, "fit": self.fit}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def bytes_of_step(self) -> Callable[[Step], int]:
        """What a weight takes up of it: in memory, where the model has to fit, else in the files."""
        if self.fit is not None and self.running is not None:
            return self.running.of_step
        return bytes_in_files

    def __str__(self) -> str:
        if self.bits is not None:
            return f"{self.bits:g} bits"
        if self.fit is not None:
            return f"{self.fit:,} bytes of memory"
        return f"{self.size:,} bytes" if self.size is not None else f"a KL of {self.max_kl:g}"

    def taken(self, plan: Plan, shard_bytes: int) -> float:
        """What `plan` takes up, in the unit of this budget, which is none of KL."""
        if self.fit is not None and self.running is not None:
            return self.running.memory(plan)["peak"]
        return plan.bits_per_weight if self.bits is not None else file_bytes(plan.outputs, shard_bytes)

    def fits_dense(self, plan: Plan, shard_bytes: int) -> bool:
        """Whether nothing of what `plan` quantizes would have to be, for a budget of bytes."""
        limit = self.fit or self.size
        return limit is not None and self.taken(plan.dense, shard_bytes) <= limit

    def left_over(self, plan: Plan, shard_bytes: int) -> int:
        """Bytes that the budget, which is none of KL, has left beside `plan`, or less than none."""
        if self.bits is not None:
            weights = sum(step.source.numel for step in plan.quantized)
            stored = sum(info.nbytes for step in plan.quantized for info in step.outputs)
            return int(self.bits * weights / 8) - stored
        return int((self.fit or self.size or 0) - self.taken(plan, shard_bytes))


def bytes_in_files(step: Step) -> int:
    return sum(info.nbytes for info in step.outputs)


def bytes_of(units: Sequence[Unit], allocation: Allocation) -> int:
    """What the units take up, each in its scheme."""
    return sum(unit.bytes[allocation[unit.modules]] for unit in units)


def recipe_of(recipe: Recipe, units: Sequence[Unit], allocation: Allocation, heads: frozenset[str]) -> Recipe:
    """`recipe` with the schemes of an allocation.

    Args:
        recipe: Its overrides stay the first ones.
        units: In any order.
        allocation: The scheme of each.
        heads: Modules that are output embeddings.
    """
    modules: dict[Scheme, list[str]] = {}
    weights: dict[Scheme, int] = {}
    head = recipe.lm_head
    for unit in units:
        scheme = allocation[unit.modules]
        if heads.intersection(unit.modules):
            head = scheme
            continue
        assert scheme is not None, "no other unit may stay dense"
        modules.setdefault(scheme, []).extend(unit.modules)
        weights[scheme] = weights.get(scheme, 0) + unit.weights
    usual = max(weights, key=lambda scheme: weights[scheme])
    others = tuple((_exactly(names), scheme) for scheme, names in modules.items() if scheme != usual)
    return replace(recipe, scheme=usual, overrides=(*recipe.overrides, *others), lm_head=head)


def _exactly(names: Sequence[str]) -> str:
    """A regex for these names and no others."""
    return f"({'|'.join(name.replace('.', '[.]') for name in names)})$"


def require_possible(budget: Budget, least: float, engine: str | None) -> None:
    """Raise UsageError where even the smallest schemes are more than a budget, which is none of KL."""
    wanted = budget.bits or budget.size or budget.fit
    if wanted is None or wanted >= least:
        return
    found = f"{least:.3f} bits" if budget.bits is not None else f"{least:,.0f} bytes"
    whom = f" that {engine} takes" if engine else ""
    if budget.running is not None and budget.fit is not None:
        found += f", {budget.running}"
    raise UsageError(f"{budget} cannot be kept: the smallest schemes{whom} come to {found}; pass at least that")
