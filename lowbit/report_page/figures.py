"""The figures of the page: matplotlib's SVG in colours of the page's own style, so that they follow light and dark."""

import math
import re
import warnings
from io import StringIO

from matplotlib import rc_context
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lowbit.report_page.facts import Facts, mean, percent, size

# Kinds with a colour of their own: no more than can be told apart
COLOURS = 8
# Dots are drawn one by one up to here: more of them are a smear, and megabytes
_MOST_DOTS = 200
_MOST_ROWS = 14
_LONGEST_LABEL = 24

# What matplotlib draws with -> what the page makes of it
_INK, _FAINT, _BEFORE, _AFTER, _GOOD, _BAD = (f"#01020{digit}" for digit in range(6))
_KINDS = [f"#01030{digit}" for digit in range(COLOURS)]
_STANDS_FOR = {
    _INK: "currentColor", _FAINT: "var(--line)", _BEFORE: "var(--before)", _AFTER: "var(--accent)",
    _GOOD: "var(--good)", _BAD: "var(--bad)", **{colour: f"var(--kind-{i})" for i, colour in enumerate(_KINDS)},
}  # fmt: skip
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lowbit",  # the same report is the same page
    "text.parse_math": False,  # names may hold dollar signs
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def figures(facts: Facts, limits: tuple[float, float]) -> dict[str, str | None]:
    """Name -> SVG of each figure, None where there is nothing to draw. limits: the largest good and fair errors."""
    drawings = {
        "depth": (_depth, facts.depths),
        "kinds": (_kinds, facts.by_kind),
        "parts": (_parts, facts.parts),
        "experts": (_experts, facts.routed),
        "frontier": (_frontier, facts.allocation and facts.allocation.frontier),
    }
    drawn = dict.fromkeys(drawings)
    for name, (draw, data) in drawings.items():
        if data:
            with rc_context(_STYLE):
                drawn[name] = _svg(draw(facts, limits), name)
    return drawn


def colour_of(facts: Facts, kind: str) -> str:
    """The CSS colour of a kind; those with the smallest errors share the last one."""
    return f"var(--kind-{_index(facts, kind)})"


def _index(facts: Facts, kind: str) -> int:
    return min(list(facts.by_kind).index(kind), COLOURS - 1)


def _depth(facts: Facts, limits: tuple[float, float]) -> Figure:
    """Error over the layers, a line for each kind; the band around it is that of its experts."""
    figure, axes = _figure(3.6)
    for kind, points in facts.depths.items():
        depths, errors = list(points), list(points.values())
        colour = _KINDS[_index(facts, kind)]
        axes.plot(depths, [mean(e) for e in errors], color=colour, marker="o", markersize=3.5, linewidth=1.6)
        if any(len(e) > 1 for e in errors):
            low, high = ([select(e) for e in errors] for select in (min, max))
            axes.fill_between(depths, low, high, color=colour, alpha=0.15, linewidth=0)
    if facts.after_layers:
        axes.plot(*zip(*facts.after_layers, strict=True), color=_INK, linestyle=(0, (1, 1.5)), linewidth=1.6)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y")
    _errors_along(axes.yaxis)
    for limit, colour in zip(limits, (_GOOD, _BAD), strict=True):
        if _inside(limit, axes.get_ylim()):
            axes.axhline(limit, color=colour, linewidth=1.2, linestyle=(0, (5, 3)), zorder=0)
    return figure


def _kinds(facts: Facts, limits: tuple[float, float]) -> Figure:
    """Errors of each kind: all, the middle half, the median."""
    kinds = dict(list(facts.by_kind.items())[:_MOST_ROWS])
    figure, axes = _figure(0.9 + 0.36 * len(kinds))
    for row, (kind, layers) in enumerate(kinds.items()):
        errors, colour = sorted(layer.error for layer in layers), _KINDS[_index(facts, kind)]
        if len(errors) <= _MOST_DOTS:
            axes.plot(errors, [row] * len(errors), "o", color=colour, markersize=5, alpha=0.45, markeredgewidth=0)
        axes.plot([errors[0], errors[-1]], [row, row], color=colour, linewidth=1)
        axes.plot([_quantile(errors, 0.25), _quantile(errors, 0.75)], [row, row], color=colour, linewidth=5, alpha=0.6)
        axes.plot(_quantile(errors, 0.5), row, "|", color=_INK, markersize=13, markeredgewidth=2)
    axes.set_yticks(range(len(kinds)), [_label(kind) for kind in kinds])
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.set_xlabel("relative error")
    axes.grid(axis="x")
    _errors_along(axes.xaxis)
    for limit, colour in zip(limits, (_GOOD, _BAD), strict=True):
        if _inside(limit, axes.get_xlim()):
            axes.axvline(limit, color=colour, linewidth=1.2, linestyle=(0, (5, 3)), zorder=0)
    return figure


