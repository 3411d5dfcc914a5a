"""The collectives of a traced program (its jaxpr), where each has its axes and dtype and each loop is an equation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A collective in a program.  loop: the innermost loop that it is in, None outside."""

    primitive: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    loop: int | None

    def __str__(self) -> str:
        return f"{self.primitive} over {', '.join(self.axes)} in {self.dtype}"


_PRIMITIVES = {
    "all_gather": "all_gather",
    "all_to_all": "all_to_all",
    "ppermute": "ppermute",
    "pmax": "pmax",
    "psum": "psum",
    "psum_invariant": "psum",
    "reduce_scatter": "reduce_scatter",
}


def collectives(jaxpr: Jaxpr, loop: int | None = None) -> Iterator[Asked]:
    """All that a program asks for, in order."""
    for equation in jaxpr.eqns:
        if kind := _PRIMITIVES.get(equation.primitive.name):
            axes = equation.params.get("axes", equation.params.get("axis_name"))
            for result in equation.outvars:
                shape, dtype = result.aval.shape, result.aval.dtype.name
                axes = (axes,) if isinstance(axes, str) else tuple(axes)
                yield Asked(primitive=kind, axes=axes, shape=shape, dtype=dtype, loop=loop)
        inside = id(equation) if equation.primitive.name in ("scan", "while") else loop
        for inner in _jaxprs_of(equation):
            yield from collectives(inner, inside)


def _jaxprs_of(equation: JaxprEqn) -> Iterator[Jaxpr]:
    for leaf in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr)):
        if isinstance(leaf, ClosedJaxpr | Jaxpr):
            yield getattr(leaf, "jaxpr", leaf)
