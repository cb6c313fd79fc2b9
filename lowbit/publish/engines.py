"""Which engines take a quantized folder as it is stored: the table of `lowbit.serving` held against its weights."""

from dataclasses import replace
from pathlib import Path

from lowbit.discovery import find_sites
from lowbit.errors import InputError
from lowbit.folders.quantized import QuantizedFolder
from lowbit.serving import Verdict, fused_units, modules_of, verdicts


def engine_verdicts(folder: Path, trust_remote_code: bool = False) -> list[Verdict]:
    """Of each engine that reads the format; none for a model that needs code of its author,
    unless that is trusted."""
    try:
        opened = QuantizedFolder(folder, trust_remote_code=trust_remote_code)
    except InputError:
        return []
    stored = {base: weight for base, weight in opened.stored.weights.items() if opened.site(base)}
    chosen = {opened.site(base).parameter: (opened.site(base), weight.scheme) for base, weight in stored.items()}
    scattered = {opened.site(base).module for base, weight in stored.items() if weight.act_order}
    modules = {
        name: replace(module, act_order=name in scattered)
        for name, module in modules_of(opened.model, chosen).items()
    }  # fmt: skip
    sites = find_sites(opened.model)
    left = [site.module for parameter, site in sites.items() if parameter not in chosen]
    dtype = str(opened.model.dtype).removeprefix("torch.")
    return verdicts(opened.stored.format, modules, left, fused_units(opened.model, sites), dtype)
