"""What the peers' scripts share: their command line, the calibration tokens they read and the files they hand back.

They run in the peers' own environment (quality_peers.py says how to make it) and import nothing of lowbit:

    python PEER.py --model DIR --calibration FILE --bits 4 --group-size 128 --variant asym+mse --output FILE

FILE of --calibration: safetensors with int64 `input_ids` [samples, length]. --output gets the dequantized weights in
float32 by parameter name, and beside it, with .json for a suffix, what is known about the run. --batch-size (8) is how
many samples calibrate at once.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from safetensors.torch import load_file, save_file


@dataclass
class Job:
    """One run: what to quantize, how (`options` are the parts of the variant's name), and where the result goes."""

    model: str
    tokens: torch.Tensor
    bits: int
    group_size: int
    options: list[str]
    output: Path
    batch_size: int

    @property
    def sym(self) -> bool:
        return "asym" not in self.options


def read_job() -> Job:
    parser = argparse.ArgumentParser()
    for name in ("model", "calibration", "variant", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    tokens = load_file(args.calibration)["input_ids"]
    options, output = args.variant.split("+"), Path(args.output)
    return Job(args.model, tokens, args.bits, args.group_size, options, output, args.batch_size)


class Stopwatch:
    """Wall and processor seconds of a `with` block: calibration and quantization, without imports and loading."""

    def __enter__(self):
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self._wall
        self.cpu_seconds = time.process_time() - self._cpu


def load_float32(model: str):
    """The model in float32: calibration is exact, and on a CPU without bf16 instructions fast."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def decoder_linears(model) -> dict[str, torch.nn.Linear]:
    """What everybody quantizes: the linear layers of the decoder, without embeddings and output head."""
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}


def hand_back(
    job: Job,
    weights: dict[str, torch.Tensor],
    watch: Stopwatch,
    package: str,
    scale_dtype: torch.dtype,
    zero_bits: int | None = None,
) -> None:
    """weights: dequantized, by the name of the parameter. package: the peer's, on PyPI. zero_bits: of a zero point as
    stored (default: `bits` when asymmetric, none when symmetric)."""
    weights = {name: weight.detach().to(torch.float32).contiguous().clone() for name, weight in weights.items()}
    save_file(weights, job.output)
    if zero_bits is None:
        zero_bits = 0 if job.sym else job.bits
    facts = {
        "bits_per_weight": job.bits + (scale_dtype.itemsize * 8 + zero_bits) / job.group_size,
        "scale_dtype": str(scale_dtype).removeprefix("torch."),
        "seconds": round(watch.seconds, 2),
        "cpu_seconds": round(watch.cpu_seconds, 2),
        "versions": {name: version(name) for name in (package, "torch", "transformers")},
    }
    job.output.with_suffix(".json").write_text(json.dumps(facts))
