"""The SentencePiece model that turns text into token ids and back.

The model is read when a `Tokenizer` is made, so that a wrong file is an error before anything else starts. A
pickled tokenizer carries its path alone: a loader's worker process reads the file again at its first use.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Sequence

import sentencepiece

from pgdist.errors import ConfigError


class Tokenizer:
    """A SentencePiece model with the pieces PaliGemma's texts need: BOS, EOS and the newline."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the model; ConfigError where it is missing, no SentencePiece model, or lacks a piece."""
        self.path = os.fspath(path)
        self._loaded: sentencepiece.SentencePieceProcessor | None = _read_model(self.path)

    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone: no BOS, no EOS."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; BOS, EOS, padding and ids beyond the model's pieces give nothing."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._processor.decode(known)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The piece of each id, a space being U+2581; "<id 300000>" for an id beyond them."""
        known = range(self.vocab_size)
        return [self._processor.id_to_piece(int(i)) if int(i) in known else f"<id {int(i)}>" for i in ids]

    def find(self, pattern: str) -> list[int]:
        """The ids whose pieces match, as file names match a shell's pattern: "<loc*>" finds all locations."""
        matches = re.compile(fnmatch.translate(pattern)).match
        return [i for i, piece in enumerate(self.pieces(range(self.vocab_size))) if matches(piece)]

    @property
    def bos_id(self) -> int:
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        return self._processor.eos_id()

    @property
    def pad_id(self) -> int:
        """The id of padding; 0, as in PaliGemma, where the model names none."""
        return max(0, self._processor.pad_id())

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        if self._loaded is None:
            self._loaded = _read_model(self.path)
        return self._loaded

    def __getstate__(self) -> dict[str, str]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.path = state["path"]
        self._loaded = None

    def __repr__(self) -> str:
        return f"Tokenizer({self.path!r})"


def _read_model(path: str) -> sentencepiece.SentencePieceProcessor:
    remedy = "give the tokenizer.model that belongs to the weights"
    if not os.path.isfile(path):
        found = "a directory" if os.path.isdir(path) else "nothing"
        raise ConfigError(f"tokenizer {path!r}: expected a SentencePiece model file, found {found}; {remedy}")
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ConfigError(f"tokenizer {path!r}: cannot be read: {error.strerror}; {remedy}") from error
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(content)
        size = processor.vocab_size()
    except RuntimeError as error:
        raise ConfigError(
            f"tokenizer {path!r}: not a SentencePiece model ({len(content)} bytes); {remedy}"
        ) from error
    missing = [name for name, i in (("BOS", processor.bos_id()), ("EOS", processor.eos_id())) if i < 0]
    # A model whose normaliser eats newlines would silently give texts without a separator.
    if not processor.encode("\n"):
        missing.append("newline")
    if missing:
        raise ConfigError(f"tokenizer {path!r}: its {size} pieces lack {', '.join(missing)}; {remedy}")
    return processor
