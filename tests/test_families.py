"""Laws of config.json: what transformers reads is read alike, or stops the import by name."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
import torch
import transformers
import variants

from jaxpt.families import family
from jaxpt.model import loss, transformer
from jaxpt.model.attention import attend_plain
from jaxpt.spec import UserError
from jaxpt.weights import huggingface

# read by any of transformers' classes, though none declares them as a field
UNDECLARED = {
    "attention_chunk_size": [4],
    "head_dim": [4],
    "is_causal": [False],
    "layer_types": [["sliding_attention"] * 5, ["full_attention"] * 5],
    "original_max_position_embeddings": [16],
    "partial_rotary_factor": [0.5],
    "per_layer_config": [{"0": {"rms_norm_eps": 0.5}}],
    "rope_local_base_freq": [50.0],
    "rope_scaling": [
        {"rope_type": "linear", "factor": 3.0},
        {"type": "linear", "factor": 2.0, "rope_theta": 77.0},
        variants.LLAMA3,
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    "rope_theta": [77.0],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 77.0},
        {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.5},
        None,
    ],
    "sliding_window": [3, None],
    "sliding_window_pattern": [2],
}
OTHERS = {  # values that are not just larger
    "hidden_act": ["gelu_pytorch_tanh", "relu"],
    "hidden_activation": ["silu", "relu"],
    "no_rope_layers": [[0, 1, 1, 0, 1]],
    "max_window_layers": [3],
}
# a value of them changes no logit, or breaks transformers only
SKIPPED = {"architectures", "dtype", "transformers_version", "id2label", "label2id"}
MISSING = "missing"
BY_FAMILY = {}
for variant in variants.CONFIGS:
    BY_FAMILY.setdefault(variants.CONFIGS[variant]().model_type, variant)


def changed_values(key, value):
    """Return other values of a key."""
    if key in UNDECLARED or key in OTHERS:
        return UNDECLARED.get(key) or OTHERS[key]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value * 2, value + 1] if value else [1]
    return [0.7, True]


def changes(config_class, config):
    """Yield every key with every other value, the missing one too."""
    fields = {field.name: field.default for field in dataclasses.fields(config_class)}
    for key in fields.keys() - SKIPPED | UNDECLARED.keys():
        for value in changed_values(key, config.get(key, fields.get(key))):
            yield key, value
        if key in config:
            yield key, MISSING


def their_logits(directory, tokens):
    """Return transformers' logits, or None where it cannot open the directory as it stands."""
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
        if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
            return None
        with torch.no_grad():
            return model(torch.tensor(tokens).long()).logits.numpy()
    except Exception:
        return None


def our_logits(spec, params, tokens):
    """Return our logits, by the plain formula and without compiling."""
    T = tokens.shape[1]
    distance = np.arange(T)[:, None] - np.arange(T)

    def attend(q, k, v, window, state):
        is_visible = (distance >= 0) & (distance < (window or T))
        return attend_plain(q, k, v, is_visible[None], spec.attention_softcap), state

    with jax.disable_jit():
        hidden, _ = transformer.forward_with(attend, spec, params, tokens, np.arange(T)[None])
        head = transformer.lm_head(spec, params)
        return np.asarray(loss.compute_logits(hidden, head, spec.logit_softcap))


def find_misread_keys(directory, mesh, config_class, compares_logits):
    """Return a line for each changed key that transformers reads otherwise than we do."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    tokens = np.random.default_rng(0).integers(0, 96, (1, 24)).astype(np.int32)
    before, spec_before = their_logits(directory, tokens), huggingface.read_hf_spec(directory)
    wrong = []
    for key, value in changes(config_class, config):
        changed = {k: v for k, v in config.items() if k != key}
        if value != MISSING:
            changed[key] = value
        path.write_text(json.dumps(changed))
        try:
            spec = huggingface.read_hf_spec(directory)
            is_read = spec != spec_before
            if is_read and not compares_logits:
                continue
            theirs = their_logits(directory, tokens)
            if theirs is None:
                continue
            ours = before
            if is_read:
                ours = our_logits(*huggingface.load_hf_model(directory, mesh), tokens)
        except UserError as error:
            if not is_named(key, str(error)):
                wrong.append(f"{key} = {value}: {error}")
            continue
        difference = np.abs(ours - theirs).max()
        if not difference < 1e-4:
            wrong.append(f"{key} = {value}: is read: {is_read}, logits off by {difference:.2g}")
    return wrong


def is_named(key, message):
    """Return whether a refusal names the key, or what the key contradicts, in one line."""
    names = (
        key,
        *UNDECLARED,
        "no_rope_layers",
        "rope type",
        "rope parameters",
        "model.",
        "tensors",
    )
    return "\n" not in message and any(name in message for name in names)


@pytest.mark.parametrize("name", BY_FAMILY.values())
def test_a_key_that_changes_transformers_logits_changes_our_spec_or_stops_the_import(
    name, tmp_path, one
):
    """Every key of transformers' class, and those that any class reads undeclared."""
    variants.make(name, tmp_path)
    config_class = type(variants.CONFIGS[name]())
    assert find_misread_keys(tmp_path, one, config_class, compares_logits=False) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_FAMILY.values())
def test_a_key_that_is_read_changes_the_logits_as_in_transformers(name, tmp_path, one):
    variants.make(name, tmp_path)
    config_class = type(variants.CONFIGS[name]())
    assert find_misread_keys(tmp_path, one, config_class, compares_logits=True) == []


def test_a_key_that_nobody_reads_is_named_once(tmp_path, caplog):
    variants.make("llama", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "spam": 1, "eggs": None}))
    with caplog.at_level(logging.WARNING):
        spec = huggingface.read_hf_spec(tmp_path)
        assert huggingface.read_hf_spec(tmp_path) == spec
    assert [record.message for record in caplog.records] == [
        f"{path}: ignored: eggs, spam. Neither transformers nor jaxpt reads it for this model_type."
    ]


def test_a_depth_that_cannot_be_is_refused_before_anything_is_listed(tmp_path):
    variants.make("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 10**9}))
    with pytest.raises(UserError, match="num_hidden_layers: expected an integer from 1 to 10000"):
        huggingface.read_hf_spec(tmp_path)


def test_every_family_that_transformers_has_has_a_variant():
    without_a_class = {"grok-1"}  # tests/test_grok1.py
    assert BY_FAMILY.keys() | without_a_class == family.list_families().keys()
