"""Laws of import, export and growth: bit-equal round trips, every key accounted for, functions kept where that is promised."""

import json
import pathlib
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import variants

from jaxpt import config, sharding
from jaxpt.model import decode, llama
from jaxpt.spec import RopeScaling, UserError
from jaxpt.weights import growth, huggingface


@pytest.mark.parametrize("name", variants.CONFIGS)
def test_export_of_import_is_bit_equal(name, tmp_path):
    variants.make(name, tmp_path / "in")
    spec, params = huggingface.load(tmp_path / "in", sharding.make_mesh(config.Mesh(fsdp=4, tensor=2)))
    huggingface.export(spec, params, tmp_path / "out")
    before, after = huggingface.open_tensors(tmp_path / "in"), huggingface.open_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for tensor in before:
        np.testing.assert_array_equal(before[tensor], after[tensor], err_msg=tensor)
    assert huggingface.read_spec(tmp_path / "out") == spec
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32)(tokens).logits
        assert torch.equal(again(tokens).logits, wanted)


def test_a_model_in_several_files_and_bfloat16_comes_back_bit_equal(tmp_path, monkeypatch, spec, one):
    params = llama.init(spec, 0, one, jnp.bfloat16)
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 7_000)
    huggingface.export(spec, params, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert {str(parameter.dtype) for parameter in transformers.AutoModelForCausalLM.from_pretrained(tmp_path).parameters()} == {"torch.bfloat16"}
    _, again = huggingface.load(tmp_path, one, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 2.0), RopeScaling("llama3", 8.0, 1.0, 4.0, 32)])
def test_config_json_tells_old_and_new_readers_the_same(spec, scaling):
    written = huggingface.config_of(spec.replace(rope_theta=5e5, rope_scaling=scaling), "float32")
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5
    old = {key: value for key, value in written.items() if key != "rope_parameters"}
    new = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling")}
    for layout in (old, new):
        assert huggingface.read_rope(layout, pathlib.Path("config.json")) == (5e5, scaling)


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory, change):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


BROKEN = {
    "another architecture": (lambda d: edit_config(d, model_type="gpt2"), "model_type is 'gpt2', supported: llama"),
    "quantized": (lambda d: edit_config(d, quantization_config={"bits": 4}), "quantization_config"),
    "another activation": (lambda d: edit_config(d, hidden_act="gelu"), "hidden_act is 'gelu'"),
    "unknown rope": (lambda d: edit_config(d, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), "rope type is 'yarn'"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
    "config of no model": (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "has no hidden_size"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "Weights are read from safetensors only"),
    "weights cut short": (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-5]), "cut short"),
    "weights are text": (
        lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
        "not a whole safetensors file",
    ),
    "a tensor missing": (lambda d: edit_tensors(d, lambda t: t.pop("model.norm.weight")), r"missing model.norm.weight \(24,\)"),
    "a tensor too many": (lambda d: edit_tensors(d, lambda t: t.update(extra=np.zeros(3, np.float32))), r"unused extra \(3,\)"),
    "a tensor of another shape": (lambda d: edit_config(d, intermediate_size=48), r"has shape \(40, 24\), wanted \(48, 24\)"),
    "a type that cannot train": (lambda d: edit_tensors(d, lambda t: t.update({"model.norm.weight": np.zeros(24, np.int8)})), "stored as I8"),
    "a shard missing": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}'),
        "model-00001-of-00002.safetensors: not there",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_directory_has_its_sentence(name, tmp_path, one):
    breaks, answer = BROKEN[name]
    variants.make("llama", tmp_path)
    breaks(tmp_path)
    with pytest.raises(UserError, match=answer):
        huggingface.load(tmp_path, one)


def test_a_doubled_tensor_and_a_tied_copy_that_differs_are_named(tmp_path, one):
    variants.make("llama, tied, biases", tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    huggingface.load(tmp_path, one)  # an equal copy is fine
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(UserError, match="differs from the embedding"):
        huggingface.load(tmp_path, one)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "again.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "again.safetensors", "b": "model.safetensors"}}))
    with pytest.raises(UserError, match="stands in another file"):
        huggingface.load(tmp_path, one)


# ---- a model that somebody trained


def stories260k(folder: pathlib.Path, out: pathlib.Path) -> list[bytes]:
    """Bring the llama2.c checkpoint to a Hugging Face directory, as a user of it would; returns its pieces."""
    from safetensors.numpy import save_file

    raw = (folder / "stories260K.bin").read_bytes()
    d, f, n_layers, n, k, vocab, _ = struct.unpack("7i", raw[:28])
    numbers, place = np.frombuffer(raw, np.float32, offset=28), 0

    def take(*shape):
        nonlocal place
        place += (size := int(np.prod(shape)))
        return numbers[place - size : place].reshape(shape)

    def split_half(w, heads):  # their rotary pairs are neighbours (2i, 2i + 1), Hugging Face's lie half a head apart
        return w.reshape(heads, d // n // 2, 2, d).transpose(0, 2, 1, 3).reshape(-1, d)

    tensors = {"model.embed_tokens.weight": take(vocab, d)}
    names = [
        ("input_layernorm", (d,)), ("self_attn.q_proj", (d, d)), ("self_attn.k_proj", (k * d // n, d)), ("self_attn.v_proj", (k * d // n, d)),
        ("self_attn.o_proj", (d, d)), ("post_attention_layernorm", (d,)), ("mlp.gate_proj", (f, d)), ("mlp.down_proj", (d, f)), ("mlp.up_proj", (f, d)),
    ]  # fmt: skip
    for name, shape in names:
        stacked = take(n_layers, *shape)
        for layer in range(n_layers):
            w = stacked[layer]
            if name.endswith(("q_proj", "k_proj")):
                w = split_half(w, n if name.endswith("q_proj") else k)
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ascontiguousarray(w)
    tensors["model.norm.weight"] = take(d)
    out.mkdir()
    save_file({name: np.ascontiguousarray(w) for name, w in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    shape = {"hidden_size": d, "intermediate_size": f, "num_hidden_layers": n_layers, "num_attention_heads": n, "num_key_value_heads": k}
    rest = {"model_type": "llama", "vocab_size": vocab, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 512}
    (out / "config.json").write_text(json.dumps(shape | rest | {"rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2}))
    pieces, text = [], (folder / "tok512.bin").read_bytes()[4:]
    while text:
        _, length = struct.unpack("fi", text[:8])
        pieces.append(text[8 : 8 + length])
        text = text[8 + length :]
    return pieces


def tell(spec, params, pieces) -> str:
    (ids,) = decode.generate(spec, params, [[1]], max_new=256)
    story = b"".join(bytes([int(pieces[i][3:5], 16)]) if pieces[i].startswith(b"<0x") else pieces[i] for i in ids if i > 2)
    return story.decode().strip()


def test_a_trained_model_tells_its_documented_story_imported_exported_and_grown(data_dir, tmp_path, one):
    folder = data_dir / "ckpt_stories260K"
    pieces = stories260k(folder, tmp_path / "hf")
    spec, params = huggingface.load(tmp_path / "hf", one)
    assert llama.count(spec) == 260_032
    story = tell(spec, params, pieces)
    documented = (folder / "stories260K.md").read_text()
    assert len(story) > 400 and " ".join(story.split())[:400] in " ".join(documented.split())
    huggingface.export(spec, params, tmp_path / "out")
    assert tell(*huggingface.load(tmp_path / "out", one), pieces) == story
    child_spec, child, _ = growth.grow(spec, params, "insert_identity(every=1)", one)
    assert child_spec.n_layers == 10 and tell(child_spec, child, pieces) == story
