"""One product for the linears of a module that share an input: q, k and v, gate and up, whatever else a model has.

Which ones do is seen in one forward pass of two tokens, not told by their names. Their weights are laid out as one for
the backend; rows of a quantized weight do not depend on each other, so that this changes no bit of them. The linears
stay the modules they were: the first that is called multiplies for all, and the others take their part of the result.
"""

import logging
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from lowbit.backends import get_backend
from lowbit.discovery.shared_inputs import SharedInputs, module_calls, with_versions
from lowbit.errors import first_line
from lowbit.layers.linear import LowbitLinear
from lowbit.layers.workspace import Workspace
from lowbit.numerics.qweight import QuantWeight
from lowbit.torch_api import version_of

logger = logging.getLogger("lowbit")


def share_products(model: nn.Module, workspace: Workspace | None = None) -> list["SharedProduct"]:
    """Fuse linears that read the same input (q/k/v, gate/up) into one matrix product.

    Call it before `prepare`: a fused weight is packed once then, instead of once alone and once fused.

    Returns:
        The fused products.
    """
    made = []
    for parent, linears in _with_one_input(model):
        product = SharedProduct(linears)
        if product.join(workspace):
            product.serve(parent)
            made.append(product)
    return made


def _with_one_input(model: nn.Module) -> list[tuple[nn.Module, list[LowbitLinear]]]:
    """(module, linears of it that took the very same tensors and can be laid out as one), two of them or more."""
    owners = {
        linear: parent
        for parent in model.modules()
        for linear in parent.children()
        if isinstance(linear, LowbitLinear) and linear.shared is None
    }
    alike = defaultdict(list)
    for linear, inputs in _inputs_of(model, owners).items():
        alike[owners[linear], inputs, _form(linear)].append(linear)
    return [(parent, linears) for (parent, *_), linears in alike.items() if len(linears) > 1]


def _inputs_of(model: nn.Module, linears: Collection[LowbitLinear]) -> dict[LowbitLinear, tuple]:
    """The inputs of each linear, call by call, when the model runs on two tokens. Nothing is multiplied: only who takes
    what counts. Empty, with the reason logged, for a model that does not run on token ids alone."""
    if not linears:
        return {}
    inputs = SharedInputs()
    found: dict[LowbitLinear, tuple] = defaultdict(tuple)

    def seen(linear: nn.Module, x: torch.Tensor) -> None:
        # the same object too, not a view of it: that is how `SharedProduct.take` knows the input of the last call
        found[linear] += ((inputs.number_of(x), id(x)),)

    ids = {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=model.device)}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = ids["input_ids"]
    try:
        for linear in linears:
            linear.multiply = partial(_nothing, linear.out_features)
        with with_versions(), module_calls(linears, seen), _without_logits(model):
            model(**ids)
    except Exception as error:  # whatever it wanted: it runs as it did before
        logger.info("linears that share an input multiply on their own: the model does not run on two token ids: %s",
                    first_line(error))  # fmt: skip
        return {}
    finally:
        for linear in linears:
            linear.__dict__.pop("multiply", None)
    return found


