"""Import and export: bit-equal round trips, every key accounted for."""

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import variants
from conftest import ROOT

from jaxpt import config, export, sharding
from jaxpt.families import family
from jaxpt.growth.apply import grow_params
from jaxpt.growth.growth import Parent
from jaxpt.growth.parse import plan_growth
from jaxpt.model import decode, transformer
from jaxpt.spec import ModelSpec, RopeScaling, UserError
from jaxpt.stage import read_manifest
from jaxpt.train import initial_run
from jaxpt.weights import checkpoint, huggingface, load, safetensors_file


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 4, "tensor": 2}])
def test_a_restore_reads_small_chunks_into_place_on_any_mesh(sizes, tmp_path, monkeypatch, one):
    """Of arrays in several chunks, saved from another mesh; a directory's name is no URL."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 3000)
    home = sharding.make_mesh(config.MeshConfig(fsdp=2, tensor=4))
    spec = ModelSpec(
        n_layers=5, d_model=24, d_ff=40, n_heads=8, n_kv_heads=4, d_head=6, vocab_size=96
    )
    params = transformer.init_params(spec, 3, home)
    step_dir = checkpoint.save_checkpoint(
        tmp_path / "a %20 run", 7, params, {"step": jnp.int32(7)}, spec, counts={}, tokenizer=None
    )
    stored = checkpoint.open_array(step_dir / "params", "blocks/gate")
    assert 4 * np.prod(stored.chunk_layout.read_chunk.shape) <= 3000
    mesh = sharding.make_mesh(config.MeshConfig(**sizes)) if sizes else one
    abstract = transformer.make_abstract_params(spec, mesh, jnp.bfloat16)
    restored = checkpoint.restore_tree(step_dir, checkpoint.PARAMS, abstract)

    def check(array, again, leaf):
        assert again.sharding == leaf.sharding and again.dtype == jnp.bfloat16
        assert np.array_equal(np.asarray(array).astype(jnp.bfloat16), np.asarray(again))

    jax.tree.map(check, params, restored, abstract)
    wider = transformer.make_abstract_params(dataclasses.replace(spec, d_ff=48), mesh, jnp.float32)
    with pytest.raises(UserError, match=r"blocks/down: expected \[5, 48, 24\], got \[5, 40, 24\]"):
        checkpoint.restore_tree(step_dir, checkpoint.PARAMS, wider)


@pytest.mark.parametrize("name", variants.CONFIGS)
def test_export_of_import_is_bit_equal(name, tmp_path):
    variants.make(name, tmp_path / "in")
    spec, params = huggingface.load_hf_model(
        tmp_path / "in", sharding.make_mesh(config.MeshConfig(fsdp=4, tensor=2))
    )
    huggingface.write_hf_model(spec, params, tmp_path / "out")
    before, after = (
        safetensors_file.open_safetensors(tmp_path / "in"),
        safetensors_file.open_safetensors(tmp_path / "out"),
    )
    assert before.keys() == after.keys()
    for tensor in before:
        np.testing.assert_array_equal(
            before[tensor].map_numbers(), after[tensor].map_numbers(), err_msg=tensor
        )
    assert huggingface.read_hf_spec(tmp_path / "out") == spec
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "in", dtype=torch.float32
        )(tokens).logits
        assert torch.equal(again(tokens).logits, expected)


def test_a_model_in_several_files_and_bfloat16_comes_back_bit_equal(
    tmp_path, monkeypatch, spec, one
):
    params = transformer.init_params(spec, 0, one, jnp.bfloat16)
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 7_000)
    huggingface.write_hf_model(spec, params, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert {
        str(parameter.dtype)
        for parameter in transformers.AutoModelForCausalLM.from_pretrained(tmp_path).parameters()
    } == {"torch.bfloat16"}
    _, again = huggingface.load_hf_model(tmp_path, one, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_each_type_comes_in_exactly_and_goes_out_as_it_came(dtype, tmp_path, one):
    theirs = variants.make("llama, tied, biases").to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "in")
    stored = safetensors_file.open_safetensors(tmp_path / "in")
    assert {tensor.dtype.name for tensor in stored.values()} == {dtype}
    spec, params = huggingface.load_hf_model(tmp_path / "in", one, dtype)
    huggingface.write_hf_model(spec, params, tmp_path / "out")
    for name, tensor in safetensors_file.open_safetensors(tmp_path / "out").items():
        assert tensor.map_numbers().tobytes() == stored[name].map_numbers().tobytes(), name
    _, params = huggingface.load_hf_model(tmp_path / "in", one, "float32")
    np.testing.assert_array_equal(
        params["blocks"]["down"][3],
        theirs.model.layers[3].mlp.down_proj.weight.detach().float().numpy().T,
    )


def test_config_json_tells_old_and_new_readers_the_same(spec, tmp_path, one):
    """An old reader knows rope_theta, rope_scaling and torch_dtype; a new one rope_parameters and
    dtype. transformers takes either for the truth.
    """

    def logits(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with torch.no_grad():
            return transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(
                torch.arange(60)[None]
            ).logits

    huggingface.write_hf_model(spec, transformer.init_params(spec, 0, one), tmp_path)
    yarn = RopeScaling("yarn", 4.0, original_max_seq_len=16, beta_fast=4.0)
    llama3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    for scaling in (None, RopeScaling("linear", 2.0), llama3, yarn):
        spec = spec.replace(rope_theta=5e5, rope_scaling=scaling)
        written, found = family.write_config(spec, "float32"), []
        for other in (
            ("rope_theta", "rope_scaling", "torch_dtype"),
            ("rope_parameters", "dtype"),
            (),
        ):
            found.append(logits({key: value for key, value in written.items() if key not in other}))
            assert huggingface.read_hf_spec(tmp_path) == spec
        assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
        misread = logits(written | {"rope_parameters": None, "rope_theta": 1e4})
        assert not torch.allclose(found[0], misread, atol=1e-3), (
            "these logits would not show another theta"
        )


def test_import_and_export_hold_a_few_tensors_on_the_host(tmp_path):
    """numpy's and Python's memory, by tracemalloc; what the devices hold and the files' pages in
    the system's cache are not in it.
    """
    spec = ModelSpec(
        n_layers=40, d_model=256, d_ff=512, n_heads=8, n_kv_heads=2, d_head=32, vocab_size=400
    )
    tensor, stack = 512 * 256 * 4, 40 * 512 * 256 * 4
    mesh = sharding.make_mesh(config.MeshConfig(fsdp=4, tensor=2))

    def peak(work) -> int:
        """Bytes above what stays: the embedding, which is read in one piece, becomes a CPU device's
        memory as it is.
        """
        work()  # compiled here
        tracemalloc.start()
        try:
            kept = work()
            stays, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        del kept
        return most - stays

    params = transformer.init_params(spec, 0, mesh)
    assert peak(lambda: huggingface.write_hf_model(spec, params, tmp_path)) < 4 * tensor < stack / 8
    assert peak(lambda: huggingface.load_hf_model(tmp_path, mesh)) < 3 * tensor
    jax.tree.map(
        np.testing.assert_array_equal, params, huggingface.load_hf_model(tmp_path, mesh)[1]
    )


HOST = """
import pathlib, sys
import jax
rank, port = int(sys.argv[1]), sys.argv[2]
source, out = pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[4])
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from jaxpt import config, sharding
from jaxpt.weights import huggingface

