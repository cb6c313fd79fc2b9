"""A model of which one decoder layer is in memory at a time.

The model runs itself: it embeds tokens, makes masks and positions, and calls its layers with whatever arguments its
authors chose. Only the layers are stepped into: all but one hand the hidden states through, that one gets the hidden
states of our choice, and the pass ends behind it. So no architecture's calling convention is written down here.
"""

import copy
import threading

import torch
from torch import nn

from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.checked import read_checked
from lowbit.discovery import CheckpointNames, decoder_layers, skeleton
from lowbit.errors import InputError, LowbitError, first_line
from lowbit.transformers_api import load_tensors


class _Through(BaseException):
    """Carries the output of the layer out of the model's forward; nothing that catches Exception may stop it."""

    def __init__(self, output):
        self.output = output


class LayeredModel:
    """model: its modules; parameters of layers are on the meta device unless loaded. names: checkpoint -> parameters.

    token_ids: the tokens that will be run, for which alone input embeddings are kept.
    """

    def __init__(
        self, config, reader: CheckpointReader, token_ids: torch.Tensor, dtype, device, trust_remote_code=False
    ):
        from accelerate import init_empty_weights

        # parameters on meta, buffers real: rotary frequencies and the like are computed, not stored
        with init_empty_weights(include_buffers=False):
            self.model = skeleton(config, trust_remote_code, dtype=dtype, device=None)
        self.model.eval()
        self.model.set_experts_implementation("eager")
        self.dtype, self.device, self.reader = dtype, torch.device(device), reader
        self.names = CheckpointNames(self.model)
        for module in self.model.modules():
            for name, buffer in [*module.named_buffers(recurse=False)]:
                setattr(module, name, buffer.to(device))
        self.prefix, _ = decoder_layers(self.model)
        self._tensors_of: dict[int | None, list[str]] = {}
        for name in reader.tensors:
            parameter, _ = self.names.locate(name)
            self._tensors_of.setdefault(self.layer_of(parameter), []).append(name)
        self._load_outside(token_ids)
        self._enter_layers()

    def twin(self) -> "LayeredModel":
        """Another one that shares what is loaded; its layers are its own."""
        made = copy.copy(self)
        shared = {id(p): p for p in self.model.parameters() if not p.is_meta}
        for layer in self.layers:
            del layer.forward
        made.model = copy.deepcopy(self.model, shared)
        self._enter_layers()
        made._enter_layers()
        return made

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.get_submodule(self.prefix)

    def layer_of(self, parameter: str) -> int | None:
        """Number of the decoder layer that a parameter or module belongs to, None outside of them."""
        if not parameter.startswith(f"{self.prefix}."):
            return None
        return int(parameter[len(self.prefix) + 1 :].partition(".")[0])

    def is_head(self, parameter: str) -> bool:
        return self._head is not None and parameter.startswith(self._head)

    def tensors_of(self, number: int) -> list[str]:
        """Checkpoint names of the tensors of a layer; number = len(layers): of the output embedding."""
        if number < len(self.layers):
            return self._tensors_of.get(number, [])
        return [name for name in self._tensors_of.get(None, ()) if self.is_head(self.names.locate(name)[0])]

    def load(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        self._load(tensors)
        self._require_loaded(self._prefix_of(number))

    def _prefix_of(self, number: int) -> str:
        return f"{self.prefix}.{number}." if number < len(self.layers) else self._head

    def unload(self, number: int) -> None:
        for module in self.model.get_submodule(self._prefix_of(number).removesuffix(".")).modules():
            for name, parameter in [*module.named_parameters(recurse=False)]:
                setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def run(self, number: int, input_ids: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        """Output [B, T, H] of layer `number` for hidden states [B, T, H]; None: those that the model itself embeds.

        number = len(layers): what the head makes of the hidden states.
        """
        self._local.number, self._local.hidden = number, None if hidden is None else hidden.to(self.device)
        try:
            return self.model(input_ids=input_ids.to(self.device), use_cache=False).logits
        except _Through as through:
            return through.output

    def _enter_layers(self) -> None:
        self._local = threading.local()  # forward passes of several threads are under way at a time
        self._outputs: int | None = None  # length of the tuple that a layer returns, None for a tensor: learned
        for number, layer in enumerate(self.layers):
            layer.forward = self._forward_of(number, layer.forward)

    def _forward_of(self, number: int, original):
        def forward(*args, **kwargs):
            hidden = self._local.hidden
            if hidden is None:
                hidden = args[0] if args else kwargs["hidden_states"]
            if number < self._local.number:
                return self._handed_through(hidden)
            if args:
                output = original(hidden, *args[1:], **kwargs)
            else:
                output = original(**{**kwargs, "hidden_states": hidden})
            self._outputs = len(output) if isinstance(output, tuple) else None
            raise _Through(output[0] if isinstance(output, tuple) else output)

        return forward

    def _handed_through(self, hidden):
        return hidden if self._outputs is None else (hidden, *[None] * (self._outputs - 1))

    def _load_outside(self, token_ids: torch.Tensor) -> None:
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        modules = {module: name for name, module in self.model.named_modules()}
        rows = f"{modules[embedding]}.weight" if isinstance(embedding, nn.Embedding) else None
        self._head = f"{modules[head]}." if head in modules else None
        tensors = {}
        for name in self._tensors_of.get(None, ()):
            tensor = read_checked(self.reader, name)  # all of it: nothing would be noticed before all layers are done
            parameter, direct = self.names.locate(name)
            if parameter == rows and direct:
                _keep_rows(embedding, self.reader, name, token_ids.unique(), self.dtype, self.device)
            elif not self.is_head(parameter):
                tensors[name] = tensor
        self._load(tensors)
        self._require_loaded("", but=(f"{self.prefix}.", self._head or "no head"))

    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        """What from_pretrained does with a state dict: renaming, merging experts, casting."""
        # a tensor that needs no cast would become the parameter itself, and parameters are changed in place
        own = {name: t.clone() if t.dtype == self.dtype else t for name, t in tensors.items()}
        try:
            failed, mismatched = load_tensors(self.model, own, self.dtype, self.device)
        except LowbitError:
            raise
        except Exception as error:
            raise InputError(f"transformers cannot load {next(iter(tensors), '')}: {first_line(error)}") from error
        for name, what in failed.items():
            raise InputError(f"transformers cannot load {name}: {what.strip().splitlines()[-1]}")
        for name, found, expected in mismatched:
            raise InputError(f"{name} has shape {list(found)}, the model's config says {list(expected)}")

    def _require_loaded(self, prefix: str, but: tuple[str, ...] = ()) -> None:
        for name, parameter in self.model.named_parameters():
            if name.startswith(prefix) and not name.startswith(but) and parameter.is_meta:
                raise InputError(
                    f"{name} is not in {self.reader.folder}: the checkpoint is not whole, or of another config"
                )


def _keep_rows(embedding: nn.Embedding, reader: CheckpointReader, name: str, ids, dtype, device) -> None:
    """Give an embedding only the rows of the tokens `ids` (sorted), and translate what it is called with."""
    rows = reader.rows(name, ids.tolist()).to(device, dtype)
    embedding.weight = nn.Parameter(rows, requires_grad=False)
    embedding.padding_idx = None  # it names a row that may not be there, and matters to gradients only
    ids = ids.to(device)
    embedding.register_forward_pre_hook(lambda module, args: (torch.searchsorted(ids, args[0]), *args[1:]))
