"""A tiny model, and a server of it."""

from pathlib import Path

import pytest
from folders import save_chat_model
from served import LONG, serving

import lowbit
from lowbit.generation import open_session


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A tiny llama in 4 bits, which never ends an answer by itself. Not to be changed."""
    made = tmp_path_factory.mktemp("served")
    save_chat_model(made / "dense", max_position_embeddings=LONG, eos_token_id=None)
    lowbit.quantize(made / "dense", made / "packed", group_size=16)  # two processes can share it
    return made / "packed"


@pytest.fixture(scope="module")
def session(folder):
    return open_session(folder)


@pytest.fixture(scope="module")
def served(session):
    with serving(session) as each:
        yield each
