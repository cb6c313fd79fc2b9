"""What the tests of this folder share: a tiny model, tokens, and the logits that a quantized folder stands for."""

import torch
from folders import save_chat_model
from models import token_ids
from transformers import AutoModelForCausalLM

import lowbit

# Relative error of two layers in float16: a rounding of 2^-11 in each of a few dozen operations
HALF = 5e-3


def save_dense(folder):
    return save_chat_model(folder, dtype=torch.float16, hidden_size=128, intermediate_size=256)


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits.float()


def plain_logits(folder, target):
    """Those of the weights that a quantized folder stands for, in float32."""
    lowbit.dequantize(folder, target, dtype="float32")
    return logits(AutoModelForCausalLM.from_pretrained(target))


def examples(count=8, length=32):
    """Calibration data."""
    ids = token_ids(count * length).view(count, length)
    return [{"input_ids": row, "attention_mask": [1] * length} for row in ids.tolist()]
