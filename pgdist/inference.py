"""A trained model ready to decode: from a finished run's workdir, or from a config and a weights file."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pgdist import hub, weights
from pgdist.config import check_values, check_vocabulary, default_config, fields_of, model_config
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
    """The config that a run recorded, with today's default for a field that it lacks.

    Raises ConfigError where there is no run, or a damaged one.
    """
    recorded = Workdir(workdir).read_config()
    if recorded is None:
        raise ConfigError(
            f"--workdir={workdir}: expected the folder of a training run, found no config.json in it. "
            "Name one that launch.train has written, or give --config and --weights."
        )
    config = default_config()
    known = fields_of(config)
    fields = {name: value for name, value in fields_of(ConfigDict(recorded)).items() if name in known}
    try:
        config.update_from_flattened_dict(fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{Workdir(workdir).config}: {error}") from error
    return config


def open_tokenizer(config: ConfigDict) -> Tokenizer:
    """The config's; ConfigError where it cannot be had, or has more tokens than the model."""
    tokenizer = Tokenizer(hub.fetch_file(config.tokenizer, field="config.tokenizer"))
    check_vocabulary(config, tokenizer.vocab_size)
    return tokenizer


def load_model(config: ConfigDict, path: str | os.PathLike[str]) -> LoadedModel:
    """The config's model with weights by name (as config.init), each array in the dtype that the file has.

    Raises ConfigError for a wrong field, WeightsError where the file does not fit the config's preset.
    """
    check_values(config)
    model = PaliGemma(model_config(config))
    tokenizer = open_tokenizer(config)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    shapes = flatten(parameter_shapes(model.config))
    stored = weights.read_header(path)
    expected = {
        name: jax.ShapeDtypeStruct(leaf.shape, stored[name].dtype if name in stored else jnp.float32)
        for name, leaf in shapes.items()
    }
    shardings = parameter_shardings(mesh, shapes)
    arrays = weights.load(
        path,
        expected=expected,
        shardings=shardings,
        seed=config.seed,
        allow_non_finite=config.init_allow_non_finite,
        layouts=preset_layouts,
    )
    return LoadedModel(model=model, params=unflatten(arrays), tokenizer=tokenizer, mesh=mesh)
