"""Checkpoints of the train state: Orbax behind save, restore and close.

A checkpoint holds what training changes (see `pgdist.train.state`) and the fingerprint of the base weights
it belongs to. It is written in the background and appears whole or not at all. One that cannot be read is
set aside, never deleted, and the one before it is used.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from orbax.checkpoint import v1 as ocp

from pgdist import cluster
from pgdist.errors import WeightsError

PyTree = Any
_UNFINISHED = "orbax-checkpoint-tmp"


class Checkpoints:
    """The checkpoints in a directory, the newest `keep` of them kept; all processes make the same calls."""

    def __init__(self, directory: Path, *, keep: int, belongs_to: Mapping[str, str]) -> None:
        """belongs_to: what a checkpoint is worthless without (the base weights' fingerprint); checked at
        restore.
        """
        self._directory = directory.absolute()
        self._keep = keep
        self._belongs_to = dict(belongs_to)
        self._checkpointer = self._open()

    def _open(self) -> ocp.training.Checkpointer:
        return ocp.training.Checkpointer(
            self._directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """The steps that have a finished checkpoint, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def save(self, step: int, state: PyTree) -> None:
        """Starts to write the state after `step` updates; waits only for an earlier save that is still being
        written.
        """
        if step in self.steps():
            return
        self._checkpointer.save_async(step, state, custom_metadata=self._belongs_to)

    def restore(self, abstract_state: PyTree) -> PyTree | None:
        """The newest state that can be read, None without any.

        abstract_state: jax.ShapeDtypeStruct leaves with shardings; every array lands on its own.
        Raises WeightsError when a checkpoint belongs to other base weights.
        """
        while self.steps():
            step = self.steps()[-1]
            state = self._try_load(step, abstract_state)
            if cluster.all_agree(state is not None):
                logging.info("Resumed from the checkpoint of step %d.", step)
                return state
            self._set_aside(step)
        return None

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        self._checkpointer.close()
        self._checkpointer = self._open()

    def close(self) -> None:
        """Finishes what is being written."""
        self._checkpointer.close()

    def _try_load(self, step: int, abstract_state: PyTree) -> PyTree | None:
        try:
            belongs_to = self._checkpointer.metadata(step).custom_metadata
            state = self._checkpointer.load(step, abstract_state)
            jax.block_until_ready(state)
        except Exception as error:
            logging.error(
                "The checkpoint of step %d cannot be read (%s: %s).", step, type(error).__name__, error
            )
            return None
        if belongs_to != self._belongs_to:
            raise WeightsError(
                f"{self._directory / str(step)} was trained on other base weights ({belongs_to}) than "
                "config.init gives "
                f"({self._belongs_to}). Give the weights it was started from, or a new --workdir."
            )
        return state

    def _set_aside(self, step: int) -> None:
        aside = self._directory.parent / "checkpoints_damaged"
        self._checkpointer.close()
        if cluster.is_primary():
            aside.mkdir(exist_ok=True)
            target = aside / str(step)
            if target.exists():
                shutil.rmtree(target)
            os.replace(self._directory / str(step), target)
            logging.error("Moved the damaged checkpoint of step %d to %s.", step, aside)
        cluster.barrier(f"set aside checkpoint {step}")
        self._checkpointer = self._open()
