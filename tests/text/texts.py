"""Texts for calibration tests."""

import json

# 19 of them, a prime: every step through them meets them all
_WORDS = (
    "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps", "under", "old", "trees",
    "while", "all", "of", "them", "watch",
)  # fmt: skip


def make_texts(count: int, words: int = 40) -> list[str]:
    """Texts that all differ."""
    steps = [n % (len(_WORDS) - 1) + 1 for n in range(count)]
    return [f"{n}: " + " ".join(_WORDS[(n + i * steps[n]) % len(_WORDS)] for i in range(words)) for n in range(count)]


def write_rows(path, rows):
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_texts(path, texts):
    return write_rows(path, [{"text": text} for text in texts])
