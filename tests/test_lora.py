"""Laws of low-rank adapters: PEFT's own model computes the same, the base stays, and only adapters
have optimizer state.
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import peft as theirs
import pytest
import test_special_tokens
import test_train
import torch
import transformers
import variants
from conftest import SMALL_SPEC

from jaxpt import config, initialize, sharding
from jaxpt.config import MeshConfig
from jaxpt.evaluate import harness
from jaxpt.model import transformer
from jaxpt.plan import cost, roofline
from jaxpt.spec import LoraSpec, UserError
from jaxpt.train import state, step
from jaxpt.weights import huggingface, load, peft

LORA = LoraSpec(rank=5, alpha=13.0, targets=("q", "v", "o", "gate", "down"))
ATTENTION = LoraSpec(rank=5, alpha=13.0, targets=("k", "v", "o"))
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 11)).astype(np.int32)
# what PEFT adapts where q_proj is no module of its own
THEIR_TARGETS = {"phi3": ["qkv_proj", "o_proj", "gate_up_proj"]}
QUICK = ("llama, tied, biases", "phi3")


def our_logits(spec, params):
    segment_ids = np.ones_like(TOKENS)
    positions = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)
    return np.asarray(transformer.compute_logits(spec, params, TOKENS, segment_ids, positions))


def their_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def save_their_adapter(directory, name="llama", **settings):
    """Save a base and an adapter with random weights by PEFT; return its logits."""
    base = variants.make(name, directory / "base")
    settings = {"r": 7, "lora_alpha": 5, "init_lora_weights": False, **settings}
    modules = THEIR_TARGETS.get(name, ["q_proj", "k_proj", "o_proj"])
    adapted = theirs.get_peft_model(base, theirs.LoraConfig(target_modules=modules, **settings))
    adapted.save_pretrained(directory / "adapter")
    change_config(directory / "adapter", base_model_name_or_path=str(directory / "base"))
    return their_logits(adapted)


def change_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def add_adapters(loaded, lora, mesh, seed=1):
    """The model with adapters that are not 0."""
    spec, params = transformer.add_adapters(loaded.spec, loaded.params, lora, seed, mesh)
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if "lora" not in jax.tree_util.keystr(path):
            return leaf
        values = 0.3 * rng.standard_normal(leaf.shape)
        return jax.device_put(values.astype(np.float32), leaf.sharding)

    return spec, jax.tree_util.tree_map_with_path(fill, params)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in variants.CONFIGS
    ],
)
def test_peft_computes_the_same_with_its_adapters_and_with_ours(tmp_path, one, name):
    """Merged on the way in; apart, as PEFT's files and merged on the way out."""
    theirs_adapted = save_their_adapter(tmp_path, name)
    merged = load.load_model(tmp_path / "adapter", one)
    np.testing.assert_allclose(our_logits(merged.spec, merged.params), theirs_adapted, atol=3e-5)

    base = load.load_model(tmp_path / "base", one)
    lora = ATTENTION if base.spec.n_experts else LORA
    spec, params = add_adapters(base, lora, one)
    ours = our_logits(spec, params)
    assert np.abs(ours - our_logits(base.spec, base.params)).max() > 0.01
    (tmp_path / "ours").mkdir()
    peft.write_adapter(spec, params, tmp_path / "ours", str(tmp_path / "base"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    opened = theirs.PeftModel.from_pretrained(model, tmp_path / "ours")
    np.testing.assert_allclose(their_logits(opened), ours, atol=3e-5)
    again = load.load_model(tmp_path / "ours", one)
    np.testing.assert_allclose(our_logits(again.spec, again.params), ours, atol=3e-5)
    alone, merged_params = transformer.merge_adapters(spec, params)
    assert alone == base.spec
    np.testing.assert_allclose(our_logits(alone, merged_params), ours, atol=3e-5)


def test_evaluation_is_of_the_merged_model_and_notices_another_base(tmp_path, one):
    """By both backends, with the base's tokenizer."""
    pytest.importorskip("lm_eval")
    base, adapter, to = tmp_path / "base", tmp_path / "adapter", tmp_path / "result.json"
    test_special_tokens.write_tokenizer(base)
    for seed in (0, 1):
        params = transformer.init_params(test_special_tokens.SPEC, seed, one)
        huggingface.write_hf_model(test_special_tokens.SPEC, params, base)
        if not seed:
            loaded = load.load_model(base, one)
            spec, adapted = add_adapters(loaded, ATTENTION, one)
            adapter.mkdir()
            peft.write_adapter(spec, adapted, adapter, str(base))
    (tmp_path / "text.txt").write_text("The ship sailed at dawn. " * 9)
    tasks = [f"bits_per_byte/t=text:{tmp_path}/text.txt"]

    def score(model, **settings):
        results = harness.evaluate_model(model, tasks, **settings)["results"]
        return results["bits_per_byte/t"]["bits_per_byte,none"]

    merged = score(adapter, backend="jax", to=to)
    assert abs(merged - score(base, backend="jax")) > 1e-3
    assert abs(merged - score(adapter, backend="hf")) < 1e-5
    huggingface.write_hf_model(loaded.spec, loaded.params, base)
    assert abs(merged - score(adapter, backend="jax", to=to)) > 1e-3


def test_rank_stabilized_adapters_have_their_own_scale(tmp_path, one):
    expected = save_their_adapter(tmp_path, use_rslora=True)
    loaded = load.load_model(tmp_path / "adapter", one)
    np.testing.assert_allclose(our_logits(loaded.spec, loaded.params), expected, atol=3e-5)


NOT_READ = {
    "use_dora": True,
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "rank_pattern": {"q_proj": 3},
    "alpha_pattern": {"q_proj": 3},
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [3],
    "fan_in_fan_out": True,
    "peft_type": "IA3",
    "a_key_of_tomorrow": 0.5,
    "r": 6,
    "target_modules": ["q_proj", "c_attn"],
}


@pytest.mark.parametrize("key", NOT_READ)
def test_what_cannot_be_read_is_refused_by_key_and_value(tmp_path, one, key):
    save_their_adapter(tmp_path)
    change_config(tmp_path / "adapter", **{key: NOT_READ[key]})
    expected = {
        "r": r"lora_A and lora_B of shapes \[\(6, 24\)",
        "target_modules": "c_attn: the base",
    }
    with pytest.raises(
        UserError, match=expected.get(key, f"{key}: expected .*, got .*")
    ) as refused:
        load.load_model(tmp_path / "adapter", one)
    assert "PEFT" in str(refused.value)


def test_a_key_of_peft_that_is_not_known_to_be_harmless_must_be_empty(tmp_path):
    known = {field.name for field in dataclasses.fields(theirs.LoraConfig)}
    assert known >= peft.READ_KEYS | peft.HARMLESS_KEYS
    for key in known - peft.READ_KEYS - peft.HARMLESS_KEYS:
        peft.check_is_plain(tmp_path, {key: peft.PLAIN_VALUES.get(key, [None])[0]})
        with pytest.raises(UserError, match=f"{key}: expected .*, got 'other'"):
            peft.check_is_plain(tmp_path, {key: "other"})


def test_adapters_that_do_not_fit_name_what_is_wrong(tmp_path, one):
    save_their_adapter(tmp_path)
    variants.make("phi3", tmp_path / "other")
    with pytest.raises(UserError, match="q_proj: the base has no such matrix"):
        load.load_model(tmp_path / "adapter", one, base=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"expected the base of .* got a run or an adapter"):
        load.load_model(tmp_path / "adapter", one, base=str(tmp_path / "adapter"))
    change_config(tmp_path / "adapter", base_model_name_or_path="/gone/base")
    with pytest.raises(UserError, match=r"'/gone/base', is not here. .*config.initialize.base=DIR"):
        load.load_model(tmp_path / "adapter", one)
    shutil.copy(tmp_path / "base/config.json", tmp_path / "adapter")
    shutil.copy(tmp_path / "base/model.safetensors", tmp_path / "adapter")
    with pytest.raises(UserError, match="holds a whole model and a LoRA adapter"):
        load.load_model(tmp_path / "adapter", one)
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model.safetensors: not found"):
        load.load_model(tmp_path / "adapter", one)


@pytest.mark.parametrize("target", ["gate", "experts_up", "embed", "q_norm", "q_bias"])
def test_a_target_that_takes_no_adapter_is_refused_with_those_that_do(target):
    spec = SMALL_SPEC.replace(n_experts=4, n_experts_per_token=2, qk_norm=True, qkv_bias=True)
    with pytest.raises(UserError, match=rf"expected .*\(q, k, v, o\), got '{target}'"):
        transformer.param_specs(spec.replace(lora=LoraSpec(3, 6.0, ("q", target))))


# ---- training


def make_state(mesh, lora=LORA, spec=SMALL_SPEC):
    """A state around the base that tests share, with fresh adapters; its spec."""
    base = jax.device_put(
        test_train.initial_params(spec), transformer.make_param_shardings(spec, mesh)
    )
    spec, params = transformer.add_adapters(spec, base, lora, 0, mesh)
    return spec, state.init_state(params, spec, test_train.SETTINGS.optim, mesh)


def train(mesh, lora=LORA, base=SMALL_SPEC, n=5, accum=1):
    spec, now = make_state(mesh, lora, base)
    settings = dataclasses.replace(test_train.SETTINGS.train, grad_accum_steps=accum)
    run = step.build_step(spec, settings, test_train.SETTINGS.optim, 32, mesh)
    losses = []
    for i in range(n):
        now, scalars = run(now, test_train.put(test_train.make_batch(i), mesh))
        losses.append(float(scalars["loss"]))
    assert run.program._cache_size() == 1
    return np.array(losses), now, spec


MIXTURE = SMALL_SPEC.replace(
    n_experts=4, n_experts_per_token=2, router="sigmoid", router_bias_rate=0.1
)


@pytest.mark.parametrize(
    ("lora", "base"),
    [(LORA, SMALL_SPEC), pytest.param(ATTENTION, MIXTURE, marks=pytest.mark.slow)],
)
def test_the_base_keeps_its_bits_and_only_adapters_have_optimizer_state(one, lora, base):
    losses, now, spec = train(one, lora, base)
    assert losses[-1] < losses[0]
    before = test_train.initial_params(base)
    adapters = {"blocks": {}}
    for name, leaf in now.params["blocks"].items():
        if "_lora_" in name:
            adapters["blocks"][name] = leaf
            assert np.abs(leaf).max() > 0
    kept = {
        **now.params,
        "blocks": {name: now.params["blocks"][name] for name in before["blocks"]},
    }
    jax.tree.map(np.testing.assert_array_equal, kept, before)
    n_adapters = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert n_adapters == transformer.count_trained_params(spec)
    moments = sum(leaf.nbytes for leaf in jax.tree.leaves(now.opt_state) if leaf.ndim)
    assert moments == 2 * 4 * n_adapters
    planned = roofline.count_state_bytes(spec, test_train.SETTINGS.optim, "float32")
    assert planned.moments == moments
    assert planned.params == sum(
        param.n_params * 4
        for _, param in transformer.list_param_specs(transformer.param_specs(spec))
    )


@pytest.mark.parametrize(
    ("sizes", "accum"),
    [
        ({"fsdp": 2, "tensor": 2, "context": 2}, 2),
        pytest.param({"fsdp": 8}, 1, marks=pytest.mark.slow),
        pytest.param({"replica": 4, "tensor": 2}, 2, marks=pytest.mark.slow),
    ],
)
def test_adapters_train_alike_on_any_mesh_and_micro_batch(one, sizes, accum):
    alone, _, _ = train(one)
    spread, now, _ = train(sharding.make_mesh(MeshConfig(**sizes)), accum=accum)
    np.testing.assert_allclose(spread, alone, rtol=2e-5)
    shard = now.params["blocks"]["gate_lora_a"].addressable_shards[0]
    assert shard.data.shape == (3, 24 // sizes.get("fsdp", 1), 5)


def test_adapters_are_float32_on_a_bfloat16_base(one):
    base = transformer.init_params(SMALL_SPEC, 0, one, "bfloat16")
    spec, params = transformer.add_adapters(SMALL_SPEC, base, LORA, 0, one)
    abstract = transformer.make_abstract_params(spec, one, "bfloat16")
    assert jax.tree.map(lambda x: x.dtype, params) == jax.tree.map(lambda x: x.dtype, abstract)
    assert params["blocks"]["q"].dtype == "bfloat16"
    assert params["blocks"]["q_lora_a"].dtype == "float32"
    _, merged = transformer.merge_adapters(spec, params)
    assert merged["blocks"]["q"].dtype == "bfloat16"


def test_the_plan_knows_adapters(tmp_path):
    variants.make("llama", tmp_path)
    values = dataclasses.asdict(config.Config())
    values["initialize"]["source"] = str(tmp_path)
    values["lora"] |= {"rank": 3, "targets": ("q", "v")}
    settings = config.build_config(values)
    spec, _ = cost.resolve_model_spec(settings)
    assert spec.lora == LoraSpec(3, 32.0, ("q", "v"))


def test_without_targets_every_matrix_of_attention_and_of_a_dense_mlp_gets_adapters():
    section = config.LoraConfig(rank=3)
    attention = ("q", "k", "v", "o")
    dense = initialize.make_lora_spec(section, SMALL_SPEC)
    assert dense == LoraSpec(3, 32.0, (*attention, "gate", "up", "down"))
    adapted = SMALL_SPEC.replace(lora=dense)
    assert initialize.make_lora_spec(section, adapted) == dense
    assert initialize.make_lora_spec(section, MIXTURE) == LoraSpec(3, 32.0, attention)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rank": -1}, "lora.rank: expected 0"),
        ({"rank": 4}, "needs a base to freeze, but initialize.source is random"),
    ],
)
def test_knobs_that_cannot_be_are_named(changes, expected):
    values = dataclasses.asdict(config.Config())
    values["lora"] |= changes
    with pytest.raises(UserError, match=expected):
        config.build_config(values)