huggingface.SHARD_BYTES = 30_000
sizes, read_tensor = [], huggingface.read_tensor

def count_read(*arguments):
    sizes.append(read_tensor(*arguments).size)
    return read_tensor(*arguments)

huggingface.read_tensor = count_read
mesh = sharding.make_mesh(config.MeshConfig(fsdp=4, tensor=2))
spec, params = huggingface.load_hf_model(source, mesh)
assert not params["blocks"]["q"].is_fully_addressable
huggingface.write_hf_model(spec, params, out if rank == 0 else out / "none")
print("TOOK", sum(sizes), flush=True)
jax.distributed.shutdown()
"""


def test_two_processes_read_their_own_slices_and_export_the_files_of_one(tmp_path, monkeypatch):
    variants.make("llama, tied, biases", tmp_path / "in")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOST]
    paths = [str(port), str(tmp_path / "in"), str(tmp_path / "two")]
    hosts = [
        subprocess.Popen(
            [*command, str(rank), *paths], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    took = [int(host.communicate(timeout=120)[0].split("TOOK")[1]) for host in hosts]
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 30_000)
    spec, params = huggingface.load_hf_model(
        tmp_path / "in", sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    )
    huggingface.write_hf_model(spec, params, tmp_path / "one")
    alone, together = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert together == alone and "model-00005-of-00005.safetensors" in alone
    matrices = (
        sum(
            leaf.size
            for name, leaf in params["blocks"].items()
            if leaf.ndim > 2 and "bias" not in name
        )
        + params["embed"].size
    )
    assert max(took) < 0.5 * matrices + 4 * (transformer.count_params(spec) - matrices), (
        "norms and biases stand whole on each of a process's 4 devices"
    )
    assert not (tmp_path / "two" / "none").exists()


def test_the_card_tells_what_the_model_was_made_from_and_how_it_grew(tmp_path, spec, one):
    sha = "1" * 40
    base, run, out = (
        tmp_path / f"models--org--tiny/snapshots/{sha}",
        tmp_path / "run",
        tmp_path / "hf",
    )
    huggingface.write_hf_model(spec, transformer.init_params(spec, 0, one), base)
    asked = config.InitializeConfig(
        source=str(base), grow=("depth_upscale(m=2)",), param_dtype="bfloat16"
    )
    initial_run.initialize_run(
        config.Config(initialize=asked, mesh=config.MeshConfig(fsdp=4, tensor=2)), run
    )
    for source in (run, run / "checkpoints/0"):
        made = export.export_model(source, out, replace=True)
        card = (out / "README.md").read_text()
        assert (
            card.startswith("---\nlibrary_name: transformers\n")
            and "base_model: org/tiny\n" in card
        )
        assert (
            "# run\n" in card
            and f"Grown from org/tiny@{sha} by depth_upscale(m=2): " in card
            and "were copied from the parent's layers 0 1 2 2 3 4." in card
        )
        found = read_manifest(run)
        step = (
            f"checkpoint 0 {read_manifest(run / 'checkpoints/0').fingerprint}; "
            "grown by depth_upscale(m=2)"
        )
        assert (
            f"| initialize | {run} | {found.fingerprint} | {found.created} | with python " in card
            and step in card
        )
        assert f"| files | org/tiny@{sha} | {found.inputs['initialize']['fingerprint']} |" in card
    assert (
        made.counts["n_params"]
        == transformer.count_params(spec.replace(n_layers=6))
        == made.counts["bytes"] // 2
    ), "a bfloat16 run exports bfloat16"


def test_what_a_family_cannot_state_is_one_sentence_that_names_one_that_can(spec, tmp_path, one):
    wrong = spec.replace(family="qwen2", qkv_bias=True, out_bias=True)
    params = transformer.init_params(wrong, 0, one)
    answer = "a qwen2 config.json cannot state out_bias = True .* family to .*llama"
    with pytest.raises(UserError, match=answer):
        huggingface.write_hf_model(wrong, params, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory, change):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_header(directory, change):
    """Rewrite the header of model.safetensors; the numbers behind it stay."""
    file = directory / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def with_norm(**entry):
    """A change of the header: other words on the final norm (24 numbers in float32)."""
    return lambda header: (
        header
        | {"model.norm.weight": {"dtype": "F32", "shape": [24], "data_offsets": [0, 96], **entry}}
    )


def pickled(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def index(directory, text):
    """Write an index; the single file, which would be read in its place, goes."""
    (directory / "model.safetensors").unlink(missing_ok=True)
    (directory / "model.safetensors.index.json").write_text(text)


BROKEN = {
    "another architecture": (
        lambda d: edit_config(d, model_type="gpt2"),
        "model_type: expected .*, llama, .*, got 'gpt2'",
    ),
    "quantized": (lambda d: edit_config(d, quantization_config={"bits": 4}), "quantization_config"),
    "quantized to four bits": (
        lambda d: edit_config(d, quantization_config={"quant_method": "mxfp4"}),
        "quantization_config: expected none .*, got .*mxfp4",
    ),
    "another activation": (
        lambda d: edit_config(d, hidden_act="gelu"),
        "hidden_act: expected silu or gelu_pytorch_tanh, got 'gelu'",
    ),
    "rotation of a part": (
        lambda d: edit_config(d, partial_rotary_factor=0.5),
        "partial_rotary_factor: expected 1.0, got 0.5",
    ),
    "unknown rope": (
        lambda d: edit_config(
            d, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        ),
        "rope type: expected .*, got 'dynamic'",
    ),
    "rope without its factor": (
        lambda d: edit_config(d, rope_parameters={"rope_type": "linear"}),
        "cannot read its rope parameters .*'linear'",
    ),
    "a size in words": (
        lambda d: edit_config(d, hidden_size="24"),
        "hidden_size: expected an integer from 1 to 2147483647, got '24'",
    ),
    "odd heads": (
        lambda d: edit_config(d, head_dim=7),
        "config.json: model.d_head: expected an even number, got 7",
    ),
    "heads that cannot be shared": (
        lambda d: edit_config(d, num_key_value_heads=4),
        "config.json: .* 6 query heads cannot share 4 kv heads",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
    "config is a list": (
        lambda d: (d / "config.json").write_text("[]"),
        "expected a JSON object, got a list",
    ),
    "config of no model": (
        lambda d: (d / "config.json").write_text('{"model_type": "llama"}'),
        "has no hidden_size",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors: not found"),
    "pickled weights": (
        pickled,
        (
            r"holds: config.json, .*pytorch_model.bin.* safetensors only, since "
            r"pickled ones .* can run code"
        ),
    ),
    "weights cut short": (
        lambda d: (d / "model.safetensors").write_bytes(
            (d / "model.safetensors").read_bytes()[:-5]
        ),
        "truncated",
    ),
    "weights are empty": (
        lambda d: (d / "model.safetensors").write_bytes(b""),
        r"not a complete safetensors file \(0 bytes",
    ),
    "weights are text": (
        lambda d: (d / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1"
        ),
        "not a complete safetensors file",
    ),
    "a header without end": (
        lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 9000) + b"[" * 9000),
        "not a complete safetensors file",
    ),
    "a header of another kind": (
        lambda d: edit_header(d, list),
        "its header is no JSON object",
    ),
    "a header that names twice": (
        lambda d: (d / "model.safetensors").write_bytes(
            struct.pack("<Q", 16) + b'{"a": 1, "a": 2}'
        ),
        "a name occurs twice",
    ),
    "no type in the header": (
        lambda d: edit_header(d, with_norm(dtype=None)),
        "model.norm.weight: expected dtype, shape and data_offsets",
    ),
    "no offsets in the header": (
        lambda d: edit_header(
            d, lambda h: h | {"model.norm.weight": {"dtype": "F32", "shape": [24]}}
        ),
        "expected dtype, shape and data_offsets",
    ),
    "negative offsets": (
        lambda d: edit_header(d, with_norm(data_offsets=[-96, 0])),
        r"model.norm.weight: expected .*\[-96, 0\]",
    ),
    "a negative size": (
        lambda d: edit_header(d, with_norm(shape=[-24])),
        r"model.norm.weight: expected .*\[-24\]",
    ),
    "offsets of another size": (
        lambda d: edit_header(d, with_norm(data_offsets=[0, 92])),
        "takes 96 bytes, but the header gives it 92",
    ),
    "tensors over each other": (
        lambda d: edit_header(d, with_norm()),
        ".* and .* overlap",
    ),
    "a tensor missing": (
        lambda d: edit_tensors(d, lambda t: t.pop("model.norm.weight")),
        r"missing model.norm.weight \(24,\)",
    ),
    "a tensor too many": (
        lambda d: edit_tensors(d, lambda t: t.update(extra=np.zeros(3, np.float32))),
        r"unused extra \(3,\)",
    ),
    "a tensor of another shape": (
        lambda d: edit_config(d, intermediate_size=48),
        r"expected shape \(48, 24\), got \(40, 24\)",
    ),
    "a type that cannot train": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.norm.weight": np.zeros(24, np.int8)})),
        "expected dtype .*, got I8",
    ),
    "a shard missing": (
        lambda d: index(
            d, '{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}'
        ),
        "model-00001-of-00002.safetensors: not found",
    ),
    "an index of nothing": (
        lambda d: index(d, '{"metadata": {"total_size": 1}}'),
        "index.json: has no weight_map",
    ),
    "an index of a file elsewhere": (
        lambda d: (
            (d / "model.safetensors").rename(d.parent / "elsewhere.safetensors"),
            index(d, '{"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}'),
        ),
        r"model.norm.weight: expected a file in this directory, got \.\./elsewhere",
    ),
    "an index of no files": (
        lambda d: index(d, '{"weight_map": {"model.norm.weight": 1}}'),
        "index.json: has no weight_map",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_directory_has_its_sentence(name, tmp_path, one):
    breaks, answer = BROKEN[name]
    variants.make("llama", tmp_path)
    breaks(tmp_path)
    with pytest.raises(UserError, match=answer) as error:
        huggingface.load_hf_model(tmp_path, one)
    assert "\n" not in str(error.value)


def test_whatever_bytes_change_in_a_header_there_is_an_answer(tmp_path):
    variants.make("llama", tmp_path)
    file, rng, refused = tmp_path / "model.safetensors", np.random.default_rng(0), 0
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for _ in range(400):
        broken = bytearray(whole)
        for place in rng.integers(0, 8 + length, rng.integers(1, 4)):
            broken[place] = rng.integers(256)
        file.write_bytes(broken)
        try:
            safetensors_file.open_safetensors(tmp_path)
        except UserError:
            refused += 1
    assert refused > 200  # the others changed a name, or numbers within their place


@pytest.mark.parametrize("name", ["llama, rope llama3", "mistral, sliding window", "qwen3"])
def test_whatever_a_config_says_there_is_an_answer(name, tmp_path):
    variants.make(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    written = family.write_config(huggingface.read_hf_spec(tmp_path), "float32")
    for key in config | written:
        for value in (None, -1, 0, 1.5, True, "x", [], {}, ["x"], {"rope_type": 7}, float("inf")):
            (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
            try:
                spec = huggingface.read_hf_spec(tmp_path)
                assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec, (
                    key,
                    value,
                )
            except UserError:
                pass


def test_a_doubled_tensor_and_a_tied_copy_that_differs_are_named(tmp_path, one):
    variants.make("llama, tied, biases", tmp_path)
    edit_tensors(
        tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()})
    )
    huggingface.load_hf_model(tmp_path, one)  # an equal copy is fine
    edit_tensors(
        tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    )
    with pytest.raises(UserError, match="differs from the embedding"):
        huggingface.load_hf_model(tmp_path, one)
    (tmp_path / "model.safetensors").rename(tmp_path / "once.safetensors")
    shutil.copy(tmp_path / "once.safetensors", tmp_path / "again.safetensors")
    index(tmp_path, json.dumps({"weight_map": {"a": "again.safetensors", "b": "once.safetensors"}}))
    with pytest.raises(UserError, match="is also in another file"):
        huggingface.load_hf_model(tmp_path, one)


def shards_beside(directory, model):
    """Shards with their index, and a newer single file, which transformers reads."""
    newer = {name: value * 1.5 for name, value in model.state_dict().items()}
    model.save_pretrained(directory, max_shard_size="20KB")
    model.load_state_dict(newer)
    model.save_pretrained(directory / "newer")
    (directory / "newer/model.safetensors").replace(directory / "model.safetensors")


def saved_over_shards(directory, model):
    """A second save_pretrained leaves the first one's index, without its shards."""
    model.save_pretrained(directory, max_shard_size="20KB")
    shards = list(directory.glob("model-*"))
    assert len(shards) > 1 and model.save_pretrained(directory) is None
    for shard in shards:
        shard.unlink(missing_ok=True)


