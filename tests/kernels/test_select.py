"""Which kernel runs: rule, shipped table, user's table; and what happens to entries that cannot be used."""

import json
import logging

import pytest
import torch

pytest.importorskip("triton")

from lowbit_kernels import gemm, gemm_hopper, launching, skinny
from lowbit_kernels.int8.layout import Int8Layout
from lowbit_kernels.layout import Layout
from lowbit_kernels.tuning import select, tune

CPU = torch.device("cpu")
LAYOUT = Layout(4, 128, True, torch.bfloat16, 128, 256)
H100 = select.Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132)
A100 = select.Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108)


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    monkeypatch.setenv(select.TABLES_VARIABLE, str(tmp_path))
    select.forget()
    yield tmp_path
    select.forget()


def test_keys_and_buckets():
    assert select.key(LAYOUT, 3) == "w4 g128 sym bf16 128x256 m4"
    assert select.key(Layout(8, 256, False, torch.float16, 7, 256), 5000) == "w8 grow asym fp16 7x256 m4096"
    assert [select.bucket(rows) for rows in (1, 2, 3, 33, 4096, 10**6)] == [1, 2, 4, 64, 4096, 4096]
    assert H100.slug == "nvidia-h100-80gb-hbm3"


@pytest.mark.parametrize("gpu", [H100, A100], ids=lambda gpu: gpu.slug)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_rule_gives_what_can_be_launched(gpu, bits):
    for shape in ((64, 512), (96, 1024), (4096, 4096), (28672, 4096), (4096, 14336)):
        layout = Layout(bits, 128, True, torch.bfloat16, *shape)
        for rows in (1, 8, 9, 32, 33, 512, 4095, 4096):
            kernel, config = select.rule(layout, rows, gpu)
            many = "hopper" if gpu is H100 and bits in (4, 8) else "gemm"
            assert kernel == ("skinny" if rows <= 32 else many if rows < 4096 else "dense")
            assert select.refuse(config, gpu) is None
            if kernel in ("skinny", "gemm"):
                assert layout.padded_out % config.block_n == 0
            if kernel == "skinny":
                assert layout.tiles % config.tiles == 0 and config.block_m >= min(rows, 32)


