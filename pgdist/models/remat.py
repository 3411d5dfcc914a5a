"""What a scanned block keeps for its backward pass, by name: memory against recomputation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from pgdist.models.flash_attention import ATTENDED

# "dots" keeps what weights and attention kernels produced and recomputes plain attention, norms and activations.
_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENDED),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
REMAT_POLICIES = tuple(_POLICIES)
_LAYER_PARAMS = "layer_params"  # a name for policies


# What is to be done with the parameters of one layer before it uses them, a nested tree without the layers' axis:
# bringing them together from where they are split, for a model that knows no mesh.
LayerParams = Callable[[Any], Any]


def rematerialize(
    block: type[nn.Module], policy: str, layer_params: LayerParams | None = None
) -> type[nn.Module]:
    """The block class wrapped for recomputation by a policy of REMAT_POLICIES; KeyError for another name.

    layer_params: applied to the block's parameters; the backward pass applies it again, whatever the policy, for
    keeping what it gives would keep the parameters of all layers.
    """
    saveable = _POLICIES[policy]
    if layer_params is not None:
        block = nn.map_variables(block, "params", trans_in_fn=_on_params(layer_params))
        saveable = saveable or jax.checkpoint_policies.save_anything_except_these_names(_LAYER_PARAMS)
    if saveable is None:
        return block
    # Inside a scan the loop itself keeps XLA from merging the recomputation away.
    return nn.remat(block, policy=saveable, prevent_cse=False)


def _on_params(layer_params: LayerParams) -> Callable[[Any], Any]:
    def apply(variables: Any) -> Any:
        if "params" not in variables:
            return variables
        given = jax.tree.map(lambda x: checkpoint_name(x, _LAYER_PARAMS), layer_params(variables["params"]))
        return {"params": given}

    return apply
