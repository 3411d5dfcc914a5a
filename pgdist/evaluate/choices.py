"""Multiple choice: the answers that each example is to be given one of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from pgdist.data.jsonl import BadRecord
from pgdist.data.loader import Source
from pgdist.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """of: the texts that example `i` may be answered with.  texts: of all examples, each once.  most: of one."""

    of: Callable[[int], Sequence[str]]
    texts: frozenset[str]
    most: int


def choices_for_all(texts: Sequence[str]) -> Choices:
    """The same for every example."""
    return Choices(of=lambda index: texts, texts=frozenset(texts), most=len(texts))


def choices_in_field(source: Source, field: str) -> Choices:
    """Each example's own, a list in that field of its record; none where the record is bad.

    Reads all records.  Raises DataError that names the first one whose field is not that.
    """

    def choices_of(index: int) -> Sequence[str]:
        record = source[index]
        return () if isinstance(record, BadRecord) else record.extra[field]

    texts, most = {""}, 1  # also where all records are bad
    for index in range(len(source)):
        record = source[index]
        if isinstance(record, BadRecord):
            continue
        found = record.extra.get(field)
        if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
            raise DataError(
                f"{record.file}, line {record.line}: field {field!r}: expected a list of texts to choose from, found "
                f"{found!r}."
            )
        texts.update(found)
        most = max(most, len(found))
    return Choices(of=choices_of, texts=frozenset(texts), most=most)
