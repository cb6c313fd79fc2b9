"""What the page of a report says, read from JSON that anyone may have written.

Whatever is missing, or is not what it should be, is None here and a dash on the page.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from lowbit.folders.allocation import Allocation
from lowbit.guards.lenient import mapping, mappings, number, text


@dataclass(frozen=True)
class Layer:
    """A weight, or that of one expert. module: its name in the model. depth: which layer it is in; kind: where in that
    layer, by as few parts of its name as tell it apart."""

    name: str
    module: str
    depth: int | None
    kind: str
    scheme: str
    error: float | None
    expert: int | None
    tokens: float | None
    routed: float | None
    shape: tuple[float, ...] | None
    note: str

    @property
    def weights(self) -> float | None:
        return None if self.shape is None else math.prod(self.shape)


@dataclass(frozen=True)
class Facts:
    """report: the object in lowbit_report.json."""

    report: dict

    @cached_property
    def quality(self) -> dict:
        return mapping(self.report.get("quality"))

    @cached_property
    def calibration(self) -> dict:
        return mapping(self.report.get("calibration"))

    @cached_property
    def recipe(self) -> dict:
        return mapping(self.report.get("recipe"))

    @cached_property
    def allocation(self) -> Allocation | None:
        found = mapping(self.report.get("allocation"))
        return Allocation(found) if found else None

    @property
    def measure(self) -> str:
        """The key of the error that a layer is judged by: what its rounding costs in outputs where there was data, else
        the error of its weights."""
        return "rounding_error" if self.calibration else "error"

    @cached_property
    def layers(self) -> list[Layer]:
        entries = mappings(self.report.get("layers"))
        modules = [text(e.get("module")) or text(e.get("name")).removesuffix(".weight") for e in entries]
        kinds = _kinds(modules)
        return [
            Layer(
                name=text(entry.get("name")) or module,
                module=module,
                depth=_depth(module),
                kind=kinds[module],
                scheme=text(entry.get("scheme")),
                error=self._error(entry),
                expert=_whole(entry.get("expert")),
                tokens=number(entry.get("tokens")),
                routed=number(entry.get("routed")),
                shape=_shape(entry.get("shape")),
                note=text(entry.get("note")),
            )
            for entry, module in zip(entries, modules, strict=True)
        ]

    def _error(self, entry: dict) -> float | None:
        error = number(entry.get(self.measure))
        # reports of earlier versions do not tell what rounding costs from what moving a weight makes up for
        return number(entry.get("output_error")) if error is None and self.calibration else error

    @cached_property
    def known(self) -> list[Layer]:
        """The layers whose error is known."""
        return [layer for layer in self.layers if layer.error is not None]

    @cached_property
    def by_kind(self) -> dict[str, list[Layer]]:
        """Kind -> its layers whose error is known and can stand on a logarithmic scale, the worst kind first."""
        kinds: dict[str, list[Layer]] = {}
        for layer in self.known:
            if layer.error > 0:
                kinds.setdefault(layer.kind, []).append(layer)
        return dict(sorted(kinds.items(), key=lambda item: -mean(layer.error for layer in item[1])))

    @cached_property
    def depths(self) -> dict[str, dict[int, list[float]]]:
        """Kind -> depth -> the errors there."""
        found: dict[str, dict[int, list[float]]] = {}
        for kind, layers in self.by_kind.items():
            for layer in sorted((x for x in layers if x.depth is not None), key=lambda x: x.depth):
                found.setdefault(kind, {}).setdefault(layer.depth, []).append(layer.error)
        return found

    @cached_property
    def by_module(self) -> dict[str, list[Layer]]:
        """Module -> its layers, one for each expert, in the order of the checkpoint."""
        modules: dict[str, list[Layer]] = {}
        for layer in self.layers:
            modules.setdefault(layer.module, []).append(layer)
        return modules

    def squares(self, layers: Iterable[Layer]) -> float:
        """The sum of squared errors over the modules of `layers`; of experts the mean: each has its share of tokens."""
        modules: dict[str, list[float]] = {}
        for layer in layers:
            if layer.error is not None:
                modules.setdefault(layer.module, []).append(layer.error**2)
        return sum(map(mean, modules.values()))

    def worst(self, count: int) -> list[Layer]:
        """The layers with the largest errors, of each module the worst one."""
        worst = {}
        for layer in sorted(self.known, key=lambda layer: -layer.error):
            worst.setdefault(layer.module, layer)
        return list(worst.values())[:count]

    @cached_property
    def after_layers(self) -> list[tuple[int, float]]:
        """(depth, relative error of the hidden states behind that decoder layer) where it was measured."""
        entries = mappings(self.report.get("decoder_layers"))
        found = [(_whole(entry.get("layer")), number(entry.get("output_error"))) for entry in entries]
        return [(depth, error) for depth, error in found if depth is not None and error]

    @cached_property
    def parts(self) -> list[tuple[str, float, float]]:
        """(part, bytes before, bytes after), the largest first."""
        entries = [(text(name), mapping(part)) for name, part in mapping(self.report.get("parts")).items()]
        sizes = [(name, number(part.get("source_bytes")), number(part.get("bytes"))) for name, part in entries]
        return sorted((size for size in sizes if None not in size), key=lambda size: -size[1])

    @cached_property
    def routed(self) -> dict[int, dict[int, float]]:
        """Depth -> expert -> the tokens that the router sent there."""
        found: dict[int, dict[int, float]] = {}
        for layer in self.layers:
            if layer.expert is not None and layer.depth is not None and layer.routed is not None:
                found.setdefault(layer.depth, {})[layer.expert] = layer.routed
        return dict(sorted(found.items()))


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / max(len(values), 1)


def percent(value: float) -> str:
    """Three digits of it."""
    return f"{100 * value:.3g} %"


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _whole(value) -> int | None:
    """Counts and positions; what is absurdly large would be drawn."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10_000 else None


def _shape(value) -> tuple[float, ...] | None:
    lengths = tuple(number(length) for length in value) if isinstance(value, list) else ()
    return lengths if lengths and all(lengths) else None


def _depth(module: str) -> int | None:
    """The first number in a module name is that of the layer."""
    found = re.search(r"(?:^|\.)([0-9]{1,4})(?:\.|$)", module)
    return int(found[1]) if found else None


def _kinds(modules: list[str]) -> dict[str, str]:
    """Module -> the shortest end of its name without numbers that no other place in a layer has."""
    places = {module: [part for part in module.split(".") if not part.isdecimal()] for module in modules}
    owners: dict[str, set[tuple]] = {}
    for place in places.values():
        for end in _ends(place):
            owners.setdefault(end, set()).add(tuple(place))
    return {
        module: next((end for end in _ends(place) if len(owners[end]) == 1), ".".join(place))
        for module, place in places.items()
    }


def _ends(place: list[str]) -> Iterator[str]:
    for start in range(len(place) - 1, -1, -1):
        yield ".".join(place[start:])
