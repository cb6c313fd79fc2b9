"""The model card of a quantized folder: metadata that the Hub reads, and a page for people.

The template is `lowbit/assets/model_card.md`. Every number on the page is read from the folder; what is not known there
has no line. All that the template is filled with is data: it becomes plain words where it is written, if no filter made
it something else.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from importlib.resources import files

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from lowbit.folders.allocation import Allocation
from lowbit.guards.escape import Markdown, code_block, code_span, link, markdown, shell, terminal, url
from lowbit.guards.lenient import mapping, number, text
from lowbit.numerics.scheme import PER_CHANNEL
from lowbit.publish.engines import engine_verdicts
from lowbit.publish.facts import QUANTIZED, Facts
from lowbit.publish.private import public_command, without_folders

# Where the base model's own card goes: ours takes its place as README.md
BASE_CARD_NAME = "BASE_MODEL_CARD.md"
_LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "LICENCE.md", "LICENCE.txt", "COPYING")
_LICENCE_KEYS = ("license", "license_name", "license_link")
# key of `lowbit eval` -> (name of the row, decimals, the base model's value or the key that has it)
_QUALITY = {
    "perplexity": ("perplexity", "{:.3f}", "reference_perplexity"),
    "kl_mean": ("mean KL divergence (nats per token)", "{:.5f}", 0),
    "kl_p99": ("99th percentile of the KL divergence", "{:.5f}", 0),
    "top1_agreement": ("the same most likely token", "{:.2%}", 1),
}
_METRICS = {"perplexity": "perplexity", "kl_mean": "kl_divergence"}  # those that go into the metadata, as the Hub says
_SERVE = {"vLLM": "vllm serve", "SGLang": "python -m sglang.launch_server --model-path"}


def model_card(facts: Facts, repo_id: str) -> ModelCard:
    """The card of the repository `repo_id` ("org/name") that `facts` will be published as."""
    template = (files("lowbit") / "assets" / "model_card.md").read_text(encoding="utf-8") + "\n"
    environment = Environment(undefined=StrictUndefined, finalize=_written)
    environment.filters |= {"code": code_span, "block": _bash, "shell": shell, "cells": _cells, "literal": _literal}
    data = Markdown(metadata(facts, repo_id).to_yaml())
    return ModelCard(environment.from_string(template).render(card_data=data, **page(facts, repo_id)))


def _written(value) -> Markdown:
    return value if isinstance(value, Markdown) else markdown(str(value))


def _bash(command: str) -> Markdown:
    return code_block(command, "bash")


def _literal(value: str) -> Markdown:
    """A string of Python, and of JSON."""
    return Markdown(json.dumps(value))


def _cells(row: Iterable) -> Markdown:
    return Markdown(f"| {' | '.join(map(_written, row))} |")


def metadata(facts: Facts, repo_id: str) -> ModelCardData:
    base, card = facts.base_model, facts.card
    return ModelCardData(
        base_model=base,
        base_model_relation=QUANTIZED if base else None,
        library_name="transformers",
        pipeline_tag=_strings(card.get("pipeline_tag")) or _task(facts),
        **licence(facts),
        language=_strings(card.get("language")) or None,
        datasets=_calibration_sets(facts),
        tags=_tags(facts),
        **_eval_results(facts, repo_id),
    )


def page(facts: Facts, repo_id: str) -> dict:
    """What the template is filled with besides the metadata."""
    scheme, base = facts.scheme, facts.base_model
    engines, notes = _engines(facts, repo_id)
    return {
        "repo_id": repo_id,
        "name": repo_id.split("/")[1],
        "chat": ["lowbit", "chat", repo_id],
        "measure": ["lowbit", "eval", repo_id, *(["--reference", base] if base else [])],
        "base": link(base, f"https://huggingface.co/{base}") if base else facts.base_name or "A model",
        "base_card": _base_card(facts),
        "format": facts.summary["format"],
        "scheme": scheme.name,
        "bits": f"{scheme.bits} bits",
        "asymmetric": not scheme.sym,
        "groups": "one scale per output channel" if scheme.group_size == PER_CHANNEL else
                  f"one scale for {scheme.group_size} inputs",
        "budget": _budget(facts),
        "allocation": _allocation(facts),
        "writer": text(facts.report.get("lowbit")),
        "engines": engines,
        "engine_notes": notes,
        "numbers": _numbers(facts),
        "quality": _measured_on(facts),
        "parts": [_part_row(part) for part in facts.summary["parts"]],
        "left_alone": _left_alone(facts),
        "fallbacks": _grouped(mapping(facts.report.get("fallbacks"))),
        "command": public_command(facts.report.get("command"), facts.hub_ids),
        "made": _made(facts),
        "licence": _licence_text(facts),
    }  # fmt: skip


def _budget(facts: Facts) -> str | None:
    """What schemes were chosen for, if they were."""
    asked = mapping(mapping(facts.report.get("allocation")).get("budget"))
    words = {"bits": "{:g} bits for a weight", "size": "{:,.0f} bytes", "max_kl": "a mean KL of {:g}",
             "fit": "{:,.0f} bytes of memory while it runs"}  # fmt: skip
    found = (form.format(value) for key, form in words.items() if (value := number(asked.get(key))) is not None)
    return next(found, None)


def _allocation(facts: Facts) -> dict | None:
    """What was chosen for a budget: rows of parts, and of other budgets and of one scheme for all."""
    found = Allocation(mapping(facts.report.get("allocation")))
    if not found.kinds or found.kl is None:
        return None
    sizes = [("chosen here", found.chosen.bits if found.chosen else None, found.kl)]
    sizes += [("the best for each part", point.bits, point.kl) for point in found.frontier]
    sizes += [(f"{point.scheme} for all", point.bits, point.kl) for point in found.uniform]
    return {
        "parts": [(part, schemes, f"{size:,.0f}", f"{kl:.4f}") for part, schemes, size, kl in found.kinds],
        "frontier": [
            (name, f"{bits:.2f}", f"{kl:.4f}") for name, bits, kl in sorted(sizes, key=lambda row: row[1] or 0) if bits
        ],
    }


def licence(facts: Facts) -> dict[str, str]:
    """license, license_name, license_link: those of the base model, whose terms bind what is made of it."""
    found = {key: value for key in _LICENCE_KEYS if (value := text(facts.card.get(key)))}
    file = next((name for name in _LICENCE_FILES if (facts.folder / name).is_file()), None)
    if not found:
        return {"license": "other", "license_link": file} if file else {}
    where = found.pop("license_link", None)
    if where and url(where):  # of the web, or a file
        missing = "://" not in where and not (facts.folder / where).is_file()
        if missing and facts.base_model and not facts.is_own_card:
            where = f"https://huggingface.co/{facts.base_model}/blob/main/{where}"
        found["license_link"] = where
    return {"license": "other", **found}


def _tags(facts: Facts) -> list[str]:
    """Not the method: on the Hub `gptq` and `awq` are names of file formats."""
    own = ["lowbit", facts.summary["format"], f"{facts.scheme.bits}-bit", facts.scheme.name.split("-")[0].lower()]
    return list(dict.fromkeys([*own, *(_strings(facts.card.get("tags")) or ())]))


def _strings(value) -> str | list[str] | None:
    """What a card says in one word, or in a list of them."""
    if isinstance(value, list | tuple):
        return [terminal(word) for word in value if isinstance(word, str)]
    return text(value) or None


def _task(facts: Facts) -> str | None:
    return "text-generation" if text(facts.summary["architecture"]).endswith("ForCausalLM") else None


def _calibration_sets(facts: Facts) -> list[str] | None:
    """`org/name, split` of a data set on the Hub; files and text of the model's own have no page there."""
    return [facts.calibration_set] if facts.calibration_set else None


