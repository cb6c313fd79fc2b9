"""LowbitConfig: what a user passes to `from_pretrained`, and what `save_pretrained` writes from it."""

from pathlib import Path

from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.numerics.scheme import Recipe, Scheme
from lowbit.options import OnLoadOptions, shows_options, takes_options
from lowbit.quantizers import checked_options


@register_quantization_config("lowbit")
@shows_options
class LowbitConfig(QuantizationConfigMixin):
    """Quantize while loading:

        AutoModelForCausalLM.from_pretrained(id, quantization_config=LowbitConfig(bits=4, group_size=128))

    `to_dict` gives the config of the format that is saved (compressed-tensors), never one of lowbit's own.

    Args:
    """

    @takes_options
    def __init__(self, options: OnLoadOptions):
        self.quant_method = "lowbit"  # type: ignore[assignment]  # one that is registered is none of theirs
        self.recipe = Recipe(
            Scheme(options.bits, options.group_size, options.sym),
            "rtn",
            checked_options("rtn", {"scale_search": options.scale_search}),
            options.overrides,  # type: ignore[arg-type]  # which makes tuples of both
            options.ignore,  # type: ignore[arg-type]
            include_vision=options.include_vision,
            embeddings=(
                Scheme.parse(options.embeddings) if isinstance(options.embeddings, str) else options.embeddings
            ),
        )
        self.backend, self.fuse, self.source = options.backend, options.fuse, options.source
        self.folder: Path | None = None  # where integers are that `from_pretrained` is handed as a state_dict
        self.exact, self.tp_plan = options.exact, options.tp_plan

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
