"""Text as its tokens come, and where it stops."""

from collections.abc import Callable, Sequence

_CUT = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer gives for a character of which bytes are missing


class TextStream:
    """put(token) hands the text that has become certain to on_text: whole characters, and nothing that may yet turn out
    to be the start of a stop string. `text` is all that was handed out: what the tokenizer gives for all tokens, up to
    the first stop string. special: show tokens such as the one that ends an answer."""

    def __init__(
        self,
        tokenizer,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] = lambda text: None,
        special: bool = False,
    ):
        self.tokenizer, self.stop, self.on_text, self.special = tokenizer, tuple(stop), on_text, special
        self.text, self.stopped = "", False
        self.ids: list[int] = []
        # Text of ids[start:] past that of ids[start:end] is new: what a token adds depends on the ones before it
        self.start = self.end = 0
        self.pending = ""

    def put(self, token: int) -> bool:
        """Returns whether a stop string has come up."""
        self.ids.append(token)
        self._decode(final=False)
        return self.stopped

    def finish(self) -> None:
        """No token comes any more: hand out what was held back."""
        if not self.stopped:
            self._decode(final=True)
            self._hand_out(len(self.pending))

    def _decode(self, final: bool) -> None:
        before, now = self._text(self.ids[self.start : self.end]), self._text(self.ids[self.start :])
        if now.endswith(_CUT) and not final:
            return
        self.start, self.end = self.end, len(self.ids)
        self.pending += now[len(before) :]
        found = [place for words in self.stop if (place := self.pending.find(words)) >= 0]
        if found:
            self.stopped = True
            self._hand_out(min(found))
        else:
            self._hand_out(len(self.pending) - self._held_back())

    def _held_back(self) -> int:
        """Characters at the end of what is pending with which a stop string begins."""
        lengths = range(max(map(len, self.stop), default=1) - 1, 0, -1)
        starts = (n for n in lengths if any(words.startswith(self.pending[-n:]) for words in self.stop))
        return next((n for n in starts if n <= len(self.pending)), 0)

    def _hand_out(self, count: int) -> None:
        certain, self.pending = self.pending[:count], self.pending[count:]
        if certain:
            self.text += certain
            self.on_text(certain)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=not self.special, clean_up_tokenization_spaces=False)
