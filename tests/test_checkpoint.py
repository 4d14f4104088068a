"""Checkpoints on a disk and in buckets: saved, kept, refused when damaged, restored, replaced."""

import buckets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpt import io
from jaxpt.spec import ModelSpec, UserError
from jaxpt.weights import checkpoint

SPEC = ModelSpec(n_layers=5, d_model=8, d_ff=40, n_heads=6, n_kv_heads=2, d_head=4, vocab_size=96)
PARAMS = {"embed": jnp.arange(96 * 8, dtype=jnp.float32).reshape(96, 8)}
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(params=["disk", "gs", "s3"])
def run(request, tmp_path, monkeypatch):
    """A run directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "disk":
        yield tmp_path / "run"
        return
    with buckets.lead_to(request.param):
        yield io.path(f"{request.param}://bucket/{tmp_path.name}")


def save(checkpointer, step):
    state = {"step": jnp.int32(step)}
    checkpointer.save_async(step, PARAMS, state, SPEC, counts={"n_sequences": 7}, tokenizer=None)
    return checkpointer.wait_until_saved()


def restore(directory, name, tree):
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=HERE), tree
    )
    return checkpoint.restore_tree(directory, name, abstract)


def test_checkpoints_are_kept_restored_found_damaged_and_replaced(run):
    checkpointer = checkpoint.Checkpointer(run, max_to_keep=2)
    for step in (3, 5, 7):
        newest = save(checkpointer, step)
    assert newest == run / "checkpoints/7" == checkpoint.find_newest(run)
    assert checkpoint.list_steps(run) == [5, 7]
    assert not [name for name in io.list_files(run / "checkpoints/3") if "/d/" in name]
    params = restore(newest, "params", PARAMS)
    assert np.array_equal(params["embed"], PARAMS["embed"])
    assert restore(newest, "train_state", {"step": jnp.int32(0)})["step"] == 7

    sizes = io.list_files(newest)
    largest = max((name for name in sizes if "/d/" in name), key=sizes.get)
    io.write_bytes(newest / largest, b"x" * sizes[largest])
    assert checkpoint.find_damage(newest) == f"{largest} was changed (its checksum differs)"
    assert checkpoint.find_newest(run) == run / "checkpoints/5"
    save(checkpoint.Checkpointer(run, max_to_keep=2), 7)
    assert checkpoint.find_newest(run) == newest and checkpoint.list_steps(run) == [5, 7]


def test_what_a_killed_process_left_is_finished_or_removed(tmp_path):
    checkpointer = checkpoint.Checkpointer(tmp_path, max_to_keep=2)
    decided = save(checkpointer, 3)
    home = decided.parent
    decided.rename(home / "3.partial")  # its manifest was written, and none of its files moved
    (home / "5.partial/params").mkdir(parents=True)
    (home / "5.partial.orbax-checkpoint-tmp").mkdir()
    checkpoint.Checkpointer(tmp_path, max_to_keep=2)
    assert io.list_names(home) == ["3"] and checkpoint.find_newest(tmp_path) == decided


def test_what_a_killed_process_left_of_a_bucket_is_finished_or_removed(run, monkeypatch):
    if not isinstance(run, io.BucketPath):
        pytest.skip("a disk's is above")
    checkpointer = checkpoint.Checkpointer(run, max_to_keep=3)
    home = save(checkpointer, 3).parent

    def end(*_):
        raise KeyboardInterrupt  # no Exception, as a kill is none

    with monkeypatch.context() as patched:
        # before anything is decided, and, where a checkpoint is uploaded, once it is
        patched.setattr(io, "seal", end)
        with pytest.raises(KeyboardInterrupt):
            save(checkpointer, 5)
        patched.undo()
        patched.setattr("jaxpt.io.published.upload_files", end)
        if run.scheme == "s3":
            with pytest.raises(KeyboardInterrupt):
                save(checkpointer, 7)
    io.write_text(home / "9/params/d/file", "of another program")
    assert checkpoint.list_steps(run) == [3]
    checkpoint.recover_run(run)
    whole = ["3", "7"] if run.scheme == "s3" else ["3"]
    assert io.list_names(home) == [*whole, "9"] and io.list_working() == []
    assert checkpoint.find_newest(run) == home / whole[-1]
    assert restore(home / whole[-1], "params", PARAMS)["embed"].sum() == PARAMS["embed"].sum()


def test_older_checkpoints_stay_until_the_new_one_is_published(tmp_path, monkeypatch):
    checkpointer = checkpoint.Checkpointer(tmp_path, max_to_keep=1)
    save(checkpointer, 3)

    def fail(*_):
        raise UserError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(io, "publish", fail)
        with pytest.raises(checkpoint.CheckpointSaveError, match="no room"):
            save(checkpointer, 5)
    assert checkpoint.list_steps(tmp_path) == [3]
    save(checkpointer, 5)
    assert checkpoint.list_steps(tmp_path) == [5]


@pytest.mark.parametrize("name", ["a[1]b", "a*b", "a\\b"])
def test_a_name_that_orbax_takes_for_another_is_refused_before_training(tmp_path, name):
    """It would write checkpoints without a number in them."""
    with pytest.raises(UserError, match="cannot be kept below a name with"):
        checkpoint.Checkpointer(tmp_path / name, max_to_keep=1)
