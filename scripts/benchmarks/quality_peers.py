"""lowbit beside its peers: the same model, calibration tokens and held-out text, evaluated by the same code.

    python scripts/benchmarks/quality_peers.py [--only peers|lowbit] [--schemes W4g128 ...] [--variants SUBSTRING ...]
    python scripts/benchmarks/quality_peers.py --real FOLDER/smollm2-135m [--seed N] ...   # see real_models.py

Everybody quantizes the linear layers of the decoder; what they make of the weights is dequantized to float32, put into
the original model and compared with the original on text that nobody calibrated on. Rows stay in the result file and
are not measured again, unless --again asks for it; rows of another model or other tokens are never mixed in.

The peers need an environment of their own, since what they pin excludes each other and lowbit. To make it:

    python3 -m venv build/peers
    build/peers/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate "setuptools<81" wheel
    echo torch==2.13.0 > build/peers/constraints.txt
    BUILD_CUDA_EXT=0 build/peers/bin/pip install -c build/peers/constraints.txt gptqmodel==7.6.0
    build/peers/bin/pip install -c build/peers/constraints.txt loguru nvidia-ml-py py-cpuinfo
    build/peers/bin/pip install --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.19.0 auto-round==0.16.1
"""

import argparse
import copy
import hashlib
import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from common import RESULTS, ROOT, WORK, facts
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.eval import evaluate
from lowbit.generation.stream import load_tokenizer
from lowbit.text.datasets import token_stream

SCHEMES = {"W4g128": (4, 128), "W4g64": (4, 64), "W4g32": (4, 32), "W3g64": (3, 64), "W2g32": (2, 32)}
SEQLEN = 512
PEER_SCRIPTS = Path(__file__).parent / "peers"
# peer -> its variants, as the scripts in peers/ explain them
PEERS = {
    "gptqmodel": ("sym", "sym+mse", "asym", "asym+mse", "asym+actorder", "asym+actorder+mse", "asym+gptaq",
                  "asym+gptaq+actorder", "asym+gptaq+mse", "asym+foem", "asym+foem+actorder"),
    "llmcompressor": ("sym+minmax", "sym+mse", "sym+imatrix_mse", "asym+minmax", "asym+mse", "asym+imatrix_mse"),
    "autoround": ("sym+rtn", "sym+optrtn", "asym+rtn", "asym+neuqi", "asym+light"),
}  # fmt: skip
# variant -> method and options of lowbit.quantize; the first word says which scheme
LOWBIT = {
    "sym+rtn+minmax": ("rtn", {"scale_search": "minmax"}),
    "sym+rtn+mse": ("rtn", {"scale_search": "mse"}),
    "asym+rtn+minmax": ("rtn", {"scale_search": "minmax"}),
    "asym+rtn+mse": ("rtn", {"scale_search": "mse"}),
    "sym+gptq": ("gptq", {}),
    "asym+gptq": ("gptq", {}),
}
CALIBRATED = ("gptq",)


@dataclass(frozen=True)
class Texts:
    """Text data sets, and how much is taken of them: calibration windows and held-out tokens. schemes: by default."""

    calibration: str
    heldout: str
    samples: int
    tokens: int
    schemes: tuple[str, ...]

    @classmethod
    def beside(cls, model: str) -> "Texts":
        """Those that real_models.py puts beside a model."""
        folder = Path(model).resolve().parent
        schemes = ("W4g64", "W3g64", "W2g32")
        return cls(str(folder / "calibration.txt"), str(folder / "held_out.txt"), 64, 8192, schemes)

    @property
    def names(self) -> list[str]:
        return [Path(text).name for text in (self.calibration, self.heldout)]


EMBEDDED = Texts("stdlib-train", "stdlib", 128, 32_768, ("W4g128", "W4g32", "W3g64", "W2g32"))


