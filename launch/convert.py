"""Writes weights in the other layout: a published npz as a folder for transformers, or the other way round.

    python -m launch.convert paligemma-3b-pt-224.f16.npz paligemma-3b-hf --tokenizer=paligemma_tokenizer.model
    python -m launch.convert hf://google/paligemma2-3b-pt-224 paligemma2-3b.npz
    python -m launch.convert runs/cows@64 cows-hf         # a run's checkpoint of step 64, merged into its base

SOURCE is what --config.init takes: an npz, a transformers folder, a run's folder (its newest checkpoint, or @STEP);
local, gs://, hf:// or kaggle://. TARGET is a file that ends in .npz, or a folder for transformers. Nothing is lost:
the numbers stay those of the source, bit by bit, unless --dtype says otherwise. A block of one array is in memory at a
time, and the target appears when it is complete.
Exit codes: 0 done, 1 a bug, 2 bad command line, 3 bad weights, or a target that is there or cannot be written.
"""

from __future__ import annotations

import os

from absl import flags

from launch import entry
from pgdist.errors import ConfigError

_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Cast the numbers to it; by default they stay as they are.",
)
_FORCE = flags.DEFINE_bool("force", False, "Replace a target that is there.")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "SentencePiece model for a transformers folder; by default the source's own, if it has one.",
)
_ALLOW_NON_FINITE = flags.DEFINE_bool("allow_non_finite", False, "Let NaN and infinity pass.")


def main(*arguments: str) -> None:
    """Converts the first argument to the second."""
    if len(arguments) != 2:
        raise ConfigError(f"expected SOURCE and TARGET, found {len(arguments)} argument(s); see --help")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no accelerator is needed, or taken from who needs it
    import jax.numpy as jnp

    from pgdist import weights

    source, target = arguments
    weights.convert(
        source,
        target,
        dtype=jnp.dtype(_DTYPE.value) if _DTYPE.value else None,
        force=_FORCE.value,
        allow_non_finite=_ALLOW_NON_FINITE.value,
        tokenizer=_TOKENIZER.value,
    )


if __name__ == "__main__":
    entry.run(main, name="convert", usage=__doc__, positional="SOURCE TARGET")
