"""Fine-tunes PaliGemma: one process of the job, or all of it on one machine.

    python -m launch.train --config=configs/demo.py --workdir=runs/demo
    python -m launch.train --config=configs/demo.py --workdir=runs/demo --config.steps=100 --fake_devices=8
    python -m launch.train --config=configs/notebook.py --compile_only --topology=v5e:4x4 --dump=/tmp/step

Goes on from the newest checkpoint in the workdir. Exit codes: 0 finished, 1 a bug, 2 bad command line or
config, 3 bad data or weights, 4 diverged, 42 stopped with its state saved, 43 a peer was lost.
"""

from __future__ import annotations

import os
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from launch import entry, membership
from pgdist import heartbeat
from pgdist.errors import ConfigError, Preempted
from pgdist.stop import StopRequest

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
_COMPILE_ONLY = flags.DEFINE_bool(
    "compile_only", False, "Compile the step and say what it costs; no data, no weights, no workdir."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "With --compile_only: TPUs to compile for that need not be here, such as v5e:4x4."
)
_SLICES = flags.DEFINE_integer("slices", 1, "Of the topology, joined by the network.", lower_bound=1)
_DUMP = flags.DEFINE_string(
    "dump", None, "With --compile_only: folder for the program's text and the figures."
)


def main() -> None:
    """Reads the flags, joins the job, trains."""
    if _COMPILE_ONLY.value:
        if _PROFILE.value is not None:
            raise ConfigError("--profile is for steps that run; --compile_only runs none")
        _compile()
        return
    if _TOPOLOGY.value or _DUMP.value or _SLICES.value > 1:
        raise ConfigError("--topology, --slices and --dump are for --compile_only.")
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


def _compile() -> None:
    """Prints what the step costs, on standard output."""
    entry.require("config")
    if _TOPOLOGY.value:
        answers = membership.stay_alone(topology=_TOPOLOGY.value)
    elif _SLICES.value > 1:
        raise ConfigError("--slices is for --topology.")
    else:
        answers = membership.join_job()
    from pgdist import plan
    from pgdist.config import check_values

    check_values(_CONFIG.value)
    devices = plan.describe_devices(_TOPOLOGY.value, slices=_SLICES.value) if _TOPOLOGY.value else None
    if _DUMP.value:
        plan.open_dump(Path(_DUMP.value))
    step = plan.compile_train_step(_CONFIG.value, devices=devices)
    print(plan.describe(step), file=answers, flush=True)
    if _DUMP.value:
        plan.write_dump(step, Path(_DUMP.value))


if __name__ == "__main__":
    entry.run(main, name="train", usage=__doc__)
