"""A merged model that is quantized anew, by a method and into schemes that are asked for, or those that it has."""

import re
from collections.abc import Callable

from lowbit.discovery import choose
from lowbit.folders.quantized import QuantizedFolder
from lowbit.merging.task import Task
from lowbit.numerics.scheme import Recipe, Scheme
from lowbit.options import CalibrationOptions, FileOptions, MergeOptions, RunOptions
from lowbit.quantization.run import checked_calibration, quantize_dense
from lowbit.quantizers import checked_options


def recipe_of(how: MergeOptions, stored: QuantizedFolder | None) -> Recipe:
    """What is asked for; without a scheme that of each weight of the quantized model, and W4A16 of a dense one.

    Raises UsageError for a scheme or a method that does not exist.
    """
    method = how.method or "rtn"
    options = checked_options(method, {})
    if how.scheme is not None or stored is None:
        asked = how.scheme or Scheme()
        return Recipe(Scheme.parse(asked) if isinstance(asked, str) else asked, method, options)
    return _as_stored(stored, method, options)


def _as_stored(stored: QuantizedFolder, method: str, options: dict) -> Recipe:
    schemes = {stored.parameter_of(base): weight.scheme for base, weight in stored.stored.weights.items()}
    head = next((schemes[name] for name, site in stored.sites.items() if site.is_head and name in schemes), None)
    usual = Recipe(stored.usual, method, options, lm_head=head, include_vision=True)
    overrides, ignored = {}, []
    for name, (site, scheme) in choose(stored.model, usual)[0].items():
        # not the names that its experts have too: a pattern means what begins with it
        pattern = re.escape(site.module) + "$"
        if name not in schemes:
            ignored.append(pattern)
        elif schemes[name] != scheme:
            overrides[pattern] = schemes[name]
    return Recipe(stored.usual, method, options, overrides, tuple(ignored), head, include_vision=True)


def write_anew(
    task: Task, how: MergeOptions, calibration: CalibrationOptions, announce: Callable[[str], None] | None
) -> str:
    """Quantize the merged model. Returns the format that it is stored in."""
    recipe = recipe_of(how, task.stored)
    data = checked_calibration(recipe, calibration, task.trust_remote_code)
    format = how.format or (task.stored.stored.format if task.stored is not None else None) or FileOptions.format
    files = FileOptions(format, task.output.max_shard_size)
    report, reader = task.report, task.merged.reader

    def on_plan(plan):
        done = task.on_start(len(plan.steps)) if task.on_start else None
        return (lambda step, note: done(note or step.source.name)) if done else None

    run = RunOptions(task.output.overwrite, command=report.command, on_plan=on_plan, announce=announce)
    made = quantize_dense(
        report.source, reader, task.merged.config, task.target, recipe, data, files, run, adapter=report.adapter
    )
    report.requantized = [entry["name"] for entry in made.layers]
    report.output_bytes, report.peak_memory = made.output_bytes, made.peak_memory
    return format
