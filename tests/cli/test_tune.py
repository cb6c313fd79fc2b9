"""`lowbit tune` where it cannot work; tests/kernels/test_gpu_check.py runs it."""

import pytest


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        (2, ["64x128", "--rows", "0"], ["rows", "0", "numbers from 1"]),
        (2, ["64x128", "--rows", "many"], ["rows", "many"]),
        (2, ["0x128"], ["0x128", "sizes from 1"]),
        (2, ["64x128", "--dtype", "float32"], ["float32", "bfloat16, float16"]),
        (2, ["64x128", "--scheme", "W7A16"], ["bits is 7"]),
        (2, ["reference"], ["reference", "no quantized layers"]),
        (2, ["64x128,64x100"], ["W4A16-G128", "100 inputs"]),
        (1, ["64x128", "--device", "cpu"], ["W4A16", "[64, 128]", "runs on GPUs, not on cpu"]),
    ],
    ids=str,
)
def test_wrong_arguments(code, arguments, words, refused):
    refused(code, "tune", *arguments, says=words)
