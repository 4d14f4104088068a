"""Merged checkpoints: the mean to the bit, points on the sphere, and what cannot be merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpt.config import MeshConfig
from jaxpt.model import transformer
from jaxpt.sharding import make_mesh
from jaxpt.spec import ModelSpec, UserError
from jaxpt.train import merge
from jaxpt.weights import checkpoint

SPEC = ModelSpec(n_layers=3, d_model=8, d_ff=40, n_heads=6, n_kv_heads=2, d_head=4, vocab_size=96)


def write(run, seed, spec=SPEC, tokenizer=None):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = transformer.init_params(spec, seed, mesh)
    state = {"step": jnp.int32(5)}
    checkpoint.save_checkpoint(run, 5, params, state, spec, counts={}, tokenizer=tokenizer)
    return run


def read(run):
    directory = checkpoint.locate_checkpoint(run)
    names = [name for name in checkpoint.read_array_metadata(directory) if name[:6] == "params"]
    return {name: checkpoint.read_array(directory, name) for name in names}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [write(root / f"run{seed}", seed) for seed in range(3)]


def test_the_mean_of_checkpoints_is_numpys_to_the_bit(runs, tmp_path):
    merge.merge_checkpoints(runs, tmp_path / "mean")
    merged = read(tmp_path / "mean")
    arrays = [read(run) for run in runs]
    assert len(merged) == 12
    for name, array in merged.items():
        expected = np.mean([each[name] for each in arrays], axis=0)
        assert array.tobytes() == expected.tobytes(), name


def test_weights_are_relative(runs, tmp_path):
    merge.merge_checkpoints(runs, tmp_path / "one", weights=[0.0, 4.0, 0.0])
    for name, array in read(tmp_path / "one").items():
        assert np.array_equal(array, read(runs[1])[name]), name


def test_a_point_on_the_sphere_keeps_each_tensors_length_and_meets_both_ends():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 20, 30))
    b = rng.normal(size=(3, 20, 30))
    for tensor in (a, b):
        tensor /= np.linalg.norm(tensor, axis=(1, 2), keepdims=True)
    a, b = (np.float32(scale) * each.astype(np.float32) for scale, each in ((7, a), (7, b)))
    between = merge.mix_spherical(a, b, 0.3, n_stacked=1)
    assert np.allclose(np.linalg.norm(between, axis=(1, 2)), 7, rtol=1e-6)
    angles = [np.arccos(np.sum(x * between, axis=(1, 2)) / 49) for x in (a, b)]
    assert np.allclose(angles[0] / (angles[0] + angles[1]), 0.3, atol=1e-5)
    assert np.allclose(merge.mix_spherical(a, b, 0.0, 1), a, atol=1e-7)
    assert np.allclose(merge.mix_spherical(a, b, 1.0, 1), b, atol=1e-7)
    assert np.array_equal(merge.mix_spherical(a, a, 0.3, 1), a)


@pytest.mark.parametrize(
    "changed, weights, slerp, sentence",
    [
        ({"n_layers": 4}, None, None, "model.n_layers is 4, but 3 in"),
        ({}, [1.0], None, "--weights: expected 2 numbers, one for each checkpoint, whose sum"),
        ({}, [1.0, -1.0], None, "--weights: expected 2 numbers, one for each checkpoint, whose"),
        ({}, None, 1.5, "--slerp: expected a number from 0 to 1, two checkpoints and no --wei"),
        ({"tokenizer": "other"}, None, None, "has another tokenizer than"),
    ],
)
def test_what_cannot_be_merged_is_refused(runs, tmp_path, changed, weights, slerp, sentence):
    tokenizer = changed.pop("tokenizer", None)
    other = write(tmp_path / "other", 9, SPEC.replace(**changed), tokenizer)
    with pytest.raises(UserError, match=sentence):
        merge.merge_checkpoints([runs[0], other], tmp_path / "out", weights, slerp)
    assert not (tmp_path / "out").exists()
