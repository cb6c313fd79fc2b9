"""One escape for each place where text leaves the program."""

import shlex

import pytest
from markdown_it import MarkdownIt

from lowbit.guards.escape import Prose, code_block, code_span, link, markdown, prose, shell, terminal, url

EVIL = (
    "a\x1b[2J\n# heading", "`` ` ```", "```\n# out\n```", "<img src=x onerror=y>", "[x](javascript:y)", "![x](http://y)",
    "a|b", "*b* _i_ ~~s~~", "&lt;b&gt;", "- item", "1. item", "+ item", "> quote", "---", "===", "    code", "\\",
    "\\`", "$x$",
    "https://evil.example", "www.evil.example", "me@evil.example", "<https://evil.example>", "a\r\n\r\n| b |",
    "\u2028x", "\ud800", "\u202eevil", "[x]: http://y", "x  \ny", "`", " ", "",
)  # fmt: skip
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def tokens(text: str) -> list:
    """All tokens of a page, those inside of lines too."""
    return [inner for token in PARSER.parse(text) for inner in (token, *(token.children or ()))]


@pytest.mark.parametrize("evil", EVIL)
def test_words_are_words_in_markdown(evil):
    found = tokens(markdown(evil))
    assert {token.type for token in found} <= {"paragraph_open", "inline", "text", "text_special", "paragraph_close"}
    assert "".join(token.content for token in found if token.type.startswith("text")) == terminal(evil).strip()


@pytest.mark.parametrize("evil", EVIL)
def test_code_shows_every_letter(evil):
    span = [token for token in tokens(f"before {code_span(evil)} after") if token.type != "paragraph_open"]
    shown = terminal(evil)
    if shown.strip():
        assert [token.content.replace("\\|", "|") for token in span if token.type == "code_inline"] == [shown]
    (block,) = (token for token in tokens(code_block(evil, "bash")) if token.type == "fence")
    assert block.content.removesuffix("\n") == "\n".join(map(terminal, evil.split("\n")))
    row = tokens(f"| a | b |\n| --- | --- |\n| {code_span(evil)} | {markdown(evil)} |\n")
    assert sum(token.type == "td_open" for token in row) == 2


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("https://x.example/a(b) c", "https://x.example/a%28b%29%20c"),
        ("LICENSE.txt", "LICENSE.txt"),
        ("docs/my licence.md", "docs/my%20licence.md"),
        *((bad, None) for bad in ("javascript:alert(1)", "JavaScript:x", " javascript:x", "data:text/html,x", "//evil",
                                  "file:///etc/passwd", "/etc/passwd", "../x", "https:", "\\\\evil\\x", "a\nb", "",
                                  "http://[")),
    ],
)  # fmt: skip
def test_links_lead_to_the_web_or_to_a_file_beside(target, expected):
    assert url(target) == expected
    assert ("](" in link("words", target)) is (expected is not None)


def test_a_link_is_one_link():
    (opened,) = (token for token in tokens(link("a](http://evil) [b", "https://x/)y")) if token.type == "link_open")
    assert opened.attrs["href"] == "https://x/%29y"


def test_words_of_a_command_stay_words():
    words = ["lowbit", "eval", "org/name; curl evil|sh", "$(touch x)", "a'b", "x\ny", ""]
    assert shlex.split(shell(words)) == [terminal(word) for word in words] and "\n" not in shell(words)


def test_a_line_of_a_terminal_is_one_line():
    for evil in EVIL:
        line = terminal(evil)
        assert line.isprintable() and len(f"x{line}".splitlines()) == 1
    assert terminal("Zwölf 日本 [x] :smile:") == "Zwölf 日本 [x] :smile:"


SEQUENCES = (
    "\x1b[31m", "\x1b[2J", "\x9b1;2H", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\", "\x1bP1$r\x1b\\", "\x1bc",
    "\x1b(B", "\x07",
    "\x08", "\x00", "\x7f", "\x85", "\x9d52;c;eA==\x9c", "\u202e", "\u2066", "\ud800", "\x1b[?1049h", "\r",
)  # fmt: skip


def test_prose_keeps_lines_and_letters():
    text = "Zwölf\tBoxkämpfer\njagen 👩‍👩‍👧 日本\u3000語 [red] 100%\n"
    assert prose(text) == text


def test_prose_loses_escape_sequences_wherever_it_is_cut():
    text = "".join(f"<{sequence}>" for sequence in SEQUENCES) + "a\r\nb\x1b"
    expected = "<>" * len(SEQUENCES) + "a\nb"
    assert prose(text) == expected
    for step in (1, 2, 3, 7):
        shown = Prose()
        pieces = [shown.put(text[start : start + step]) for start in range(0, len(text), step)]
        assert "".join([*pieces, shown.finish()]) == expected


def test_prose_does_not_wait_for_an_end_that_never_comes():
    shown = Prose()
    pieces = [shown.put(piece) for piece in ["\x1b]", *["word "] * 2000]]
    assert "".join(pieces).endswith("word word ") and len("".join(pieces) + shown.finish()) == 10001
