"""The bytes that tokens stand for. A character may be several tokens, none of which has a text."""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

#: What a decoder writes for bytes that are no character.
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
#: How byte-level vocabularies write bytes, and how SentencePiece's do where they have no piece.
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


class TokenBytes:
    """Token id -> its bytes, and its name in OpenAI's form.

    frame: ids that are no part of a text, such as its end: they have a name and nothing else
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, frame: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._frame = frame

    def shown(self, id: int) -> bytes | None:
        """What the token adds to a text that holds it; None where it is not shown."""
        return None if id in self._frame else self[id]

    def __getitem__(self, id: int) -> bytes:
        text = str(self._tokenizer.decode([id]))
        piece = str(self._tokenizer.convert_ids_to_tokens(id))
        if _UNFINISHED in text:
            if found := _FALLBACK.fullmatch(piece):
                return bytes([int(found[1], 16)])
            if all(character in _BYTES for character in piece):
                return bytes(_BYTES[character] for character in piece)
        if piece.startswith(_SPACE) and not text.startswith(" "):
            text = f" {text}"  # a decoder leaves it out at the beginning of a text
        return text.encode()

    def name(self, id: int) -> str:
        """The token's text; bytes that are no characters are written as `\\xf0`."""
        return self[id].decode(errors="backslashreplace")

    def long_name(self, id: int) -> str:
        """The same for completions, where `bytes:` stands before such a name."""
        name = self.name(id)
        return name if self._is_text(id) else f"bytes:{name}"

    def _is_text(self, id: int) -> bool:
        try:
            self[id].decode()
        except UnicodeDecodeError:
            return False
        return True


class CharacterOffsets:
    """Where the tokens of one text begin in it, in characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def place(self, token: bytes) -> int:
        """The characters that are complete before `token`, which comes next."""
        before = self._characters
        self._characters += len(self._decoder.decode(token))
        return before
