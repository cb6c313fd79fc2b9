"""The commands that take a model, on a GGUF file: of integers, and of blocks that are decoded."""

import io
import json
import sys

import pytest
from gguf_files import SIZES, write_gguf
from models import tiny_model

from lowbit.folders import gguf as opening

pytest.importorskip("gguf")
pytestmark = pytest.mark.slow

BENCH = ("--batch", "1", "--prompt-tokens", "4", "--new-tokens", "2", "--rounds", "1", "--against", "unquantized")


@pytest.fixture
def file(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "cache_root", lambda: tmp_path / "cache")
    model = tiny_model("llama", **SIZES, num_hidden_layers=1)
    return write_gguf(tmp_path / "model.gguf", "llama", lambda name: kind, model=model)


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_commands(kind, file, cli, tmp_path, monkeypatch):
    def done(*arguments) -> str:
        outcome = cli(*arguments)
        assert outcome.code == 0, (arguments, outcome.err)
        return outcome.out

    is_packed = kind == "Q4_0"
    assert ("W4A16-G32" if is_packed else "Q6_K") in done("inspect", file)
    assert json.loads(done("plan", file, "--group-size", 32, "--json"))["converted"] == (7 if is_packed else 0)
    assert done("generate", file, "--prompt", "ab", "--max-new-tokens", 2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n!exit\n"))
    done("chat", file, "--max-new-tokens", 2)
    done("verify", file)
    done("dequantize", file, "-o", tmp_path / "plain")
    done("verify", file, "--reference", tmp_path / "plain")
    done("eval", file, "--reference", tmp_path / "plain", "--num-tokens", 64)
    done("quantize", file, "-o", tmp_path / "made", "--scheme", "W8A16-G32")
    assert not (tmp_path / "made" / "gguf_index.json").exists()
    done("verify", tmp_path / "made", "--reference", file)
    sides = json.loads(done("bench", file, *BENCH, "--lm-head", "none", "--json"))["sides"]
    assert sides["lowbit"]["origin"] == ("as stored" if is_packed else "W4A16-G128, rtn")
    assert sides["unquantized"]["origin"] == "dequantized"
    converted = cli("convert", file, "-o", tmp_path / "converted", "--format", "gptq")
    assert (converted.code == 0) == is_packed and (is_packed or "as Q6_K, which no format here holds" in converted.err)
