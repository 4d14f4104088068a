"""Laws of Grok-1, which transformers has no class for: here xAI's function is written in NumPy."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_growth import grown, randomised
from test_model import logits_of

from jaxpt.families import family
from jaxpt.model import decode, transformer
from jaxpt.spec import UserError
from jaxpt.weights import huggingface

CONFIG = {
    "architectures": ["Grok1ModelForCausalLM"],
    "model_type": "grok-1",
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "attn_output_multiplier": 0.4,
    "embedding_multiplier_scale": 24**0.5,
    "output_multiplier_scale": 0.5773502691896257,
    "max_attn_value": 2.0,  # 30 in the release, which small scores do not come near
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": True,
}
PATH = pathlib.Path("config.json")
EXPERTS = ("linear", "linear_v", "linear_1")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """One as of the public conversion: config.json without head_dim, the head stored too."""
    directory = tmp_path_factory.mktemp("grok")
    V, D, F, N, K, E = 96, 24, 40, 6, 2, 7
    H = D // N
    shapes = {"model.embed_tokens": (V, D)}
    norms = ["model.norm"]
    for i in range(3):
        layer = f"model.layers.{i}"
        for part in ("attn", "moe"):
            norms += [f"{layer}.pre_{part}_norm", f"{layer}.post_{part}_norm"]
        for name, n_heads in {"q": N, "k": K, "v": K}.items():
            shapes[f"{layer}.attn.{name}_proj"] = (n_heads * H, D)
        shapes |= {f"{layer}.attn.o_proj": (D, N * H), f"{layer}.moe_block.gate": (E, D)}
        for e in range(E):
            for name, shape in zip(EXPERTS, [(F, D), (F, D), (D, F)], strict=True):
                shapes[f"{layer}.moe_block.experts.{e}.{name}"] = shape
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": 0.3 * rng.normal(size=shape) for name, shape in shapes.items()}
    tensors |= {f"{name}.scale": 1 + 0.2 * rng.normal(size=D) for name in norms}
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


# ---- xAI's function, in float64


def rms_norm(x, scale):
    return scale * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG["rms_norm_eps"])


def softmax(x):
    shares = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return shares / np.sum(shares, axis=-1, keepdims=True)


def rotate(x, positions):
    """Rotate channel i of a head [T, heads, H] with i + H/2."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
    pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def attend(x, layer, positions):
    T = len(x)
    N, K = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    q, k, v = (x @ layer[f"attn.{name}_proj.weight"].T for name in "qkv")
    q = rotate(q.reshape(T, N, -1), positions)
    k = rotate(k.reshape(T, K, -1), positions)
    v = v.reshape(T, K, -1)
    out = np.empty_like(q)
    cap = CONFIG["max_attn_value"]
    for n in range(N):
        scores = CONFIG["attn_output_multiplier"] * q[:, n] @ k[:, n * K // N].T
        scores = np.where(np.tri(T), cap * np.tanh(scores / cap), -1e30)
        out[:, n] = softmax(scores) @ v[:, n * K // N]
    return out.reshape(T, -1) @ layer["attn.o_proj.weight"].T


def gelu(x):
    return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def run_experts(x, layer):
    """Sum the three best experts by their shares of all seven."""
    out = np.zeros_like(x)
    shares = softmax(x @ layer["moe_block.gate.weight"].T)
    for t, token in enumerate(x):
        for e in np.argsort(-shares[t])[:3]:
            gate, up, down = (layer[f"moe_block.experts.{e}.{name}.weight"] for name in EXPERTS)
            out[t] += shares[t, e] * down @ (gelu(gate @ token) * (up @ token))
    return out


def compute_logits(tensors, tokens, positions):
    """Return the logits [T, V] of tokens [T]."""
    embedding = tensors["model.embed_tokens.weight"].astype(float)
    x = CONFIG["embedding_multiplier_scale"] * embedding[tokens]
    for i in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        layer = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        out = attend(rms_norm(x, layer["pre_attn_norm.scale"]), layer, positions)
        x = x + rms_norm(out, layer["post_attn_norm.scale"])
        out = run_experts(rms_norm(x, layer["pre_moe_norm.scale"]), layer)
        x = x + rms_norm(out, layer["post_moe_norm.scale"])
    x = rms_norm(x, tensors["model.norm.scale"])
    return CONFIG["output_multiplier_scale"] * x @ embedding.T


# ---- laws


def make_tokens():
    tokens = np.random.default_rng(0).integers(0, 96, (2, 48)).astype(np.int32)
    positions = np.arange(48, dtype=np.int32) + np.array([[0], [3000]], np.int32)
    return tokens, np.ones_like(tokens), positions


def test_logits_are_those_of_xais_function_at_long_positions(directory, one):
    spec, params = huggingface.load_hf_model(directory, one)
    tensors = load_file(directory / "model.safetensors")
    tokens, segments, positions = make_tokens()
    expected = [compute_logits(tensors, *pair) for pair in zip(tokens, positions, strict=True)]
    found = logits_of(spec, params, tokens, segments, positions)
    np.testing.assert_allclose(found, expected, atol=3e-5)


def test_export_of_import_is_bit_equal(directory, one, tmp_path):
    """But for the head's copy of the embedding, as of every tied model."""
    spec, params = huggingface.load_hf_model(directory, one)
    huggingface.write_hf_model(spec, params, tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (directory, tmp_path))
    assert before.keys() - after.keys() == {"lm_head.weight"}
    for name, tensor in after.items():
        np.testing.assert_array_equal(tensor, before[name], strict=True)
    written = json.loads((tmp_path / "config.json").read_text())
    assert CONFIG.items() <= written.items()
    assert huggingface.read_hf_spec(tmp_path) == spec


def test_another_order_of_the_experts_computes_the_same(directory, one):
    spec, params = huggingface.load_hf_model(directory, one)
    inputs = make_tokens()
    expected = logits_of(spec, params, *inputs)
    order = np.array([3, 6, 0, 5, 1, 4, 2])
    blocks = params["blocks"]
    moved = {name: blocks[name][:, order] for name in ("gate", "up", "down")}
    moved["router"] = blocks["router"][:, :, order]
    found = logits_of(spec, {**params, "blocks": {**blocks, **moved}}, *inputs)
    np.testing.assert_allclose(found, expected, atol=3e-6)


def test_greedy_text_is_that_of_the_forward_pass(directory, one):
    spec, params = huggingface.load_hf_model(directory, one)
    prompts = [[5, 9, 60, 33], [7]]
    spec = spec.replace(eos_ids=())
    found = decode.generate(spec, params, prompts, max_new=6)
    tensors = load_file(directory / "model.safetensors")
    for prompt, text in zip(prompts, found, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            logits = compute_logits(tensors, tokens, np.arange(len(tokens)))
            tokens.append(int(np.argmax(logits[-1])))
        assert text == tokens[len(prompt) :]


@pytest.mark.parametrize(
    "text",
    [
        "more_experts(m=2, top_k=6)",
        pytest.param("insert_identity(every=2)", marks=pytest.mark.slow),
        pytest.param("widen(d=48)", marks=pytest.mark.slow),
        pytest.param("widen(ff=50)", marks=pytest.mark.slow),
    ],
)
def test_growth_keeps_its_function(directory, one, text):
    spec = huggingface.read_hf_spec(directory).replace(n_layers=2)
    parent = randomised(spec, one)
    child_spec, child, grew = grown(spec, parent, text, one)
    assert grew.preserves_function
    expected = logits_of(spec, parent, *make_tokens())
    found = logits_of(child_spec, child, *make_tokens())
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())
    family.write_config(child_spec, "float32")  # it can be exported


def test_the_release_has_its_parameters():
    spec = family.read_spec(
        {
            **CONFIG,
            "vocab_size": 131_072,
            "hidden_size": 6144,
            "intermediate_size": 32_768,
            "num_hidden_layers": 64,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "attn_output_multiplier": 0.08838834764831845,
            "embedding_multiplier_scale": 78.38367176906169,
        },
        PATH,
    )
    assert transformer.count_params(spec) == 315_684_820_992
    assert transformer.count_active_params(spec) == 83_756_587_008
    assert spec.query_scale is None


@pytest.mark.parametrize("key", ["attn_output_multiplier", "max_attn_value"])
def test_a_missing_factor_is_named(key):
    config = {name: value for name, value in CONFIG.items() if name != key}
    with pytest.raises(UserError, match=f"{key}: expected a number above 0"):
        family.read_spec(config, PATH)
