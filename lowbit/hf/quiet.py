"""transformers without its warnings, where lowbit says as an error what they are about."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers logs errors only: its report of the keys of a checkpoint has a line for each of them."""
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity(max(before, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(before)
