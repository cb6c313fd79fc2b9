"""A layer of the model in memory, for as long as it is looked at."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lowbit.checkpoint.checked import read_checked
from lowbit.quantization.calibrated.model import LayeredModel
from lowbit.quantization.calibrated.targets import Target, targets
from lowbit.quantization.plan import Step


@contextmanager
def loaded(model: LayeredModel, number: int, steps: list[Step]) -> Iterator[dict[str, list[Target]]]:
    """Have decoder layer `number` in memory; one behind the last: the output embedding.

    Yields:
        Parameter -> the matrices of `steps` in it.
    """
    tensors = {name: read_checked(model.reader, name) for name in model.tensors_of(number)}
    tied = None if tensors or number < len(model.layers) else _tied_head(model)
    if tensors:
        model.load(number, tensors)
    try:
        yield targets(steps, tensors, model.names, model.model)
    finally:
        if tensors:
            model.unload(number)
        if tied is not None:
            tied.weight = nn.Parameter(tied.weight.to("meta"), requires_grad=False)


def _tied_head(model: LayeredModel) -> nn.Module:
    """The output embedding, with the rows of the input embedding, which it shares."""
    names = {module: name for name, module in model.model.named_modules()}
    embedding = f"{names[model.model.get_input_embeddings()]}.weight"
    stored = next(name for name in model.reader.tensors if model.names.locate(name)[0] == embedding)
    head = model.model.get_output_embeddings()
    weight = read_checked(model.reader, stored).to(model.device, model.dtype)
    head.weight = nn.Parameter(weight, requires_grad=False)
    return head
