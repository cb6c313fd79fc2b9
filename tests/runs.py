"""Calibrated runs for tests: what they wrote as a dense model, runs that stop midway, runs in other processes."""

import gc
import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import transformers
from folders import contents, read_json, stored_tensors
from models import token_ids
from safetensors.torch import save_file
from transformers import conversion_mapping
from transformers.models.llama import modeling_llama  # noqa: F401  a forked process has it already
from transformers.models.mixtral import modeling_mixtral  # noqa: F401
from weights import matrix

import lowbit
from lowbit.errors import LowbitError
from lowbit.formats.compressed_tensors import unpack_weight
from lowbit.quantization.calibrated.job import Job
from lowbit.quantization.run import quantize

conversion_mapping.get_checkpoint_conversion_mapping("llama")  # compiles what a forked process needs, once
IDS = token_ids(8 * 32).view(8, 32)
LAYERS = 3


def gptq(source, output, **options):
    return quantize(source, output, **{"method": "gptq", "dataset": IDS, "group_size": 16, **options})


def quick_gptq(source, output, **options):
    """Without the refinement, where results only have to be compared with each other."""
    return gptq(source, output, **{**options, "options": {"sweeps": 0, **options.get("options", {})}})


# What was written


def dense_tensors(source: Path, output: Path, report) -> dict[str, torch.Tensor]:
    """The tensors of `source` with those that `output` holds packed replaced by what these stand for, in float64."""
    stored, tensors = stored_tensors(output), stored_tensors(source)
    for name, scheme in {layer["name"]: layer["scheme"] for layer in report.layers}.items():
        fused = tensors[name].ndim == 3  # gpt_oss: all experts, [in, out]
        transposed = fused or read_json(source / "config.json")["model_type"] == "gpt2"
        separator = "_" if fused else "."
        prefix = name.removesuffix(".weight") + separator
        parts = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
        parts = {k if k.startswith("weight_") else f"weight_{k}": v for k, v in parts.items() if k != "bias"}
        experts = [{k: v[e] for k, v in parts.items()} for e in range(len(tensors[name]))] if fused else [parts]
        shape = tensors[name].shape[-2:][:: -1 if transposed else 1]
        dense = [matrix(unpack_weight(expert, lowbit.Scheme.parse(scheme), *shape)) for expert in experts]
        dense = [m.T if transposed else m for m in dense]
        tensors[name] = torch.stack(dense) if fused else dense[0]
    return tensors


def dense_model(source: Path, output: Path, report, folder: Path):
    """`output` as a plain transformers model, loaded by transformers alone."""
    folder.mkdir()
    tensors = dense_tensors(source, output, report)
    save_file({k: v.float().contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    shutil.copyfile(source / "config.json", folder / "config.json")
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def same_codes(first: Path, second: Path) -> float:
    """The share of equal bytes in the packed codes of two outputs."""
    codes = [{k: v for k, v in stored_tensors(f).items() if k.endswith("_packed")} for f in (first, second)]
    assert codes[0].keys() == codes[1].keys() and codes[0]
    return min(float((codes[0][k].view(torch.uint8) == codes[1][k].view(torch.uint8)).float().mean()) for k in codes[0])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def job_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.job")


def state_of(output: Path) -> dict:
    return read_json(job_of(output) / "job.json")


def layer_files(output: Path) -> list[Path]:
    return [job_of(output) / layer["file"] for layer in state_of(output)["layers"]]


# Runs that stop


class Stopped(BaseException):
    """As if the process had ended here."""


def stop_after_layers(monkeypatch, count: int, run) -> None:
    """Call `run`, and leave it when `count` layers are committed and what is not needed any more is removed."""
    drop_streams = Job.drop_streams

    def counted(self, number, rank):
        drop_streams(self, number, rank)
        if number == len(self.layers) == count:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(Job, "drop_streams", counted)
        try:
            run()
        except Stopped:
            return
    raise AssertionError(f"the run ended before {count} layers were committed")


# Runs in processes of their own, forked from one that has imported everything

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__])


def start(target, *args):
    """A process that calls target(*args), a function of a module of these tests."""
    with pytest.MonkeyPatch.context() as patched:  # the server imports before it is told where from
        patched.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        forkserver.ensure_running()
    process = FORKED.Process(target=_main, args=(target, *args), daemon=True)
    process.start()
    return process


def _main(target, *args) -> None:
    """The exit code of `lowbit` for what `target` raises."""
    torch.set_num_threads(1)
    gc.freeze()  # what the server imported: see conftest.py
    try:
        target(*args)
    except LowbitError as error:
        print(f"lowbit: error: {error}", flush=True)
        os._exit(error.exit_code)
    except BaseException:
        traceback.print_exc()
        os._exit(70)
    os._exit(0)


def run_and_tell(told, source, output, options) -> None:
    """Leaves its report, or its error, in the file `told`."""
    try:
        told.write_text(json.dumps(gptq(source, output, **options).to_dict()))
    except Exception as error:
        told.write_text(json.dumps({"error": type(error).__name__, "message": str(error)}))
        raise


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def start_ranks(source, output, world: int = 2, function=run_and_tell, **options) -> list:
    """A process per rank, each calls function(told, source, output, options): told is rank-N.json beside the output."""
    port = free_port()
    return [start(_rank, rank, world, port, function, source, output, options) for rank in range(world)]


def _rank(rank, world, port, function, source, output, options) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )  # fmt: skip
    function(output.with_name(f"rank-{rank}.json"), source, output, options)


def ended(processes, timeout: float = 600) -> list[int]:
    """Exit codes. The timeout, on all of them together, only keeps a hang from lasting for ever."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def told_by_ranks(output: Path, world: int = 2) -> list[dict]:
    """What the ranks left, taken away."""
    told = []
    for rank in range(world):
        path = output.with_name(f"rank-{rank}.json")
        told.append(read_json(path))
        path.unlink()
    return told


def assert_finished(output: Path, expected: dict[str, bytes], beside=()) -> None:
    """The output is `expected` to the byte, and nothing of the work is left beside it."""
    assert contents(output) == expected
    assert names(output.parent) == sorted([output.name, *beside])
