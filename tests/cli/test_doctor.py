"""`lowbit doctor`: what runs here, and, in triton's interpreter, which kernel each layer gets."""

from importlib.metadata import version

import pytest
import torch
from models import save_tiny

import lowbit
from lowbit.backends import BACKENDS, native, triton
from lowbit.cli.commands.doctor import _show_compiler, kernels_of
from lowbit.generation import eligibility, loop


def test_json(json_of):
    found = json_of("doctor")
    assert found["packages"]["torch"] == version("torch") and "transformers" in found["packages"]
    assert found["backends"].keys() == BACKENDS.keys() and found["backends"]["reference"] is None
    assert "cpu" in found["devices"] and found["python"].startswith("3.")
    assert found["tables"].keys() == found["compiler"].keys() == found["devices"].keys() - {"cpu"}
    assert "kernels" not in found


def test_instructions_of_the_kernels(json_of, compiler):
    found = json_of("doctor")["instructions"]
    assert found["used"] in found["available"] and found["available"][-1] == "portable"


def test_the_embedded_model_generates(json_of, monkeypatch):
    found = json_of("doctor")["generation"]
    assert found == {"path": "recorded loop", "why": None} or native.available() in found["why"]
    monkeypatch.setattr(loop, "refuse", lambda model: eligibility.Refusal("it is left alone"))
    assert json_of("doctor")["generation"] == {"path": "model.generate", "why": "it is left alone"}


def test_for_people(done):
    out = done("doctor").out
    assert "the embedded model generates in: " in out and " loop" in out
    assert ("the kernels in C run with: " in out) is (native.available() is None)
    assert version("torch") in out and "runs here" in out
    assert ("no kernels are chosen here: " in out) is not torch.cuda.is_available()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_model_without_a_gpu(json_of, done, quantized):
    assert json_of("doctor", quantized)["kernels"] == []
    assert done("doctor", quantized).out.count("no kernels are chosen here") == 1


def test_a_model_that_is_not_quantized(refused, tmp_path):
    refused(2, "doctor", save_tiny(tmp_path / "dense"), says="is not quantized")


@pytest.fixture
def interpreted(monkeypatch, tmp_path):
    select = pytest.importorskip("lowbit_kernels.tuning.select")
    monkeypatch.setattr(triton, "INTERPRETED", True)
    monkeypatch.setenv(select.TABLES_VARIABLE, str(tmp_path / "tables"))
    select.forget()
    yield select
    select.forget()


def test_kernels_of_a_model(interpreted, tmp_path):
    from lowbit_kernels import skinny

    dense = save_tiny(tmp_path / "dense", "mixtral", torch.bfloat16)
    lowbit.quantize(dense, tmp_path / "quantized", group_size=32)
    gpu, config = interpreted.gpu_of(torch.device("cpu")), skinny.Config(block_n=32)
    tuned = {"w4 g32 sym bf16 64x64 m16": ("skinny", config, 3.0)}
    interpreted.write_table(interpreted.user_table(gpu), gpu, tuned)
    tables = triton.tables("cpu")
    assert tables["tuned here"] == {"path": str(tmp_path / "tables" / "interpreter.json"), "entries": 1}
    assert tables["shipped table"]["entries"] == 0

    found = kernels_of(str(tmp_path / "quantized"), ["cpu"])
    cases = {(*case["shape"], case["rows"]): (case["kernel"], case["reason"]) for case in found}
    # as loaded: gate and up of all experts are one
    shapes = [(64, 64), (32, 64), (4, 192, 64), (4, 64, 96)]
    assert cases.keys() == {(*shape, rows) for shape in shapes for rows in (1, 16, 512)} and len(cases) == len(found)
    assert {case["scheme"] for case in found} == {"W4A16-G32"}
    assert cases[64, 64, 16] == ("skinny", "tuned here") and cases[64, 64, 1] == ("skinny", "by rule")
    assert cases[32, 64, 512] == ("gemm", "by rule")
    assert {cases[4, 64, 96, rows] for rows in (1, 16, 512)} == {("skinny", "by rule for experts")}
    of_experts = {case["rows"]: case["config"]["block_m"] for case in found if case["shape"] == [4, 64, 96]}
    assert of_experts == {1: 8, 16: 8, 512: 32}


def test_what_the_compiler_forbids(interpreted, monkeypatch, capsys):
    from lowbit_kernels import launching

    assert triton.compiler_limit("cpu") is None
    hopper = interpreted.Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132)
    monkeypatch.setattr(interpreted, "gpu_of", lambda device: hopper)
    monkeypatch.setattr(launching, "FENCED", True)
    assert triton.compiler_limit("cuda:0") is None
    monkeypatch.setattr(launching, "FENCED", False)
    limit = triton.compiler_limit("cuda:0")
    assert "fixed in 3.7.1" in limit and "at most 2 warps" in limit
    _show_compiler({"cuda:0": limit, "cuda:1": None})
    assert " ".join(capsys.readouterr().out.split()) == f"cuda:0: {limit}"


def test_kernels_of_a_model_that_none_runs(interpreted, tmp_path):
    lowbit.quantize(save_tiny(tmp_path / "dense"), tmp_path / "quantized", group_size=32)  # float32
    found = kernels_of(str(tmp_path / "quantized"), ["cpu"])
    assert found and {(case["kernel"], case["rows"]) for case in found} == {(None, None)}
    assert all("bfloat16 and float16" in case["reason"] for case in found)


def test_each_choice_is_logged_once(interpreted, caplog):
    """What LOWBIT_LOG_LEVEL=DEBUG shows."""
    caplog.set_level("DEBUG", logger="lowbit_kernels")
    for rows in (1, 3, 4, 512, 1):
        triton.explain(lowbit.Scheme(4, 32), (64, 64), torch.bfloat16, rows, "cpu")
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(" on ")[0].rpartition(" ")[2] for message in messages] == ["m1", "m4", "m512"]
    assert messages[0].startswith("w4 g32 sym bf16 64x64 m1 on interpreter: skinny Config(")
    assert all(message.endswith(", by rule") for message in messages)
