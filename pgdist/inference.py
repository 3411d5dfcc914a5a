"""A trained model ready to decode: from a finished run's workdir, or from a config and a weights file."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pgdist import weights
from pgdist.config import check_vocabulary, model_config
from pgdist.data.tokenizer import Tokenizer
from pgdist.errors import ConfigError
from pgdist.mesh import make_mesh, parameter_shardings
from pgdist.models.paligemma import PaliGemma, parameter_shapes
from pgdist.models.presets import preset_layouts
from pgdist.parameters import flatten, unflatten
from pgdist.workdir import Workdir

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """What decoding needs: params is the nested tree, placed on `mesh`."""

    model: PaliGemma
    params: PyTree
    tokenizer: Tokenizer
    mesh: Mesh


def read_run_config(workdir: str | os.PathLike[str]) -> ConfigDict:
    """The config that a run recorded; ConfigError where there is no run."""
    path = Workdir(workdir).config
    try:
        return ConfigDict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--workdir={workdir}: expected a run's folder with its config.json, found: {error}. Name "
            "the --workdir of a training run, "
            "or give --config and --weights."
        ) from error


def load_model(config: ConfigDict, path: str | os.PathLike[str]) -> LoadedModel:
    """The config's model with the weights of an npz, each array in the dtype that the file has.

    Raises WeightsError where the file does not fit the config's preset.
    """
    model = PaliGemma(model_config(config))
    tokenizer = Tokenizer(config.tokenizer)
    check_vocabulary(config, tokenizer.vocab_size)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    shapes = flatten(parameter_shapes(model.config))
    stored = weights.read_header(path)
    expected = {
        name: jax.ShapeDtypeStruct(leaf.shape, stored[name].dtype if name in stored else jnp.float32)
        for name, leaf in shapes.items()
    }
    shardings = parameter_shardings(mesh, shapes)
    arrays = weights.load(path, expected=expected, shardings=shardings, layouts=preset_layouts)
    return LoadedModel(model=model, params=unflatten(arrays), tokenizer=tokenizer, mesh=mesh)
