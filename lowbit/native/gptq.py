"""The loops of GPTQ over the columns of a group, as gptq.c runs them: `lowbit.quantizers.gptq_loops` defines them.

All tensors are float32 on the CPU; those that are not contiguous are copied. Needs the library.
"""

import torch

from lowbit.native.build import library

# The longest group: its targets stay in a processor's caches
LONGEST = 512


def columns(
    target: torch.Tensor, feedback: torch.Tensor, costs: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor,
    levels: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Round the columns of a group one after the other, each corrected for the errors of those before it.

    Args:
        target: [g, N], of at most `LONGEST` columns.
        feedback: M of `Factor`, [g, g]; only what is above the diagonal is read.
        costs: [g].
        scales, zeros: The candidates, [C, N].
        levels: Codes are below it.

    Returns:
        Of the cheapest candidate of each row: codes [g, N], scales [N], zeros [N], cost [N].
    """
    (length, rows), threads, kernels = target.shape, torch.get_num_threads(), library()
    given = [tensor.contiguous() for tensor in (target, feedback.T, costs, scales, zeros)]
    made = target.new_empty(length, rows), *(target.new_empty(rows) for _ in range(3))
    scratch = torch.empty(kernels.lowbit_round_scratch(length, threads), dtype=torch.uint8)
    target, feedback, costs, *grids = (tensor.data_ptr() for tensor in given)
    outputs = (tensor.data_ptr() for tensor in made)
    kernels.lowbit_round_columns(
        target, length, rows, feedback, costs, *grids, len(scales), levels, *outputs, threads, scratch.data_ptr()
    )
    return made


def descend(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, descent: torch.Tensor, hessian: torch.Tensor,
    levels: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Move each code to its best value while all others stay, one column after the other.

    Args:
        codes: [g, N].
        scales, zeros: The grid, [N].
        descent: Half the negated gradient, [g, N].
        hessian: [g, g].
        levels: Codes are below it.

    Returns:
        Codes [g, N]; by how much that moved their values, [g, N]; what it takes off the objective, [N].
    """
    length, rows = codes.shape
    given = [tensor.contiguous() for tensor in (codes, scales, zeros, descent, hessian)]
    made = torch.empty_like(given[0]), torch.empty_like(given[0]), torch.empty_like(given[1])
    first, *others = (tensor.data_ptr() for tensor in given)
    outputs = (tensor.data_ptr() for tensor in made)
    library().lowbit_descend(first, length, rows, *others, levels, *outputs, torch.get_num_threads())
    return made
