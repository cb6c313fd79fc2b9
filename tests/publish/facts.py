"""What a base model says of itself in its card, and a run in its report."""

from lowbit.numerics.scheme import Recipe, Scheme

BASE_CARD = """---
license: other
license_name: acme-1
license_link: LICENSE.txt
language: [en]
tags: [chat]
pipeline_tag: text-generation
base_model: acme/Tiny-Pretrained
---
# Tiny

Knows little.
"""
REPORT = {
    "lowbit": "0.1.0",
    "date": "2026-11-30",
    "source": "acme/Tiny",
    "source_revision": "0123abcd",
    "recipe": Recipe(Scheme(4, 32), "gptq", {"damping": "0.05"}).to_dict(),
    "format": "compressed-tensors",
    "command": "lowbit quantize acme/Tiny -o tiny --method gptq",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "machine": "a machine, 2 threads",
    "seconds": 83.4,
    "peak_memory": 1_250_000_000,
    "source_bytes": 2_470_000_000,
    "output_bytes": 1_030_000_000,
    "parameters": 134_464,
    "bits_per_weight": 4.5,
    "quantized_share": 0.83,
    "left_alone": {
        "lm_head.weight": "output embedding",
        "model.layers.0.mlp.gate.weight": "router",
        "model.layers.1.mlp.gate.weight": "router",
    },
    "fallbacks": {"model.layers.0.mlp.down_proj.weight": "W4A16-G16"},
    "calibration": {"source": "NeelNanda/pile-10k, train", "samples": 16, "tokens": 32768},
    "layers": [],
    "quality": {
        "dataset": "wikitext2", "tokens": 4000, "perplexity": 18.2341, "reference_perplexity": 17.7,
        "kl_mean": 0.01384, "kl_p99": 0.1, "top1_agreement": 0.923,
    },
}  # fmt: skip
