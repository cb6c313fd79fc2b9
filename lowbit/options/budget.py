"""Options that name a size or a quality, to which a scheme is chosen for each part of a model."""

from dataclasses import dataclass

from lowbit.errors import UsageError
from lowbit.options.keywords import changed, option
from lowbit.options.recipe import RecipeOptions

# What else says how a weight is stored, and so cannot be said beside a budget
_OF_ONE_SCHEME = ("scheme", "group_size", "sym", "smooth", "activation_range")


@dataclass(frozen=True)
class BudgetOptions:
    """What a model may take up, or lose."""

    size: str | int | None = option(
        None,
        "Bytes of all weight files at most, or 4.2GB: a scheme for each part of the model is chosen, for the least KL.",
        typed=str | None,
    )
    max_kl: float | None = option(
        None,
        "Mean KL to the model at most, in nats per token, on text like the data set: schemes are chosen, for the least "
        "size.",
    )
    engine: str | None = option(
        None, "Of schemes chosen by budget: only those that vllm, sglang, transformers, gptqmodel, llama.cpp or mlx takes."
    )


def asks_for_budget(recipe: RecipeOptions, budget: BudgetOptions) -> bool:
    """Whether a scheme is to be chosen for each part of a model.

    Raises:
        UsageError: Several budgets, options that do not go with one, or an engine without.
    """
    average = recipe.average_bits is not None
    given = [name for name, value in (("--size", budget.size), ("--max-kl", budget.max_kl)) if value is not None]
    given += [f"--bits {recipe.bits}"] if average else []
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are two budgets: pass one of them")
    if not given:
        if budget.engine is not None:
            raise UsageError("--engine says which schemes a budget may choose: pass --bits 3.5, --size or --max-kl too")
        return False
    if recipe.bits is not None and not average:
        raise UsageError(f"{given[0]} chooses the bits of each part: leave --bits {recipe.bits} out")
    for each in changed(recipe):
        if each.name in _OF_ONE_SCHEME:
            raise UsageError(f"{given[0]} chooses a scheme for each part: leave --{each.name.replace('_', '-')} out")
    if budget.max_kl is not None and not 0 < budget.max_kl < float("inf"):
        raise UsageError(f"max_kl is {budget.max_kl!r}; expected a number above 0, in nats per token")
    return True
