"""Speculative decoding: a model in few bits drafts tokens, and itself in 8 bits checks several of them at a time.

    python examples/speculative.py [MODEL] [PROMPT]

MODEL is a folder, a Hub id, or `reference`, the small model of Python that comes with lowbit. What comes out is what
the 8-bit model alone would write; whether it comes faster depends on the machine (scripts/benchmarks/speculative.py).
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

import lowbit


def main(model="reference", prompt="def read_lines(path):\n"):
    with tempfile.TemporaryDirectory() as work:
        target, draft = (Path(work) / scheme for scheme in ("W8A16-G128", "W4A16-G128"))
        for folder in (target, draft):
            lowbit.quantize(model, folder, scheme=folder.name)
        tokenizer = AutoTokenizer.from_pretrained(target)
        target, draft = lowbit.load(target), lowbit.load(draft)

        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(target.device)
        for name, options in {
            "alone": {},
            "with a draft of 4 bits": {"assistant_model": draft},
            "with drafts looked up in the prompt": {"prompt_lookup_num_tokens": 8},
        }.items():
            output = target.generate(**inputs, max_new_tokens=64, do_sample=False, **options)
            print(f"--- {name}\n{tokenizer.decode(output[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
