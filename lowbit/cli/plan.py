"""lowbit plan"""

from collections import Counter

from lowbit.cli.common import (
    JsonOption,
    LmHeadOption,
    LmHeadSchemeOption,
    ModelArgument,
    ModelOption,
    RevisionOption,
    ShardSizeOption,
    TrustOption,
    check_known,
    one_model,
    quiet_transformers,
    size,
)
from lowbit.cli.dtype import only_converts, preview_dtype
from lowbit.cli.recipe import (
    ActivationRangeOption,
    BitsOption,
    FormatOption,
    GroupSizeOption,
    IgnoreOption,
    IncludeVisionOption,
    MethodOption,
    MethodOptionsOption,
    NumSamplesOption,
    OverrideOption,
    ScaleSearchOption,
    SchemeOption,
    SeqlenOption,
    SmoothOption,
    SymOption,
    recipe_arguments,
)
from lowbit.cli.terminal import console, print_json, show_names, table


def plan(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    scheme: SchemeOption = None,
    bits: BitsOption = None,
    group_size: GroupSizeOption = None,
    sym: SymOption = None,
    method: MethodOption = "rtn",
    scale_search: ScaleSearchOption = None,
    option: MethodOptionsOption = None,
    num_samples: NumSamplesOption = 128,
    seqlen: SeqlenOption = 2048,
    lm_head: LmHeadOption = False,
    lm_head_scheme: LmHeadSchemeOption = None,
    include_vision: IncludeVisionOption = False,
    smooth: SmoothOption = None,
    activation_range: ActivationRangeOption = None,
    override: OverrideOption = None,
    ignore: IgnoreOption = None,
    format: FormatOption = "compressed-tensors",
    max_shard_size: ShardSizeOption = "5GB",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
):
    """Show what quantizing a model would give and take, from its headers: nothing is downloaded or written.

    Sizes are exact. Takes the flags of `quantize` that matter to the result. With --json, output_bytes are those of all
    tensors, file_bytes those of the weight files, headers and all: what they take up on a disk.
    """
    check_known(format=format, method=method)
    recipe = recipe_arguments(
        scheme, bits, group_size, sym, method, scale_search, option, override, ignore, lm_head, lm_head_scheme,
        include_vision, smooth, activation_range,
    )  # fmt: skip
    name, files = one_model(model, model_option), {"max_shard_size": max_shard_size, "revision": revision}
    options = {"num_samples": num_samples, "seqlen": seqlen, "format": format}
    if only_converts(**recipe, **options):
        preview_dtype(name, scheme, json, **files)
    else:
        preview(name, {**recipe, **options, **files, "trust_remote_code": trust_remote_code}, json)


def preview(model: str, arguments: dict, json: bool) -> None:
    """Print what `lowbit.plan(model, **arguments)` finds."""
    from lowbit.quantization.preview import plan as find

    quiet_transformers()
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
    console.print(
        f"the run: about {_duration(found.seconds)} on this machine, peak memory {size(found.peak_ram_bytes)}, "
        f"disk {size(found.disk_bytes)}"
    )
    show_names("other group size, because theirs does not divide in_features:", found.fallbacks)
    show_names("left alone:", found.skipped)
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


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
