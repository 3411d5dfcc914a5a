"""Where parameters live while decoding, such that a token moves activations and no parameters.

A step of decoding reads every weight once for a handful of tokens, so weights stay where they are. The MLP's hidden
units and the vocabulary, most of a model, are split over `fsdp`: the rows of the `fsdp` group come together before
them, and partial results are added up after. Attention is whole on every device, for few key/value heads do not
split, and each device attends for its own rows, whose cache it holds. Prompts are read as in training, the image tower
and the MLP gathered layer by layer: hundreds of tokens a row are more than the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pgdist.mesh import parameter_sharding

# The dimension that `fsdp` splits of what lives elsewhere than in training; None: whole.
_DIMENSION = tuple(
    (re.compile(pattern), dimension)
    for pattern, dimension in (
        (r"llm/layers/mlp/gating_einsum", 3),
        (r"llm/layers/mlp/linear", 1),
        (r"llm/layers/.*", None),
    )
)


def decoding_shardings(mesh: Mesh, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, NamedSharding]:
    """By parameter name. An MLP that `fsdp` does not divide is whole."""
    return {name: _sharding(mesh, name, leaf.shape) for name, leaf in shapes.items()}


def _sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    for pattern, dimension in _DIMENSION:
        if pattern.fullmatch(name):
            if dimension is None or shape[dimension] % mesh.shape["fsdp"]:
                return NamedSharding(mesh, PartitionSpec())
            return NamedSharding(mesh, PartitionSpec(*(None,) * dimension, "fsdp"))
    return parameter_sharding(mesh, name, shape)
