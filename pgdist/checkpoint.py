"""Checkpoints of the train state: Orbax behind save, restore and close.

A checkpoint holds what training changes (see `pgdist.train.state`), the fingerprint of the base weights it
belongs to, and a checksum of each array. It is written in the background and appears whole or not at all. One
that cannot be read, or whose numbers are not those that were saved, is set aside, never deleted, and the one
before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from orbax.checkpoint import v1 as ocp

from pgdist import cluster, files
from pgdist.errors import WeightsError

PyTree = Any
_CHECKSUMS = "checksums"


class Checkpoints:
    """The checkpoints in a directory, the newest `keep` of them kept; all processes make the same calls."""

    def __init__(
        self,
        directory: Path | epath.Path,
        *,
        keep: int,
        belongs_to: Mapping[str, str],
        before_save: Callable[[], None] = lambda: None,
    ) -> None:
        """directory: local, or in a bucket.  belongs_to: what a checkpoint is worthless without (the base
        weights' fingerprint); checked at restore.  before_save: called before each save, so that what it makes
        safe is never older than the newest checkpoint.
        """
        self._directory = epath.Path(directory if files.is_url(directory) else directory.absolute())
        self._aside = self._directory.parent / "checkpoints_damaged"
        self._keep = keep
        self._belongs_to = dict(belongs_to)
        self._before_save = before_save
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

    def latest(self) -> int | None:
        """The newest step that has a finished checkpoint, None without any; all processes must call this.

        Raises WeightsError when they do not see the same one.
        """
        step = max(self.steps(), default=-1)
        if not cluster.all_equal(step):
            raise WeightsError(
                f"The processes of this job see different checkpoints in {self._directory} (this one: "
                f"{step}): --workdir must lie on "
                "a filesystem that all of them share."
            )
        return None if step < 0 else step

    def save(self, step: int, state: PyTree) -> None:
        """Starts to write the state after `step` updates; waits only for an earlier save that is still being
        written.
        """
        if step in self.steps():
            return
        self._before_save()
        metadata = self._belongs_to | {_CHECKSUMS: checksums(state)}
        self._checkpointer.save_async(step, state, custom_metadata=metadata)

    def restore(self, abstract_state: PyTree) -> PyTree | None:
        """The newest state that can be read, None without any checkpoint.

        abstract_state: jax.ShapeDtypeStruct leaves with shardings; every array lands on its own. Raises
        WeightsError when a checkpoint belongs to other base weights or holds other arrays, when none of them
        can be read, and when processes see different ones.
        """
        latest = self.latest()
        while (step := self.latest()) is not None:
            state = self._try_load(step, abstract_state)
            if cluster.all_agree(state is not None):
                if checksums(state) == self._checkpointer.metadata(step).custom_metadata.get(_CHECKSUMS):
                    logging.info("Resumed from the checkpoint of step %d.", step)
                    return state
                logging.error("The checkpoint of step %d cannot be read: numbers in it have changed.", step)
            self._set_aside(step)
        if latest is not None:
            raise WeightsError(
                f"None of the checkpoints in {self._directory} can be read; they were moved to "
                f"{self._aside}. Start again to train "
                "from the beginning, or use a new --workdir."
            )
        return None

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        self._checkpointer.close()
        self._checkpointer = self._open()

    def close(self) -> None:
        """Finishes what is being written."""
        self._checkpointer.close()

    def _try_load(self, step: int, abstract_state: PyTree) -> PyTree | None:
        """The state, or None if this process cannot read it: others may, so none of them waits for another
        here.
        """
        context = ocp.Context()
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
        try:
            metadata = self._checkpointer.metadata(step)
            self._check_belongs(step, metadata, abstract_state)
            with context:
                return ocp.load(self._directory / str(step), abstract_state)
        except (WeightsError, MemoryError, jax.errors.JaxRuntimeError):
            raise  # no damage: the checkpoint is another run's, or this machine is too small
        except Exception as error:
            logging.error(
                "The checkpoint of step %d cannot be read (%s: %s).", step, type(error).__name__, error
            )
            return None

    def _check_belongs(self, step: int, metadata: ocp.CheckpointMetadata, abstract_state: PyTree) -> None:
        """Raises WeightsError for a sound checkpoint of another run, and KeyError for damaged metadata."""
        belongs_to = {name: metadata.custom_metadata[name] for name in self._belongs_to}
        path = self._directory / str(step)
        if belongs_to != self._belongs_to:
            raise WeightsError(
                f"{path} was trained on other base weights ({belongs_to}) than config.init gives "
                f"({self._belongs_to}). Give the weights it was started from, or a new --workdir."
            )
        found, wanted = _describe_arrays(metadata.metadata), _describe_arrays(abstract_state)
        # Nothing is found where Orbax's description of the arrays is damaged; they may be sound all the same.
        if found and found != wanted:
            lines = [f"  - {line}" for line in sorted(found - wanted)]
            lines += [f"  + {line}" for line in sorted(wanted - found)]
            raise WeightsError(
                f"{path} holds other arrays (-) than this config trains (+):\n"
                + "\n".join(lines)
                + "\nconfig.trainable, config.optimizer.name and config.model.preset must be those of the "
                "run that saved it; else use a new --workdir."
            )

    def _set_aside(self, step: int) -> None:
        self._checkpointer.close()
        if cluster.is_primary():
            self._aside.mkdir(exist_ok=True)
            if files.is_url(self._aside):  # a folder in a bucket is there when something is in it
                (self._aside / "README.txt").write_text("Checkpoints that could not be read.\n")
            target = self._aside / str(step)
            if target.exists():
                target.rmtree()
            (self._directory / str(step)).rename(target)
            logging.error("Moved the damaged checkpoint of step %d to %s.", step, self._aside)
        cluster.barrier(f"set aside checkpoint {step}")
        self._checkpointer = self._open()


@jax.jit
def _sum_bits(state: PyTree) -> list[jax.Array]:
    def bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)

    return [jnp.sum(bits(leaf), dtype=jnp.uint32) for leaf in jax.tree.leaves(state)]


def checksums(state: PyTree) -> list[int]:
    """The sum of each array's bits as unsigned integers, modulo 2**32: the same on every mesh."""
    return [int(total) for total in jax.device_get(_sum_bits(state))]


def _describe_arrays(tree: PyTree) -> set[str]:
    """`name dtype[shape]` of each leaf, equal for a state and for the dicts that Orbax makes of it."""
    return {
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
