"""Text to tokens and back.

`Tokenizer` wraps the model's tokenizer.json. Its detokenisers turn a stream of tokens into a stream of text: what they
have given so far is always a prefix of the text of all tokens, and a character whose bytes are spread over several
tokens is given when its last byte is there.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from ..common.errors import InvalidRequest, PromptTooLong

_INLINE_CHARS = 2048
"""Shorter texts are tokenised on the event loop, where they take less than half a millisecond."""
_MAX_HELD = 8
"""Tokens that may wait for the rest of a character; more than any character has bytes, so these are no character."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer(Protocol):
    def push(self, token: int) -> str:
        """The text that is certain now and was not before; "" while a character is incomplete or a token is special."""
        ...

    def flush(self) -> str:
        """What is left at the end: an incomplete character becomes U+FFFD."""
        ...


class ByteDetokenizer:
    """For byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2): every token stands for fixed bytes, so a table and an
    incremental UTF-8 decoder are exact, and fast."""

    __slots__ = ("_decode", "_table")

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token: int) -> str:
        return self._decode(self._table[token])

    def flush(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer:
    """For every other tokenizer (sentencepiece style, WordPiece): decode a window of the last tokens with and without
    the new one, and give the difference. The window keeps the tokens given last, because decoders treat the first
    token of a text differently (they strip its space). The idea of the two offsets is Hugging Face TGI's."""

    __slots__ = ("_given", "_hidden", "_tokenizer", "_window")

    def __init__(self, tokenizer: tokenizers.Tokenizer, hidden: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._window: list[int] = []
        self._given = 0  # leading tokens of the window whose text has been given

    def push(self, token: int) -> str:
        if token in self._hidden:
            return ""
        self._window.append(token)
        text = self._difference()
        if text.endswith("�") and len(self._window) - self._given < _MAX_HELD:
            return ""
        self._window = self._window[self._given :]
        self._given = len(self._window)
        return text

    def flush(self) -> str:
        text = self._difference()
        self._given = len(self._window)
        return text

    def _difference(self) -> str:
        before: str = self._tokenizer.decode(self._window[: self._given])
        after: str = self._tokenizer.decode(self._window)
        return after[len(before) :]


class Tokenizer:
    """The tokenizer of one model. `vocab_size` is the model's, which may be padded beyond the tokenizer's own."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocab_size: int, max_tokens: int) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._max_tokens = max_tokens
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, content in added.items() if content.special)
        byte_level = _is_byte_level(json.loads(tokenizer.to_str())["decoder"])
        spelling = _byte_level_bytes if byte_level else _piece_bytes
        self._bytes = [b""] * max(vocab_size, tokenizer.get_vocab_size(with_added_tokens=True))
        for piece, token in tokenizer.get_vocab(with_added_tokens=True).items():
            self._bytes[token] = piece.encode() if token in self._special else spelling(piece)
        self._longest = max(map(len, self._bytes))
        shown = [b"" if token in self._special else data for token, data in enumerate(self._bytes)]
        self._table = shown if byte_level else None

    @classmethod
    def load(cls, folder: Path, vocab_size: int, max_tokens: int) -> Tokenizer:
        """From `folder`/tokenizer.json. Texts that cannot be `max_tokens` or shorter are refused untokenised. Raises
        `InvalidRequest` where the file is missing or damaged."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InvalidRequest(f"{path} is missing: the gateway needs the model's tokenizer", param="model")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise InvalidRequest(f"{path} is not a tokenizer: {error}", param="model") from error
        return cls(tokenizer, vocab_size, max_tokens)

    async def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        """Token ids of `text`; `special` adds what the tokenizer puts around a text (the beginning-of-text token).
        Long texts are tokenised in a thread, with the interpreter lock released. Raises `PromptTooLong` for a text
        that would not fit the context even if it were made of the longest tokens."""
        if len(text) <= _INLINE_CHARS:
            return self._encode(text, special)
        if len(text) > self._longest * self._max_tokens:
            raise PromptTooLong(
                f"the prompt has {len(text)} characters, which is more than the {self._max_tokens} tokens of this "
                "model's context can hold",
                param="messages" if not special else "prompt",
            )
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._encode, text, special)

    def _encode(self, text: str, special: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, special tokens included; the inverse of `encode`."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for; a special token stands for its name."""
        return self._bytes[token]

    def detokenizer(self) -> Detokenizer:
        """A fresh one, for one output. Special tokens give no text."""
        if self._table is not None:
            return ByteDetokenizer(self._table)
        return WindowDetokenizer(self._tokenizer, self._special)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    if decoder["type"] == "Sequence":
        return [part["type"] for part in decoder["decoders"]] == ["ByteLevel"]
    return bool(decoder["type"] == "ByteLevel")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as characters: printable Latin-1 stands for itself, the rest moves above 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    """Bytes of a byte-level piece. A character outside the alphabet marks an added token, which stands for itself."""
    if all(char in _ALPHABET for char in piece):
        return bytes(_ALPHABET[char] for char in piece)
    return piece.encode()


def _piece_bytes(piece: str) -> bytes:
    """Bytes of a sentencepiece-style piece: U+2581 is a space, <0xNN> one byte."""
    byte = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()