def head_alone(directory, model):
    """What safetensors.torch.save_model may leave of two tied names."""
    edit_tensors(directory, lambda t: t.update({HEAD: t.pop("model.embed_tokens.weight")}))


def double_precision(directory, model):
    """Weights in float64, as some scripts save them."""
    edit_tensors(
        directory, lambda t: t.update({name: x.astype(np.float64) for name, x in t.items()})
    )


def other_folders(directory, model):
    """Folders whose names mean something elsewhere."""
    for name in ("tokenizer", "checkpoints"):
        (directory / name).mkdir()
        (directory / name / "file").write_text("x")


HEAD = "lm_head.weight"
LAYOUTS = {
    "a single file beside an index": ("llama", shards_beside),
    "an index without its shards": ("llama", saved_over_shards),
    "tied, under the head's name alone": ("llama, tied, biases", head_alone),
    "folders of other names": ("llama", other_folders),
    "float64": ("llama", double_precision),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_directory_is_read_as_transformers_reads_it_however_it_was_saved(layout, tmp_path, one):
    name, arrange = LAYOUTS[layout]
    arrange(tmp_path, variants.make(name, tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    loaded = load.load_model(tmp_path, one, "float32")
    huggingface.copy_tokenizer(tmp_path, tmp_path / "copied")
    np.testing.assert_array_equal(
        np.asarray(loaded.params["embed"]), theirs.get_input_embeddings().weight.detach().numpy()
    )
    assert export.find_stored_dtype(tmp_path) == "float32"


# ---- a model that somebody trained


def stories260k(folder: pathlib.Path, out: pathlib.Path) -> list[bytes]:
    """Bring the llama2.c checkpoint to a Hugging Face directory, as a user of it would; returns its
    pieces.
    """
    from safetensors.numpy import save_file

    raw = (folder / "stories260K.bin").read_bytes()
    d, f, n_layers, n, k, vocab, _ = struct.unpack("7i", raw[:28])
    numbers, place = np.frombuffer(raw, np.float32, offset=28), 0

    def take(*shape):
        nonlocal place
        place += (size := int(np.prod(shape)))
        return numbers[place - size : place].reshape(shape)

    def split_half(
        w, heads
    ):  # their rotary pairs are neighbours (2i, 2i + 1), Hugging Face's lie half a head apart
        return w.reshape(heads, d // n // 2, 2, d).transpose(0, 2, 1, 3).reshape(-1, d)

    tensors = {"model.embed_tokens.weight": take(vocab, d)}
    names = [
        ("input_layernorm", (d,)),
        ("self_attn.q_proj", (d, d)),
        ("self_attn.k_proj", (k * d // n, d)),
        ("self_attn.v_proj", (k * d // n, d)),
        ("self_attn.o_proj", (d, d)),
        ("post_attention_layernorm", (d,)),
        ("mlp.gate_proj", (f, d)),
        ("mlp.down_proj", (d, f)),
        ("mlp.up_proj", (f, d)),
    ]
    for name, shape in names:
        stacked = take(n_layers, *shape)
        for layer in range(n_layers):
            w = stacked[layer]
            if name.endswith(("q_proj", "k_proj")):
                w = split_half(w, n if name.endswith("q_proj") else k)
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ascontiguousarray(w)
    tensors["model.norm.weight"] = take(d)
    out.mkdir()
    save_file(
        {name: np.ascontiguousarray(w) for name, w in tensors.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    shape = {
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n,
        "num_key_value_heads": k,
    }
    rest = {
        "model_type": "llama",
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
    }
    (out / "config.json").write_text(
        json.dumps(shape | rest | {"rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2})
    )
    pieces, text = [], (folder / "tok512.bin").read_bytes()[4:]
    while text:
        _, length = struct.unpack("fi", text[:8])
        pieces.append(text[8 : 8 + length])
        text = text[8 + length :]
    return pieces


def tell(spec, params, pieces) -> str:
    (ids,) = decode.generate(spec, params, [[1]], max_new=256)
    story = b"".join(
        bytes([int(pieces[i][3:5], 16)]) if pieces[i].startswith(b"<0x") else pieces[i]
        for i in ids
        if i > 2
    )
    return story.decode().strip()


def test_a_trained_model_tells_its_documented_story_imported_exported_and_grown(
    data_dir, tmp_path, one
):
    folder = data_dir / "ckpt_stories260K"
    pieces = stories260k(folder, tmp_path / "hf")
    spec, params = huggingface.load_hf_model(tmp_path / "hf", one)
    assert transformer.count_params(spec) == 260_032
    story = tell(spec, params, pieces)
    documented = (folder / "stories260K.md").read_text()
    assert len(story) > 400 and " ".join(story.split())[:400] in " ".join(documented.split())
    huggingface.write_hf_model(spec, params, tmp_path / "out")
    assert tell(*huggingface.load_hf_model(tmp_path / "out", one), pieces) == story
    grew = plan_growth("insert_identity(every=1)", Parent(spec))
    assert (
        grew.child.n_layers == 10
        and tell(grew.child, grow_params(grew, params, one), pieces) == story
    )
