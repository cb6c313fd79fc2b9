"""`lowbit_report.json` as one HTML page: no scripts, nothing that is fetched, every word of the report escaped."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from lowbit.errors import InputError
from lowbit.guards.escape import shell
from lowbit.guards.lenient import mapping, number, text
from lowbit.publish.private import recorded_command
from lowbit.report_page.advice import FEW_TOKENS, Advice, advice, advice_by_kind
from lowbit.report_page.bands import FAIR_KL, GOOD_KL, SLOPES, band, limits
from lowbit.report_page.facts import Facts, Layer, mean, percent, size

_WORST, _KINDS = 10, 3


def render(report: dict, folder: str) -> str:
    """The page of a report; `folder`: what its commands call the quantized model.

    Raises InputError where the packages that draw it are not installed.
    """
    try:
        from markupsafe import Markup

        from lowbit.report_page.figures import COLOURS, colour_of, figures

        template = _template()
    except ImportError as error:
        raise InputError(f"the page of a report needs {error.name}: pip install 'lowbit[report]'") from None

    facts = Facts(report)
    good, fair = limits(facts.measure, len(facts.by_module))
    return template.render(
        facts=facts,
        folder=text(folder),
        name=_name(facts),
        scheme=_scheme(facts),
        numbers=_numbers(facts),
        strings=_strings(facts),
        errors=_Errors.of(facts, good, fair),
        kinds=advice_by_kind(facts)[:_KINDS],
        worst=[_Worst.of(layer, facts, good, fair) for layer in facts.worst(_WORST)],
        modules=[_module(layers, good, fair) for layers in facts.by_module.values()],
        legend=[(kind, colour_of(facts, kind)) for kind in list(facts.by_kind)[:COLOURS]],
        figures={name: svg and Markup(svg) for name, svg in figures(facts, (good, fair)).items()},
        coverage=_coverage(facts),
        fewest=FEW_TOKENS,
        notes=[(layer, layer.note) for layer in facts.layers if layer.note],
        left_alone=_pairs(report.get("left_alone")),
        fallbacks=_pairs(report.get("fallbacks")),
        settings=list(_settings(facts)),
        versions=_pairs(report.get("versions")),
        command=shell(recorded_command(command := text(report.get("command"))) or ([command] if command else [])),
        measure=shell(["lowbit", "eval", folder, "--reference", text(report.get("source")), "--save"]),
        quality_band="" if (kl := number(facts.quality.get("kl_mean"))) is None else band(kl, GOOD_KL, FAIR_KL),
        good=good, fair=fair, good_kl=GOOD_KL, fair_kl=FAIR_KL, slope=SLOPES[facts.measure],
    )  # fmt: skip


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _or_dash(formatted: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: "–" if value is None else formatted(value)


# How the template writes numbers that may not be there
_FILTERS = {
    "percent": _or_dash(percent),
    "size": _or_dash(size),
    "time": _or_dash(_time),
    "count": _or_dash("{:,.0f}".format),
    "digits": _or_dash("{:.4g}".format),
    "rough": _or_dash("{:.1g}".format),
}


@cache
def _template():
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= _FILTERS
    return environment.from_string((files("lowbit") / "assets" / "report.html").read_text(encoding="utf-8"))


def _name(facts: Facts) -> str:
    return text(facts.report.get("source")).rstrip("/").rpartition("/")[2] or "a model"


def _numbers(facts: Facts) -> dict[str, float | None]:
    """Every number of the report and of what was measured since, by its key; what is no number is None."""
    keys = ("source_bytes", "output_bytes", "parameters", "bits_per_weight", "quantized_share", "quantized_tensors",
            "seconds", "peak_memory")  # fmt: skip
    measured = ("perplexity", "reference_perplexity", "kl_mean", "kl_p99", "top1_agreement", "tokens", "seqlen")
    numbers = {key: number(facts.report.get(key)) for key in keys}
    numbers |= {f"quality_{key}": number(facts.quality.get(key)) for key in measured}
    numbers |= {f"calibration_{key}": number(facts.calibration.get(key)) for key in ("samples", "tokens")}
    before, after = numbers["quality_reference_perplexity"], numbers["quality_perplexity"]
    numbers["growth"] = after / before - 1 if before and after is not None else None
    sizes = numbers["source_bytes"], numbers["output_bytes"]
    numbers["times_smaller"] = sizes[0] / sizes[1] if sizes[0] and sizes[1] else None
    return numbers


def _strings(facts: Facts) -> dict[str, str]:
    strings = {key: text(facts.report.get(key)) for key in ("source", "source_revision", "format", "date", "machine")}
    strings |= {"lowbit": text(facts.report.get("lowbit")), "method": text(facts.recipe.get("method"))}
    strings["calibration"] = text(facts.calibration.get("source"))
    return strings | {f"quality_{key}": text(facts.quality.get(key)) for key in ("dataset", "reference", "date")}


@dataclass(frozen=True)
class _Errors:
    """How many weights are in which band, their mean error, and the least and the largest KL divergence to expect of
    errors like these."""

    bands: dict[str, int]
    mean: float | None
    worst_band: str
    expected_kl: tuple[float, float] | None

    @classmethod
    def of(cls, facts: Facts, good: float, fair: float) -> "_Errors":
        bands = dict.fromkeys(("good", "fair", "bad"), 0)
        for layer in facts.known:
            bands[band(layer.error, good, fair)] += 1
        if not facts.known:
            return cls(bands, None, "", None)
        squares, slope = facts.squares(facts.known), SLOPES[facts.measure]
        worst = max((name for name, count in bands.items() if count), key=list(bands).index)
        average = mean(layer.error for layer in facts.known)
        return cls(bands, average, worst, (slope.least * squares, slope.most * squares))


@dataclass(frozen=True)
class _Worst:
    """A weight of the list of the worst: how bad, compared with its kind, and what to try."""

    layer: Layer
    band: str
    experts: int
    times_median: float | None
    advice: list[Advice]

    @classmethod
    def of(cls, layer: Layer, facts: Facts, good: float, fair: float) -> "_Worst":
        peers = sorted(other.error for other in facts.known if other.scheme == layer.scheme)
        median = peers[len(peers) // 2]
        together = facts.by_module[layer.module]
        weights = [other.weights for other in together]
        todo = advice(layer, number(facts.calibration.get("samples")), None if None in weights else sum(weights))
        return cls(
            layer, band(layer.error, good, fair), len(together), layer.error / median if median else None, list(todo)
        )


def _module(layers: list[Layer], good: float, fair: float) -> dict:
    """A row of the list of all modules."""
    errors = [layer.error for layer in layers if layer.error is not None]
    error = mean(errors) if errors else None
    return {
        "name": layers[0].module,
        "experts": len(layers),
        "scheme": layers[0].scheme,
        "error": error,
        "largest": max(errors, default=None),
        "band": "" if error is None else band(error, good, fair),
    }


def _coverage(facts: Facts) -> dict[str, float]:
    tokens = sorted(count for experts in facts.routed.values() for count in experts.values()) or [0]
    return {
        "experts": len(tokens),
        "cold": sum(count < FEW_TOKENS for count in tokens),
        "fewest": tokens[0],
        "median": tokens[len(tokens) // 2],
        "most": tokens[-1],
    }


def _pairs(value) -> list[tuple[str, str]]:
    return [(text(key), text(entry)) for key, entry in mapping(value).items()]


def _scheme(facts: Facts) -> str:
    """The scheme of most weights."""
    names = [layer.scheme for layer in facts.layers if layer.scheme]
    return max(set(names), key=names.count) if names else ""


def _settings(facts: Facts) -> Iterator[tuple[str, str]]:
    """What the recipe says, a line for each setting that is not empty."""
    for key, value in facts.recipe.items():
        inside = value if isinstance(value, dict) else {"": value}
        for name, setting in inside.items():
            if setting not in ([], {}, None):
                yield text(name or key).replace("_", " "), _plain(setting)


def _plain(setting) -> str:
    return text(setting if isinstance(setting, str) else json.dumps(setting))
