"""Talk to a model: several turns, answers that appear as they are written.

    python examples/chat.py [MODEL]

MODEL is a folder (quantized or not), a Hub id, or `reference`. An empty line or the end of input ends the chat.
"""

import sys

from transformers import AutoTokenizer, TextStreamer

import lowbit


def main(name="reference"):
    folder = lowbit.resolve(name)
    model, tokenizer = lowbit.load(folder), AutoTokenizer.from_pretrained(folder)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages = []
    while line := input("> ").strip():
        messages.append({"role": "user", "content": line})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=128, do_sample=True, temperature=0.7, streamer=streamer)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except EOFError:
        print()
