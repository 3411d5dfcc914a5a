"""TPU slices as Google's Kubernetes names them: which shapes there are, and how many hosts one has.

A slice is what chips on one interconnect make up: `v5e:4x4` is sixteen of them, four on each of four hosts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

from pgdist.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuSlice:
    """One shape. accelerator: its node label's value.  topology: such as "4x4".  chips_per_host: of one VM."""

    generation: str
    accelerator: str
    topology: str
    chips_per_host: int

    @property
    def chips(self) -> int:
        """All chips of the slice."""
        return math.prod(map(int, self.topology.split("x")))

    @property
    def hosts(self) -> int:
        """Its VMs: one pod runs on each."""
        return self.chips // self.chips_per_host


def _shapes_3d(*, side: int, chips: int) -> dict[str, tuple[int, ...]]:
    """Below 64 chips these four, then whole cubes of 4x4x4, sides ascending; with the longest side, all chips."""
    small = dict.fromkeys(("2x2x1", "2x2x2", "2x2x4", "2x4x4"), (4,))
    cubes = itertools.combinations_with_replacement(range(4, side + 1, 4), 3)
    large = sorted((cube for cube in cubes if math.prod(cube) <= chips), key=math.prod)
    return small | {"x".join(map(str, cube)): (4,) for cube in large}


# By the number of chips that one of its hosts can have, the usual one first.
_SHAPES_2D = {"1x1": (1,), "2x2": (4,), "2x4": (4, 8)} | dict.fromkeys(
    ("4x4", "4x8", "8x8", "8x16", "16x16"), (4,)
)

# The value of the node label cloud.google.com/gke-tpu-accelerator, and the shapes ("Plan TPUs in GKE"). The
# largest slice of a v4 is its pod of 16x16x16, of a v5p 6,144 chips of its 16x20x28, of a TPU7x its 16x24x24.
_GENERATIONS = {
    "v4": ("tpu-v4-podslice", _shapes_3d(side=16, chips=4096)),
    "v5p": ("tpu-v5p-slice", _shapes_3d(side=28, chips=6144)),
    "v5e": ("tpu-v5-lite-podslice", _SHAPES_2D),
    "v6e": ("tpu-v6e-slice", _SHAPES_2D),
    "tpu7x": ("tpu7x", _shapes_3d(side=24, chips=9216)),
}


def read_slice(text: str, *, chips_per_host: int = 0) -> TpuSlice:
    """The slice that --tpu=`text` means, such as "v5e:4x4".

    chips_per_host: 0 for the usual one; where there are two kinds of hosts, this chooses.  Raises ConfigError
    for shapes that do not exist, naming those that do, and for hosts that the chips do not fill.
    """
    generation, colon, topology = text.partition(":")
    if generation not in _GENERATIONS or not colon:
        known = ", ".join(_GENERATIONS)
        raise ConfigError(
            f"--tpu={text}: expected GENERATION:TOPOLOGY, such as v5e:4x4, with one of the generations {known}"
        )
    accelerator, shapes = _GENERATIONS[generation]
    if topology not in shapes:
        raise ConfigError(
            f"--tpu={text}: a {generation} has no slices of {topology or 'that shape'}; "
            f"there are {_list_shapes(shapes)}{_advise(topology, shapes)}"
        )
    if chips_per_host and chips_per_host not in shapes[topology]:
        chips = math.prod(map(int, topology.split("x")))
        kinds = " or ".join(map(str, shapes[topology]))
        raise ConfigError(
            f"--chips_per_host={chips_per_host}: the {chips} chips of a {generation}:{topology} stand on hosts of "
            f"{kinds}"
        )
    return TpuSlice(
        generation=generation,
        accelerator=accelerator,
        topology=topology,
        chips_per_host=chips_per_host or shapes[topology][0],
    )


def _list_shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    names = list(shapes)
    if len(names) <= 12:
        return ", ".join(names)
    return f"{', '.join(names[:8])} and so on, all sides multiples of 4 in ascending order, up to {names[-1]}"


def _advise(topology: str, shapes: dict[str, tuple[int, ...]]) -> str:
    """The same sides in the order in which they are known."""
    sides = sorted(map(int, re.findall(r"\d+", topology)))
    for shape in shapes:
        if sorted(map(int, shape.split("x"))) == sides:
            return f"; did you mean {shape}?"
    return ""