def _eval_results(facts: Facts, repo_id: str) -> dict:
    dataset = _dataset(facts) or "unknown"
    measured = {key: number(facts.quality.get(key)) for key in _METRICS}
    results = [
        EvalResult("text-generation", dataset, dataset, metric, measured[key], metric_name=_QUALITY[key][0])
        for key, metric in _METRICS.items() if measured[key] is not None
    ]  # fmt: skip
    return {"model_name": repo_id.split("/")[1], "eval_results": results} if results else {}


def _numbers(facts: Facts) -> list[tuple[str, str, str]]:
    summary, quality, before = facts.summary, facts.quality, number(facts.report.get("source_bytes"))
    rows = [
        ("weights", _size(before) if before else "", _size(summary["bytes"])),
        ("parameters", "", f"{summary['parameters']:,}"),
        ("bits per quantized weight", "", f"{facts.quantized_bits:.2f}"),
    ]
    for key, (name, form, base) in _QUALITY.items():
        reference = number(quality.get(base)) if isinstance(base, str) else base
        measured = number(quality.get(key))
        if measured is not None:
            rows.append((name, "" if reference is None else form.format(reference), form.format(measured)))
    return rows


def _measured_on(facts: Facts) -> str | None:
    if not facts.quality:
        return None
    tokens, seqlen = (number(facts.quality.get(key)) for key in ("tokens", "seqlen"))
    counted = f"{tokens:,.0f} tokens of " if tokens else ""
    windows = f" in windows of {seqlen:.0f}" if seqlen else ""
    return f"{counted}{_dataset(facts) or 'text that is not named'}{windows}"