def test_the_users_table_wins():
    gpu = select.gpu_of(CPU)
    assert select.choose(LAYOUT, 3, CPU).reason == "by rule"
    config = skinny.Config(block_n=32, block_m=8, warps=1)
    select.write_table(select.user_table(gpu), gpu, {select.key(LAYOUT, 3): ("skinny", config, 4.25)})
    assert select.choose(LAYOUT, 4, CPU) == select.Choice("skinny", config, "tuned here")
    assert select.choose(LAYOUT, 5, CPU).reason == "by rule"  # exactly this case, or none
    more = gemm.Config(block_n=64, block_m=64)
    select.write_table(select.user_table(gpu), gpu, {select.key(LAYOUT, 40): ("gemm", more, 9.0)})
    stored = json.loads(select.user_table(gpu).read_text())
    assert set(stored["entries"]) == {select.key(LAYOUT, 3), select.key(LAYOUT, 40)} and stored["device"] == gpu.name
    assert [path.name for path in select.user_table(gpu).parent.iterdir()] == ["interpreter.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"entries": {"a": 3}}', "\0"], ids=repr)
def test_a_damaged_table_is_reported_and_passed_over(text, caplog):
    path = select.user_table(select.gpu_of(CPU))
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert select.choose(LAYOUT, 3, CPU).reason == "by rule"
    assert str(path) in caplog.text


@pytest.mark.parametrize(
    "entry",
    [{"kernel": "marlin", "config": {}}, {"kernel": "skinny", "config": {"block_n": 7}}, {"config": {}},
     {"kernel": "gemm", "config": {"tile": 3}}],
    ids=str,
)  # fmt: skip
def test_entries_of_another_version_are_passed_over(entry, caplog):
    gpu = select.gpu_of(CPU)
    path = select.user_table(gpu)
    path.write_text(json.dumps({"entries": {select.key(LAYOUT, 3): entry}}))
    with caplog.at_level(logging.INFO, logger="lowbit_kernels"):
        assert select.choose(LAYOUT, 3, CPU).reason == "by rule"
    assert select.key(LAYOUT, 3) in caplog.text


@pytest.mark.parametrize("joinable", [True, False])
def test_configs_that_triton_miscompiles_are_not_used(joinable, monkeypatch):
    """Neither from a table that was made with another triton, nor as a candidate."""
    monkeypatch.setattr(launching, "JOINABLE", joinable)
    gpu, joined = select.gpu_of(CPU), gemm.Config(block_n=64, block_m=64, joined=4)
    select.write_table(select.user_table(gpu), gpu, {select.key(LAYOUT, 40): ("gemm", joined, 9.0)})
    assert select.choose(LAYOUT, 40, CPU).reason == ("tuned here" if joinable else "by rule")
    found = [config.joined for kernel, config in tune.candidates(LAYOUT, 40, H100) if kernel == "gemm"]
    assert found and (max(found) == 4) is joinable


B200 = select.Gpu("NVIDIA B200", (10, 0), 148)
LAYOUTS = [Layout(bits, 128, True, torch.bfloat16, 4096, 4096) for bits in (2, 3, 4, 8)]
LAYOUTS += [Int8Layout(bits, 128, torch.bfloat16, 4096, 4096) for bits in (4, 8)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{type(layout).__name__}-{layout.bits}")
@pytest.mark.parametrize("fenced", [True, False])
def test_without_a_proxy_fence_no_copy_feeds_a_wgmma(fenced, layout, monkeypatch):
    """Triton picks wgmma and tcgen05 for four warps: they read x from where cp.async wrote it, and TMA with a fence."""
    monkeypatch.setattr(launching, "FENCED", fenced)
    for gpu in (H100, B200, A100):
        limited = gpu is not A100 and not fenced
        assert (launching.compiler_limit(gpu.capability) is not None) is limited
        for rows in (1, 32, 33, 64, 65, 512, 4096):
            chosen = [select.rule(layout, rows, gpu), *tune.candidates(layout, rows, gpu)]
            assert len(chosen) > 4 and {"gemm", "skinny", "int8", "dense"} & {kernel for kernel, _ in chosen}
            most = max(getattr(config, "warps", 0) for _, config in chosen)
            assert most <= 2 if limited else most >= 4
            if gpu is H100 and rows > 32 and not isinstance(layout, Int8Layout):
                assert "hopper" in {kernel for kernel, _ in chosen}


def test_a_table_made_with_a_fence_is_not_used_without(monkeypatch, tables):
    monkeypatch.setattr(launching, "FENCED", False)
    monkeypatch.setattr(select, "gpu_of", lambda device: H100)
    choices = {select.key(LAYOUT, 3): ("skinny", skinny.Config(block_n=128, warps=4), 1.0)}
    choices[select.key(LAYOUT, 40)] = ("hopper", gemm_hopper.Config(block_m=64), 1.0)
    select.write_table(select.user_table(H100), H100, choices)
    assert select.choose(LAYOUT, 3, CPU).reason == "by rule"
    assert select.choose(LAYOUT, 40, CPU).kernel == "hopper"


def test_a_launch_that_the_compiler_would_break_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for fenced, warps in ((True, 8), (False, 2)):
        monkeypatch.setattr(launching, "FENCED", fenced)
        launching.check_warps(warps, torch.device("cuda"))
    launching.check_warps(8, CPU)
    with pytest.raises(ValueError, match=r"warps is 4: triton .* kernels take at most 2 warps"):
        launching.check_warps(4, torch.device("cuda"))


@pytest.mark.parametrize("kernel", ["skinny", "gemm", "int8"])
def test_every_launcher_asks_the_compiler(kernel, monkeypatch):
    asked = []
    monkeypatch.setattr(launching, "check_warps", lambda warps, device: asked.append((warps, device)))
    layout = Int8Layout(4, 128, torch.bfloat16, 64, 256) if kernel == "int8" else LAYOUT
    config = select.CONFIGS[kernel](block_n=64, block_m=16, warps=2)
    weight = tune.packed(tune.random_weight(layout, CPU), layout)
    tune.ops.run(torch.ones(3, 256, dtype=torch.bfloat16), *weight, layout, None, select.Choice(kernel, config, ""))
    assert asked == [(2, CPU)]


@pytest.mark.parametrize("gpu", [H100, A100], ids=lambda gpu: gpu.slug)
def test_candidates(gpu):
    for rows in (1, 16, 40, 512):
        found = list(tune.candidates(Layout(4, 128, True, torch.bfloat16, 4096, 4096), rows, gpu))
        assert len(found) == len(set(found)) and 5 < len(found) < 100
        kernels = {kernel for kernel, _ in found}
        assert ("hopper" in kernels) is (rows > 32 and gpu is H100)
        assert ("skinny" in kernels) is (rows <= 64)
        assert all(isinstance(config, select.CONFIGS[kernel]) for kernel, config in found)
    assert any(isinstance(c, gemm_hopper.Config) for _, c in tune.candidates(LAYOUT, 64, H100))


def test_tuning_drops_what_computes_something_else(monkeypatch):
    """Of three candidates the fastest is wrong, one is not repeatable, one raises: the fourth is taken."""
    good = skinny.Config()
    names = {name: ("skinny", skinny.Config(stages=n)) for n, name in enumerate(("wrong", "unsteady", "broken"), 4)}
    monkeypatch.setattr(tune, "candidates", lambda *args: [*names.values(), ("skinny", good)])
    run, calls = tune.ops.run, []

    def faulty(x, weight, meta, layout, bias, choice):
        y = run(x, weight, meta, layout, bias, select.Choice("skinny", good, ""))
        calls.append(choice.config.stages)
        if choice.config == names["wrong"][1]:
            return y * 1.05
        if choice.config == names["unsteady"][1]:
            return y if calls.count(choice.config.stages) < 3 else y.nextafter(y + 1)
        if choice.config == names["broken"][1]:
            raise RuntimeError("out of shared memory")
        return y

    monkeypatch.setattr(tune.ops, "run", faulty)
    kernel, config, us, dropped = tune.fastest(LAYOUT, 2, CPU)
    assert (kernel, config) == ("skinny", good) and us > 0
    reasons = list(dropped.values())
    assert "relative error" in reasons[0] and reasons[1] == "repeats differ" and "shared memory" in reasons[2]
    monkeypatch.setattr(tune, "candidates", lambda *args: [names["wrong"]])
    with pytest.raises(RuntimeError, match="no kernel runs"):
        tune.fastest(LAYOUT, 2, CPU)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("gpu", [H100, A100, B200], ids=lambda gpu: gpu.slug)
def test_the_rule_takes_the_kernel_of_hopper_there_from_33_rows(bits, gpu, monkeypatch):
    monkeypatch.setattr(select, "_distrusted", set())
    layout = Layout(bits, 128, True, torch.bfloat16, 4096, 4096)
    for rows in (1, 32, 33, 64, 65, 2048, 4096):
        hopper = gpu is H100 and bits in (4, 8) and 32 < rows < 4096
        kernel, config = select.rule(layout, rows, gpu)
        assert (kernel == "hopper") is hopper
        if hopper:
            assert gemm_hopper.layout_refusal(layout, config) is None
            assert config.block_m == (64 if rows <= 64 else 128) and config.split == (4 if rows <= 128 else 1)
            assert select.rule(layout, rows, gpu, without=("hopper",))[0] == "gemm"
    select.distrust("hopper", gpu)
    assert select.rule(layout, 64, gpu)[0] == "gemm"
