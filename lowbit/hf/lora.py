"""LoRA adapters of PEFT on quantized layers (QLoRA): the base stays frozen and quantized, the adapters train."""

from lowbit.errors import UsageError
from lowbit.hf.modules import dense_layer
from lowbit.layers.linear import LowbitLinear

# Ways to start an adapter that leave the base weight what it is; all others subtract what the adapter starts with
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def enable_lora(config):
    """Make a `peft.LoraConfig` accept quantized layers; returns it:

    model = get_peft_model(lowbit.load(path), enable_lora(LoraConfig(target_modules=["q_proj", "v_proj"])))

    Merging an adapter dequantizes the layers it is on, and unmerging gives the quantized ones back, bit for bit. Raises
    UsageError for a config whose adapters would change the quantized weights when they are made.
    """
    start = config.init_lora_weights
    if start not in PLAIN_STARTS or getattr(config, "kasa_config", None) is not None:
        raise UsageError(
            f"init_lora_weights={start!r} changes the weights that an adapter is put on, and quantized ones stay as "
            "they are: use True, 'gaussian', 'orthogonal' or 'eva'"
        )
    # PEFT has no public hook for layers it does not know; this one is its own extension point, documented as such
    config._register_custom_module({LowbitLinear: _lora_layer()})
    return config


def _lora_layer():
    from peft.tuners.lora.layer import Linear

    class LoraLowbitLinear(Linear):
        """PEFT's layer for dense linears. While an adapter is merged, its base is one, made of the quantized one."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.fan_in_fan_out = False  # of the dense layer of GPT-2, not of the quantized one
            self._quantized: tuple = ()  # the layer that is put away while an adapter is merged, in no module

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            quantized = self.base_layer
            if isinstance(quantized, LowbitLinear):
                self._quantized = (quantized,)
                self.base_layer = dense_layer(quantized, quantized.dtype)
                self.fan_in_fan_out = quantized.transposed
            try:
                super().merge(safe_merge, adapter_names)
            finally:
                self._restore()

        def unmerge(self) -> None:
            super().unmerge()
            self._restore()

        def _restore(self) -> None:
            """Put the quantized layer back where no adapter is merged any more."""
            if not self.merged_adapters and self._quantized:
                (quantized,), self._quantized = self._quantized, ()
                self.base_layer = quantized.to(self.base_layer.weight.device)
                self.fan_in_fan_out = False

    return LoraLowbitLinear
