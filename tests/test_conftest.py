"""The fixtures do what tests rely on them for."""

import os

import torch


def test_hub_is_offline():
    from huggingface_hub.constants import HF_HUB_OFFLINE

    assert os.environ["HF_HUB_OFFLINE"] == "1" and HF_HUB_OFFLINE


def test_seed_is_fixed():
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))


def test_poison_reaches_every_way_to_get_uninitialised_memory(nan_poison, device):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        written = torch.zeros(5, device=device, dtype=dtype)
        for empty in (
            torch.empty(3, device=device, dtype=dtype),
            torch.empty_like(written),
            torch.empty_strided((2, 3), (3, 1), device=device, dtype=dtype),
            written.new_empty(3),
        ):
            assert empty.isnan().all()
    assert (torch.empty(3, dtype=torch.int32, device=device) == torch.iinfo(torch.int32).max).all()


def test_poison_ends_with_the_test():
    assert not torch.are_deterministic_algorithms_enabled()
