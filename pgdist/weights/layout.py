"""Names: how the arrays of a published file map to the arrays of the model.

Published files name arrays as the model does, with two liberties: a leading `params/`, and, where queries and
keys have the same number of heads, one fused `qkv_einsum/w` [..., 3, N, D, H] instead of `q_einsum/w`
[..., N, D, H] and `kv_einsum/w` [..., 2, N, D, H]. A `Part` says which piece of a stored array is which array
of the model, so that the two are cut out of the fused array while it streams by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from pgdist.errors import WeightsError
from pgdist.weights.array_info import ArrayInfo, Shaped
from pgdist.weights.boxes import Box

_PREFIX = "params/"
_FUSED, _QUERY, _KEY_VALUE = "qkv_einsum/w", "q_einsum/w", "kv_einsum/w"
_QKV_AXIS = -4  # of [..., 3, N, D, H]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One array of the model as a piece of a stored array: all of it, or entries start:stop of one axis.

    `axis` is None for all of it. With `drop_axis` it is one entry, and the model's array lacks that axis.
    """

    info: ArrayInfo
    stored_name: str
    axis: int | None = None
    start: int = 0
    drop_axis: bool = False

    def stored_box(self, box: Box) -> Box:
        """The same box in the coordinates of the stored array."""
        if self.axis is None:
            return box
        if self.drop_axis:
            return (*box[: self.axis], (self.start, self.start + 1), *box[self.axis :])
        lo, hi = box[self.axis]
        return (*box[: self.axis], (lo + self.start, hi + self.start), *box[self.axis + 1 :])


def model_parts(stored: Iterable[ArrayInfo], *, path: object) -> dict[str, Part]:
    """The stored arrays under the model's names, in the file's order; WeightsError if two claim one name."""
    parts: dict[str, Part] = {}
    for info in stored:
        for part in _parts_of(info):
            name = part.info.name
            if name in parts:
                raise WeightsError(
                    f"{path}: {parts[name].stored_name!r} and {info.name!r} are both {name!r} of the model. "
                    "Write the file again with one of them."
                )
            parts[name] = part
    return parts


def group_by_stored(parts: Mapping[str, Part]) -> dict[str, list[Part]]:
    """Parts by the stored array that they are cut from, in the file's order."""
    groups: dict[str, list[Part]] = {}
    for part in parts.values():
        groups.setdefault(part.stored_name, []).append(part)
    return groups


def fusible(arrays: Mapping[str, Shaped]) -> dict[str, tuple[str, str]]:
    """{fused name: (query name, key-value name)} where `arrays` has both with the same number of heads."""
    pairs = {}
    for query in arrays:
        if _last_two(query) == _QUERY:
            base = query.removesuffix(_QUERY)
            key_value = base + _KEY_VALUE
            if key_value in arrays and fused_shape(arrays[query].shape, arrays[key_value].shape):
                pairs[base + _FUSED] = (query, key_value)
    return pairs


def fused_shape(query: tuple[int, ...], key_value: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape [..., 3, N, D, H] of the fused array, or None where query and key heads differ in number."""
    if len(query) < 3 or key_value != (*query[:-3], 2, *query[-3:]):
        return None
    return (*query[:-3], 3, *query[-3:])


def _parts_of(info: ArrayInfo) -> list[Part]:
    name = info.name.removeprefix(_PREFIX)
    shape = info.shape
    if _last_two(name) != _FUSED or len(shape) < -_QKV_AXIS or shape[_QKV_AXIS] != 3:
        return [Part(info=dataclasses.replace(info, name=name), stored_name=info.name)]
    base = name.removesuffix(_FUSED)
    axis = len(shape) + _QKV_AXIS
    lead, tail = shape[:axis], shape[axis + 1 :]
    query = ArrayInfo(name=base + _QUERY, shape=(*lead, *tail), dtype=info.dtype)
    key_value = ArrayInfo(name=base + _KEY_VALUE, shape=(*lead, 2, *tail), dtype=info.dtype)
    return [
        Part(info=query, stored_name=info.name, axis=axis, drop_axis=True),
        Part(info=key_value, stored_name=info.name, axis=axis, start=1),
    ]


def _last_two(name: str) -> str:
    return "/".join(name.split("/")[-2:])
