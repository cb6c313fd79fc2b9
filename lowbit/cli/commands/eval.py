"""lowbit eval"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.common import (
    JsonOption,
    ModelArgument,
    ModelOption,
    checked_dtype,
    default_device_map,
    heavy_imports,
    one_model,
)
from lowbit.cli.terminal import console, print_json, progress, table
from lowbit.cli.together import is_first, refuse_together, shared_plan
from lowbit.errors import UsageError
from lowbit.options import DeviceOptions, ShareOptions, SourceOptions, changed, keywords, option


@dataclass(frozen=True)
class TextOptions:
    """The tokens that models are measured on."""

    dataset: str = option(
        "stdlib",
        "A text file, 'stdlib' (held-out Python modules), 'wikitext2', or org/name[:config[:split[:column]]].",
    )
    seqlen: int = option(2048, "Tokens in a window, at most the model's context.", least=2)
    num_tokens: int | None = option(None, "Use the first tokens only.", least=2)


@dataclass(frozen=True)
class TaskOptions:
    """Tasks of lm-evaluation-harness."""

    tasks: str | None = option(None, "Run these tasks of lm-eval instead: hellaswag,arc_easy.")
    task_path: str | None = option(None, "Folder with task files (YAML) that take the place of those of lm-eval.")
    task_limit: int | None = option(None, "So many examples of each task.", least=1)
    task_batch: int = option(1, "Sequences in one forward pass of tasks.", least=1)


def evaluate(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    reference: Annotated[
        str | None, typer.Option(help="Model to compare with: KL divergence and top-1 agreement.", show_default=False)
    ] = None,
    *,
    text: TextOptions,
    device: DeviceOptions,
    share: ShareOptions,
    task: TaskOptions,
    source: SourceOptions,
    save: Annotated[
        bool, typer.Option("--save", help="Record the result in the report of the quantized folder MODEL.")
    ] = False,
    json: JsonOption = False,
):
    """Measure perplexity, and KL divergence to a reference model, on the same tokens.

    With --tasks it is what lm-evaluation-harness makes of it, and of the reference, that is measured.
    With --save the result goes into MODEL/lowbit_report.json, where `lowbit report` and the model card find it.
    """
    name = one_model(model, model_option)
    checked_dtype(device.dtype)
    if task.tasks is not None:
        _run_tasks(name, reference, task, device, source, save, json)
        return
    if changed(task):
        raise UsageError("--task-path, --task-limit and --task-batch are of --tasks: pass that too")
    with heavy_imports():
        from lowbit.checkpoint.report_file import load_report, save_report
        from lowbit.eval import evaluate as measure
        from lowbit.eval.compare import starts_with_bos
        from lowbit.folders.locate import resolve
        from lowbit.generation.stream import load_tokenizer
        from lowbit.system.machine import now
        from lowbit.text.datasets import token_stream

    if save:
        load_report(_own_folder(name))  # what cannot be recorded is said before it is measured
    folder, trust = resolve(name, source.revision), source.trust_remote_code
    _require_text(folder, trust)
    tokenizer = load_tokenizer(folder, trust)
    stream = token_stream(tokenizer, text.dataset, text.num_tokens)
    plan = shared_plan(share.tp_plan)
    loaded = _load(folder, device, plan, trust)
    other = None
    if reference is not None:
        original = resolve(reference)
        _require_text(original, trust)
        other = _load(original, replace(device, backend=None), plan, trust)
    bos = tokenizer.bos_token_id if starts_with_bos(tokenizer) else None
    with progress("evaluating", 1, quiet=json or not is_first()) as advance:
        done = measure(
            loaded, stream, reference=other, seqlen=text.seqlen, bos=bos, on_window=lambda _, total: advance(1 / total)
        )
    if not is_first():
        return
    result = {"reference": reference, "dataset": text.dataset, **done.to_dict()}
    if json:
        print_json({"model": name, **result})
    else:
        _show(name, reference, text.dataset, done)
    if save:
        folder = _own_folder(name)
        save_report(folder, {**load_report(folder), "quality": {**result, "date": now()}})


def _run_tasks(name, reference, task: TaskOptions, device: DeviceOptions, source: SourceOptions, save, json) -> None:
    """The tasks of lm-eval, of the model and of the one that it is compared with."""
    refuse_together("--tasks")
    names = [each.strip() for each in (task.tasks or "").split(",") if each.strip()]
    if not names or save:
        raise UsageError("--save records perplexities, no --tasks" if save else "--tasks is empty: expected names")
    if task.task_path is not None and not Path(task.task_path).is_dir():
        raise UsageError(f"--task-path {task.task_path} is no folder")
    with heavy_imports():
        from lowbit.eval.tasks import harness, run_tasks
        from lowbit.folders.locate import resolve
        from lowbit.generation.stream import load_tokenizer

    harness()  # before a model is loaded
    folder, results = Path(task.task_path) if task.task_path else None, {}
    for which in filter(None, (name, reference)):
        found, trust = resolve(which, source.revision if which == name else None), source.trust_remote_code
        _require_text(found, trust)
        loaded = _load(found, device if which == name else replace(device, backend=None), None, trust)
        tokenizer = load_tokenizer(found, trust)
        results[which] = run_tasks(loaded, tokenizer, names, folder, task.task_limit, task.task_batch)
        del loaded
    if json:
        shown = {"reference": reference, "tasks": results[name]}
        print_json({"model": name, **shown, "reference_tasks": results.get(reference) if reference else None})
        return
    rows = table("", *(Path(which).name for which in results))
    for each, metrics in results[name].items():
        for metric in metrics:
            rows.add_row(f"{each}, {metric}", *(f"{of[each].get(metric, math.nan):.4f}" for of in results.values()))
    console.print(rows)


def _require_text(folder: Path, trust_remote_code: bool) -> None:
    """Raise InputError for a model that does not write text."""
    from lowbit.discovery import require_language_head
    from lowbit.folders.locate import load_config

    require_language_head(load_config(folder, trust_remote_code), folder, trust_remote_code)


def _load(folder: Path, device: DeviceOptions, plan: str | None, trust_remote_code: bool):
    from lowbit.hf import load

    device_map = default_device_map(device.device_map) if plan is None else device.device_map
    placed = {**keywords(device), "device_map": device_map, "tp_plan": plan}
    return load(folder, **placed, trust_remote_code=trust_remote_code)


def _own_folder(name: str) -> Path:
    """The folder that MODEL is. Raises UsageError for one that belongs to the Hub's cache, or to lowbit."""
    from lowbit.folders.locate import REFERENCE

    folder = Path(name).expanduser()
    if name == REFERENCE or not folder.is_dir():
        raise UsageError(f"--save writes into the folder of the model: pass a quantized folder, not {name}")
    return folder


def _show(name: str, reference: str | None, dataset: str, done) -> None:
    rows = table("", *(Path(which).name for which in (name, reference) if which is not None))
    if reference is None:
        rows.add_row("perplexity", f"{done.perplexity:.3f}")
    else:
        rows.add_row("perplexity", f"{done.perplexity:.3f}", f"{done.reference_perplexity:.3f}")
        rows.add_row("mean KL divergence (nats)", f"{done.kl_mean:.5f}", "0")
        rows.add_row("99th percentile KL", f"{done.kl_p99:.5f}", "0")
        rows.add_row("top-1 agreement", f"{done.top1_agreement:.2%}", "100%")
    console.print(rows)
    against = "" if reference is None else f" against {reference}"
    console.print(f"{name}{against}: {done.tokens:,} tokens of {dataset} in windows of {done.seqlen}")
