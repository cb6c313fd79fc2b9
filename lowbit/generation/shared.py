"""Generation with a model that several processes share: all of them make the same steps, and the first one decides."""

import random
from collections.abc import Callable

from lowbit.errors import UsageError
from lowbit.parallel import ranks_of

OnToken = Callable[[list[int]], bool | None]


def check_shared(model, compile: bool, draft) -> None:
    """Raises UsageError for what a shared model cannot do."""
    if ranks_of(model) is None:
        return
    if compile:
        raise UsageError("compile does not go with tp_plan: the step waits for other processes")
    if draft is not None:
        raise UsageError("drafts do not go with tp_plan: each process would draft for itself")


def in_step(model, seed: int | None, on_token: OnToken | None) -> tuple[int | None, OnToken | None]:
    """The seed and what is called with tokens, such that all processes sample the same and end together."""
    ranks = ranks_of(model)
    if ranks is None:
        return seed, on_token
    seed = ranks.of_first(lambda: random.getrandbits(63) if seed is None else seed)
    if not ranks.of_first(lambda: on_token is not None):
        return seed, None

    def decided(tokens: list[int]) -> bool:
        return ranks.of_first(lambda: bool(on_token is not None and on_token(tokens)))

    return seed, decided
