"""What engines care about, found in the model: which linears they merge into one, and which side of a matrix tensor
parallelism divides."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import torch
from torch import nn

from lowbit.discovery import CheckpointNames, Site, find_sites, heads_in
from lowbit.discovery.shared_inputs import Products, SharedInputs, with_versions
from lowbit.numerics.scheme import Scheme
from lowbit.serving.rules import COLUMN, ROW, Module
from lowbit.transformers_api import generic_name, tensor_parallel_plan, tied_weights
from lowbit.upstream import MissingNameError

logger = logging.getLogger("lowbit")


def fused_units(model: nn.Module, sites: Mapping[str, Site]) -> list[tuple[str, ...]]:
    """Names of the modules that engines merge: linears of one parent that multiply the same input (query, key and
    value; gate and up), in the order of their use, and what the experts of a layer consist of.

    model: of `discovery.skeleton`, in bfloat16 on the meta device, where a forward pass runs. Where a model cannot run
    without numbers, what lies behind that point is not seen.
    """
    linears = {site.module: model.get_parameter(name) for name, site in sites.items() if site.kind == "linear"}
    inputs = SharedInputs()
    units: dict[tuple, list[str]] = {}

    def seen(name: str, x: torch.Tensor) -> None:
        unit = units.setdefault((inputs.number_of(x), _parent(name)), [])
        if name not in unit:
            unit.append(name)

    # a model without numbers, or without its pictures, fails anywhere
    with with_versions(), suppress(Exception), Products(linears, seen):
        model(torch.zeros(1, 2, dtype=torch.long, device="meta"))
    for site in sites.values():
        if site.kind == "experts":
            units.setdefault(("experts", _parent(site.module)), []).append(site.module)
    return [tuple(names) for names in units.values() if len(names) > 1]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _plan(model: nn.Module) -> dict[str, str]:
    try:
        return {generic_name(name): style for name, style in tensor_parallel_plan(model).items()}
    except MissingNameError as error:
        logger.warning("how linears are split over GPUs is guessed, as in Megatron-LM: %s", error)
        return {}


def splits(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, str | None]:
    """Module name -> COLUMN, ROW or None, from the tensor parallel plan of transformers. Where a parent has no linear
    in the plan: its last one by rows, those before it by columns (Megatron-LM)."""
    plan = {
        name: COLUMN if "colwise" in style else ROW
        for name, style in _plan(model).items()
        if "colwise" in style or "rowwise" in style
    }
    found: dict[str, str | None] = {}
    parents: dict[str, list[str]] = {}
    for site in sites.values():
        if site.kind == "embedding":
            continue  # a part of its rows is on each rank, and no product is made of it
        found[site.module] = plan.get(generic_name(site.module))
        parents.setdefault(_parent(site.module), []).append(site.module)
    for names in parents.values():
        if len(names) > 1 and not any(found[name] for name in names):
            found.update(dict.fromkeys(names[:-1], COLUMN) | {names[-1]: ROW})
    return found


def modules_of(model: nn.Module, chosen: Mapping[str, tuple[Site, Scheme]]) -> dict[str, Module]:
    """What `discovery.choose` has chosen, as engines see it: module name -> Module. model: of `discovery.skeleton`."""
    names, ties = CheckpointNames(model), tied_weights(model)
    tied = {*ties, *ties.values()}
    split, plan = splits(model, find_sites(model)), _plan(model)
    modules = {}
    for name, (site, scheme) in chosen.items():
        side = split.get(site.module)
        module = Module(
            scheme, site.out_features, site.in_features, split=side, planned=generic_name(site.module) in plan,
            heads=heads_in(model, site, outputs=side == COLUMN) if side else 0,
        )  # fmt: skip
        if site.kind == "embedding":
            module = replace(module, embedding=True, tied=name in tied)
        if site.kind == "experts":
            module = replace(module, expert=True, merged=names.merged(name), fused=not names.by_expert(name))
        modules[site.module] = module
    return modules
