"""How schemes were chosen for a budget, read from JSON that anyone may have written."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from lowbit.guards.lenient import mapping, mappings, number, text


@dataclass(frozen=True)
class Point:
    """An allocation: average bits, and nats per token. scheme: of one that has the same for all, else empty."""

    bits: float
    kl: float
    scheme: str = ""


@dataclass(frozen=True)
class Allocation:
    """report: what is under `allocation` in lowbit_report.json."""

    report: dict

    @property
    def budget(self) -> str:
        """What was asked for, as it is typed."""
        asked = mapping(self.report.get("budget"))
        units = {"bits": "--bits {:g}", "size": "--size {:.0f}", "max_kl": "--max-kl {:g}", "fit": "--fit {:.0f}"}
        found = [form.format(value) for key, form in units.items() if (value := number(asked.get(key))) is not None]
        return " ".join(found)

    @property
    def kl(self) -> float | None:
        return number(self.report.get("predicted_kl"))

    @property
    def data(self) -> str:
        return text(self.report.get("data"))

    @cached_property
    def frontier(self) -> list[Point]:
        return self._points("frontier")

    @cached_property
    def judged(self) -> list[Point]:
        return self._points("judged")

    @cached_property
    def uniform(self) -> list[Point]:
        return self._points("uniform")

    @property
    def best_uniform(self) -> Point | None:
        """Of one scheme for all that is no larger than the result, the one with the least KL."""
        most = self.chosen.bits if self.chosen else 0.0
        return min((point for point in self.uniform if point.bits <= most), key=lambda point: point.kl, default=None)

    def to_dict(self) -> dict:
        """What is shown of it, as JSON."""
        return {
            "budget": self.budget,
            "predicted_kl": self.kl,
            "parts": [
                {"part": part, "schemes": schemes, "bytes": size, "kl": kl} for part, schemes, size, kl in self.kinds
            ],
            "frontier": [{"bits": point.bits, "kl": point.kl} for point in self.frontier],
            "uniform": [{"scheme": point.scheme, "bits": point.bits, "kl": point.kl} for point in self.uniform],
        }

    def _points(self, key: str) -> list[Point]:
        entries = mappings(self.report.get(key))
        found = [(number(e.get("bits")), number(e.get("kl")), text(e.get("scheme"))) for e in entries]
        # a logarithmic axis has no place for zero
        return sorted((Point(b, kl, s) for b, kl, s in found if b and kl), key=lambda point: point.bits)

    @cached_property
    def chosen(self) -> Point | None:
        """The point of the result."""
        best = [point for point in self.judged if point.kl == self.kl]
        return best[0] if best else None

    @cached_property
    def kinds(self) -> list[tuple[str, str, float, float]]:
        """(kind of part, its schemes, bytes, KL), in the order of the model."""
        found: dict[str, list[dict]] = {}
        for unit in mappings(self.report.get("units")):
            found.setdefault(text(unit.get("name")).rpartition(".")[2], []).append(unit)
        return [(kind, _schemes(units), _sum(units, "bytes"), _sum(units, "kl")) for kind, units in found.items()]


def _schemes(units: list[dict]) -> str:
    counts = Counter(text(unit.get("scheme")) for unit in units)
    return ", ".join(f"{count} × {scheme}" for scheme, count in sorted(counts.items()))


def _sum(units: list[dict], key: str) -> float:
    return sum(number(unit.get(key)) or 0.0 for unit in units)
