"""Train a LoRA adapter on a quantized model, whose weights stay packed: QLoRA with PEFT and transformers' Trainer.

    python examples/finetune.py [MODEL] [-o ADAPTER] [--text FILE] [--steps 60] [--length 128] [--batch 4]

MODEL is a quantized folder; `reference`, or any dense model, is quantized to 4 bits while it is loaded. It trains on
the standard library of Python, or on FILE, with gradient checkpointing and autocast to bfloat16, prints the loss on
other text of that kind before and after, saves the adapter, and loads it again.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, Trainer, TrainingArguments

import lowbit
from lowbit.hf import enable_lora


def load(name: str):
    """A quantized model, frozen."""
    folder = lowbit.resolve(name)
    try:
        return lowbit.load(folder, quantization_config=lowbit.LowbitConfig(scheme="W4A16-G32"))
    except lowbit.LowbitError:  # it is quantized already
        return lowbit.load(folder)


def blocks(tokenizer, text: str, length: int) -> list[dict]:
    """The text in pieces of so many tokens, which are their own labels."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return [{"input_ids": piece, "labels": piece} for piece in ids[: len(ids) // length * length].view(-1, length)]


def stdlib(files: int = 24) -> str:
    folder = Path(sysconfig.get_path("stdlib"))
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))[:files])


@torch.inference_mode()
def loss(model, held_out: list[dict]) -> float:
    batch = torch.stack([piece["input_ids"] for piece in held_out]).to(model.device)
    return float(model(input_ids=batch, labels=batch).loss)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="reference")
    parser.add_argument("-o", "--output", default="adapter")
    parser.add_argument("--text")
    for name, default in {"steps": 60, "length": 128, "batch": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(lowbit.resolve(chosen.model))
    text = Path(chosen.text).read_text(encoding="utf-8") if chosen.text else stdlib()
    data = blocks(tokenizer, text, chosen.length)
    held_out, training = data[:: max(len(data) // 8, 2)], [d for n, d in enumerate(data) if n % max(len(data) // 8, 2)]

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = enable_lora(LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    model = get_peft_model(load(chosen.model), config)
    model.print_trainable_parameters()
    before = loss(model.eval(), held_out)
    arguments = TrainingArguments(
        output_dir=f"{chosen.output}-checkpoints",
        max_steps=chosen.steps,
        per_device_train_batch_size=chosen.batch,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=training)
    trainer.train()
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # without autocast from here on
    after = loss(model.eval(), held_out)
    model.save_pretrained(chosen.output)

    again = PeftModel.from_pretrained(load(chosen.model), chosen.output, config=config)
    print(f"loss before {before:.4f}, after {after:.4f}, loaded again {loss(again.eval(), held_out):.4f}")


if __name__ == "__main__":
    main()
