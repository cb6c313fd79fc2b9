"""examples/finetune.py: an adapter on packed weights learns, and what is saved is what was learnt."""

import re
import runpy
import sys

import pytest
from folders import ROOT

import lowbit


@pytest.mark.slow
def test_the_example_trains_saves_and_loads(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    lines = [f"the value of entry number {number} is {number * number}\n" for number in range(400)]
    text.write_text("".join(lines), encoding="utf-8")
    lowbit.quantize("reference", tmp_path / "packed", scheme="W4A16-G32")
    before = {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()}
    monkeypatch.chdir(tmp_path)
    words = ["packed", "-o", "adapter", "--text", str(text), "--steps", "12", "--length", "48", "--batch", "2"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
    runpy.run_path(str(ROOT / "examples" / "finetune.py"), run_name="__main__")
    found = re.search(r"loss before (\S+), after (\S+), loaded again (\S+)", capsys.readouterr().out)
    first, last, again = map(float, found.groups())
    assert last < first - 0.5
    assert again == last
    assert {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()} == before
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 4_000_000
