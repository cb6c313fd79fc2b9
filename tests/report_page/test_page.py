"""The page of a report: its numbers are those of the JSON, and no JSON breaks it or gets out of its text."""

import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from statistics import geometric_mean

import pytest
import torch
from folders import data_bytes, read_json
from models import save_tiny
from reports import SCHEME, layer, report

import lowbit
from lowbit.eval import evaluate
from lowbit.generation.stream import load_tokenizer
from lowbit.report_page import figures as page_figures
from lowbit.report_page.advice import advice, advice_by_kind
from lowbit.report_page.bands import FAIR_KL, GOOD_KL, SLOPES, band, limits
from lowbit.report_page.facts import Facts
from lowbit.report_page.page import render
from lowbit.text.datasets import token_stream

RESULTS = Path(__file__).parents[2] / "scripts" / "benchmarks" / "results"
EVIL = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", "</style><b>", "-->",
    "]]></svg><iframe src=//evil.example>", "$\\frac{", "{{ 7 * 7 }}", "{% raw %}", "\x1b[31m\x00\n\u202e", "\ud800",
    "a" * 3000, "模型", "'; rm -rf ~; '", "",
]  # fmt: skip
JUNK = [None, [], {}, "", "x", -1, True, math.nan, math.inf, 1e300, 10**400, [[]], [None, 3], {"a": {"b": []}}]


