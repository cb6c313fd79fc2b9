"""llm-compressor (vLLM project): GPTQModifier in its sequential pipeline.

Variants are joined by "+": sym or asym, one observer (minmax, mse, imatrix_mse: how the range of a group is chosen),
and one activation order (static, its default; group; none).
"""

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from shared import Job, Stopwatch, decoder_linears, hand_back, load_float32, read_job

OBSERVERS = {"minmax": "memoryless_minmax", "mse": "memoryless_mse", "imatrix_mse": "imatrix_mse"}
ORDERS = {"static": "static", "group": "group", "none": None}


def recipe(job: Job) -> GPTQModifier:
    weights = QuantizationArgs(
        num_bits=job.bits,
        type="int",
        strategy="group",
        group_size=job.group_size,
        symmetric=job.sym,
        observer=next(OBSERVERS[option] for option in job.options if option in OBSERVERS),
    )
    return GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head"],
        actorder=next((ORDERS[option] for option in job.options if option in ORDERS), "static"),
    )


def quantize(model, job: Job, processor=None) -> None:
    """In place: the linears hold rounded weights afterwards, and their scales. processor: None takes the model's."""
    rows = job.tokens.tolist()
    oneshot(
        model=model,
        processor=processor,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=recipe(job),
        num_calibration_samples=len(rows),
        max_seq_length=job.tokens.shape[1],
        batch_size=job.batch_size,
        pipeline="sequential",
    )


def main():
    job = read_job()
    model = load_float32(job.model)
    with Stopwatch() as watch:
        quantize(model, job)
    weights = {}
    for name, module in decoder_linears(model).items():
        zero = getattr(module, "weight_zero_point", None)
        args = module.quantization_scheme.weights
        weights[f"{name}.weight"] = fake_quantize(module.weight, module.weight_scale, zero, args)
    hand_back(job, weights, watch, "llmcompressor", module.weight_scale.dtype)


if __name__ == "__main__":
    main()
