"""What inputs rounded to 8 bits cost, beside what quantization itself costs: KL divergence per scheme.

    python scripts/benchmarks/int8_inputs.py [--model MODEL TEXT] [--tokens N] [--name RESULT]

Each model is quantized to each scheme by rounding to nearest. "quantization" is KL(unquantized || quantized), inputs as
they are; "inputs" is KL(quantized || quantized with rounded inputs), of all tokens, as in a prompt: decoding alone
rounds nothing. TEXT is what `lowbit eval --dataset` takes. Where the second is below a twentieth of the first,
`lowbit.native.gemm` rounds by default.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from common import save

import lowbit
from lowbit.eval import evaluate
from lowbit.eval.compare import starts_with_bos
from lowbit.folders.locate import resolve
from lowbit.generation.stream import load_tokenizer
from lowbit.layers.inputs import choose_inputs
from lowbit.numerics.scheme import Scheme
from lowbit.text.datasets import token_stream

SCHEMES = [Scheme(bits, group, sym) for bits in (2, 3, 4, 8) for group in (32, 64, 128) for sym in (True, False)]
WINDOW = 512


def measure(model: str, text: str, count: int, schemes: list[Scheme]) -> list[dict]:
    """A row for each scheme that fits the model."""
    folder = resolve(model)
    tokenizer = load_tokenizer(folder)
    stream = token_stream(tokenizer, text, count)
    bos = tokenizer.bos_token_id if starts_with_bos(tokenizer) else None
    dense = lowbit.load(folder, dtype=torch.bfloat16)
    rows = []
    for scheme in schemes:
        with tempfile.TemporaryDirectory() as work:
            try:
                lowbit.quantize(folder, Path(work) / "quantized", scheme=scheme)
            except lowbit.LowbitError as error:
                print(model, scheme.name, error)
                continue
            exact, rounded = (lowbit.load(Path(work) / "quantized", dtype=torch.bfloat16) for _ in range(2))
        choose_inputs(exact, True)
        choose_inputs(rounded, False)
        cost = {
            "quantization": evaluate(exact, stream, reference=dense, seqlen=WINDOW, bos=bos),
            "inputs": evaluate(rounded, stream, reference=exact, seqlen=WINDOW, bos=bos),
        }
        row = {"model": Path(model).name, "scheme": scheme.name, "tokens": cost["inputs"].tokens}
        row |= {f"kl_{name}": quality.kl_mean for name, quality in cost.items()}
        row["share"] = row["kl_inputs"] / row["kl_quantization"]
        row["top1_agreement"] = cost["inputs"].top1_agreement
        print(row, flush=True)
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs=2, action="append", metavar=("MODEL", "TEXT"), default=None)
    parser.add_argument("--schemes", nargs="+", type=Scheme.parse, default=SCHEMES)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--name", default="int8_inputs", help="of the file in results/")
    options = parser.parse_args()
    rows = [
        row
        for given in options.model or [["reference", "stdlib"]]
        for row in measure(*given, options.tokens, options.schemes)
    ]
    save(options.name, {"window": WINDOW, "rows": rows})


if __name__ == "__main__":
    main()
