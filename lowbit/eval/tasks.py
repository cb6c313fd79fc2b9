"""Tasks of lm-evaluation-harness, whose `hf` model type takes a model that is loaded."""

import logging
import os
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from lowbit.errors import InputError, first_line


def harness():
    """The package. Raises InputError where it is not installed."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise InputError(f"tasks need {error.name}: pip install 'lowbit[lm-eval]'") from None
    return lm_eval


def run_tasks(
    model, tokenizer, tasks: Sequence[str], folder: Path | None = None, limit: int | None = None, batch: int = 1
) -> dict[str, dict[str, float]]:
    """What the harness finds of a loaded model.

    Args:
        tasks: Names, of the harness or of the YAML files in `folder`.
        folder: Holds tasks that take the place of those of the harness.
        limit: So many examples of each task, None for all.
        batch: Sequences in one forward pass.

    Returns:
        Task -> metric ("acc", "acc_norm", "acc_stderr", ...) -> value.

    Raises:
        InputError: The harness is not installed, or has no such task, or cannot get its data.
    """
    lm_eval = harness()
    with _quiet():
        wrapped = lm_eval.models.huggingface.HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch, device=str(model.device)
        )
        manager = lm_eval.tasks.TaskManager(
            include_path=None if folder is None else str(folder), include_defaults=folder is None
        )
        known = set(manager.all_tasks)
        unknown = [name for name in tasks if name not in known]
        if unknown:
            raise InputError(
                f"there is no task {unknown[0]!r} in {'lm-eval' if folder is None else folder}: "
                f"{', '.join(sorted(known)[:12]) if folder else '`lm-eval ls tasks` lists them'}"
            )
        try:
            found = lm_eval.simple_evaluate(
                model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:  # of data sets, files and templates of tasks
            raise InputError(f"lm-eval cannot run {', '.join(tasks)}: {first_line(error)}") from error
    return {name: _numbers(metrics) for name, metrics in found["results"].items()}


def _numbers(metrics: dict) -> dict[str, float]:
    """Metrics by the names that people know: "acc,none" -> "acc". Those that are no numbers are left out."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and "," in name and value == value
    }


@contextmanager
def _quiet():
    """The harness logs and shows bars whatever it does."""
    before, bars = logging.root.manager.disable, os.environ.get("TQDM_DISABLE")
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        logging.disable(before)
        os.environ.pop("TQDM_DISABLE")
        if bars is not None:
            os.environ["TQDM_DISABLE"] = bars
