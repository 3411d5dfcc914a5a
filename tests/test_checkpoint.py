"""Checkpoints: the newest that can be read is used, damaged ones are set aside, those of others refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from pgdist.checkpoint import Checkpoints, checksums
from pgdist.errors import WeightsError
from pgdist.mesh import make_mesh, parameter_sharding
from pgdist.parameters import flatten, unflatten
from pgdist.train.state import TrainState, init_state, state_shardings

# A load that fails leaves tasks of Orbax behind that nobody waits for.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# Large enough to lie in a file of their own, small enough to be quick.
SHAPES = {"llm/layers/mlp/linear": (2, 64, 32), "llm/final_norm/scale": (32,)}
BASE = {"base_weights": "abc"}


def shardings_on(mesh: Mesh, optimizer: optax.GradientTransformation, shapes: dict = SHAPES) -> TrainState:
    leaves = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    placement = {name: parameter_sharding(mesh, name, shape) for name, shape in shapes.items()}
    return state_shardings(optimizer, unflatten(placement), unflatten(leaves), mesh)


def random_state(step: int, *, mesh: Mesh, shapes: dict = SHAPES, optimizer=None) -> TrainState:
    """Parameters and Adam's moments drawn by the step."""
    optimizer = optax.scale_by_adam() if optimizer is None else optimizer
    shardings = shardings_on(mesh, optimizer, shapes)
    rng = np.random.default_rng(step)

    def draw(leaf: jax.Array, sharding) -> jax.Array:
        return jax.device_put(rng.standard_normal(leaf.shape).astype(leaf.dtype), sharding)

    zeros = unflatten({name: jnp.zeros(shape) for name, shape in shapes.items()})
    state = jax.tree.map(draw, init_state(optimizer, zeros, shardings), shardings)
    return state.replace(step=jax.device_put(jnp.int32(step), shardings.step))


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same_state(found: TrainState | None, expected: TrainState) -> None:
    assert found is not None
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(data=2)


@pytest.fixture
def open_checkpoints(tmp_path):
    """open_checkpoints() -> the Checkpoints of one directory, closed at the end of the test."""
    opened: list[Checkpoints] = []

    def open_(*, keep: int = 2, belongs_to: dict[str, str] = BASE) -> Checkpoints:
        for before in opened:
            before.close()
        opened.append(Checkpoints(tmp_path / "checkpoints", keep=keep, belongs_to=belongs_to))
        return opened[-1]

    yield open_
    for checkpoints in opened:
        checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, mesh) -> Path:
    """A directory with checkpoints of steps 4 and 8."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(directory, keep=2, belongs_to=BASE)
    for step in (4, 8):
        checkpoints.save(step, random_state(step, mesh=mesh))
    checkpoints.close()
    return directory


@pytest.fixture
def directory(saved, tmp_path) -> Path:
    """A copy of `saved`, to be damaged."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_without_checkpoints_there_is_nothing_to_restore(open_checkpoints, mesh):
    assert open_checkpoints().restore(abstract(random_state(0, mesh=mesh))) is None


def test_the_newest_state_comes_back_to_the_bit_on_its_shardings(directory, open_checkpoints, mesh):
    expected = random_state(8, mesh=mesh)

    found = open_checkpoints().restore(abstract(expected))

    assert_same_state(found, expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.sharding == other.sharding


@pytest.mark.parametrize("other", [{"data": 8}, {"devices": 1}])
def test_a_state_comes_back_on_another_mesh(directory, open_checkpoints, mesh, other):
    devices = jax.devices()[: other["devices"]] if "devices" in other else None
    template = random_state(0, mesh=make_mesh(data=other.get("data", 1), devices=devices))

    found = open_checkpoints().restore(abstract(template))

    assert_same_state(found, random_state(8, mesh=mesh))
    for one, expected in zip(jax.tree.leaves(found), jax.tree.leaves(template), strict=True):
        assert one.sharding == expected.sharding
    assert checksums(found) == checksums(random_state(8, mesh=mesh))


def test_the_newest_are_kept(open_checkpoints, mesh, tmp_path):
    checkpoints = open_checkpoints(keep=2)
    for step in (1, 2, 3, 5):
        checkpoints.save(step, random_state(step, mesh=mesh))
    checkpoints.wait()

    assert checkpoints.steps() == [3, 5]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "5"]