@contextmanager
def _without_logits(model: nn.Module) -> Iterator[None]:
    """The output embedding, where it is dense, multiplies by nothing: it is the largest matrix, and no linear comes
    after it."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head):  # a hook of accelerate, say
        yield
        return
    head.forward = partial(_nothing, head.out_features)
    try:
        yield
    finally:
        del head.forward


def _nothing(out_features: int, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_zeros(*x.shape[:-1], out_features)


def _form(linear: LowbitLinear) -> tuple:
    """What linears must have in common to be laid out as one, but for the order of their inputs."""
    if linear.backend is None:
        state = "packed", linear.best_backend(), linear.weight_scale.dtype, "weight_g_idx" in linear.packed_shapes
    else:
        state = "prepared", linear.backend, linear.dtype, linear.order is not None
    return *state, linear.device, linear.scheme, linear.in_features, linear.bias is None


def _input_grid(weight: QuantWeight) -> tuple[float, int | None]:
    return weight.input_scale.item(), None if weight.input_zero is None else weight.input_zero.item()


class SharedProduct:
    """x W^T of several linears with one input: W has the rows of all of them, member after member.

    Joined, every member holds the same buffers, those of W, and `take` gives it its part of the product. The product is
    kept for the other members while their module runs, no longer, and belongs to one tensor in one state: what a hook
    has changed in place is multiplied anew. Split, each has its own weight, as before; that is how members move to
    another device or load a state, and when all have arrived they join again.
    """

    def __init__(self, members: list[LowbitLinear]):
        self.members = tuple(members)
        self.joined = self.running = False
        self.kept: tuple | None = None

    def serve(self, parent: nn.Module) -> None:
        """parent: the module whose forward calls the members."""
        parent.register_forward_pre_hook(self._enter)
        parent.register_forward_hook(self._leave, always_call=True)

    def _enter(self, *_) -> None:
        self.running, self.kept = True, None

    def _leave(self, *_) -> None:
        self.running, self.kept = False, None

    def join(self, workspace: Workspace | None = None) -> bool:
        """Whether the members are laid out as one, which needs them to be alike."""
        if self.joined:
            return True
        if len({_form(member) for member in self.members}) > 1:
            return False
        first = self.members[0]
        name = first.backend or first.best_backend()
        shape = sum(member.out_features for member in self.members), first.in_features
        workspace = workspace or Workspace()
        codes = workspace.codes(shape, first.device) if first.backend is None else None
        weights, orders = zip(*(weight.in_group_order() for weight in self._weights(codes)), strict=True)
        if orders[0] is not None and not all(torch.equal(orders[0], order) for order in orders):
            return False
        if first.scheme.is_static and len({_input_grid(weight) for weight in weights}) > 1:
            return False
        if get_backend(name).refuse(first.scheme, first.device, weights[0].scales.dtype, shape) is not None:
            return False
        whole = QuantWeight.concatenated(weights, codes if orders[0] is None else None)
        buffers = workspace.prepare(name, whole)
        start = 0
        for member in self.members:
            member.lay_out(name, buffers, orders[0], shape, start)
            start += member.out_features
        self.joined = True
        for member in self.members:
            member.shared = self
        return True

    def _weights(self, codes: torch.Tensor | None) -> list[QuantWeight]:
        """Those of the members. codes: [all out_features, in_features], where their codes are put."""
        if codes is None:
            return [member.quantized_weight() for member in self.members]
        parts = codes.split([member.out_features for member in self.members])
        return [member.quantized_weight(part) for member, part in zip(self.members, parts, strict=True)]

    def split(self) -> None:
        """Give each member its own weight back."""
        if self.joined:
            self.joined, self.kept = False, None
            for member in self.members:
                qweight, order = member.quantized_weight().in_group_order()
                member.lay_out(member.backend, get_backend(member.backend).prepare(qweight), order)

    def take(self, member: LowbitLinear, x: torch.Tensor) -> torch.Tensor:
        """The product [..., member.out_features] of x [..., in_features]."""
        state = _state(x)
        if self.kept is not None and self.kept[0] is x and self.kept[1] == state and member.start in self.kept[3]:
            _, _, y, waiting = self.kept
        else:
            y, waiting = member.multiply(x, self._bias()), tuple(other.start for other in self.members)
        waiting = tuple(start for start in waiting if start != member.start)
        self.kept = (x, state, y, waiting) if waiting and self.running else None
        return y[..., member.start : member.start + member.out_features].contiguous()

    def _bias(self) -> torch.Tensor | None:
        # not kept: biases are parameters, that may be trained
        return None if self.members[0].bias is None else torch.cat([member.bias for member in self.members])


def _state(x: torch.Tensor) -> tuple:
    """What must not have changed for a product with x to be that of the next call with x."""
    # A graph of torch.compile and tensors of inference mode have no versions: there it counts that the forward of the
    # module was seen not to change its input between the calls
    if torch.compiler.is_compiling():
        return (torch.is_grad_enabled(),)
    version = None if x.is_inference() else version_of(x)
    return version, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
