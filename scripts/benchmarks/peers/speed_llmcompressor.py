"""GPTQ of llm-compressor as somebody would use it: load in float32, quantize, save. Times and peak memory of each part.

Takes what the others here take. --output is the folder to save to; the facts go beside it.
"""

import json
import resource
import time
from importlib.metadata import version
from itertools import pairwise

import torch
from shared import load_float32, read_job
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401 - importing is not what is measured
from with_llmcompressor import quantize


def main():
    job = read_job()
    # the checkpoint has none, and oneshot insists on one, although the tokens are there
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    marks = [time.perf_counter()]
    model = load_float32(job.model)
    marks.append(time.perf_counter())
    quantize(model, job, tokenizer)
    marks.append(time.perf_counter())
    model.save_pretrained(job.output, save_compressed=True)
    marks.append(time.perf_counter())
    load, oneshot, save = (later - earlier for earlier, later in pairwise(marks))
    facts = {
        "seconds": marks[-1] - marks[0],
        "load_seconds": load,
        "oneshot_seconds": oneshot,
        "save_seconds": save,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "start_up_bytes": before * 1024,
        "output_bytes": sum(file.stat().st_size for file in job.output.glob("*.safetensors")),
        "threads": torch.get_num_threads(),
        "batch_size": job.batch_size,
        "versions": {name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")},
    }
    job.output.with_suffix(".json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
