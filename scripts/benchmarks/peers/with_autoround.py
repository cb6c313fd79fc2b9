"""AutoRound (Intel): its two ways of rounding to nearest, and its tuning.

Variants are joined by "+": sym or asym, and one of
    rtn     plain rounding to nearest
    optrtn  with scales searched under importance from the calibration tokens; in 0.16 only for sym, asym stays plain
    neuqi   with scale and zero point searched under that importance
    light   50 iterations of signed gradient descent, at the learning rate of the authors' "light" recipe
"""

import torch
from auto_round import AutoRound
from shared import Stopwatch, decoder_linears, hand_back, load_float32, read_job
from transformers import AutoTokenizer

OPTIONS = {
    "sym": {},
    "asym": {},
    "rtn": {"iters": 0, "disable_opt_rtn": True},
    "optrtn": {"iters": 0, "disable_opt_rtn": False},
    "neuqi": {"iters": 0, "disable_opt_rtn": False, "enable_neuqi": True},
    "light": {"iters": 50, "lr": 5e-3},
}
SCALE_DTYPE = torch.float16  # its default


def main():
    job = read_job()
    chosen = {key: value for option in job.options for key, value in OPTIONS[option].items()}
    model = load_float32(job.model)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in job.tokens]
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model),
        bits=job.bits,
        group_size=job.group_size,
        sym=job.sym,
        dataset=rows,
        nsamples=len(rows),
        seqlen=job.tokens.shape[1],
        batch_size=job.batch_size,
        device_map="cpu",
        enable_torch_compile=False,
        amp=False,  # bfloat16, slow on a CPU without instructions for it
        seed=42,
        **chosen,
    )
    with Stopwatch() as watch:
        tuned, _ = tuner.quantize()
    weights = {f"{name}.weight": module.weight for name, module in decoder_linears(tuned).items()}
    hand_back(job, weights, watch, "auto-round", SCALE_DTYPE)


if __name__ == "__main__":
    main()
