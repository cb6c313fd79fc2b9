"""What `quantize` and `plan` do when the scheme is FP16 or BF16: nothing is quantized."""

from contextlib import ExitStack
from pathlib import Path

from lowbit.cli.common import size
from lowbit.cli.options import spelled
from lowbit.cli.terminal import console, print_json, progress, show_names, table
from lowbit.errors import UsageError
from lowbit.options import changed

# Options that go with dtypes too
_OF_EITHER = ("scheme", "max_shard_size")


def only_converts(scheme: object, *groups: object, clamp: bool = False) -> bool:
    """Whether `scheme` is FP16 or BF16. groups: all options that say how to quantize.

    Raises UsageError for an option that goes with the other kind of scheme only.
    """
    from lowbit.numerics.scheme import DTYPE_NAMES, is_dtype

    if not is_dtype(scheme):
        if clamp:
            raise UsageError(f"--clamp goes with --scheme {' or '.join(DTYPE_NAMES)} only: other schemes clamp nothing")
        return False
    for each in changed(*groups):
        if each.name not in _OF_EITHER:
            raise UsageError(f"{spelled(each)} says how to quantize, --scheme {scheme} does not: leave it out")
    return True


def preview_dtype(model: str, scheme: str, json: bool, **options) -> None:
    """Print what `lowbit.plan_dtype` finds."""
    from lowbit.conversion.dtype import plan_dtype

    found = plan_dtype(model, scheme, **options)
    if json:
        print_json(found.to_dict())
    else:
        _show_sizes(found)


def convert_to_dtype(model: str, output_dir: Path, scheme: str, json: bool, **options) -> None:
    """Run `lowbit.convert_dtype`, and print its report."""
    from lowbit.conversion.dtype import convert_dtype

    with ExitStack() as stack:

        def on_plan(planned):
            advance = stack.enter_context(progress("converting", planned.source_bytes, quiet=json))
            return lambda info: advance(info.nbytes, info.name)

        report = convert_dtype(model, output_dir, scheme, on_plan=on_plan, **options)
    if json:
        print_json(report.to_dict())
        return
    _show_sizes(report)
    _show_counts("too large, now the largest of the dtype:", report.clamped)
    _show_counts("too small, now zero:", report.underflowed)
    console.print(f"written to {output_dir}")


def _show_sizes(report) -> None:
    rows = table("", "before", "after")
    rows.add_row("weights", size(report.source_bytes), size(report.output_bytes))
    console.print(rows)
    console.print(f"{report.converted_tensors} tensors converted to {report.dtype}")


def _show_counts(title: str, counts: dict[str, int]) -> None:
    title = f"{title} {sum(counts.values()):,} values in {len(counts)} tensors"
    show_names(title, {name: f"{count:,}" for name, count in counts.items()})
