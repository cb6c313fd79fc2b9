"""The model card of a quantized folder: metadata that the Hub reads, and a page for people.

The template is `lowbit/assets/model_card.md`. Every number on the page is read from the folder; what is not known there
has no line.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.resources import files

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lowbit.publish.engines import engine_verdicts
from lowbit.publish.facts import QUANTIZED, Facts, is_hub_id
from lowbit.scheme import PER_CHANNEL

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
    template = (files("lowbit") / "assets" / "model_card.md").read_text(encoding="utf-8")
    return ModelCard.from_template(metadata(facts, repo_id), template_str=template + "\n", **page(facts, repo_id))


def metadata(facts: Facts, repo_id: str) -> ModelCardData:
    base, card = facts.base_model, facts.card
    return ModelCardData(
        base_model=base,
        base_model_relation=QUANTIZED if base else None,
        library_name="transformers",
        pipeline_tag=card.get("pipeline_tag") or _task(facts),
        **licence(facts),
        language=card.get("language"),
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
        "base": f"[{base}](https://huggingface.co/{base})" if base else facts.base_name or "A model",
        "base_id": base,
        "base_card": _base_card(facts),
        "format": facts.summary["format"],
        "scheme": scheme.name,
        "bits": f"{scheme.bits} bits",
        "asymmetric": "" if scheme.sym else " with zero points",
        "groups": "one scale per output channel" if scheme.group_size == PER_CHANNEL else
                  f"one scale for {scheme.group_size} inputs",
        "writer": facts.report.get("lowbit"),
        "engines": engines,
        "engine_notes": notes,
        "numbers": _numbers(facts),
        "quality": _measured_on(facts),
        "parts": [_part_row(part) for part in facts.summary["parts"]],
        "left_alone": _left_alone(facts),
        "fallbacks": _grouped(facts.report.get("fallbacks") or {}),
        "command": facts.report.get("command"),
        "made": _made(facts),
        "licence": _licence_text(facts),
    }  # fmt: skip


def licence(facts: Facts) -> dict[str, str]:
    """license, license_name, license_link: those of the base model, whose terms bind what is made of it."""
    found = {key: facts.card.get(key) for key in _LICENCE_KEYS if facts.card.get(key)}
    file = next((name for name in _LICENCE_FILES if (facts.folder / name).is_file()), None)
    if not found:
        return {"license": "other", "license_link": file} if file else {}
    link = found.get("license_link")
    relative = link and "://" not in link
    if relative and not (facts.folder / link).is_file() and facts.base_model and not facts.is_own_card:
        found["license_link"] = f"https://huggingface.co/{facts.base_model}/blob/main/{link}"
    return found


def _tags(facts: Facts) -> list[str]:
    """Not the method: on the Hub `gptq` and `awq` are names of file formats."""
    own = ["lowbit", facts.summary["format"], f"{facts.scheme.bits}-bit", facts.scheme.name.split("-")[0].lower()]
    return list(dict.fromkeys([*own, *(facts.card.get("tags") or ())]))


def _task(facts: Facts) -> str | None:
    return "text-generation" if facts.summary["architecture"].endswith("ForCausalLM") else None


def _calibration_sets(facts: Facts) -> list[str] | None:
    """`org/name, split` of a data set on the Hub; files and text of the model's own have no page there."""
    source = (facts.report.get("calibration") or {}).get("source") or ""
    name = source.split(",")[0].split(":")[0]
    return [name] if is_hub_id(name) else None


def _eval_results(facts: Facts, repo_id: str) -> dict:
    quality = facts.quality or {}
    dataset = quality.get("dataset", "unknown")
    results = [
        EvalResult("text-generation", dataset, dataset, metric, quality[key], metric_name=_QUALITY[key][0])
        for key, metric in _METRICS.items() if quality.get(key) is not None
    ]  # fmt: skip
    return {"model_name": repo_id.split("/")[1], "eval_results": results} if results else {}


