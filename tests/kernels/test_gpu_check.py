"""scripts/gpu_check.sh and `lowbit tune` on tiny shapes in the interpreter, so that they work when a GPU is at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "benchmarks"))

import rendering  # noqa: E402
import tables  # noqa: E402

pytestmark = pytest.mark.slow

# The command, with the kernels on the CPU
TUNE = "from lowbit.backends import triton; triton.INTERPRETED = True; from lowbit.cli import main; main()"


def environment(**more):
    paths = [str(ROOT), str(ROOT / "triton_kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "TRITON_INTERPRET": "1", "LOWBIT_PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}  # fmt: skip


@pytest.mark.usefixtures("compiler")
def test_gpu_check(tmp_path, monkeypatch):
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--tiny", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert result["facts"]["device"] == "interpreter" and result["left_out"] == []
    kernels = {case["case"].split()[0] for case in result["correctness"]}
    assert kernels == {"skinny", "gemm", "dense", "int8"} and not any(case["wrong"] for case in result["correctness"])
    for entry in result["timings"]:
        assert all("us" in times for times in entry["lowbit"].values()), entry
        assert "us" in entry["peers"]["cublas"] and "reason" in entry["peers"]["gemlite"]
    assert "0 wrong" in done.stdout
    whole = result["end_to_end"]
    assert {(row["side"], row["batch"], row["path"]) for row in whole["rows"]} == {
        (side, batch, "recorded loop") for side in ("W4A16-G128", "bf16") for batch in (1, 2)
    }
    assert "tiny bf16       batch   2" in done.stdout

    monkeypatch.setattr(rendering, "RESULTS", tmp_path)
    assert tables.gpu_check().startswith("Not yet measured")
    assert tables.gpu_end_to_end().startswith("Not yet measured")
    assert [(entry["shape"], entry["rows"]) for entry in result["timings"]] == [
        ("w4 tiny", 1), ("w4 tiny", 33), ("w8a8 tiny", 33)
    ]  # fmt: skip
    fast, broken, _ = result["timings"]
    us = next(iter(fast["lowbit"].values()))["us"]
    fast["peers"] |= {"cublas": {"us": 3 * us}, "gemlite": {"us": 2 * us}, "tinygemm": {"us": 4 * us}}
    broken["lowbit"] = {"gemm": {"reason": "does not compile"}}
    result["correctness"][0]["wrong"] = "relative error 1"
    (tmp_path / "gpu_check.json").write_text(json.dumps(result))
    header, _, row, *_, source = tables.gpu_check().splitlines()
    assert header.endswith("| 1 row | 33 rows |")
    assert row == f"| w4 tiny | {us:.1f} (3.00x, 2.00x) | failed |"
    assert "4 cases compared with float64, 1 wrong" in source
    _, _, first, second, *_ = tables.gpu_end_to_end().splitlines()
    assert first.startswith("| 1 | ") and second.startswith("| 2 | ") and first.endswith("x |")
    result["end_to_end"] = {"reason": "transformers is not installed"}
    (tmp_path / "gpu_check.json").write_text(json.dumps(result))
    assert tables.gpu_end_to_end() == "Not measured: transformers is not installed."


def test_tune(tmp_path):
    def lowbit(*arguments):
        return subprocess.run(
            [sys.executable, "-c", TUNE, "tune", *arguments],
            env=environment(LOWBIT_KERNELS_TABLES=str(tmp_path)), capture_output=True, text=True, timeout=1800,
        )  # fmt: skip

    done = lowbit("64x64", "--rows", "1", "--scheme", "W8A16-G32", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["table"] == str(tmp_path / "interpreter.json")
    stored = json.loads((tmp_path / "interpreter.json").read_text())["entries"]
    assert [entry["key"] for entry in found["entries"]] == list(stored) == ["w8 g32 sym bf16 64x64 m1"]