def test_a_step_that_is_saved_already_is_left_alone(directory, open_checkpoints, mesh):
    checkpoints = open_checkpoints()
    checkpoints.save(8, random_state(0, mesh=mesh))
    checkpoints.wait()

    assert_same_state(checkpoints.restore(abstract(random_state(0, mesh=mesh))), random_state(8, mesh=mesh))


def test_saving_does_not_keep_the_state_from_being_donated(open_checkpoints, mesh):
    """The next step overwrites the arrays while they are being written."""
    checkpoints, state = open_checkpoints(), random_state(1, mesh=mesh)
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 + 7, state), donate_argnums=0)

    checkpoints.save(1, state)
    state = step(state)
    checkpoints.wait()

    assert_same_state(checkpoints.restore(abstract(state)), random_state(1, mesh=mesh))


def largest_file(checkpoint: Path, pattern: str) -> Path:
    return max(checkpoint.glob(pattern), key=lambda path: path.stat().st_size)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def turn_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DATA = "state/ocdbt.process_0/d/*"
DAMAGES = [
    pytest.param(DATA, truncate, id="truncated data"),
    pytest.param(DATA, Path.unlink, id="missing data"),
    pytest.param(DATA, empty, id="empty data"),
    pytest.param(DATA, turn_a_byte, id="one wrong byte in the data"),
    pytest.param("state/d/*", truncate, id="truncated index"),
    pytest.param("state/manifest.ocdbt", Path.unlink, id="missing manifest"),
    pytest.param("state/_METADATA", truncate, id="truncated metadata of the arrays"),
    pytest.param("state/_METADATA", Path.unlink, id="missing metadata of the arrays"),
    pytest.param("_CHECKPOINT_METADATA", truncate, id="truncated metadata"),
    pytest.param("_CHECKPOINT_METADATA", Path.unlink, id="missing metadata"),
    pytest.param("state", shutil.rmtree, id="missing state"),
]


@pytest.mark.parametrize(("pattern", "damage"), DAMAGES)
def test_a_damaged_newest_is_reported_and_set_aside_and_the_one_before_used(
    directory, open_checkpoints, mesh, caplog, pattern: str, damage: Callable[[Path], None]
):
    damage(largest_file(directory / "8", pattern))
    checkpoints = open_checkpoints()

    found = checkpoints.restore(abstract(random_state(0, mesh=mesh)))

    assert_same_state(found, random_state(4, mesh=mesh))
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert any("step 8 cannot be read" in message for message in errors)
    aside = directory.parent / "checkpoints_damaged" / "8"
    assert any(str(aside.parent) in message for message in errors)
    assert aside.is_dir() and not (directory / "8").exists()  # kept, for who wants to look
    # The run gets to step 8 again, and its checkpoint is a good one.
    checkpoints.save(8, random_state(80, mesh=mesh))
    checkpoints.wait()
    assert_same_state(checkpoints.restore(abstract(found)), random_state(80, mesh=mesh))


def test_when_all_are_damaged_it_says_so_and_only_the_next_start_is_a_new_one(
    directory, open_checkpoints, mesh, caplog
):
    for step in ("4", "8"):
        truncate(largest_file(directory / step, DATA))

    checkpoints = open_checkpoints()

    with pytest.raises(
        WeightsError, match="None of the checkpoints .* Start again to train from the beginning"
    ):
        checkpoints.restore(abstract(random_state(0, mesh=mesh)))

    assert checkpoints.restore(abstract(random_state(0, mesh=mesh))) is None
    assert checkpoints.steps() == []
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert all(any(f"step {step} cannot be read" in message for message in errors) for step in (4, 8))
    aside = directory.parent / "checkpoints_damaged"
    assert sorted(path.name for path in aside.iterdir()) == ["4", "8"]