def _parts(facts: Facts, _) -> Figure:
    """Bytes of each part before and after."""
    parts, rest = facts.parts[: _MOST_ROWS - 1], facts.parts[_MOST_ROWS - 1 :]
    if rest:
        parts = [*parts, ("other", sum(before for _, before, _ in rest), sum(after for _, _, after in rest))]
    figure, axes = _figure(0.9 + 0.42 * len(parts))
    for row, (_, before, after) in enumerate(parts):
        axes.barh(row - 0.2, before, 0.36, color=_BEFORE)
        axes.barh(row + 0.2, after, 0.36, color=_AFTER)
    axes.set_yticks(range(len(parts)), [_label(name) for name, _, _ in parts])
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="x")
    return figure


def _experts(facts: Facts, _) -> Figure:
    """Tokens that each expert was sent, a row for each layer."""
    depths, count = list(facts.routed), 1 + max(max(experts) for experts in facts.routed.values())
    # no tokens have no logarithm: they are drawn below one token
    tokens = [[max(facts.routed[depth].get(e, math.nan), 0.5) for e in range(count)] for depth in depths]
    figure, axes = _figure(min(6.0, 1.3 + 0.2 * len(depths)))
    most = max(2.0, max(max(experts.values()) for experts in facts.routed.values()))
    image = axes.imshow(
        tokens, norm=LogNorm(0.5, most), cmap="viridis", aspect="auto", interpolation="none",
        extent=(-0.5, count - 0.5, len(depths) - 0.5, -0.5),
    )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.solids.set_rasterized(True)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    bar.set_label("tokens")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    rows = sorted({round(row * (len(depths) - 1) / 7) for row in range(8)})
    axes.set_yticks(rows, [str(depths[row]) for row in rows])
    return figure


def _frontier(facts: Facts, _) -> Figure:
    """KL against bits: the best allocations, one scheme for all, and what was chosen."""
    allocation = facts.allocation
    figure, axes = _figure(3.0)
    chosen = [allocation.chosen] if allocation.chosen else []
    for points, marker, colour, width in (
        (allocation.frontier, "-", _AFTER, 1.6),
        (allocation.uniform, "o", _BEFORE, 4),
        (allocation.judged, ".", _INK, 3),
        (chosen, "D", _GOOD, 6),
    ):
        axes.plot([p.bits for p in points], [p.kl for p in points], marker, color=colour, linewidth=width, ms=width)
    axes.set(yscale="log", xlabel="bits per weight", ylabel="KL, nats per token")
    axes.grid()
    return figure


def _figure(height: float) -> tuple:
    """Inches: this wide, its text can be read on a phone, and two have place side by side on a desk."""
    figure = Figure(figsize=(4.5, height), layout="constrained")
    return figure, figure.subplots()


def _errors_along(axis) -> None:
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    many = high > 30 * low
    axis.set_major_locator(LogLocator(subs=(1.0,) if many else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    axis.set_minor_formatter(NullFormatter())


def _inside(limit: float, interval: tuple[float, float]) -> bool:
    return min(interval) < limit < max(interval)


def _quantile(ordered: list[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _label(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else "…" + name[1 - _LONGEST_LABEL :]


def _svg(figure: Figure, name: str) -> str:
    """An <svg> element as wide as what it is in, with ids that begin with `name`: those of all figures share a page."""
    buffer = StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's browser has fonts of its own
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', "", svg, count=1)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", svg)
    for drawn, meant in _STANDS_FOR.items():
        svg = svg.replace(drawn, meant)
    return svg
