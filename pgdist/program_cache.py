"""Where compiled programs are kept, so that the next start of a run reads them instead of compiling again.

JAX keeps them, by program, flags, versions and devices; here is chosen only in which folder. The processes of one job
must all find a program or all miss it: on GPUs those that compile wait for the others' share of the measurements.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax
from absl import logging
from jax.experimental.compilation_cache import compilation_cache

from pgdist import files
from pgdist.hub import cache

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
IN_WORKDIR = "compilation_cache"


def open_cache(workdir: str) -> Path | None:
    """Chooses the folder before anything large is compiled; None where nothing is kept.

    What JAX was told already wins, by JAX_COMPILATION_CACHE_DIR or otherwise; an empty name means none. Else a process
    that is alone has a folder of its user's, `programs` beside what pgdist has fetched; several share one in `workdir`,
    which all of them see: none where that is "" or a bucket.  A folder that cannot be made is said, and left alone.

    Several processes on CPUs keep nothing, whatever JAX was told: a program that jaxlib 0.10.2 reads back no longer
    keeps the order of its collectives, so that processes send each other the wrong ones and abort.
    """
    if jax.default_backend() == "cpu" and jax.process_count() > 1:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
        return None
    if (chosen := jax.config.jax_compilation_cache_dir or os.environ.get(VARIABLE)) is not None:
        # JAX would take an empty one for the current folder, for some of what it keeps.
        jax.config.update("jax_compilation_cache_dir", chosen or None)
        return Path(chosen) if chosen else None
    if jax.process_count() == 1:
        folder = cache.folder() / "programs"
    elif workdir and not files.is_url(workdir):
        folder = Path(workdir).expanduser().absolute() / IN_WORKDIR
    else:
        return None
    try:
        # Who may write here may make this user run any program.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        logging.warning("Compiled programs are not kept: %s: %s. Set %s.", folder, error.strerror, VARIABLE)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
