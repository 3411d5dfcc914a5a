"""Learning-rate schedules as published, and the optimizer as one optax transformation.

The update of step s is -schedule(s) * (learning_rate * scale * direction + weight_decay * parameter): as in
the published implementation, weight decay does not depend on the learning rate, and both follow the
schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from pgdist.errors import ConfigError
from pgdist.parameters import map_named, matching

SCHEDULES = ("constant", "cosine", "linear", "polynomial", "rsqrt")
OPTIMIZERS = ("sgd", "momentum", "adamw")


def relative_rate(
    step: ArrayLike,
    *,
    name: str,
    total_steps: int,
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    end: float = 0.0,
    power: float = 1.0,
    shift: float = 0.0,
    timescale: float = 10_000.0,
) -> jax.Array:
    """The learning rate at a 0-based step s of T, as a share of the base rate, float32[].

    With W warm-up and C cool-down steps and p = clip((s-W)/(T-W), 0, 1): cosine (1+cos(pi p))/2; polynomial
    end + (1-end)(1-p)^power; linear the same with power 1; rsqrt 1/sqrt(1+(s+shift-W)/timescale) from W on,
    1/sqrt(1+shift/timescale) before; then * min(1, s/W) * min(1, (T-s)/C). (The published implementation's.)
    """
    s = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((s - warmup_steps) / max(1, total_steps - warmup_steps), 0.0, 1.0)
    if name == "cosine":
        rate = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    elif name in ("linear", "polynomial"):
        rate = end + (1.0 - end) * (1.0 - progress) ** (power if name == "polynomial" else 1.0)
    elif name == "rsqrt":
        rate = jax.lax.rsqrt(1.0 + (jnp.maximum(0.0, s - warmup_steps) + shift) / timescale)
    elif name == "constant":
        rate = jnp.ones(())
    else:
        raise ConfigError(f"config.schedule.name: expected one of {', '.join(SCHEDULES)}, found {name!r}.")
    if warmup_steps:
        rate = rate * jnp.minimum(1.0, s / warmup_steps)
    if cooldown_steps:
        rate = rate * jnp.minimum(1.0, (total_steps - s) / cooldown_steps)
    return rate


def make_schedule(config: ConfigDict) -> Callable[[ArrayLike], jax.Array]:
    """Training step (0-based) -> share of the base rate.

    Counts as the published tutorial does, s = step + 1 of T = steps + 1, so that no update is made at rate 0.
    """
    total = config.steps + 1
    schedule = config.schedule

    def share_to_steps(share: float) -> int:
        # Rounding as published: any share above 0 is at least one step.
        return max(1, round(share * total)) if share else 0

    warmup, cooldown = share_to_steps(schedule.warmup), share_to_steps(schedule.cooldown)
    return lambda step: relative_rate(
        step + 1,
        name=schedule.name,
        total_steps=total,
        warmup_steps=warmup,
        cooldown_steps=cooldown,
        end=schedule.end,
        power=schedule.power,
        shift=schedule.shift,
        timescale=schedule.timescale,
    )


def decayed_names(names: set[str], config: ConfigDict) -> set[str]:
    """The parameters that weight decay touches, by `config.optimizer.weight_decay_on`; none without weight
    decay.
    """
    if not config.optimizer.weight_decay:
        return set()
    decayed = matching(names, config.optimizer.weight_decay_on, field="config.optimizer.weight_decay_on")
    if not decayed:
        raise ConfigError(
            f"config.optimizer.weight_decay={config.optimizer.weight_decay} but weight_decay_on="
            f"{config.optimizer.weight_decay_on!r} matches no trainable parameter: "
            f"{', '.join(sorted(names))}."
        )
    return decayed


def make_optimizer(
    config: ConfigDict, *, scales: Mapping[str, float], decayed: set[str]
) -> optax.GradientTransformation:
    """Gradients -> the update before the schedule, subtracted: learning_rate * scale * direction + decay *
    parameter.

    scales: learning-rate scale of each trainable parameter.  decayed: the names that weight decay touches.
    """
    o = config.optimizer
    directions = {
        "sgd": optax.identity,
        "momentum": lambda: optax.trace(decay=o.momentum),
        "adamw": lambda: optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps),
    }
    if o.name not in directions:
        raise ConfigError(
            f"config.optimizer.name: expected one of {', '.join(OPTIMIZERS)}, found {o.name!r}."
        )

    def scale(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        return map_named(lambda name, update: update * (o.learning_rate * scales[name]), updates)

    transformations = [directions[o.name](), optax.stateless(scale)]
    if o.clip_norm:
        transformations.insert(0, optax.clip_by_global_norm(o.clip_norm))
    if decayed:
        mask = lambda params: map_named(lambda name, _: name in decayed, params)
        transformations.append(optax.add_decayed_weights(o.weight_decay, mask=mask))
    return optax.chain(*transformations)
