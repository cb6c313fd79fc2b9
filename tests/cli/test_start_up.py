"""What commands import, and what it costs: held without a clock, in processes of their own."""

import json
import os
import subprocess
import sys

import pytest
from folders import ROOT

pytestmark = pytest.mark.slow

# Runs a body, and writes down what was imported and which of MARKS were there at each full collection of garbage
RECORD = """
import gc, json, sys
out, marks, full = sys.argv[1], ("torch", "transformers.generation.utils"), []
def collected(phase, info):
    if phase == "start" and info["generation"] == 2:
        full.append([name in sys.modules for name in marks])
gc.callbacks.append(collected)
try:
    {body}
except SystemExit as ended:
    assert not ended.code, ended.code
with open(out, "w") as file:
    json.dump(dict(modules=list(sys.modules), full=full, frozen=gc.get_freeze_count()), file)
"""
COMMAND = "sys.argv = ['lowbit', *sys.argv[2:]]; from lowbit.cli import main; main()"
PLAIN = """from transformers import AutoModelForCausalLM, AutoTokenizer
    tokens = AutoTokenizer.from_pretrained(sys.argv[2])("import os", return_tensors="pt")
    AutoModelForCausalLM.from_pretrained(sys.argv[2]).generate(**tokens, max_new_tokens=2)"""

# What is not imported by a command; with its submodules
NEVER = {
    "help": ("torch", "transformers", "numpy", "huggingface_hub", "safetensors", "pydantic", "rich"),
    "plan": ("datasets", "lowbit_kernels", "lowbit.quantization.calibrated.run", "lowbit.conversion", "lowbit.hf"),
    "generate": ("datasets", "lowbit_kernels", "lowbit.quantization", "lowbit.conversion", "lowbit.calibration"),
}
# Packages that commands may add to those that transformers imports to generate: ours, those of the command line with
# what they are made of, and the standard library
ADDED = {"lowbit", "typer", "click", "shellingham", "annotated_doc", "rich", "pygments", "pydantic", "pydantic_core",
         "annotated_types", "typing_inspection", "typing_extensions", *sys.stdlib_module_names}  # fmt: skip
# Modules of others that commands may add
SMALL = {"transformers.generation.streamers"}


def recorded(tmp_path, name: str, body: str, *words) -> dict:
    out = tmp_path / f"{name}.json"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'triton_kernels'}", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", RECORD.format(body=body), str(out), *map(str, words)],
                   check=True, capture_output=True, env=environment, cwd=tmp_path)  # fmt: skip
    return json.loads(out.read_text())


def within(modules: list[str], packages: tuple[str, ...]) -> set[str]:
    return {name for name in modules if any(name == each or name.startswith(f"{each}.") for each in packages)}


@pytest.fixture(scope="module")
def runs(chat_model, quantized, tmp_path_factory) -> dict[str, dict]:
    """What was recorded of each command, and of plain transformers."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "plain": recorded(folder, "plain", PLAIN, chat_model),
        "help": recorded(folder, "help", COMMAND, "--help"),
        "plan": recorded(folder, "plan", COMMAND, "plan", chat_model),
        "generate": recorded(
            folder, "generate", COMMAND, "generate", quantized, "--prompt", "import os", "--max-new-tokens", "2"
        ),
    }


@pytest.mark.parametrize("command", NEVER)
def test_commands_do_without(runs, command):
    assert not within(runs[command]["modules"], NEVER[command])


@pytest.mark.parametrize("command", ["help", "plan", "generate"])
def test_commands_add_little_to_what_transformers_imports(runs, command):
    added = set(runs[command]["modules"]) - set(runs["plain"]["modules"])
    assert {name for name in added if name.partition(".")[0] not in ADDED} <= SMALL


@pytest.mark.parametrize("command", ["plan", "generate"])
def test_imports_are_not_searched_for_garbage(runs, command):
    while_importing = [True, False]
    assert while_importing not in runs[command]["full"] and while_importing in runs["plain"]["full"]
    assert runs[command]["frozen"] > 100_000 > runs["plain"]["frozen"]
