"""The processes of one run: one alone, or several under `torchrun` / `accelerate launch`.

Calibrated quantization divides its samples over the ranks, sums second moments, and divides the rows of each weight
again: rows are quantized independently of each other. Tensor parallelism divides the weights.
"""

import atexit
import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from lowbit.errors import OutputError

# One process may sample text or write the checkpoint while the others wait
_LONGEST_WAIT = timedelta(days=7)


class Ranks:
    """rank of this process, world: how many there are. Alone, every method gives back what it was given."""

    def __init__(self):
        self.rank, self.world = 0, 1
        self._owned = False
        if dist.is_available() and (dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1):
            if not dist.is_initialized():
                # objects and counts are summed on the CPU, second moments where they are
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_LONGEST_WAIT
                )
                self._owned = True
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # what is gathered as objects goes there

    @classmethod
    def alone(cls) -> "Ranks":
        """One process, however many were started."""
        made = cls.__new__(cls)
        made.rank, made.world, made._owned = 0, 1, False
        return made

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this process computes: a GPU of its own where there are some."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())

    def share_of(self, count: int) -> slice:
        """The contiguous part of `count` things that is this rank's."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def sum(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over the ranks, in place."""
        if self.world > 1:
            with _others_alive():
                dist.all_reduce(tensor)

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks, the same bits on each of them. Half precision is summed in float32 on
        CPUs, where it is not faster than that."""
        wide = tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16)
        total = tensor.float() if wide else tensor.contiguous()
        self.sum(total)
        return total.to(tensor.dtype)

    def joined(self, tensor: torch.Tensor) -> torch.Tensor:
        """[..., n] of each rank, alike -> [..., n * world], in the order of ranks."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.world)]
        with _others_alive():
            dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, -1)

    def all_of(self, mine):
        """What each rank has, in the order of ranks."""
        if self.world == 1:
            return [mine]
        gathered = [None] * self.world
        with _others_alive():
            dist.all_gather_object(gathered, mine)
        return gathered

    def of_first(self, make):
        """What `make()` returns on the first rank, on every rank. An error there is raised everywhere."""
        if self.world == 1:
            return make()
        outcome = [None, None]
        if self.first:
            try:
                outcome = [make(), None]
            except Exception as error:
                outcome = [None, error]
        with _others_alive():
            dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def wait(self) -> None:
        if self.world > 1:
            with _others_alive():
                dist.barrier()

    def stay(self) -> None:
        """The group is left as it is until this process ends: a model needs it."""
        if self._owned:
            self._owned = False
            atexit.register(dist.destroy_process_group)

    def close(self) -> None:
        if self._owned:
            dist.destroy_process_group()


def ranks_of(model) -> Ranks | None:
    """The processes that share the weights of a model, None for one that is whole in each process."""
    return getattr(model, "lowbit_ranks", None)


@contextmanager
def _others_alive():
    """Turns the error that torch raises when another process of the group has died into one line: that process has
    printed why."""
    try:
        yield
    except RuntimeError as error:
        raise OutputError(
            "another process of this run has ended: what it printed says why, nothing if it was killed"
        ) from error
