"""lowbit plan"""

from collections import Counter
from dataclasses import dataclass

from lowbit.cli.common import (
    HeadFlags,
    JsonOption,
    ModelArgument,
    ModelOption,
    check_known,
    heavy_imports,
    one_model,
    size,
)
from lowbit.cli.dtype import only_converts, preview_dtype
from lowbit.cli.terminal import console, notes, print_json, show_names, table
from lowbit.options import DataOptions, RecipeOptions, SourceOptions, TargetOptions, keywords


def plan(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    *,
    recipe: RecipeOptions,
    head: HeadFlags,
    samples: DataOptions,
    files: TargetOptions,
    source: SourceOptions,
    json: JsonOption = False,
):
    """Show what quantizing a model would give and take, from its headers: nothing is downloaded or written.

    Sizes are exact. Takes the flags of `quantize` that matter to the result. With --json, output_bytes are those of all
    tensors, file_bytes those of the weight files, headers and all: what they take up on a disk. For a budget (--bits
    3.5, --size, --fit, --max-kl) the model is read, and the schemes that are chosen are shown with the KL that they
    come to. With --fit or --context, what running takes is shown too.
    """
    check_known(format=files.format, method=recipe.method)
    options = PlanOptions(recipe, head, samples, files, source)
    preview_any(one_model(model, model_option), options, json)


@dataclass(frozen=True)
class PlanOptions:
    """All that a plan is made from."""

    recipe: RecipeOptions
    head: HeadFlags
    samples: DataOptions
    files: TargetOptions
    source: SourceOptions


def preview_any(name: str, asked: PlanOptions, json: bool) -> None:
    """Print what `lowbit.plan` or `lowbit.plan_dtype` finds, whichever the scheme is of."""
    recipe, files, source = asked.recipe, asked.files, asked.source
    lm_head = asked.head.scheme()
    if only_converts(recipe.base, recipe, asked.head, asked.samples, files):
        preview_dtype(name, recipe.base, json, max_shard_size=files.max_shard_size, revision=source.revision)
    else:
        options = keywords(recipe, asked.samples, files, source)
        preview(name, {**options, "lm_head": lm_head, "announce": notes.print}, json)


def preview(model: str, arguments: dict, json: bool) -> None:
    """Print what `lowbit.plan(model, **arguments)` finds."""
    with heavy_imports():
        from lowbit.quantization.preview import plan as find

    found = find(model, **arguments)
    if json:
        print_json(found.to_dict())
    else:
        _show(found)


def _show(found) -> None:
    rows = table("", "now", "quantized")
    rows.add_row("weights", size(found.source_bytes), size(found.output_bytes))
    rows.add_row("bits per quantized weight", "", f"{found.bits_per_weight:.2f}")
    console.print(rows)
    schemes = Counter(module["scheme"] for module in found.modules)
    parts = ", ".join(f"{count} as {scheme}" for scheme, count in schemes.most_common())
    console.print(f"{len(found.modules)} weight tensors quantized, {found.quantized_share:.1%} of the bytes: {parts}")
    if found.converted:
        console.print(f"{found.converted} of them are converted exactly: the integers of the source, not rounded again")
    if found.allocation:
        show_allocation(found.allocation)
    console.print(
        f"the run: about {_duration(found.seconds)} on this machine, peak memory {size(found.peak_ram_bytes)}, "
        f"disk {size(found.disk_bytes)}"
    )
    if found.memory:
        show_memory(found.memory)
    show_names("other group size, because theirs does not divide in_features:", found.fallbacks)
    show_names("left alone:", found.skipped)
    show_unclaimed(found.unclaimed)
    engines = table("engine", "takes it", "on GPUs", "GPU from", "")
    engines.columns[4].justify = "left"
    for entry in found.engines:
        ranks = [count for count, reason in entry["tensor_parallel"].items() if reason is None]
        engines.add_row(
            f"{entry['engine']} {entry['version']}",
            "yes" if entry["ok"] else "no",
            ", ".join(ranks) or "-",
            f"sm_{entry['compute_capability'].replace('.', '')}" if entry["compute_capability"] else "any",
            entry["reason"] or ", ".join(entry["kernels"]) or entry["note"],
        )
    console.print()
    console.print(engines)


def show_allocation(allocation: dict) -> None:
    """Print what was chosen for a budget: each kind of part and its schemes, the KL, and what one scheme would give."""
    kinds: dict[str, Counter] = {}
    for unit in allocation["units"]:
        kind = unit["name"].rpartition(".")[2]
        kinds.setdefault(kind, Counter())[unit["scheme"]] += 1
    chosen = table("part", "schemes", "KL")
    chosen.columns[1].justify = "left"
    for kind, schemes in kinds.items():
        share = sum(unit["kl"] for unit in allocation["units"] if unit["name"].endswith(f".{kind}"))
        text = ", ".join(f"{count} x {scheme}" for scheme, count in sorted(schemes.items()))
        chosen.add_row(kind, text, f"{share:.4f}")
    console.print(chosen)
    if allocation["fits_dense"]:
        console.print("everything fits dense, as the model is: for this budget nothing has to be quantized")
    judged = len(allocation["judged"])
    chosen_of = f"the best of {judged} allocations" if judged > 1 else "of the only allocation that was judged"
    console.print(
        f"expected mean KL {allocation['predicted_kl']:.3g} nats per token, {chosen_of}, on {allocation['data']}"
    )
    fits = [point for point in allocation["uniform"] if point["bytes"] <= sum(u["bytes"] for u in allocation["units"])]
    if fits:
        best = min(fits, key=lambda point: point["kl"])
        console.print(f"one scheme for all that is no larger: {best['scheme']} with {best['kl']:.4f}")


def show_memory(memory: dict) -> None:
    """Print what running takes, in a line."""
    console.print(
        f"running {memory['batch']} x {memory['context']:,} tokens: peak memory {size(memory['peak'])}: weights "
        f"{size(memory['weights'])}, {memory['kv_cache']} cache {size(memory['cache'])}, working memory "
        f"{size(memory['working'])}"
    )


def show_unclaimed(tensors: dict[str, str]) -> None:
    """How many tensors no module has, and what becomes of them, in a line."""
    if tensors:
        counts = Counter(what.partition(":")[0] for what in tensors.values())
        done = ", ".join(f"{count} {what}" for what, count in counts.most_common())
        console.print(f"{len(tensors)} tensors that no module of the model has: {done} (first: {next(iter(tensors))})")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
