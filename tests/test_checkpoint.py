"""What is restored is what was saved, byte for byte, on any mesh; what is damaged is never loaded; nothing is lost in silence."""

import errno
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax import checkpoint, integrity, shelf
from rlhf_jax.checkpoint import Checkpoints, read
from rlhf_jax.errors import UserError
from rlhf_jax.types import Moments, RunState, TrainState
from tests.digests import read_digest, state_digest


def mesh_of(data, fsdp, tensor):
    devices = np.array(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
    return jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def shardings(state, mesh):
    def place(leaf):
        spec = PartitionSpec("fsdp", "tensor") if leaf.ndim == 2 else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree.map(place, state)


def abstract(state, mesh):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings(state, mesh)
    )


def make_state(seed=0, mesh=None):
    rng = np.random.default_rng(seed)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    def train_state():
        params = {
            "layers": {"w": rng.normal(size=(16, 8)).astype(np.float32), "scale": rng.normal(size=8).astype(jnp.bfloat16)},
            "blocks": [rng.normal(size=(8, 8)).astype(np.float32)],
        }
        opt_state = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype(leaf.dtype), tx.init(params))
        return TrainState(step=np.int32(rng.integers(100)), params=params, opt_state=opt_state)

    state = RunState(
        step=np.int32(7),
        cursor=np.int32(56),
        actor=train_state(),
        critic=train_state(),
        ema=None,
        kl_coef=np.float32(0.07),
        scores=Moments(count=np.float32(9), mean=np.float32(0.5), m2=np.float32(2)),
        best=np.float32(-np.inf),
        bad_steps=np.int32(1),
        alarms=np.arange(6, dtype=np.int32),
    )
    return jax.device_put(state, shardings(jax.tree.map(jnp.asarray, state), mesh or mesh_of(1, 4, 2)))


