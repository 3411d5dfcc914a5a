"""The list of bad records of a run, and when they are too many to go on.

A bad record costs its row, not the run; but a wrong data root or a half-copied data set makes most rows bad,
and training on the rest would be a waste nobody asked for.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable

from pgdist.data.jsonl import BadRecord
from pgdist.errors import DataError

# Below this many rows the share of bad ones is still chance; a smaller data set is judged against its size.
_ROWS_TO_JUDGE = 10_000


class BadRecordLog:
    """A file of lines {"file", "line", "reason"}: each distinct bad record once, also across restarts."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        known = _read(self.path)
        self._logged = known.records
        # The next line must not continue one that a crash has torn.
        self._separator = "\n" if known.torn else ""

    def add(self, records: Iterable[BadRecord]) -> list[BadRecord]:
        """Writes those that are new and returns them."""
        new = [record for record in dict.fromkeys(records) if record not in self._logged]
        if new:
            lines = [json.dumps(dataclasses.asdict(record), ensure_ascii=False) for record in new]
            # One write, so that a crash tears at most one line and other writers' lines stay whole.
            # Half a surrogate pair in a reason is written as JSON's own escape.
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(self._separator + "".join(f"{line}\n" for line in lines))
            self._logged.update(new)
            self._separator = ""
        return new


class BadShare:
    """Counts the rows of the job and refuses to go on when too many of them are masked."""

    def __init__(self, *, num_examples: int, max_share: float, first_row: int = 0) -> None:
        """first_row: the global row that counting starts at, where a run is resumed."""
        self.num_examples = num_examples
        self.max_share = max_share
        self.first_row = first_row
        self._masked = 0
        self._rows = 0

    def add(self, *, masked_rows: int, rows: int) -> None:
        """Counts rows of a global batch, the same in every process; raises DataError above the share."""
        self._masked += masked_rows
        self._rows += rows
        # Divided, not multiplied: 29 / 100 is the float 0.29, but 0.29 * 100 is less than 29.
        if self._masked / self._rows_to_judge() > self.max_share:
            raise DataError(
                f"{self._masked} of {self._rows} rows so far are masked because their records are bad, more"
                f" than the share of {self.max_share:g} allowed by config.data.max_bad_share;"
                " bad_records.jsonl in the workdir lists them with their reasons: mend them or allow more."
            )

    def _rows_to_judge(self) -> int:
        if self.num_examples > _ROWS_TO_JUDGE:
            return max(self._rows, _ROWS_TO_JUDGE)
        # Every epoch begun counts as a whole: its bad records may all come early by chance.
        first_epoch = self.first_row // self.num_examples
        end_epoch = -(-(self.first_row + self._rows) // self.num_examples)
        return (end_epoch - first_epoch) * self.num_examples


def refuse_bad_share(bad: Iterable[BadRecord], *, num_examples: int, max_share: float) -> None:
    """Raises DataError, with the first few named, if more than `max_share` of the examples are bad."""
    bad = sorted(bad, key=lambda record: (record.file, record.line))
    if len(bad) / num_examples <= max_share:
        return
    shown = "\n".join(f"  {record}" for record in bad[:5])
    more = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
    raise DataError(
        f"{len(bad)} of {num_examples} examples are bad, more than the share of {max_share:g} allowed by"
        f" config.data.max_bad_share; mend them or allow more:\n{shown}{more}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Logged:
    records: set[BadRecord]
    torn: bool


def _read(path: str) -> _Logged:
    if not os.path.exists(path):
        return _Logged(records=set(), torn=False)
    records, line = set(), "\n"
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                records.add(BadRecord(**json.loads(line)))
            except (ValueError, TypeError):
                continue
    return _Logged(records=records, torn=not line.endswith("\n"))