def _dataset(facts: Facts) -> str:
    """What the quality was measured on."""
    return without_folders(text(facts.quality.get("dataset")), facts.hub_ids)


def _part_row(part: dict) -> tuple[str, ...]:
    return (
        code_span(part["name"]), f"{part['tensors']:,}", f"{part['parameters']:,}", _size(part["bytes"]),
        f"{part['bits_per_weight']:.2f}",
    )  # fmt: skip


def _left_alone(facts: Facts) -> list[dict]:
    """With the reasons of the report; without one, the names that the config says to ignore."""
    if facts.report.get("left_alone") is not None:
        return _grouped(mapping(facts.report["left_alone"]))
    ignored = mapping(facts.config.get("quantization_config")).get("ignore")
    return _grouped(dict.fromkeys(_strings(ignored) or (), "") if isinstance(ignored, list) else {})


def _grouped(names: dict) -> list[dict]:
    """{"name", "count", "what"} of names that differ in numbers only: hundreds of routers are one line."""
    found = Counter((re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), text(what)) for name, what in names.items())
    return [{"name": name, "count": count, "what": what} for (name, what), count in found.items()]


def _engines(facts: Facts, repo_id: str) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """(name, command) of the servers that take these files, and why the others do not."""
    found = [verdict for verdict in engine_verdicts(facts.folder, facts.trust_remote_code) if verdict.engine in _SERVE]
    taken = [(f"{v.engine} ({v.version} or newer)", [*_SERVE[v.engine].split(), repo_id]) for v in found if v.ok]
    return taken, [f"{v.engine} {v.version} does not take it: {v.reason}." for v in found if not v.ok]


def _made(facts: Facts) -> list[tuple[str, str]]:
    report, recipe = facts.report, facts.recipe
    seconds, memory = (number(report.get(key)) for key in ("seconds", "peak_memory"))
    rows = {
        "method": recipe.method if recipe else None,
        "options": _pairs(recipe.options.items()) if recipe else None,
        "other schemes": _pairs((p, s.name) for p, s in recipe.overrides) if recipe else None,
        "calibration": _calibration(facts),
        "source revision": text(report.get("source_revision")),
        "versions": _pairs(mapping(report.get("versions")).items(), " "),
        "machine": text(report.get("machine")),
        "time": f"{seconds:,.1f} s" if seconds else None,
        "peak memory": _size(memory) if memory else None,
        "date": text(report.get("date")),
    }
    return [(name, value) for name, value in rows.items() if value]


def _pairs(items: Iterable[tuple[str, object]], sign: str = " = ") -> str:
    return ", ".join(f"{name}{sign}{value}" for name, value in items)


def _calibration(facts: Facts) -> str:
    used = {key: number(facts.calibration.get(key)) for key in ("samples", "tokens")}
    source = without_folders(text(facts.calibration.get("source")), facts.hub_ids)
    counts = [f"{count:,.0f} {key}" for key, count in used.items() if count]
    return ", ".join([*counts, *([f"from {source}"] if source else [])])


def _base_card(facts: Facts) -> Markdown | None:
    known = facts.base_model or facts.has_base_card
    where = f"https://huggingface.co/{facts.base_model}" if facts.base_model else BASE_CARD_NAME
    return link("the card of the base model", where) if known else None


def _licence_text(facts: Facts) -> Markdown | None:
    found = licence(facts)
    if not found:
        return None
    name = found.get("license_name") or found["license"]
    return link(name, found.get("license_link", ""))


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