@pytest.fixture(scope="module")
def state():
    return make_state()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    """Checkpoints 10, 20 and 30 of states 10, 20, 30; tests copy it."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, keep_last=3) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, state.replace(step=state.step * 0 + step), {"note": f"at {step}"})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def largest_file(path):
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def equal(a, b):
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(same))


def test_round_trip_keeps_bytes_types_structure_and_shardings(tmp_path, state):
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(state) is None
        checkpoints.save(7, state, {"data_epoch": 2, "nested": {"a": [1, None, "x"]}})
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored = checkpoints.restore(abstract(state, mesh_of(1, 4, 2)))
    assert restored is not None
    assert (restored.step, restored.extra) == (7, {"data_epoch": 2, "nested": {"a": [1, None, "x"]}})
    assert equal(restored.state, state)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored.state) == shardings(state, mesh_of(1, 4, 2))
    assert state_digest(restored.state) == state_digest(state) == read_digest(tmp_path / "c" / "7")


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 1), (2, 2, 2), (1, 8, 1), (1, 1, 8)])
def test_another_mesh_gets_equal_bytes(saved, state, shape):
    mesh = mesh_of(*shape)
    with Checkpoints(saved, keep_last=3) as checkpoints:
        restored = checkpoints.restore(abstract(state, mesh))
    assert restored is not None
    assert equal(restored.state, state.replace(step=state.step * 0 + 30))
    assert restored.state.actor.params["layers"]["w"].sharding.mesh.devices.size == mesh.devices.size


def test_arrays_can_be_read_by_name_without_the_model(saved, state):
    arrays = read(saved / "30")
    assert arrays["actor/params/layers/scale"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(arrays["critic/params/blocks/0"], np.asarray(state.critic.params["blocks"][0]))


def test_a_state_that_is_donated_right_after_save_is_saved_as_it_was(tmp_path):
    state = {f"w{n}": jnp.full((256, 512), float(n)) for n in range(8)}
    advance = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * -1.0 - 7.0, tree), donate_argnums=0)
    with Checkpoints(tmp_path, keep_last=20) as checkpoints:
        digests = {}
        for step in range(1, 9):
            digests[step] = state_digest(state)
            checkpoints.save(step, state)
            state = advance(state)
            for _ in range(3):  # reuse the memory that was given back
                state = advance(state)
    assert {step: read_digest(tmp_path / str(step)) for step in digests} == digests


def test_keeps_the_last_ones_and_every_mth(tmp_path):
    with Checkpoints(tmp_path, keep_last=2, keep_every=10) as checkpoints:
        for step in (5, 10, 15, 20, 25, 30, 35):
            checkpoints.save(step, {"x": jnp.float32(step)})
            checkpoints.wait()
        assert checkpoints.steps() == [10, 20, 30, 35]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20", "30", "35", "LATEST"]


def test_saving_a_step_twice_writes_it_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, {"x": jnp.float32(1)})
        checkpoints.wait()
        before = (tmp_path / "5" / "manifest.json").stat().st_mtime_ns
        checkpoints.save(5, {"x": jnp.float32(1)})
    assert (tmp_path / "5" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("killed", [False, True])
def test_a_checkpoint_is_replaced_and_comes_back_where_a_kill_came_before_the_new_one(tmp_path, monkeypatch, killed):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, {"x": jnp.float32(1)}, {"owes": True})
        checkpoints.wait()
    if killed:
        monkeypatch.setattr(Checkpoints, "_finish", lambda self, step, response: response.result())
    with Checkpoints(tmp_path, say=lambda text: None) as checkpoints:
        checkpoints.restore({"x": jnp.float32(0)})
        checkpoints.save(5, {"x": jnp.float32(2)}, replace=True)
    assert (tmp_path / "5").exists() != killed
    with Checkpoints(tmp_path, say=lambda text: None) as checkpoints:
        found = checkpoints.restore({"x": jnp.float32(0)})
    assert found is not None
    assert (float(found.state["x"]), found.extra) == ((1.0, {"owes": True}) if killed else (2.0, {}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "LATEST"]


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


HARMS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": flip_a_bit,
    "deleted": lambda path: path.unlink(),
    "zeroed": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(folder, state, harm):
    victim = largest_file(folder / "30")
    harm(victim)
    told = []
    with Checkpoints(folder, say=told.append) as checkpoints:
        restored = checkpoints.restore(abstract(state, mesh_of(1, 4, 2)))
        assert restored is not None
        assert (restored.step, int(restored.state.step), restored.extra) == (20, 20, {"note": "at 20"})
        assert len(told) == 1
        assert victim.name in told[0]
        assert "falling back to checkpoint 20" in told[0]
        assert (folder / "30.broken").is_dir()
        assert (folder / "LATEST").read_text() == "20\n"
        checkpoints.save(30, restored.state)  # the step is reached again
    assert checkpoints.steps() == [20, 30]
    assert integrity.problems(folder / "30", step=30) == []


def test_two_damaged_ones_fall_back_twice(folder, state):
    flip_a_bit(folder / "30" / "manifest.json")
    flip_a_bit(folder / "20" / "checkpoint.json")
    told = []
    with Checkpoints(folder, say=told.append) as checkpoints:
        restored = checkpoints.restore(state)
    assert restored is not None
    assert restored.step == 10
    assert ["manifest.json" in told[0], "checkpoint.json" in told[1]] == [True, True]


def test_when_all_are_damaged_the_run_stops_lists_them_and_deletes_nothing(folder, state):
    for step in (10, 20, 30):
        flip_a_bit(largest_file(folder / str(step)))
    before = sorted(folder.rglob("*"))
    with Checkpoints(folder) as checkpoints, pytest.raises(UserError) as caught:
        checkpoints.restore(state)
    lines = str(caught.value).splitlines()
    assert [f"/{step}/" in line for step, line in zip((30, 20, 10), lines[1:4], strict=True)] == [True] * 3
    assert "--from-scratch" in lines[-1]
    assert len(lines) <= 15
    assert sorted(folder.rglob("*")) == before


def test_checkpoints_that_are_gone_are_missed(folder, state):
    for step in (10, 20, 30):
        shutil.rmtree(folder / str(step))
    with Checkpoints(folder) as checkpoints, pytest.raises(UserError, match="names checkpoint 30, but no checkpoint is there"):
        checkpoints.restore(state)


def test_the_newest_one_that_somebody_removed_is_told(folder, state):
    shutil.rmtree(folder / "30")
    told = []
    with Checkpoints(folder, say=told.append) as checkpoints:
        restored = checkpoints.restore(state)
    assert restored is not None
    assert restored.step == 20
    assert "LATEST names checkpoint 30, which is gone" in told[0]


@pytest.mark.parametrize("latest", ["20\n", "garbage", None])
def test_what_a_kill_just_after_a_checkpoint_was_finished_left_undone_is_done(folder, state, latest):
    (folder / "LATEST").rename(folder / "LATEST.partial")
    if latest is not None:
        (folder / "LATEST").write_text(latest)
    with Checkpoints(folder, keep_last=2, say=lambda text: None) as checkpoints:
        restored = checkpoints.restore(state)
    assert restored is not None
    assert restored.step == 30
    assert (folder / "LATEST").read_text() == "30\n"
    assert sorted(path.name for path in folder.iterdir()) == ["20", "30", "LATEST"]


def test_a_latest_that_cannot_be_written_is_told_with_what_was_saved(folder, state, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "LATEST.partial")

    monkeypatch.setattr(integrity, "write_latest", full)
    checkpoints = Checkpoints(folder)
    checkpoints.save(40, state)
    with pytest.raises(
        UserError, match=r"^checkpoint 40 is written, but not what follows it \(LATEST, [^!]* Checkpoint 40 is intact"
    ):
        checkpoints.wait()
    with pytest.raises(UserError, match=r"LATEST.partial cannot be written: No space left on device. Checkpoint 40 is intact"):
        checkpoints.restore(state)
    checkpoints.close()


def test_200_flips_in_a_real_checkpoint_are_all_found(folder):
    rng = np.random.default_rng(2)
    files = [path for path in (folder / "30").rglob("*") if path.is_file() and path.stat().st_size]
    sizes = np.array([path.stat().st_size for path in files])
    found = 0
    for number in range(200):
        path = files[number % len(files)] if number < 100 else files[rng.choice(len(files), p=sizes / sizes.sum())]
        good = path.read_bytes()
        bad = bytearray(good)
        bit = int(rng.integers(8 * len(bad)))
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        found += bool(integrity.problems(folder / "30", step=30))
        path.write_bytes(good)
    assert found == 200
    assert integrity.problems(folder / "30", step=30) == []


def test_a_state_of_another_shape_is_refused_with_names(folder, state):
    other = state.replace(kl_coef=jnp.zeros(2), ema={"w": jnp.zeros(3)}, critic=None)
    with Checkpoints(folder) as checkpoints, pytest.raises(UserError) as caught:
        checkpoints.restore(other)
    text = str(caught.value)
    assert "does not fit this run; 13 arrays differ" in text
    assert "critic/opt_state/1/0/count: saved int32[], this run has nothing" in text
    assert len(text.splitlines()) <= 15
    assert checkpoints.steps() == [10, 20, 30]


def test_left_overs_of_a_kill_are_removed_and_told_and_nothing_else_is(folder, state):
    for name in ("40.partial", "5.deleting"):
        shutil.copytree(folder / "30", folder / name)
    (folder / "41.partial").mkdir()
    (folder / "42.partial").mkdir()
    (folder / "42.partial" / "thesis.tex").write_text("not ours")
    (folder / "7").mkdir()
    (folder / "7" / "notes").write_text("not ours")
    (folder / "30.broken").mkdir()
    told = []
    with Checkpoints(folder, keep_last=1, say=told.append) as checkpoints:
        restored = checkpoints.restore(state)
        assert restored is not None
        checkpoints.save(31, restored.state)
    assert sorted(path.name for path in folder.iterdir()) == ["30.broken", "31", "42.partial", "7", "LATEST"]
    assert [line.split(":")[0] for line in told] == [
        f"removed {folder / name}" for name in ("40.partial", "41.partial", "5.deleting")
    ]


def test_what_threads_of_a_failed_save_put_back_is_removed_by_the_next(folder, state):
    """A disk that was really full left `40.partial` without its marker, and every later start failed on it."""
    for name in ("40.partial", "41.partial"):
        (folder / name / "state.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
        (folder / name / "state.orbax-checkpoint-tmp" / "d" / "half").write_text("…")
    (folder / "41.partial" / "state").symlink_to(folder / "30")
    told = []
    with Checkpoints(folder, say=told.append) as checkpoints:
        restored = checkpoints.restore(state)
        (folder / "40.partial" / "state" / "d").mkdir(parents=True)  # and again, within one process
        checkpoints.save(40, restored.state)
    assert told == [f"removed {folder / '40.partial'}: left over from a save that was interrupted"]
    assert checkpoints.steps()[-1] == 40
    assert (folder / "41.partial" / "state").is_symlink()


def test_a_link_is_no_checkpoint(folder, state, tmp_path):
    (folder / "30").rename(tmp_path / "elsewhere")
    (folder / "30").symlink_to(tmp_path / "elsewhere")
    with Checkpoints(folder, say=lambda text: None) as checkpoints:
        restored = checkpoints.restore(state)
    assert restored is not None
    assert restored.step == 20


def test_too_little_space_is_told_before_anything_is_written(folder, state, monkeypatch):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with Checkpoints(folder) as checkpoints:
        for call in (lambda: checkpoints.require_space(state), lambda: checkpoints.save(40, state)):
            with pytest.raises(UserError) as caught:
                call()
            assert "has 0.01 MB free and a checkpoint needs 1.05 MB" in str(caught.value)
            assert "Checkpoint 30 is intact" in str(caught.value)
    assert checkpoints.steps() == [10, 20, 30]
    assert not (folder / "40.partial").exists()


@pytest.mark.parametrize("surfaces", ["next save", "wait", "check", "close"])
def test_a_failure_in_the_background_is_never_lost(folder, state, monkeypatch, surfaces):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "data")

    monkeypatch.setattr(integrity, "write_manifest", full)
    checkpoints = Checkpoints(folder)
    checkpoints.save(40, state)
    checkpoints._saving[2].exception()  # finished, and failed
    calls = {
        "next save": lambda: checkpoints.save(50, state),
        "wait": checkpoints.wait,
        "check": checkpoints.check,
        "close": checkpoints.close,
    }
    with pytest.raises(UserError) as caught:
        calls[surfaces]()
    text = str(caught.value)
    assert "checkpoint 40 could not be written" in text
    assert "Free 0.0" in text
    assert "Checkpoint 30 is intact" in text
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20", "30", "LATEST"]
    monkeypatch.undo()
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(50, state)  # the disk has room again
    assert checkpoints.steps()[-1] == 50


def test_a_process_that_alone_cannot_write_says_so_before_it_waits_for_the_others(folder, state, monkeypatch, caplog):
    monkeypatch.setattr(integrity, "sync_path", lambda *_: 1 / 0)
    checkpoints = Checkpoints(folder)
    checkpoints.save(40, state)
    checkpoints._saving[2].exception()
    monkeypatch.setattr(checkpoint.processes, "is_writer", lambda: False)
    monkeypatch.setattr(checkpoint.processes, "fail_together", lambda _: None)  # the others never come to it
    checkpoints.wait()
    assert "checkpoint 40 could not be written" in caplog.text


def test_the_first_error_is_the_one_raised_and_the_late_one_is_told(folder, state, monkeypatch):
    monkeypatch.setattr(integrity, "write_manifest", lambda *_: 1 / 0)
    told = []

    def loop():
        with Checkpoints(folder, say=told.append) as checkpoints:
            checkpoints.save(40, state)
            raise KeyError("loop")

    with pytest.raises(KeyError, match="loop"):
        loop()
    assert "checkpoint 40 could not be written" in told[0]


def test_a_nan_in_extra_and_a_slash_in_a_key_are_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="JSON"):
            checkpoints.save(1, {"x": jnp.zeros(2)}, {"best": float("nan")})
        with pytest.raises(ValueError, match="cannot be a name"):
            checkpoints.save(1, {"a/b": jnp.zeros(2)})


@pytest.mark.parametrize("keys", [{"keep_last": 0}, {"keep_every": 0}])
def test_retention_of_nothing_is_refused(tmp_path, keys):
    with pytest.raises(UserError, match="keep_"):
        Checkpoints(tmp_path, **keys)


def test_a_manifest_lists_every_file(saved):
    files = json.loads((saved / "30" / "manifest.json").read_text())["files"]
    assert set(files) == {path.relative_to(saved / "30").as_posix() for path in (saved / "30").rglob("*") if path.is_file()} - {
        "manifest.json"
    }


def test_a_process_that_is_faster_than_the_first_leaves_its_hashes_beside_the_checkpoint(tmp_path, monkeypatch):
    """Inside, they would be taken for a part of it, and their final name would vanish while the first process reads."""
    keep = Checkpoints(tmp_path, keep_last=1)
    stale = shelf.part(tmp_path, 20, 1)
    stale.write_text("{}")
    (tmp_path / "20.part1.partial").write_text("{}")
    assert keep._prepare(30, 0, "{}") == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["30.partial"]
    ours, theirs = (tmp_path / "30.partial" / "state" / f"ocdbt.process_{n}" / "data" for n in (0, 1))
    for path in (ours, theirs):
        path.parent.mkdir(parents=True)
        path.write_text(path.parent.name)
    done = SimpleNamespace(result=lambda: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        keep._finish(30, done)
    assert integrity.problems(tmp_path / "30", step=30) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["30", "LATEST"]
    theirs = tmp_path / "30" / "state" / "ocdbt.process_1" / "data"
    theirs.write_text("another")
    assert len(integrity.problems(tmp_path / "30", step=30)) == 1
