"""Fine-tunes PaliGemma: one process of the job, or all of it on one machine.

    python -m launch.train --config=configs/demo.py --workdir=runs/demo
    python -m launch.train --config=configs/demo.py --workdir=runs/demo --config.steps=100 --fake_devices=8
    python -m launch.train --config=configs/notebook.py --compile_only --topology=v5e:4x4 --dump=/tmp/step

Goes on from the newest checkpoint in the workdir. Exit codes: 0 finished, 1 a bug, 2 bad command line or
config, 3 bad data or weights, 4 diverged, 42 stopped with its state saved, 43 a peer was lost.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags, logging
from ml_collections import config_flags

from launch import compile_only, entry, membership
from pgdist import heartbeat
from pgdist.errors import ConfigError, Preempted
from pgdist.stop import StopRequest

if TYPE_CHECKING:
    import jax

    from pgdist.plan import CompiledStep

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Python file with get_config(); fields: --config.a.b=VALUE."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, report.")
_FORK = flags.DEFINE_bool("fork", False, "Go on in a workdir that a run of another config began.")
_PROFILE = flags.DEFINE_string(
    "profile",
    None,
    "STEP:COUNT: trace so many steps into WORKDIR/profile, for xprof, TensorBoard and Perfetto.",
)


def main() -> None:
    """Reads the flags, joins the job, trains."""
    if compile_only.is_wanted():
        if _PROFILE.value is not None:
            raise ConfigError("--profile is for steps that run; --compile_only runs none")
        entry.require("config")
        compile_only.run(_compile)
        return
    entry.require("config", "workdir")
    # An agent counts the signals itself, and everybody may have been sent them.
    with StopRequest(second_ends=heartbeat.VARIABLE not in os.environ) as stop:
        heartbeat.beat("starting")
        membership.join_job()
        from pgdist import cluster
        from pgdist.finetune import finetune
        from pgdist.train.profile import parse_profiled_steps

        profile = None if _PROFILE.value is None else parse_profiled_steps(_PROFILE.value)
        try:
            finetune(
                _CONFIG.value,
                workdir=_WORKDIR.value,
                should_stop=stop.is_wanted,
                fork=_FORK.value,
                profile=profile,
            )
        except Preempted:
            cluster.leave()  # all stop at the same step: nobody may go while another still writes
            raise
        if cluster.is_primary():
            logging.info("Done. See report.html and model.npz in %s.", _WORKDIR.value)
        cluster.leave()


def _compile(devices: Sequence[jax.Device] | None) -> CompiledStep:
    from pgdist import plan
    from pgdist.config import check_values

    check_values(_CONFIG.value)
    return plan.compile_train_step(_CONFIG.value, devices=devices)


if __name__ == "__main__":
    entry.run(main, name="train", usage=__doc__)