def _numbers(facts: Facts) -> list[tuple[str, str, str]]:
    summary, quality, before = facts.summary, facts.quality or {}, facts.report.get("source_bytes")
    rows = [
        ("weights", _size(before) if before else "", _size(summary["bytes"])),
        ("parameters", "", f"{summary['parameters']:,}"),
        ("bits per quantized weight", "", f"{facts.quantized_bits:.2f}"),
    ]
    for key, (name, form, base) in _QUALITY.items():
        reference = quality.get(base) if isinstance(base, str) else base
        if quality.get(key) is not None:
            rows.append((name, "" if reference is None else form.format(reference), form.format(quality[key])))
    return rows


def _measured_on(facts: Facts) -> str | None:
    quality = facts.quality
    if not quality:
        return None
    tokens = f"{quality['tokens']:,} tokens of " if quality.get("tokens") else ""
    windows = f" in windows of {quality['seqlen']}" if quality.get("seqlen") else ""
    return f"{tokens}{quality.get('dataset', 'text that is not named')}{windows}"


def _part_row(part: dict) -> tuple[str, ...]:
    return (
        f"`{part['name']}`", f"{part['tensors']:,}", f"{part['parameters']:,}", _size(part["bytes"]),
        f"{part['bits_per_weight']:.2f}",
    )  # fmt: skip


def _left_alone(facts: Facts) -> list[str]:
    """With the reasons of the report; without one, the names that the config says to ignore."""
    if facts.report.get("left_alone") is not None:
        return _grouped(facts.report["left_alone"])
    ignored = (facts.config.get("quantization_config") or {}).get("ignore") or ()
    return _grouped(dict.fromkeys(ignored, ""))


def _grouped(names: Mapping[str, str]) -> list[str]:
    """Lines for names that differ in numbers only: hundreds of routers are one line."""
    found = Counter((re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), text) for name, text in names.items())
    return [
        f"`{pattern}`" + (f" ({count})" if count > 1 else "") + (f": {text}" if text else "")
        for (pattern, text), count in found.items()
    ]


def _engines(facts: Facts, repo_id: str) -> tuple[list[tuple[str, str]], list[str]]:
    """(name, command) of the servers that take these files, and why the others do not."""
    found = [verdict for verdict in engine_verdicts(facts.folder, facts.trust_remote_code) if verdict.engine in _SERVE]
    taken = [(f"{v.engine} ({v.version} or newer)", f"{_SERVE[v.engine]} {repo_id}") for v in found if v.ok]
    return taken, [f"{v.engine} {v.version} does not take it: {v.reason}." for v in found if not v.ok]


def _made(facts: Facts) -> list[tuple[str, str]]:
    report, calibration, recipe = facts.report, facts.report.get("calibration") or {}, facts.recipe
    rows = {
        "method": recipe.method if recipe else None,
        "options": _pairs(recipe.options.items()) if recipe else None,
        "other schemes": _pairs((p, s.name) for p, s in recipe.overrides) if recipe else None,
        "calibration": _calibration(calibration),
        "source revision": report.get("source_revision"),
        "versions": _pairs((report.get("versions") or {}).items(), " "),
        "machine": report.get("machine"),
        "time": f"{report['seconds']:,.1f} s" if report.get("seconds") else None,
        "peak memory": _size(report["peak_memory"]) if report.get("peak_memory") else None,
        "date": report.get("date"),
    }
    return [(name, str(value)) for name, value in rows.items() if value]


def _pairs(items: Iterable[tuple[str, object]], sign: str = " = ") -> str:
    return ", ".join(f"{name}{sign}{value}" for name, value in items)


def _calibration(used: dict) -> str | None:
    if not used:
        return None
    counts = [f"{used[key]:,} {key}" for key in ("samples", "tokens") if used.get(key)]
    return ", ".join([*counts, *([f"from {used['source']}"] if used.get("source") else [])])


def _base_card(facts: Facts) -> str | None:
    if facts.base_model:
        return f"https://huggingface.co/{facts.base_model}"
    return BASE_CARD_NAME if facts.has_base_card else None


def _licence_text(facts: Facts) -> str | None:
    found = licence(facts)
    if not found:
        return None
    name = found.get("license_name") or found["license"]
    shown = f"[{name}]({found['license_link']})" if "license_link" in found else name
    return f"That of the base model: {shown}. Quantization changes the weights, not the terms."


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
