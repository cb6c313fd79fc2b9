"""Every text-writing architecture of the installed transformers: tiny, random, through the whole round of lowbit.

    python scripts/benchmarks/architectures.py [MODEL_TYPE ...]

Round: quantize (W4, groups of 32) -> load -> generate -> save -> load, beside the model of the dequantized weights and
the one quantized while loading. One line for each; all of them go to results/architectures.json, also those that
transformers cannot build from a small config, with its reason. Each runs in a process of its own.
"""

import argparse
import multiprocessing
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from common import ROOT, save
from transformers.utils import logging

sys.path[:0] = [str(ROOT), str(ROOT / "triton_kernels"), str(ROOT / "tests")]

from rounds import round_trip  # noqa: E402
from tiny import model_types, tiny_model_that_runs  # noqa: E402

_SECONDS = 300
_LEAST_SHARE = 0.95


def go(task: str, model_type: str) -> dict:
    """status: "ok", "failed", or "not built" where transformers does not build or run a small one."""
    row = {"model_type": model_type, "task": task}
    try:
        model, inputs = tiny_model_that_runs(task, model_type)
    except Exception as error:
        return {**row, "status": "not built", "reason": _line(error)}
    row["architecture"] = type(model).__name__
    try:
        with tempfile.TemporaryDirectory() as folder:
            facts = round_trip(task, model, inputs, Path(folder))
    except RuntimeError as error:
        return {**row, "status": "failed", "reason": _line(error)}
    if facts["share"] < _LEAST_SHARE:
        return {**row, "status": "failed", "reason": f"{facts['share']:.1%} of the weights are quantized", **facts}
    return {**row, "status": "ok", **facts}


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:240]


def _send(connection, task: str, model_type: str) -> None:
    connection.send(go(task, model_type))


def isolated(task: str, model_type: str) -> dict:
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(False)
    process = context.Process(target=_send, args=(sending, task, model_type))
    process.start()
    sending.close()
    try:
        reason = f"no answer in {_SECONDS} s"
        if receiving.poll(_SECONDS):
            return receiving.recv()
    except EOFError:
        reason = "the process died"
    finally:
        process.kill()
        process.join()
    return {"model_type": model_type, "task": task, "status": "failed", "reason": reason}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_type", nargs="*", help="only these; nothing is written then")
    only = parser.parse_args().model_type
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # a process that has threads is not safe to fork
    go("AutoModelForCausalLM", "llama")  # what everyone imports is imported once
    wanted = [(task, name) for task, name in model_types() if not only or name in only]
    rows = []
    for number, (task, name) in enumerate(wanted, 1):
        rows.append(isolated(task, name))
        row = rows[-1]
        print(f"{number}/{len(wanted)} {row['status']:9} {task} {name} {row.get('reason', '')}", flush=True)
    print(f"{sum(row['status'] == 'ok' for row in rows)} of {len(rows)}")
    if not only:
        write(rows)


def write(rows: list[dict]) -> None:
    classes = {s: {r.get("architecture") for r in rows if r["status"] == s} - {None} for s in ("ok", "failed")}
    counts = {
        "model_types": len(rows),
        "built": sum(row["status"] != "not built" for row in rows),
        "ok": sum(row["status"] == "ok" for row in rows),
        "architectures": len(classes["ok"] | classes["failed"]),
        "architectures_ok": len(classes["ok"] - classes["failed"]),
    }
    save("architectures", {**counts, "rows": rows})


if __name__ == "__main__":
    main()
