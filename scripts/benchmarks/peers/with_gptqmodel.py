"""GPTQModel (ModelCloud): quantize, save its checkpoint, load that and dequantize as its own kernels do.

Variants are joined by "+": sym or asym, and any of
    nogar     without group-aware reordering, which is the default
    actorder  columns in order of activation (desc_act): its groups are scattered, a kernel has to look them up
    mse       clip each group by a grid search on |error|^2.4
    gptaq     GPTAQ: correct for the error of the layers before (alpha 0.25, the default)
    foem      FOEM: first-order term of the loss (beta 0.2, the default)
"""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default for two cores is one, and then it raises

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig
from safetensors.torch import load_file
from shared import Stopwatch, hand_back, read_job

OPTIONS = {
    "sym": {},
    "asym": {},
    "nogar": {"desc_act": False, "act_group_aware": False},
    "actorder": {"desc_act": True, "act_group_aware": False},
    "mse": {"mse": 2.4},
    "gptaq": {"gptaq": GPTAQConfig()},
    "foem": {"foem": FOEMConfig()},
}


def dequantized(folder: str) -> tuple[dict[str, torch.Tensor], torch.dtype]:
    """The weights of a saved checkpoint, and the type of its scales.

    Codes and zero points are read by GPTQModel's own layer: its format subtracts one from packed zero points, with a
    borrow from one to the next, which reading them one by one gets wrong. The layer holds scales in the model's dtype;
    those of the file are finer.
    """
    stored = {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}
    model = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu").model
    weights = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            scales = stored[f"{name}.scales"]
            module.scales = scales.float()
            weights[f"{name}.weight"] = module.dequantize_weight().T
    return weights, scales.dtype


def main():
    job = read_job()
    chosen = {key: value for option in job.options for key, value in OPTIONS[option].items()}
    config = QuantizeConfig(
        bits=job.bits, group_size=job.group_size, sym=job.sym, device="cpu", offload_to_disk=False, **chosen
    )
    examples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.tokens.tolist()]
    model = GPTQModel.load(job.model, config, dtype=torch.float32)
    with Stopwatch() as watch:
        model.quantize(examples, batch_size=job.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        weights, scale_dtype = dequantized(folder)
    # symmetric or not, its format stores a zero point for each group
    hand_back(job, weights, watch, "gptqmodel", scale_dtype, zero_bits=job.bits)


if __name__ == "__main__":
    main()
