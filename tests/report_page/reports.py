"""A report as a calibrated run of a small mixture of experts leaves it, without the run."""

SCHEME = "W4A16_ASYM-G128"
KINDS = {"self_attn.q_proj": 0.021, "self_attn.o_proj": 0.034, "mlp.down_proj": 0.087}


def layer(module: str, error: float, **others) -> dict:
    return {
        "name": f"{module}.weight", "module": module, "kind": module.rpartition(".")[2], "scheme": SCHEME,
        "shape": [256, 512], "source_bytes": 262144, "bytes": 68000, "error": 3 * error, "tokens": 4096,
        "damping": 0.03, "objective": {"gptq": error * error}, "seconds": 0.25, "note": "",
        "output_error": 1.05 * error, "output_error_to_original": 1.1 * error, "rounding_error": error, **others,
    }  # fmt: skip


def report(layers: int = 4, experts: int = 6) -> dict:
    entries = []
    for depth in range(layers):
        grown = 1 + depth / 7.3
        entries += [layer(f"model.layers.{depth}.{kind}", error * grown) for kind, error in KINDS.items()]
        for expert in range(experts):
            routed = 90 + 400 * expert * (depth + 1)
            note = f"cold expert: {routed} tokens of its own, topped up" if routed < 256 else ""
            module = f"model.layers.{depth}.mlp.experts.gate_up_proj"
            entries.append(layer(module, 0.051 * grown + expert / 487, expert=expert, routed=routed, note=note))
    return {
        "lowbit": "0.1.0", "date": "2026-11-23 08:09 UTC", "source": "org/Model-8B", "source_revision": "0123abcdef",
        "recipe": {
            "scheme": {"bits": 4, "group_size": 128, "sym": False}, "method": "gptq", "options": {"damping": 0.03},
            "overrides": [[".*o_proj", {"bits": 8, "group_size": 128, "sym": True}]], "ignore": [], "lm_head": False,
        },
        "format": "compressed-tensors", "command": "lowbit quantize org/Model-8B -o Model-8B-W4A16 --method gptq",
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "lowbit": "0.1.0"}, "machine": "AMD EPYC, 2 threads",
        "seconds": 4321.0, "peak_memory": 654_960_000, "expected_peak": 700_000_000, "source_bytes": 8_918_528,
        "output_bytes": 3_097_648, "parameters": 4_459_264, "quantized_tensors": len(entries),
        "quantized_share": 0.8817957, "bits_per_weight": 4.157389,
        "left_alone": {"lm_head.weight": "output embedding"},
        "fallbacks": {"model.layers.0.mlp.down_proj.weight": "W4A16_ASYM-G64"},
        "parts": {
            "embed_tokens": {"source_bytes": 1_048_576, "bytes": 1_048_576},
            "gate_up_proj": {"source_bytes": 6_291_456, "bytes": 1_632_000},
        },
        "calibration": {"source": "stdlib-train", "samples": 16, "tokens": 4096},
        "layers": entries,
        "decoder_layers": [{"layer": depth, "output_error": 0.02 + depth / 100} for depth in range(layers)],
        "quality": {
            "dataset": "stdlib", "reference": "org/Model-8B", "date": "2026-11-23 09:00 UTC", "tokens": 16352,
            "seqlen": 512, "perplexity": 16.6160888, "reference_perplexity": 16.4418179, "kl_mean": 0.0127899,
            "kl_p99": 0.0753394, "top1_agreement": 0.9250244,
        },
    }  # fmt: skip
