"""Nothing is measured once for all tests: each has a cache of its own."""

import pytest

from lowbit.quantization.allocation import stored


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(stored, "cache_root", lambda: folder)
    return folder / "allocation"
