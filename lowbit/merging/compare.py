"""How far a merged model is from the model with the adapter beside it."""

from pathlib import Path

from lowbit.eval.compare import Quality, evaluate
from lowbit.eval.gate import some_tokens
from lowbit.hf import enable_lora, load
from lowbit.merging.adapter import ADAPTER, quietly, read_adapter
from lowbit.options import ComparisonOptions


def compared(
    folder: Path, adapter: Path, merged: Path, asked: ComparisonOptions, trust_remote_code: bool = False
) -> Quality:
    """Perplexity of the merged model, and its KL divergence to the model in `folder` with the adapter in `adapter`.

    That one runs on the quantized weights, where PEFT can put the adapter on them; else on what they stand for. Both
    models are in memory at once.
    """
    options = {"device_map": asked.device_map, "trust_remote_code": trust_remote_code}
    unmerged = _with_adapter(load(folder, **options), adapter)
    made = load(merged, **options)
    tokens, bos = some_tokens(merged, made, trust_remote_code, asked.heldout, asked.heldout_tokens)
    return evaluate(made, tokens, reference=unmerged, bos=bos)


def _with_adapter(model, adapter: Path):
    from peft import PeftModel

    config, _ = read_adapter(adapter)
    beside = ("use_dora", "target_parameters", "modules_to_save", "trainable_token_indices", "lora_bias")
    if getattr(model, "hf_quantizer", None) is not None:
        # what PEFT does more than add a product to what a layer gives needs the weight itself
        if any(getattr(config, name, None) for name in beside) or config.bias != "none":
            model = model.dequantize()
        else:
            config = enable_lora(config)
    with quietly():
        return PeftModel.from_pretrained(model, str(adapter), ADAPTER, config=config).eval()
