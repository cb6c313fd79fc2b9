"""LoRA adapters of PEFT on quantized layers (QLoRA): the base stays frozen and quantized, the adapters train."""

from lowbit.linear import LowbitLinear


def enable_lora(config):
    """Make a `peft.LoraConfig` accept quantized layers; returns it:

    model = get_peft_model(lowbit.load(path), enable_lora(LoraConfig(target_modules=["q_proj", "v_proj"])))
    """
    # PEFT has no public hook for layers it does not know; this one is its own extension point, documented as such
    config._register_custom_module({LowbitLinear: _lora_layer()})
    return config


def _lora_layer():
    from peft.tuners.lora.layer import LoraLayer
    from torch import nn

    class LoraLowbitLinear(nn.Module, LoraLayer):
        """y = base(x) + B(A(dropout(x))) * scaling, for each active adapter."""

        def __init__(self, base_layer, adapter_name, config=None, r=8, lora_alpha=16, **kwargs):
            super().__init__()
            LoraLayer.__init__(self, base_layer, **kwargs)
            self.fan_in_fan_out = False
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

        def forward(self, x, *args, **kwargs):
            y = self.base_layer(x)
            if self.disable_adapters:
                return y
            for adapter in self.active_adapters:
                if adapter in self.lora_A:
                    a, b = self.lora_A[adapter], self.lora_B[adapter]
                    update = b(a(self.lora_dropout[adapter](x.to(a.weight.dtype)))) * self.scaling[adapter]
                    y = y + update.to(y.dtype)
            return y

    return LoraLowbitLinear
