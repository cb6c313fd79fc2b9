"""Text of strangers, spelled for the place where it leaves the program: one function for each place.

Names of tensors, files and data sets, tags of a card, what a tokenizer or another package says: all of it is data. Who
writes to a place applies its function to everything, once, where the text goes out; who makes the text does not.
"""

import re
import shlex
from collections.abc import Iterable
from urllib.parse import quote, urlsplit


def terminal(text: str) -> str:
    """One line for a terminal, a log or an error message: control characters, line breaks, half surrogates and marks
    that reverse the direction of writing are spelled out, as in `\\x1b`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


# Escape sequences: those of one character and its intermediates, CSI (colours, movements of the cursor, ...), and
# strings up to their end (titles, links, the clipboard, ...). No two parts can match the same character, so that the
# time to search is that of the text's length.
_STRING_START, _STRING_BODY = r"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])", r"[^\x00-\x08\x0b-\x1f\x7f-\x9f]"
_SEQUENCE = re.compile(
    rf"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|{_STRING_START}{_STRING_BODY}*(?:\x07|\x1b\\|\x9c)|\x1b[ -/]*[0-OQ-WYZ`-~]"
)
_BEGUN = re.compile(rf"(?:(?:\x1b\[|\x9b)[0-?]*[ -/]*|{_STRING_START}{_STRING_BODY}*\x1b?|\x1b[ -/]*)\Z")
# What is longer is no sequence but text behind a stray character, and must not wait for an end that never comes
_LONGEST_SEQUENCE = 2048
# All control characters but tab and newline, half surrogates, and what changes the direction of the text that follows
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


class Prose:
    """Text of several lines for a terminal, in pieces as it comes: newlines and tabs stay, escape sequences and other
    control characters are left out, also where a sequence is spread over pieces."""

    def __init__(self):
        self._held = ""

    def put(self, piece: str) -> str:
        """What can be shown of the text so far and was not shown before."""
        text = _SEQUENCE.sub("", self._held + piece)
        begun = _BEGUN.search(text, max(0, len(text) - _LONGEST_SEQUENCE))
        self._held = begun[0] if begun else ""
        return _UNSEEN.sub("", text[: len(text) - len(self._held)])

    def finish(self) -> str:
        """No piece comes any more: what was held back."""
        held, self._held = self._held, ""
        return _UNSEEN.sub("", held)


def prose(text: str) -> str:
    """The same for a text that is there as a whole."""
    shown = Prose()
    return shown.put(text) + shown.finish()


class Markdown(str):
    """Text that is markdown already."""


def markdown(text: str) -> Markdown:
    """One line of plain words: no markup, HTML, entity, link, formula or end of a table's cell."""
    escaped = re.sub(r"[\\`*_\[\]<>|&~$]", r"\\\g<0>", terminal(text).lstrip())
    escaped = re.sub(r"^(\d*)([#+\-=.)])(?=\D|$)", r"\1\\\2", escaped)  # headings, lists, and lines under a heading
    return Markdown(re.sub(r":(?=//)|(?<=www)\.|@", r"\\\g<0>", escaped))  # what is a link without any brackets


def code_span(text: str) -> Markdown:
    """One line shown letter by letter, also in the cell of a table."""
    line = terminal(text).replace("|", "\\|")
    if not line.strip():
        return markdown(line)
    fence = "`" * (_longest_run(line) + 1)
    padding = " " if line[0] in "` " or line[-1] in "` " else ""
    return Markdown(f"{fence}{padding}{line}{padding}{fence}")


def code_block(text: str, language: str = "") -> Markdown:
    """Lines shown letter by letter."""
    lines = [terminal(line) for line in text.split("\n")]
    fence = "`" * max(3, _longest_run(text) + 1)
    return Markdown("\n".join([fence + language, *lines, fence]))


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def link(text: str, target: str) -> Markdown:
    """A link; its words alone where `target` is neither an address of the web nor a file in the same folder."""
    where = url(target)
    return markdown(text) if where is None else Markdown(f"[{markdown(text)}]({where})")


def url(target: str) -> str | None:
    """An http or https address, or the path of a file beside the page, with all that is special in it encoded; None for
    anything else."""
    try:
        parts = urlsplit(target)
    except ValueError:
        return None
    web = parts.scheme in ("http", "https") and bool(parts.netloc)
    beside = not parts.scheme and not parts.netloc and ":" not in target and not target.startswith(("/", "\\"))
    if not target.isprintable() or not (web or (beside and target and ".." not in target.split("/"))):
        return None
    return quote(target, safe="/:?#@!$&+,;=%~*" if web else "/")


def shell(words: Iterable[str]) -> str:
    """A command that can be copied into a shell: each word stays one word."""
    return shlex.join(map(terminal, words))