class Page(HTMLParser):
    """Elements, attributes and visible words of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.attributes, self.words = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        if self.elements[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def quick(monkeypatch):
    """Empty figures: drawing takes seconds."""
    for name in ("_depth", "_kinds", "_parts", "_experts"):
        monkeypatch.setattr(page_figures, name, lambda facts, limits: None)
    monkeypatch.setattr(page_figures, "_svg", lambda figure, name: "<svg></svg>")


def test_numbers_are_those_of_the_report(quick):
    """In as many digits as are shown, from the JSON by another way."""
    data = report()
    text = Page(render(data, "out")).text
    by_module = {}
    for entry in data["layers"]:
        by_module.setdefault(entry["module"], []).append(entry["rounding_error"])
    good, fair = limits("rounding_error", len(by_module))
    for module, errors in by_module.items():
        mean = math.fsum(errors) / len(errors)
        verdict = "good" if mean < good else "fair" if mean < fair else "bad"
        matrices = f" {len(errors)} matrices, the worst {max(errors) * 100:.3g} %" if len(errors) > 1 else ""
        assert f"{module}{matrices} {SCHEME} {mean * 100:.3g} % {verdict}" in text
    worst = sorted(by_module, key=lambda module: -max(by_module[module]))[:10]
    shown = text.split("what to try")[1].split("Quality before")[0]
    assert re.findall(r"model\.layers\.\d\.[a-z_.]+", shown) == worst
    for word in (
        "8.92 MB became 3.1 MB, 2.9 times smaller", "perplexity grew by 1.06 %", "92.5 % of all places", "4.157",
        "88.2 % of the bytes", "perplexity 16.62 16.44", "(nats) fair 0.01279 0", "(nats) 0.07534 0", "92.5 % 100 %",
        "16,352 tokens of stdlib in windows of 512, against org/Model-8B, 2026-11-23 09:00 UTC", "1 h 12 min", "655 MB",
        "gate_up_proj 6.29 MB 1.63 MB", "lm_head.weight output embedding", "16 samples, 4,096 tokens: stdlib-train",
        "model.layers.0.mlp.down_proj.weight W4A16_ASYM-G64", "cold expert: 90 tokens of its own",
        "revision 0123abcdef", "python 3.11.7, torch 2.13.0+cpu, lowbit 0.1.0", data["command"],
        data["machine"], data["date"], "damping 0.03",
    ):  # fmt: skip
        assert word in text, word


def test_a_run_without_data(quick):
    data = report(experts=0)
    data |= {"calibration": None, "quality": None, "decoder_layers": [], "command": None, "source": "a model"}
    text = Page(render(data, "my out")).text
    mean = math.fsum(entry["error"] for entry in data["layers"]) / len(data["layers"])
    assert f"error of the weights {100 * mean:.3g} %" in text and "--method gptq" in text
    assert "lowbit eval 'my out' --reference 'a model' --save" in text and "Started from Python" in text
    assert "not been measured" in text and "Calibration" not in text


def paths(data, path=()):
    """Of every value in nested objects; of lists the first entry."""
    items = data.items() if isinstance(data, dict) else list(enumerate(data))[:1] if isinstance(data, list) else []
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


def changed(path, change) -> dict:
    data = report(layers=2, experts=2)
    inside = data
    for key in path[:-1]:
        inside = inside[key]
    change(inside, path[-1])
    return data


def test_every_key_may_be_missing(quick):
    for path in paths(report()):
        text = Page(render(changed(path, lambda inside, key: inside.pop(key)), "out")).text
        assert "How it was made" in text and "nan" not in text and "None" not in text, path


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk)[:20])
def test_every_value_may_be_something_else(quick, junk):
    def replace(inside, key):
        inside[key] = junk

    for path in {path[:2]: path for path in paths(report())}.values():
        assert "How it was made" in Page(render(changed(path, replace), "out")).text, path


EXTREMES = [layer(f"model.layers.{i}.x", error) for i, error in enumerate((1e-300, 1e17, 1e300, 0.0))]


@pytest.mark.parametrize("data", [{}, {"layers": [{}]}, {"layers": EXTREMES}, report(1, 1)], ids=len)
def test_figures_of_little(data):
    assert "How it was made" in Page(render(data, "out")).text


def hostile(data, evil: str, names: bool = False):
    """Every string, and every key that is a name, ends evilly."""
    if isinstance(data, dict):
        named = ("parts", "left_alone", "fallbacks", "versions", "options")
        return {f"{key}{evil}" if names else key: hostile(value, evil, key in named) for key, value in data.items()}
    if isinstance(data, list):
        return [hostile(value, evil) for value in data]
    return f"{data}{evil}" if isinstance(data, str) else data


@pytest.mark.filterwarnings("error")
def test_names_cannot_get_out_of_the_text():
    data = report(layers=2, experts=2)
    data["layers"] += [layer(f"model.layers.{i}.x{evil}", 0.5 + i / 100) for i, evil in enumerate(EVIL)]
    harmless = Page(render(report(layers=2, experts=2), "out"))
    for evil in ("".join(EVIL), None):
        html = render(data if evil is None else hostile(data, evil), f"out{evil}")
        html.encode("utf-8")
        page = Page(html)
        assert {*page.elements} == {*harmless.elements} and {"script", "img", "iframe"}.isdisjoint(page.elements)
        assert {name for name, _ in page.attributes} == {name for name, _ in harmless.attributes}
        assert not [name for name, _ in page.attributes if name.startswith("on")]
        assert "<script>alert(1)</script>" in page.text and "{{ 7 * 7 }}" in page.text and "\u202e" not in html
        assert "\\x1b[31m\\x00\\n\\u202e" in page.text and "\\ud800" in page.text


def test_nothing_is_fetched():
    html = render(report(), "out")
    page = Page(html)
    for name, value in page.attributes:
        if name in ("href", "src", "xlink:href", "srcset", "action", "poster", "data"):
            assert value.startswith(("#", "data:image/png;base64,")), (name, value)
    assert "@import" not in html and {*re.findall(r"url\((.)", html)} <= {"#"}
    assert {"link", "script", "base", "object", "embed"}.isdisjoint(page.elements) and page.elements.count("svg") == 4
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len({*ids})  # of several figures
    targets = [value[1:] for name, value in page.attributes if name == "xlink:href" and value[0] == "#"]
    assert targets and {*targets, *re.findall(r"url\(#([^)]+)", html)} <= {*ids}


def test_kinds_are_told_apart_by_as_little_as_needed():
    names = [
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.experts.3.up_proj",
        "model.layers.0.mlp.shared_expert.up_proj", "visual.blocks.7.self_attn.q_proj", "lm_head", "",
    ]  # fmt: skip
    layers = Facts({"layers": [{"module": name, "name": "x"} for name in names]}).layers
    assert [layer.kind for layer in layers] == [
        "layers.self_attn.q_proj", "layers.self_attn.q_proj", "experts.up_proj", "shared_expert.up_proj",
        "blocks.self_attn.q_proj", "lm_head", "x",
    ]  # fmt: skip
    assert [layer.depth for layer in layers] == [0, 1, 0, 0, 7, None, None]


# What to try


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "source"
    return save_tiny(folder, dtype=torch.bfloat16, hidden_size=128, intermediate_size=256)


def options_of(words: str) -> dict:
    name, value = shlex.split(words)
    return {"--override": {"overrides": [tuple(value.rsplit("=", 1))]}, "--ignore": {"ignore": [value]}}[name]


@pytest.mark.parametrize("scheme", ["W4A16_ASYM-G128", "W2A16-G64", "W8A16-CHANNEL", "W3A16_ASYM-CHANNEL"])
def test_advice_does_what_it_says(bfloat16, scheme, tmp_path):
    """To the module, to nothing else, and for as many bytes."""
    plain = lowbit.quantize(bfloat16, tmp_path / "plain", scheme=scheme)
    (worst,) = Facts(plain.to_dict()).worst(1)
    steps = list(advice(worst, None, worst.weights))
    assert len(steps) == 2
    for number, step in enumerate(steps):
        out = tmp_path / str(number)
        better = lowbit.quantize(bfloat16, out, scheme=scheme, **options_of(step.options))
        entries = {entry["name"]: entry for entry in better.layers}
        others = {entry["name"]: entry for entry in plain.layers if entry["name"] != worst.name}
        assert {name: entries[name] for name in others} == others
        if "--ignore" in step.options:
            assert worst.name in better.left_alone
            continue
        assert entries[worst.name]["scheme"] in step.options and entries[worst.name]["error"] < 0.95 * worst.error
        assert data_bytes(out) - data_bytes(tmp_path / "plain") == step.extra_bytes


def test_advice_for_what_saw_little():
    entry = layer("model.layers.0.mlp.experts.up_proj", 0.2, expert=1, routed=20, note="rtn: singular")
    (worst,) = Facts({"calibration": {"samples": 16}, "layers": [entry]}).worst(1)
    steps = [step.options for step in advice(worst, 16, None)]
    assert steps[:2] == ["--option damping=0.1", "--num-samples 128"] and len(steps) == 4


@pytest.mark.parametrize("evil", EVIL)
def test_advice_can_be_pasted(evil):
    (worst,) = Facts({"layers": [layer(f"model.x{evil}", 0.2)]}).worst(1)
    for step in advice(worst, None, None):
        _, value = shlex.split(step.options)
        pattern, _, scheme = value.rpartition("=")
        assert re.fullmatch(pattern, worst.module) and lowbit.Scheme.parse(scheme)


# Bands


def test_bands_are_those_of_the_measurements():
    rows = read_json(RESULTS / "error_bands.json")["rows"]
    for measure, slope in SLOPES.items():
        found = {}
        for row in rows:
            small = row["kl_mean"] < 1  # beyond it the squares of errors say nothing
            if small and measure in row and (measure == "error") == (row["method"] == "rtn"):
                found.setdefault(row["model"], []).append(row["kl_mean"] / row[measure] ** 2 / row["modules"])
        means = sorted(geometric_mean(slopes) for slopes in found.values())
        assert len(means) == 3
        digits = [float(f"{value:.2g}") for value in (means[0], geometric_mean(means), means[-1])]
        assert [slope.least, slope.usual, slope.most] == digits
    peers = read_json(RESULTS / "quality_peers.json")["rows"]
    growth = sorted(math.log(row["perplexity"] / row["reference_perplexity"]) / row["kl_mean"] for row in peers)
    assert len(growth) == 61 and f"{growth[30]:.2f}" == "0.83"
    assert math.expm1(growth[30] * GOOD_KL) < 0.01 and math.expm1(growth[30] * FAIR_KL) < 0.05


def test_bands():
    good, fair = limits("rounding_error", 100)
    assert 0 < good < fair < 1 and [band(x, good, fair) for x in (0, good, fair, 1)] == ["good", "good", "fair", "bad"]


@pytest.mark.slow
def test_advice_lowers_the_divergence(tmp_path):
    """Real KL divergence, of the embedded model on text that it was not calibrated with: following what is to be tried
    first makes up for half of it and more, for as many bytes as is said."""
    data = {"dataset": "stdlib-train", "num_samples": 8, "seqlen": 128}
    how = {"method": "gptq", "scheme": "W4A16_ASYM-G128", "options": {"sweeps": 0}, **data}
    report = lowbit.quantize("reference", tmp_path / "before", **how)
    steps = advice_by_kind(Facts(report.to_dict()))[:3]
    followed = [pair for step in steps for pair in options_of(step.options)["overrides"]]
    lowbit.quantize("reference", tmp_path / "after", overrides=followed, **how)
    stream = token_stream(load_tokenizer("reference"), "stdlib", 1024)
    reference = lowbit.load("reference", dtype="float32")
    before, after = (
        evaluate(lowbit.load(tmp_path / name, dtype="float32").dequantize(), stream, reference=reference, seqlen=512)
        for name in ("before", "after")
    )
    assert len(followed) == 3 and after.kl_mean < 0.5 * before.kl_mean
    said = sum(step.extra_bytes for step in steps)
    assert data_bytes(tmp_path / "after") - data_bytes(tmp_path / "before") == said


def test_advice_by_kind():
    """What gains most for its bytes first. Kinds of several schemes, of eight bits and of hostile names: none."""
    entries = [layer(f"model.layers.{n}.self_attn.v_proj", 0.03) for n in range(2)]
    entries += [layer(f"model.layers.{n}.mlp.down_proj", 0.03, shape=[256, 2048]) for n in range(2)]
    entries += [layer("model.layers.0.mlp.up_proj", 0.5, scheme="W8A16-G128")]
    entries += [layer("model.layers.0.o_proj", 0.5), layer("model.layers.1.o_proj", 0.5, scheme="W3A16")]
    entries += [layer("model.layers.0.x$(rm)", 0.5)]
    first, second = advice_by_kind(Facts({"calibration": {"samples": 1}, "layers": entries}))
    assert first.options == "--override v_proj=W8A16_ASYM-G128" and second.kind == "down_proj"
    assert first.share == pytest.approx(second.share) and 0 < first.share < 0.01
    assert second.extra_bytes == 4 * first.extra_bytes == 4 * 2 * 256 * 512 * (4 + 4 / 128) / 8
