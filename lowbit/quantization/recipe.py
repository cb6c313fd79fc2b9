"""The recipe that options stand for."""

from dataclasses import replace

from lowbit.errors import UsageError
from lowbit.numerics.scheme import ACTIVATION_RANGES, HEAD_SCHEME, Recipe, Scheme, is_dtype
from lowbit.options import HeadOption, RecipeOptions
from lowbit.quantizers import checked_options


def make_recipe(asked: RecipeOptions, head: HeadOption) -> Recipe:
    """A Recipe from what a user types; raises UsageError for anything that is not allowed."""
    base, wanted = asked.base, head.lm_head
    if is_dtype(base):
        raise UsageError(f"{base} is a dtype, which nothing is quantized to: lowbit.convert_dtype converts to it")
    scheme = Scheme.parse(base) if isinstance(base, str) else base
    grid = {"group_size": asked.group_size, "sym": asked.sym}
    scheme = replace(scheme, **{field: value for field, value in grid.items() if value is not None})
    search = {} if asked.scale_search is None else {"scale_search": asked.scale_search}
    recipe = Recipe(
        scheme,
        asked.method,
        checked_options(asked.method, {**search, **(asked.options or {})}),
        asked.overrides,
        asked.ignore if isinstance(asked.ignore, str) else tuple(asked.ignore),
        Scheme.parse(wanted) if isinstance(wanted, str) else {True: HEAD_SCHEME, False: None}.get(wanted, wanted),
        asked.include_vision,
        asked.smooth,
        asked.activation_range or ACTIVATION_RANGES[0],
        Scheme.parse(asked.embeddings) if isinstance(asked.embeddings, str) else asked.embeddings,
        asked.unclaimed,
    )
    if asked.activation_range is not None and not recipe.is_static:
        raise UsageError(f"activation_range is of static schemes, such as W8A8-STATIC, not of {scheme.name}")
    return recipe
