"""GPTQ, W4 with groups of 128, of lowbit and of llm-compressor: time and peak memory on the same machine in one run.

    python scripts/benchmarks/gptq_speed.py [--only NAME ...] [--layers N]

Random bf16 checkpoint with the shapes of Llama-3.2-1B, 16 x 512 random tokens. Each side is a process of its own that
reads the checkpoint, quantizes and writes; imports are not counted. llm-compressor calibrates in float32, which on a
CPU without bf16 instructions is several times faster than bf16, and in its sequential pipeline, its most frugal one.
lowbit does the same work first, the algorithm of the paper with min-max grids; `lowbit_default` is what it does unless
told otherwise, with a second stream, searched grids and a sweep of refinement. Runs of part of the layers are printed
and not kept. The peers' environment: see quality_peers.py.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import ROOT, WORK, llama_1b, save
from safetensors.torch import load_file, save_file

SAMPLES, SEQLEN, LAYERS = 16, 512, 16
BITS, GROUP_SIZE = 4, 128
SCHEME = f"W{BITS}A16_ASYM-G{GROUP_SIZE}"
# What lowbit is told to do
OPTIONS = {"lowbit": {"drift": 0, "scale_search": "minmax", "sweeps": 0}, "lowbit_default": {}}
SIDES = ("llmcompressor", *OPTIONS)
PEER_SCRIPT = Path(__file__).parent / "peers" / "speed_llmcompressor.py"


def make_checkpoint(layers: int) -> Path:
    """The 1B shapes, or the first `layers` layers of them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    whole = llama_1b()
    if layers == LAYERS:
        return whole
    folder = WORK / f"llama-3.2-1b-shapes-{layers}"
    if not (folder / "model.safetensors").is_file():
        config = AutoConfig.from_pretrained(whole)
        config.num_hidden_layers = layers
        AutoModelForCausalLM.from_pretrained(whole, config=config, dtype="auto").save_pretrained(folder)
    return folder


def make_tokens(folder: Path) -> Path:
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokens = torch.randint(vocabulary, (SAMPLES, SEQLEN), generator=torch.Generator().manual_seed(0))
    path = WORK / "gptq_speed.safetensors"
    save_file({"input_ids": tokens}, path)
    return path


def lowbit_once(source: str, calibration: str, output: str, name: str) -> None:
    """In a process of its own: print seconds and peak memory as JSON."""
    import lowbit

    tokens = load_file(calibration)["input_ids"]
    # start-up, importing transformers and the model's code, is not what is measured
    lowbit.quantize(source, output, scheme=SCHEME, dry_run=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    report = lowbit.quantize(source, output, scheme=SCHEME, method="gptq", dataset=tokens, overwrite=True,
                             options=OPTIONS[name])  # fmt: skip
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "peak_bytes": peak * 1024, "start_up_bytes": before * 1024,
                      "output_bytes": report.output_bytes, "threads": torch.get_num_threads()}))  # fmt: skip


def run_lowbit(source: Path, calibration: Path, name: str) -> dict:
    output = WORK / "gptq_speed-lowbit"
    command = [sys.executable, __file__, "--once", source, calibration, output, name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(output)
    return json.loads(done.stdout.splitlines()[-1])


def run_llmcompressor(source: Path, calibration: Path, python: str, batch_size: int) -> dict:
    output = WORK / "gptq_speed-llmcompressor"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, PEER_SCRIPT, "--model", source, "--calibration", calibration, "--output", output,
               "--bits", str(BITS), "--group-size", str(GROUP_SIZE), "--variant", "asym+minmax",
               "--batch-size", str(batch_size)]  # fmt: skip
    # its progress bars go to stderr and are left to be seen: this takes minutes
    subprocess.run(command, check=True, env=environment, cwd=WORK, stdout=subprocess.DEVNULL)
    shutil.rmtree(output)
    facts = output.with_suffix(".json")
    result = json.loads(facts.read_text())
    facts.unlink()
    return result


def main():
    if sys.argv[1:2] == ["--once"]:
        lowbit_once(*sys.argv[2:])
        return
    if sys.argv[1:2] == ["--make"]:
        print(make_checkpoint(int(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer, to try it")
    parser.add_argument("--batch-size", type=int, default=8, help="of llm-compressor's calibration")
    parser.add_argument("--peers-python", default=str(ROOT / "build" / "peers" / "bin" / "python"))
    args = parser.parse_args()

    # elsewhere: a process that once held the model hands its peak down to the processes it starts
    making = [sys.executable, __file__, "--make", str(args.layers)]
    source = Path(subprocess.run(making, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    calibration = make_tokens(source)
    result = {"model": f"Llama-3.2-1B shapes, {args.layers} layers, random bf16", "scheme": SCHEME,
              "calibration": [SAMPLES, SEQLEN]}  # fmt: skip
    for side in args.only:
        if side == "llmcompressor":
            result[side] = run_llmcompressor(source, calibration, args.peers_python, args.batch_size)
        else:
            result[side] = run_lowbit(source, calibration, side)
        print(json.dumps({side: result[side]}, indent=2), flush=True)
    if args.layers == LAYERS and {"llmcompressor", "lowbit"} <= set(args.only):
        save("gptq_speed", result)


if __name__ == "__main__":
    main()
