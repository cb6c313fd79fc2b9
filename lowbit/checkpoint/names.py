"""Names of the tensors that quantizing a stored one gives."""


def output_name(source: str, suffix: str) -> str:
    """`x.weight` -> `x.weight_packed`; a fused parameter `x.gate_up_proj` -> `x.gate_up_proj_packed`."""
    base = source.removesuffix(".weight")
    return f"{base}.{suffix}" if base != source else source + suffix.removeprefix("weight")
