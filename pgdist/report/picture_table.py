"""Pictures with texts beside them, as a table that a notebook shows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from pgdist.report.thumbnails import thumbnail

_TABLE = Markup("<table><thead><tr><th></th>{header}</tr></thead><tbody>{rows}</tbody></table>")
_TITLE = Markup('<th style="text-align: left">{title}</th>')
_ROW = Markup('<tr><td><img width="160" src="{image}"></td>{cells}</tr>')
_CELL = Markup('<td style="text-align: left; vertical-align: top; white-space: pre-wrap">{text}</td>')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureTable:
    """Notebooks show its `html`, which holds the pictures: it asks for no file."""

    html: str = dataclasses.field(repr=False)

    def _repr_html_(self) -> str:
        return self.html


def picture_table(
    images: Sequence[str | os.PathLike[str]], texts: Mapping[str, Sequence[str]]
) -> PictureTable:
    """A row for each image file, a column for each of `texts`: {its title: the text beside each image}.

    The images are as the model sees them, square. Raises BadImage, and ValueError where a column is not as long as
    `images`.
    """
    header = Markup("").join(_TITLE.format(title=title) for title in texts)
    rows = Markup("").join(
        _ROW.format(image=thumbnail(image), cells=Markup("").join(_CELL.format(text=text) for text in row))
        for image, row in zip(images, _rows(texts, len(images)), strict=True)
    )
    return PictureTable(html=str(_TABLE.format(header=header, rows=rows)))


def _rows(texts: Mapping[str, Sequence[str]], count: int) -> list[tuple[str, ...]]:
    return list(zip(*texts.values(), strict=True)) if texts else [()] * count