def calibration_windows(stream: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """int64 [count, SEQLEN]: one window from a random place of each of `count` equal parts of the stream."""
    random = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    starts = ((torch.arange(count) + random) * ((len(stream) - SEQLEN) / count)).long()
    return torch.stack([stream[start : start + SEQLEN] for start in starts.tolist()])


class Comparison:
    """The original in float32, the tokens, and a model to try weights in."""

    def __init__(self, model: str, texts: Texts, seed: int):
        tokenizer = load_tokenizer(model)
        self.model = model
        self.folder = lowbit.resolve(model)
        self.calibration = calibration_windows(token_stream(tokenizer, texts.calibration), texts.samples, seed)
        self.heldout = token_stream(tokenizer, texts.heldout, texts.tokens)
        self.original = lowbit.load(model, dtype="float32").eval()
        self.trial = copy.deepcopy(self.original)
        self.linears = {
            f"{name}.weight": module.weight
            for name, module in self.trial.named_modules()
            if isinstance(module, torch.nn.Linear) and ".layers." in name
        }

    def digest(self) -> str:
        """What a row depends on, besides the code that made it."""
        digest = hashlib.sha256()
        for tensor in (self.calibration, self.heldout, *self.original.state_dict().values()):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def of_weights(self, weights: dict[str, torch.Tensor]) -> dict:
        """Quality of the original with the decoder's linears replaced: all of them, and nothing else."""
        if weights.keys() != self.linears.keys():
            raise ValueError(f"weights of other layers than expected: {sorted(weights.keys() ^ self.linears.keys())}")
        for name, parameter in self.linears.items():
            parameter.copy_(weights[name])
        return self.of_model(self.trial)

    def of_model(self, model) -> dict:
        return evaluate(model, self.heldout, reference=self.original, seqlen=SEQLEN).to_dict()


def run_peer(peer: str, variant: str, scheme: str, comparison: Comparison, python: str) -> dict:
    """One row, from a process of the peers' environment in a scratch folder (they leave logs behind)."""
    bits, group_size = SCHEMES[scheme]
    with tempfile.TemporaryDirectory() as scratch:
        calibration, output = Path(scratch, "calibration.safetensors"), Path(scratch, "weights.safetensors")
        save_file({"input_ids": comparison.calibration}, calibration)
        command = [python, PEER_SCRIPTS / f"with_{peer}.py", "--model", comparison.folder.resolve(), "--output", output,
                   "--calibration", calibration, "--variant", variant, "--bits", bits,
                   "--group-size", group_size]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run([str(part) for part in command], cwd=scratch, env=environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")  # fmt: skip
        if done.returncode or not output.is_file():
            lines = [line for line in done.stdout.splitlines() if line.strip()]
            return {"error": lines[-1][:300] if lines else f"exit code {done.returncode}"}
        return {**json.loads(output.with_suffix(".json").read_text()), **comparison.of_weights(load_file(output))}


def run_lowbit(variant: str, scheme: str, comparison: Comparison) -> dict:
    bits, group_size = SCHEMES[scheme]
    method, options = LOWBIT[variant]
    arguments = {"dataset": comparison.calibration} if method in CALIBRATED else {}
    name = f"W{bits}A16{'' if variant.startswith('sym') else '_ASYM'}-G{group_size}"
    folder = WORK / "quality_peers" / f"{name}-{variant}"
    started, started_cpu = time.perf_counter(), time.process_time()
    report = lowbit.quantize(
        comparison.model, folder, scheme=name, method=method, options=options, overwrite=True, **arguments
    )
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    return {
        "bits_per_weight": report.bits_per_weight,
        "scale_dtype": scale_dtype(folder),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "versions": {"lowbit": lowbit.__version__, "torch": torch.__version__, "transformers": facts()["transformers"]},
        **comparison.of_model(lowbit.load(folder, dtype="float32")),
    }


def scale_dtype(folder: Path) -> str:
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a file handle, not a dict
                if name.endswith("weight_scale"):
                    return str(tensors.get_tensor(name).dtype).removeprefix("torch.")
    return "none"


def wanted(only: str | None, schemes: list[str], variants: list[str]):
    """(tool, variant, scheme) of each row to measure."""
    tools = {} if only == "lowbit" else dict(PEERS)
    if only != "peers":
        tools["lowbit"] = tuple(LOWBIT)
    for scheme in schemes:
        for tool, names in tools.items():
            for variant in names:
                if not variants or any(part in f"{tool}+{variant}" for part in variants):
                    yield tool, variant, scheme


def read_rows(path: Path) -> dict[tuple[str, str, str], dict]:
    """The rows of a result file by (tool, variant, scheme)."""
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return {(row["tool"], row["variant"], row["scheme"]): row for row in rows}


def table(rows: list[dict], schemes: list[str]) -> str:
    """Mean KL of each variant, schemes side by side."""
    cells = {(row["tool"], row["variant"], row["scheme"]): row.get("kl_mean") for row in rows}
    lines = [f"{'mean KL':40}" + "".join(f"{scheme:>10}" for scheme in schemes)]
    for tool, variant in dict.fromkeys((tool, variant) for tool, variant, _ in cells):
        values = (cells.get((tool, variant, scheme)) for scheme in schemes)
        shown = "".join(f"{'-' if value is None else format(value, '.5f'):>10}" for value in values)
        lines.append(f"{tool + ' ' + variant:40}{shown}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", metavar="MODEL", help="one of real_models.py, with its texts, not the embedded model")
    parser.add_argument("--only", choices=("peers", "lowbit"))
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, help="default: those of its table")
    parser.add_argument("--variants", nargs="+", default=[], metavar="SUBSTRING", help="of TOOL+VARIANT; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows")
    parser.add_argument("--again", action="store_true", help="measure again what is already in the result file")
    parser.add_argument("--peers-python", default=str(ROOT / "build" / "peers" / "bin" / "python"))
    parser.add_argument("--result", help="name of the file in results/, without .json (default: by model and seed)")
    args = parser.parse_args()

    texts = Texts.beside(args.real) if args.real else EMBEDDED
    schemes, name = args.schemes or texts.schemes, f"quality_{Path(args.real).name}" if args.real else "quality_peers"
    args.result = args.result or name + (f"_{args.seed}" if args.seed else "")
    comparison = Comparison(args.real or "reference", texts, args.seed)
    inputs = comparison.digest()
    path = RESULTS / f"{args.result}.json"
    rows = read_rows(path)
    if any(row["inputs"] != inputs for row in rows.values()):
        parser.error(f"{path.name} holds rows of another model, seed or text: remove it, or name another --result")
    for key in wanted(args.only, schemes, args.variants):
        tool, variant, scheme = key
        if key in rows and "error" not in rows[key] and not args.again:
            continue
        if tool == "lowbit":
            measured = run_lowbit(variant, scheme, comparison)
        else:
            measured = run_peer(tool, variant, scheme, comparison, args.peers_python)
        row = {"tool": tool, "variant": variant, "scheme": scheme, **measured,
               "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "inputs": inputs}  # fmt: skip
        print(scheme, tool, variant, measured.get("error") or f"{measured['perplexity']:.3f} {measured['kl_mean']:.5f} "
              f"{measured['seconds']:.0f} s", flush=True)  # fmt: skip
        # after each row, since a run takes hours; read anew, since lowbit may be measured beside the peers
        rows = {**read_rows(path), key: row}
        dataset, heldout = texts.names
        result = {"facts": facts(), "model": Path(args.real or "reference").name, "seed": args.seed,
                  "calibration": [texts.samples, SEQLEN], "dataset": dataset, "heldout": heldout,
                  "heldout_tokens": texts.tokens, "rows": list(rows.values())}  # fmt: skip
        path.write_text(json.dumps(result, indent=2) + "\n")
    print(table(list(rows.values()), schemes))


if __name__ == "__main__":
    main()
