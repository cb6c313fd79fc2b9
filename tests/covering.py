"""Fewer cases than a full product, with every combination of a few of its values."""

from itertools import combinations, product


def cover(*factors, strength: int = 2) -> list[tuple]:
    """Some cases of the product of `factors`: any `strength` values, each of another factor, meet in one of them.

    A fault that shows for one value, or for `strength` values together, shows in them as it would in all. Values that
    may be at fault only together (bits, group size, symmetry) are one factor, a Scheme. Values are hashable; the choice
    is greedy and always the same."""
    numbers: dict[tuple, int] = {}
    masks = {
        case: sum(1 << numbers.setdefault(part, len(numbers)) for part in combinations(enumerate(case), strength))
        for case in product(*factors)
    }
    order, chosen, left = list(masks), [], (1 << len(numbers)) - 1
    while left:
        chosen.append(max(masks, key=lambda case: (masks[case] & left).bit_count()))
        left &= ~masks.pop(chosen[-1])
    return sorted(chosen, key=order.index)
