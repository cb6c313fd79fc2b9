"""LowbitConfig: what a user passes to `from_pretrained`, and what `save_pretrained` writes from it."""

from collections.abc import Iterable, Mapping

from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.errors import UsageError
from lowbit.numerics.scheme import Recipe, Scheme
from lowbit.quantizers import checked_options


@register_quantization_config("lowbit")
class LowbitConfig(QuantizationConfigMixin):
    """Quantize while loading:

        AutoModelForCausalLM.from_pretrained(id, quantization_config=LowbitConfig(bits=4, group_size=128))

    bits: 2, 3, 4, 8. group_size: 16 ... 1024, or -1 per channel. sym: symmetric grid. scale_search: "minmax" or "mse".
    ignore: modules to leave alone, each a regex from the start of their names, or words of them ("down_proj", "mlp").
    overrides: (pattern, scheme) pairs or a dict of them, for modules that get another scheme, such as "W8A16".
    backend: the name of the one to run on, an error if it cannot;
    by default each layer takes the first that can. source: the `quantization_config` of a quantized checkpoint.
    include_vision: of a model that sees or hears, quantize all of it, not its language model alone.
    fuse: linears that share an input share one product (lowbit.layers.shared_product).

    `to_dict` gives the config of the format that is saved (compressed-tensors), never one of lowbit's own.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        sym: bool = True,
        scale_search: str = "minmax",
        ignore: Iterable[str] = (),
        backend: str | None = None,
        source: dict | None = None,
        include_vision: bool = False,
        fuse: bool = True,
        overrides: Mapping[str, str | Scheme] | Iterable[tuple[str, str | Scheme]] = (),
        **unknown,
    ):
        if unknown:
            raise UsageError(f"LowbitConfig has no option {next(iter(unknown))!r}")
        self.quant_method = "lowbit"
        options = checked_options("rtn", {"scale_search": scale_search})
        self.recipe = Recipe(
            Scheme(bits, group_size, sym),
            "rtn",
            options,
            overrides,
            ignore=(ignore,) if isinstance(ignore, str) else tuple(ignore),
            include_vision=include_vision,
        )
        self.backend, self.fuse = backend, fuse
        self.source = source

    def to_dict(self) -> dict:
        if self.source is not None:
            return dict(self.source)
        return {"quant_method": "lowbit", **self.recipe.to_dict()}

    def to_diff_dict(self) -> dict:
        return self.to_dict()

    def get(self, key, default=None):
        """transformers reads a few keys of a checkpoint's config as if it were a dict."""
        return self.to_dict().get(key, default)

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        known = {key: value for key, value in config_dict.items() if key != "quant_method"}
        config = cls(**known)
        return (config, kwargs) if return_unused_kwargs else config
