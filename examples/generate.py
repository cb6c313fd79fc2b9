"""Quantize a model, load it on lowbit's kernels, and complete a prompt.

    python examples/generate.py [MODEL] [PROMPT]

MODEL is a folder, a Hub id, or `reference`, the small model of Python that comes with lowbit.
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

import lowbit


def main(model="reference", prompt="def read_lines(path):\n"):
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "quantized"
        report = lowbit.quantize(model, folder, scheme="W4A16-G128")
        print(f"{report.source_bytes / 1e6:.1f} MB -> {report.output_bytes / 1e6:.1f} MB", file=sys.stderr)

        # both are plain transformers objects: everything that works on those works here
        quantized = lowbit.load(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)

        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(quantized.device)
        output = quantized.generate(**inputs, max_new_tokens=64, do_sample=False)
        print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
