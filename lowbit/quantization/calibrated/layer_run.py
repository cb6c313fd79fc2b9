"""The forward passes of one decoder layer over all samples, and what arrives at its stages."""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lowbit.calibration.staged_pass import Stage, StagedPass, find_stages
from lowbit.quantization.calibrated.model import LayeredModel
from lowbit.quantization.calibrated.streams import NoStreams, Streams, StreamsWriter


class LayerRun:
    """Layer `number` of the loaded `models` (quantized, original) or (quantized,), over the samples of this rank.

    batches: int64 [B, T] token ids each. keep: leave every forward pass open between stages; otherwise each stage
    begins anew at the start of the layer, in less memory and about twice the time.
    """

    def __init__(
        self,
        models: tuple[LayeredModel, ...],
        number: int,
        batches: list[torch.Tensor],
        streams: Streams | NoStreams,
        keep: bool,
    ):
        self.models, self.quantized, self.number = models, models[0], number
        self.batches, self.streams, self.keep = batches, streams, keep
        self._passes: dict[int, list[StagedPass]] = {}
        self._stages: list[Stage] = []
        self._parameters: list[str] = []
        self._hooks: list[RemovableHandle] = []

    def find_stages(self, parameters: list[str]) -> list[Stage]:
        """The stages of the layer, seen on one sample."""
        hidden = self._hidden(self.quantized, self.streams.read(0)[0])
        hidden = None if hidden is None else hidden[:1]
        self._parameters = parameters
        self._stages = find_stages(
            lambda: self.quantized.run(self.number, self.batches[0][:1], hidden),
            {name: self.quantized.model.get_parameter(name) for name in parameters},
            hidden,
            self._modules(),
        )
        for model in self.models:
            for stage in self._stages:
                if stage.experts is not None:
                    experts = model.model.get_submodule(stage.experts)
                    hook = experts.register_forward_pre_hook(StagedPass.at_experts(stage.experts), with_kwargs=True)
                    self._hooks.append(hook)
        return self._stages

    def _modules(self) -> dict[str, nn.Module]:
        """Those of the layer that hold parameters of their own and are no linears: norms, in the first place."""
        if self.number >= len(self.quantized.layers):
            return {}
        layer = self.quantized.layers[self.number]
        prefix = f"{self.quantized.prefix}.{self.number}."
        return {
            prefix + name: module
            for name, module in layer.named_modules()
            if all(parameter.ndim == 1 for parameter in module.parameters()) and not [*module.children()]
        }

    def norm_behind(self, stage: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The module that the output of a stage goes through before it joins the residual stream."""
        name = self._stages[stage].through
        return None if name is None else self.quantized.model.get_submodule(name)

    def _passes_of(self, index: int) -> list[StagedPass]:
        if index in self._passes:
            return self._passes[index]
        passes = []
        for model, hidden in zip(self.models, self.streams.read(index), strict=False):
            parameters = {name: model.model.get_parameter(name) for name in self._parameters}
            hidden = self._hidden(model, hidden)

            def run(model=model, hidden=hidden):
                return model.run(self.number, self.batches[index], hidden)

            passes.append(StagedPass(run, self._stages, parameters, hidden))
        if self.keep:
            self._passes[index] = passes
        return passes

    @staticmethod
    def _hidden(model: LayeredModel, hidden: torch.Tensor | None) -> torch.Tensor | None:
        # moved here: a pass knows the residual stream by where it lies
        return None if hidden is None else hidden.to(model.device)

    def arrivals(self, stage: int) -> Iterator[tuple]:
        """(quantized, original, residual) batch by batch: what `stage` receives in both streams, and what the residual
        stream of the quantized one lacks, None if the stage does not join it. Without an original stream, the quantized
        one stands for both."""
        for index in range(len(self.batches)):
            passes = self._passes_of(index)
            arrived = [staged.to(stage) for staged in passes]
            if all(arrival is not None for arrival in arrived):
                streams = [staged.stream for staged in passes]
                joins = self._stages[stage].joins and all(stream is not None for stream in streams)
                yield arrived[0], arrived[-1], streams[-1] - streams[0] if joins else None
            if not self.keep:
                for staged in passes:
                    staged.abandon()

    def finish(self, streams: StreamsWriter) -> tuple[float, float]:
        """Go on to the end; the outputs are written to `streams`. Squared distance of the quantized outputs from the
        original ones, and the squared norm of those."""
        distance = norm = 0.0
        for index in range(len(self.batches)):
            outputs = [staged.to_end() for staged in self._passes_of(index)]
            self._passes.pop(index, None)
            distance += float((outputs[0] - outputs[-1]).float().square().sum())
            norm += float(outputs[-1].float().square().sum())
            streams.write(index, outputs)
        return distance, norm

    def close(self) -> None:
        for passes in self._passes.values():
            for staged in passes:
                staged.abandon()
        for hook in self._hooks:
            hook.remove()
