"""What a scanned block keeps for its backward pass, by name: memory against recomputation."""

from __future__ import annotations

import flax.linen as nn
import jax

# "dots" keeps what weights produced (the expensive matmuls) and recomputes attention, norms and activations.
_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
REMAT_POLICIES = tuple(_POLICIES)


def rematerialize(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """The block class wrapped for recomputation by a policy of REMAT_POLICIES; KeyError for another name."""
    saveable = _POLICIES[policy]
    if saveable is None:
        return block
    # Inside a scan the loop itself keeps XLA from merging the recomputation away.
    return nn.remat(block, policy=saveable, prevent_cse=False)
