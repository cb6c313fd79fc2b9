"""Chats through the template of a tokenizer: a program of the model's author, which is run here and nowhere else.

transformers runs it in a sandbox, which keeps it from files and from Python. What it raises, how long it takes and how
much it writes is bounded here.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from lowbit.errors import InputError, first_line

# Lines of a template that are run. A long chat takes some ten thousand; two million take a second or two
_MOST_LINES = 2_000_000
# Memory and characters beyond what the chat itself has
_MOST_BYTES, _MOST_CHARACTERS = 2**30, 10_000_000
_TEMPLATE_FILE = "<template>"  # what jinja2 calls the source of a template that was no file


class _TooMuchError(Exception):
    """The template does not come to an end in time."""


def chat_ids(tokenizer, messages: list[dict], chat: str, *, threads: bool = False, **given) -> list[int]:
    """Token ids of messages [{"role": ..., "content": ...}].

    chat: what an error calls them. threads: others of this process allocate memory meanwhile, whose bound would be
    theirs too. given: what else the template sees, and add_generation_prompt.

    Raises InputError where the template refuses them, fails, or does not come to an end.
    """
    try:
        with _bounded_lines(), nullcontext() if threads else _bounded_memory():
            text = tokenizer.apply_chat_template(messages, tokenize=False, **given)
        if len(text) > _MOST_CHARACTERS + 100 * len(str(messages)):
            raise _TooMuchError(f"it makes {len(text):,} characters of it")
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except Exception as error:  # a program raises what it likes
        raise InputError(f"the chat template of the tokenizer refuses {chat}: {first_line(error)}") from None


@contextmanager
def _bounded_lines() -> Iterator[None]:
    """Counts lines of templates as they are run, which the interpreter reports; time would depend on the machine."""
    left = _MOST_LINES

    def trace(frame, event, argument):
        return count if frame.f_code.co_filename == _TEMPLATE_FILE else None

    def count(frame, event, argument):
        nonlocal left
        left -= 1
        if left < 0:
            raise _TooMuchError(f"it has not come to an end after {_MOST_LINES:,} of its lines")
        return count

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """One operation of a template can ask for any number of bytes: where the system can refuse them, it does."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + _MOST_BYTES
    lower = wanted if soft == resource.RLIM_INFINITY else min(wanted, soft)
    resource.setrlimit(resource.RLIMIT_AS, (lower, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
