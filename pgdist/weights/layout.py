"""Names: how the arrays of a published npz map to the arrays of the model.

Published files name arrays as the model does, with some liberties: a leading `params/`; where queries and keys have
the same number of heads, one fused `qkv_einsum/w` [..., 3, N, D, H] instead of `q_einsum/w` [..., N, D, H] and
`kv_einsum/w` [..., 2, N, D, H]; a file of one tower alone, without `img/` or `llm/`; and image towers whose layers are
stored apart, as `encoderblock_3/...`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping

from pgdist.errors import WeightsError
from pgdist.weights.array_info import ArrayInfo, Shaped, common_dtype
from pgdist.weights.pieces import ModelArray, Piece, whole_piece

_PREFIX = "params/"
_FUSED, _QUERY, _KEY_VALUE = "qkv_einsum/w", "q_einsum/w", "kv_einsum/w"
_QKV_AXIS = -4  # of [..., 3, N, D, H]
_LAYER = re.compile(r"(.*/encoderblock)_(\d+)(/.*)")
# By an array that each of them has, what a file of one tower leaves out of its names.
_TOWERS = {"embedder/input_embedding": "llm/", "pos_embedding": "img/"}


def model_arrays(
    stored: Iterable[ArrayInfo], *, fortran_order: Collection[str] = (), path: object
) -> dict[str, ModelArray]:
    """The stored arrays under the model's names, in the file's order; WeightsError if two claim one name.

    fortran_order: the stored names of arrays whose data is that of the array with its axes reversed.
    """
    stored = list(stored)
    tower = _missing_tower([info.name for info in stored])
    arrays: dict[str, ModelArray] = {}
    layers: dict[str, dict[int, ModelArray]] = {}
    for info in stored:
        for array in _arrays_of(info, tower):
            if info.name in fortran_order:
                array = dataclasses.replace(array, pieces=tuple(map(_reversed, array.pieces)))
            if match := _LAYER.fullmatch(array.info.name):
                layers.setdefault(match[1] + match[3], {})[int(match[2])] = array
                continue
            _refuse_second(arrays.get(array.info.name), array, path=path)
            arrays[array.info.name] = array
    for name, found in layers.items():
        stacked = _stack(name, found, path=path)
        _refuse_second(arrays.get(name), stacked, path=path)
        arrays[name] = stacked
    return arrays


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


def _arrays_of(info: ArrayInfo, tower: str) -> list[ModelArray]:
    name = tower + info.name.removeprefix(_PREFIX)
    shape = info.shape
    if _last_two(name) != _FUSED or len(shape) < -_QKV_AXIS or shape[_QKV_AXIS] != 3:
        return [ModelArray(info=dataclasses.replace(info, name=name), pieces=(whole_piece(info),))]
    base = name.removesuffix(_FUSED)
    axis = len(shape) + _QKV_AXIS
    lead, tail = shape[:axis], shape[axis + 1 :]
    whole = whole_piece(info)
    query = dataclasses.replace(whole, axes=tuple(a for a in whole.axes if a != axis))
    key_value = dataclasses.replace(whole, start=tuple(int(a == axis) for a in whole.axes))
    return [
        ModelArray(
            info=ArrayInfo(name=base + _QUERY, shape=(*lead, *tail), dtype=info.dtype), pieces=(query,)
        ),
        ModelArray(
            info=ArrayInfo(name=base + _KEY_VALUE, shape=(*lead, 2, *tail), dtype=info.dtype),
            pieces=(key_value,),
        ),
    ]


def _missing_tower(names: Collection[str]) -> str:
    plain = {name.removeprefix(_PREFIX) for name in names}
    if any(name.startswith(("img/", "llm/")) for name in plain):
        return ""
    return next((tower for name, tower in _TOWERS.items() if name in plain), "")


def _stack(name: str, layers: Mapping[int, ModelArray], *, path: object) -> ModelArray:
    """One array of the model, layers on axis 0, from an array a layer."""
    infos = [array.info for array in layers.values()]
    shapes = sorted({info.shape for info in infos})
    if sorted(layers) != list(range(len(layers))) or len(shapes) > 1:
        found = f"layers {sorted(layers)} of shapes {shapes}"
        raise WeightsError(
            f"{path}: cannot stack the layers of {name!r}: expected 0, 1, ... of one shape, found {found}."
        )
    info = ArrayInfo(
        name=name, shape=(len(layers), *shapes[0]), dtype=common_dtype(info.dtype for info in infos)
    )
    pieces = (dataclasses.replace(layers[i].pieces[0], index=(i,)) for i in range(len(layers)))
    return ModelArray(info=info, pieces=tuple(pieces))


def _reversed(piece: Piece) -> Piece:
    """The same piece of an array that is stored with its axes reversed."""
    last = len(piece.view) - 1
    return dataclasses.replace(
        piece, view=piece.view[::-1], start=piece.start[::-1], axes=tuple(last - axis for axis in piece.axes)
    )


def _refuse_second(first: ModelArray | None, second: ModelArray, *, path: object) -> None:
    if first is not None:
        raise WeightsError(
            f"{path}: {first.pieces[0].stored_name!r} and {second.pieces[0].stored_name!r} are both "
            f"{second.info.name!r} of the model. Write the file again with one of them."
        )


def _last_two(name: str) -> str:
    return "/".join(name.split("/")[-2:])