def test_a_second_damaged_checkpoint_of_a_step_replaces_the_first_aside(directory, open_checkpoints, mesh):
    for _ in range(2):
        truncate(largest_file(directory / "8", DATA))
        checkpoints = open_checkpoints()
        assert_same_state(
            checkpoints.restore(abstract(random_state(0, mesh=mesh))), random_state(4, mesh=mesh)
        )
        checkpoints.save(8, random_state(8, mesh=mesh))
        checkpoints.close()


def test_an_unfinished_checkpoint_is_ignored_and_goes(directory, open_checkpoints, mesh):
    unfinished = directory / "12.orbax-checkpoint-tmp"
    shutil.copytree(directory / "8", unfinished)

    checkpoints = open_checkpoints()

    assert checkpoints.steps() == [4, 8]
    assert_same_state(checkpoints.restore(abstract(random_state(0, mesh=mesh))), random_state(8, mesh=mesh))
    checkpoints.save(12, random_state(12, mesh=mesh))
    checkpoints.wait()
    assert checkpoints.steps() == [8, 12]
    assert not unfinished.exists()


def assert_untouched(directory: Path) -> None:
    assert sorted(path.name for path in directory.iterdir()) == ["4", "8"]
    assert not (directory.parent / "checkpoints_damaged").exists()


def test_other_base_weights_are_refused_and_nothing_is_set_aside(directory, open_checkpoints, mesh):
    checkpoints = open_checkpoints(belongs_to={"base_weights": "xyz"})

    with pytest.raises(
        WeightsError, match="other base weights.*abc.*config.init.*xyz.*new --workdir"
    ) as refused:
        checkpoints.restore(abstract(random_state(0, mesh=mesh)))

    assert refused.value.exit_code == 3
    assert_untouched(directory)


OTHER_SHAPES = {
    "fewer": ({"llm/final_norm/scale": (32,)}, "- trainable/llm/layers/mlp/linear float32"),
    "more": (SHAPES | {"img/head/bias": (32,)}, r"\+ trainable/img/head/bias float32\[32\]"),
    "smaller": (SHAPES | {"llm/final_norm/scale": (16,)}, r"\+ trainable/llm/final_norm/scale float32\[16\]"),
}


@pytest.mark.parametrize("case", OTHER_SHAPES)
def test_other_trainable_arrays_are_refused_and_not_taken_for_damage(directory, open_checkpoints, mesh, case):
    shapes, expected = OTHER_SHAPES[case]

    with pytest.raises(WeightsError, match=f"(?s)holds other arrays.*{expected}.*config.trainable"):
        open_checkpoints().restore(abstract(random_state(0, mesh=mesh, shapes=shapes)))

    assert_untouched(directory)


def test_another_optimizer_is_refused_and_not_taken_for_damage(directory, open_checkpoints, mesh):
    template = random_state(0, mesh=mesh, optimizer=optax.identity())

    with pytest.raises(WeightsError, match="(?s)- opt_state/mu/llm/final_norm/scale.*config.optimizer.name"):
        open_checkpoints().restore(abstract(template))

    assert_untouched(directory)


def test_checksums_see_any_changed_bit(mesh):
    state = random_state(1, mesh=mesh)
    before = checksums(state)

    scale = np.array(flatten(state.trainable)["llm/final_norm/scale"])
    scale.view(np.uint32)[5] ^= 1
    state.trainable["llm"]["final_norm"]["scale"] = jax.device_put(scale)

    assert len(before) == len(jax.tree.leaves(state))
    assert sum(one != other for one, other in zip(checksums(state), before, strict=True)) == 1
