"""From a budget to a recipe: what each scheme would cost, the best allocations by that, of those the best in truth."""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path

import torch

from lowbit import __version__
from lowbit.discovery import find_sites, skeleton
from lowbit.errors import UsageError
from lowbit.numerics.scheme import Recipe, Scheme
from lowbit.options import LoadedOptions, RecipeOptions
from lowbit.quantization.allocation.budget import Budget, bytes_of, recipe_of, require_possible
from lowbit.quantization.allocation.fisher import second_order_costs
from lowbit.quantization.allocation.judge import Method, divergences
from lowbit.quantization.allocation.solve import best_choice
from lowbit.quantization.allocation.stored import Store, key_of
from lowbit.quantization.allocation.trial import divergence_of_run
from lowbit.quantization.allocation.units import CANDIDATES, Allocation, Unit, find_units, most_gpus
from lowbit.quantization.calibrated.model import LayeredModel
from lowbit.quantization.calibrated.options import Calibration
from lowbit.quantization.calibrated.targets import steps_by_layer
from lowbit.quantization.opened import Source
from lowbit.quantization.plan import Plan, Step, make_plan
from lowbit.quantization.running import running
from lowbit.text.samples import Samples, calibration_samples
from lowbit.transformers_api import tied_weights

logger = logging.getLogger("lowbit")

# Samples that costs are measured on, as many others that allocations are judged on, and as many again that a method is
# calibrated with besides the first, which has more of them in the run itself; tokens in each at most
_SAMPLES, _SEQLEN = 16, 512
# By what the costs of a bit width, or of a kind of parts, are multiplied in the proposals: what the second order leaves
# out is alike in them
_TILTS = (0.7, 1.4)
# Points of the frontier
_POINTS = 16
# Text that was not judged on has another KL: a limit has to hold this share below it, and so many standard errors
_AIM, _ERRORS, _TRIES = 0.8, 3, 4


# A bit width or a kind of unit -> by what its costs are multiplied
Tilt = Mapping[int | str, float]


@dataclass(frozen=True)
class Wanted:
    """What is allocated for.

    Attributes:
        budget: What has to be kept.
        format_name: Of the files that will be written.
        shard_bytes: The largest of them.
        engine: What has to take the result, None: no engine in particular.
    """

    budget: Budget
    format_name: str
    shard_bytes: int
    engine: str | None


@dataclass(frozen=True)
class Allocated:
    """recipe: with the chosen schemes. facts: what was measured and chosen, for the report (`_facts`)."""

    recipe: Recipe
    facts: dict


def allocate(start: Source, wanted: Wanted, data: Calibration, announce: Callable[[str], None]) -> Allocated:
    """Choose a scheme for each unit of a model, for the least KL in a budget, or the least size with a KL.

    Args:
        start: The model; the method, and what is left alone. The scheme of its recipe is what is chosen.
        wanted: The budget, and what the result is for.
        data: Where samples come from.
        announce: Told what goes on, in sentences.

    Raises:
        UsageError: The budget cannot be kept.
        InputError: The model, or the data.
    """
    search, budget = _Search(start, wanted, data, announce), wanted.budget
    if budget.max_kl is not None:
        judged = search.with_kl(budget.max_kl)
        best, kl = judged[-1]
    else:
        smallest = {unit.modules: min(unit.bytes, key=lambda scheme: unit.bytes[scheme]) for unit in search.units}
        require_possible(budget, budget.taken(search.plan(smallest), wanted.shard_bytes), wanted.engine)
        proposals = [search.within(budget, smallest, tilt) for tilt in search.tilts()]
        judged = search.judged([each for n, each in enumerate(proposals) if each not in proposals[:n]])
        best, apart = min(judged, key=lambda pair: pair[1])
        kl = search.of_run(best)
        # what a run makes up for is taken to be alike in all of them
        judged = [(each, kl if each is best else other * kl / apart) for each, other in judged]
    return Allocated(search.recipe_of(best), _facts(search, budget, best, kl, judged))


def budget_of(asked: RecipeOptions, start: Source, loaded: LoadedOptions, trust_remote_code: bool = False) -> Budget:
    """The budget that a user has named; raises UsageError for one that is none, InputError where it cannot be told what
    running takes."""
    runs = None if asked.fit is None else running(start, loaded, asked.engine, trust_remote_code)
    return Budget.of(asked, runs)


