"""A small model, what an uninterrupted run makes of it, and where to put another one."""

import pytest
from folders import contents
from models import save_tiny
from runs import LAYERS
from runs import quick_gptq as gptq


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Not to be changed."""
    return save_tiny(tmp_path_factory.mktemp("models") / "model", num_hidden_layers=LAYERS)


@pytest.fixture(scope="session")
def expected(source):
    """The files of an uninterrupted run."""
    gptq(source, source.with_name("expected"))
    return contents(source.with_name("expected"))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"