class _Search:
    """Units, their costs, and allocations of them."""

    def __init__(self, start: Source, wanted: Wanted, data: Calibration, announce: Callable[[str], None]):
        self._start, self.wanted, self._data, self._announce = start, wanted, data, announce
        self._recipe, self._method = start.recipe, Method(start.recipe)
        runnable = skeleton(start.config, data.trust_remote_code, dtype=torch.bfloat16)
        found = find_units(
            start, runnable, wanted.format_name, CANDIDATES, wanted.engine, most_gpus(start.config),
            wanted.budget.bytes_of_step, open_head=self._open_head,
        )  # fmt: skip
        self.units = self._with_known_costs(found)
        self._heads = frozenset(site.module for site in find_sites(runnable).values() if site.is_head)

    def _with_known_costs(self, units: list[Unit]) -> list[Unit]:
        """Units of which nothing is measured, outside of the decoder layers, have their largest scheme alone."""
        unseen = [unit for unit in units if not self._seen.issuperset(unit.modules)]
        if unseen:
            logger.warning(
                "%s (and %d more) lies where no data comes by: nobody knows what it costs, so it gets the most bits",
                unseen[0].name, len(unseen) - 1,
            )  # fmt: skip
        return [unit.largest if unit in unseen else unit for unit in units]

    def recipe_of(self, allocation: Allocation) -> Recipe:
        return recipe_of(self._recipe, self.units, allocation, self._heads)

    def plan(self, allocation: Allocation) -> Plan:
        return self._plan_of(self.recipe_of(allocation))

    def schemes_of(self, allocation: Allocation) -> dict[str, Scheme]:
        """Module -> scheme of all that is quantized, what the user has named too."""
        return {step.site.module: step.scheme for step in self.plan(allocation).quantized}

    def _plan_of(self, recipe: Recipe) -> Plan:
        return make_plan(self._start.reader, self._start.model, recipe, self.wanted.format_name)

    def tilts(self) -> list[Tilt]:
        """None; and for each bit width, and each kind of unit, that its costs are lower or higher than estimated."""
        bits = {scheme.bits for unit in self.units for scheme in unit.bytes if scheme is not None}
        kinds = {unit.kind for unit in self.units}
        return [{}, *({what: factor} for what in (*sorted(bits)[:-1], *sorted(kinds)) for factor in _TILTS)]

    def within(self, budget: Budget, smallest: Allocation, tilt: Tilt) -> Allocation:
        """The best allocation that keeps to a budget, which is none of KL, by costs that are tilted."""
        limit = bytes_of(self.units, smallest) + budget.left_over(self.plan(smallest), self.wanted.shard_bytes)
        found = self.best(limit, tilt) or smallest
        # headers grow with the names that are in them, by a few bytes: the smallest is known to keep to the budget
        while (left := budget.left_over(self.plan(found), self.wanted.shard_bytes)) < 0:
            limit += left
            found = self.best(limit, tilt) or smallest
        return found

    def best(self, limit: int, tilt: Tilt | None = None) -> Allocation | None:
        """The allocation of at most `limit` bytes that costs least."""
        factor = tilt or {}
        costs = [
            [
                0.0 if s is None else self.cost(unit, s) * factor.get(s.bits, 1.0) * factor.get(unit.kind, 1.0)
                for s in unit.bytes
            ]
            for unit in self.units
        ]
        chosen = best_choice(costs, [list(unit.bytes.values()) for unit in self.units], limit)
        if chosen is None:
            return None
        return {unit.modules: list(unit.bytes)[at] for unit, at in zip(self.units, chosen, strict=True)}

    def cost(self, unit: Unit, scheme: Scheme | None) -> float:
        """The KL that a unit costs, to second order, in nats per token."""
        if scheme is None:
            return 0.0
        return sum(self._costs[module][scheme.name] for module in unit.modules if module in self._seen)

    def estimate(self, allocation: Allocation) -> float:
        return sum(self.cost(unit, allocation[unit.modules]) for unit in self.units)

    def judged(self, allocations: Sequence[Allocation]) -> list[tuple[Allocation, float]]:
        """Each with its real KL, on samples that costs were not measured on."""
        known = self._store.measured.divergences
        schemes = [self.schemes_of(each) for each in allocations]
        keys = [key_of(each) for each in schemes]
        new = {key: each for key, each in zip(keys, schemes, strict=True) if key not in known}
        if new:
            tell = self._tenths(f"judging {len(new)} allocations", len(self._model.layers))
            calibration, judged = self._calibration_and_judged
            found = divergences(
                self._model, self._steps, calibration, judged, list(new.values()), self._method, tell
            )  # fmt: skip
            known.update({key: list(each) for key, each in zip(new, found, strict=True)})
            self._store.save()
        return [(each, known[key][0]) for each, key in zip(allocations, keys, strict=True)]

    def of_run(self, allocation: Allocation) -> float:
        """The real KL of what the run will make of an allocation, on samples that it is not calibrated with."""
        if not self._method.wants_hessian:
            ((_, kl),) = self.judged([allocation])
            return kl
        known, key = self._store.measured.divergences, self._key_of_run(allocation)
        if key not in known:
            tell = self._tenths("trying the run", len(self._model.layers) + 1)
            calibration, judged = self._calibration_and_judged
            plan = self.plan(allocation)
            known[key] = list(divergence_of_run(self._model, plan, calibration, judged, tell))
            self._store.save()
        return known[key][0]

    def _key_of_run(self, allocation: Allocation) -> str:
        """What the measurements of `of_run` are kept under."""
        return key_of(self.schemes_of(allocation)) + (" calibrated" if self._method.wants_hessian else "")

    def at_most(self, allocation: Allocation) -> float:
        """The KL that text like the data set will hardly exceed, of an allocation that `of_run` knows."""
        kl, error = self._store.measured.divergences[self._key_of_run(allocation)]
        return max(kl / _AIM, kl + _ERRORS * error)

    def with_kl(self, most: float) -> list[tuple[Allocation, float]]:
        """Allocations with ever truer estimates of their KL; the last one is the smallest that keeps below `most`."""
        ratio, tried = 1.0, []
        for _ in range(_TRIES):
            allocation = self._smallest_with(most / ratio)
            if allocation is None:
                break
            tried.append((allocation, self.of_run(allocation)))
            if (kl := self.at_most(allocation)) <= most:
                return tried
            ratio = max(ratio * 1.02, kl / self.estimate(allocation))
        largest = {unit.modules: max(unit.bytes, key=lambda s: unit.bytes[s]) for unit in self.units}
        kl = self.of_run(largest)
        if (found := self.at_most(largest)) > most:
            raise UsageError(f"a KL of {most:g} cannot be kept: the largest schemes come to {found:.3g}, with a margin")
        return [*tried, (largest, kl)]

    def _smallest_with(self, most: float) -> Allocation | None:
        """The smallest allocation that is estimated to cost at most `most`."""
        low = sum(min(unit.bytes.values()) for unit in self.units)
        high, found = sum(max(unit.bytes.values()) for unit in self.units), None
        while low <= high:
            middle = (low + high) // 2
            allocation = self.best(middle)
            if allocation is not None and self.estimate(allocation) <= most:
                found, high = allocation, bytes_of(self.units, allocation) - 1
            else:
                low = middle + 1
        return found

    @cached_property
    def samples(self) -> Samples:
        language_model = self._start.config.get_text_config()
        return calibration_samples(
            self._data.dataset, self._start.reader.folder,
            num_samples=self._number_of_parts * min(_SAMPLES, self._data.num_samples),
            seqlen=min(_SEQLEN, self._data.seqlen), seed=self._data.seed, vocabulary=language_model.vocab_size,
            context=getattr(language_model, "max_position_embeddings", None),
            trust_remote_code=self._data.trust_remote_code, announce=self._announce,
        )  # fmt: skip

    @property
    def _number_of_parts(self) -> int:
        return 3 if self._method.wants_hessian else 2

    @cached_property
    def _parts(self) -> list[torch.Tensor]:
        """The samples that costs are measured on, those that allocations are judged on, others to calibrate with."""
        ids = self.samples.input_ids
        if len(ids) < 2:
            raise UsageError(f"1 sample of {self.samples.source} is too little for a budget: it takes 2 at least")
        parts = (ids[start :: self._number_of_parts] for start in range(self._number_of_parts))
        return [part for part in parts if len(part)]  # each from all over the text

    @property
    def _calibration_and_judged(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Samples that the method is calibrated with, and others that allocations are judged on; one in each batch."""
        measured, judged, *more = (list(part.split(1)) for part in self._parts)
        return [*measured, *(ids for part in more for ids in part)], judged

    @cached_property
    def _model(self) -> LayeredModel:
        start, ids = self._start, self.samples.input_ids
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # in half precision what is added up would lose more than 8 bits do
        return LayeredModel(start.config, start.reader, ids, torch.float32, device, self._data.trust_remote_code)

    @cached_property
    def _steps(self) -> list[list[Step]]:
        head = Scheme() if self._open_head else self._recipe.lm_head
        return steps_by_layer(self._plan_of(replace(self._recipe, lm_head=head)), self._model)

    @cached_property
    def _open_head(self) -> bool:
        """Whether an output embedding of its own may be quantized or stay dense: where bytes count, and nothing was
        said of it. One that is tied would need a table of its own, which is larger than none."""
        asked, ties = self._recipe, tied_weights(self._start.model)
        heads = [name for name, site in find_sites(self._start.model).items() if site.is_head]
        said = asked.lm_head is not None or asked.embeddings is not None or self.wanted.budget.bits is not None
        return not said and bool(heads) and not {*ties, *ties.values()}.intersection(heads)

    @cached_property
    def _seen(self) -> set[str]:
        """Modules whose inputs and gradients are seen."""
        return {step.site.module for group in self._steps for step in group}

    @cached_property
    def _store(self) -> Store:
        files = [self._start.reader.folder / "config.json", *self._start.reader.files]
        return Store({
            "lowbit": __version__,
            "torch": torch.__version__,
            "source": [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
            "tokens": self.samples.digest,
            "method": [self._recipe.method, dict(self._recipe.options)],
            "device": self._model.device.type,
        })  # fmt: skip

    @cached_property
    def _costs(self) -> dict[str, dict[str, float]]:
        wanted = {
            m: [s for s in unit.bytes if s is not None] for unit in self.units for m in unit.modules if m in self._seen
        }
        known = self._store.measured.costs
        missing = {m: [s for s in schemes if s.name not in known.get(m, {})] for m, schemes in wanted.items()}
        if not any(missing.values()):
            return known
        self._announce(
            f"measuring what each scheme costs {len(self.units)} parts of the model, on {self._parts[0].numel():,} "
            f"tokens of {self.samples.source}"
        )
        tell = self._tenths("measuring", 2 * len(self._model.layers) + 1)
        with tempfile.TemporaryDirectory(prefix="lowbit-allocation-") as folder:
            found = second_order_costs(
                self._model, self._steps, list(self._parts[0].split(1)), missing, self._method.without_data,
                Path(folder), tell,
            )  # fmt: skip
        for module, costs in found.items():
            known.setdefault(module, {}).update({scheme.name: cost for scheme, cost in costs.items()})
        self._store.save()
        return known

    def _tenths(self, what: str, total: int) -> Callable[[str], None]:
        """Announces every tenth of `total` steps."""
        done = count(1)

        def tell(step: str) -> None:
            number = next(done)
            if number * 10 // total > (number - 1) * 10 // total:
                self._announce(f"{what}: {step}, {number / total:.0%}")

        return tell


def _facts(
    search: _Search, budget: Budget, best: Allocation, kl: float, judged: list[tuple[Allocation, float]]
) -> dict:
    """What the report says of an allocation.

    budget: what was asked for. fits_dense: whether the model as it is keeps to it. predicted_kl: of the result as the
    run will make it, in nats per token; estimated_kl: the same to second order. units: each with its modules, scheme,
    bytes and share of the KL. judged: the shortlist. frontier: the best allocations of other sizes; uniform: one scheme
    for all, where all units have it.
    """
    units, ratio = search.units, kl / max(search.estimate(best), 1e-30)
    weights = sum(unit.weights for unit in units)

    def point(allocation: Allocation, kl: float | None = None) -> dict:
        size = bytes_of(units, allocation)
        return {
            "bytes": size,
            "bits": 8 * size / weights,
            "kl": ratio * search.estimate(allocation) if kl is None else kl,
        }

    low, high = (sum(pick(unit.bytes.values()) for unit in units) for pick in (min, max))
    limits = [int(low * (high / low) ** (step / (_POINTS - 1))) for step in range(_POINTS)]
    uniform = [s for s in CANDIDATES if all(s in unit.bytes for unit in units)]
    dense = {unit.modules: None for unit in units if None in unit.bytes}
    return {
        "budget": budget.to_dict(),
        "fits_dense": budget.fits_dense(search.plan(best), search.wanted.shard_bytes),
        "engine": search.wanted.engine,
        "memory": budget.running.memory(search.plan(best)) if budget.running else None,
        "data": f"{search.samples.tokens:,} tokens of {search.samples.source}",
        "predicted_kl": kl,
        "estimated_kl": search.estimate(best),
        "units": [
            {
                "name": unit.name,
                "modules": list(unit.modules),
                "scheme": _name(best[unit.modules]),
                "bytes": unit.bytes[best[unit.modules]],
                "kl": ratio * search.cost(unit, best[unit.modules]),
            }
            for unit in units
        ],
        "judged": [point(each, found) for each, found in judged],
        "frontier": [point(found) for limit in limits if (found := search.best(limit)) is not None],
        "uniform": [{"scheme": s.name, **point({unit.modules: s for unit in units} | dense)} for s in uniform],
    }


def _name(scheme: Scheme | None) -> str:
    return "dense" if scheme is None else scheme.name
