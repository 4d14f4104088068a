"""A small transformers model of every supported architecture and switch, for laws that hold for all
of them.
"""

import torch
import transformers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, head_dim=8),
    "llama, other theta and eps": lambda: transformers.LlamaConfig(
        **SIZES, head_dim=8, rope_theta=5e5, rms_norm_eps=1e-3
    ),
    "llama, tied, biases": lambda: transformers.LlamaConfig(
        **SIZES, head_dim=8, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama, head apart from width": lambda: transformers.LlamaConfig(**SIZES, head_dim=10),
    "llama, head from width, attention biases": lambda: transformers.LlamaConfig(
        **SIZES, attention_bias=True
    ),
    "llama, a head each, feed-forward biases": lambda: transformers.LlamaConfig(
        **SIZES | {"num_key_value_heads": 6}, head_dim=8, mlp_bias=True
    ),
    "llama, rope llama3": lambda: transformers.LlamaConfig(
        **SIZES, head_dim=8, rope_parameters=LLAMA3
    ),
    "llama, rope linear": lambda: transformers.LlamaConfig(
        **SIZES,
        head_dim=8,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    ),
    "mistral, sliding window": lambda: transformers.MistralConfig(
        **SIZES, head_dim=8, sliding_window=7
    ),
    "mistral, no window": lambda: transformers.MistralConfig(
        **SIZES, head_dim=8, sliding_window=None
    ),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen2, windows in the upper layers": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=2
    ),
    "qwen3, windows by layer": lambda: transformers.Qwen3Config(
        **SIZES,
        head_dim=8,
        use_sliding_window=True,
        sliding_window=7,
        layer_types=[*["sliding_attention"] * 2, "full_attention", *["sliding_attention"] * 2],
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=8),
    "seed_oss": lambda: transformers.SeedOssConfig(**SIZES, head_dim=8, mlp_bias=True),
    "seed_oss, a bias at the output": lambda: transformers.SeedOssConfig(
        **SIZES, head_dim=None, attention_bias=False, attention_out_bias=True
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **SIZES, head_dim=8, num_local_experts=7, num_experts_per_tok=3
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES,
        moe_intermediate_size=28,
        shared_expert_intermediate_size=44,
        num_experts=7,
        num_experts_per_tok=3,
    ),
    "solar_open": lambda: transformers.SolarOpenConfig(
        **SIZES,
        head_dim=8,
        moe_intermediate_size=20,
        n_routed_experts=7,
        num_experts_per_tok=3,
        n_shared_experts=2,
        routed_scaling_factor=0.5,
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, head_dim=8, moe_intermediate_size=28, num_experts=7, num_experts_per_tok=3
    ),
    "qwen3_moe, renormalised": lambda: transformers.Qwen3MoeConfig(
        **SIZES,
        head_dim=8,
        moe_intermediate_size=28,
        num_experts=7,
        num_experts_per_tok=3,
        norm_topk_prob=True,
    ),
    "olmoe": lambda: transformers.OlmoeConfig(
        **SIZES | {"hidden_size": 48}, num_experts=7, num_experts_per_tok=3
    ),
    "qwen3, tied, biases": lambda: transformers.Qwen3Config(
        **SIZES, head_dim=8, tie_word_embeddings=True, attention_bias=True
    ),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES, head_dim=8, attention_bias=True),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES,
        head_dim=8,
        sliding_window=7,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        sliding_window=7,
        sliding_window_pattern=3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    ),
    "phi3": lambda: transformers.Phi3Config(**SIZES, sliding_window=7, pad_token_id=0),
    "smollm3": lambda: transformers.SmolLM3Config(
        **SIZES,
        head_dim=8,
        pad_token_id=0,
        no_rope_layer_interval=2,
        use_sliding_window=True,
        sliding_window=7,
    ),
    "granite": lambda: transformers.GraniteConfig(
        **SIZES,
        head_dim=8,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=1.7,
    ),
    "olmo3": lambda: transformers.Olmo3Config(
        **SIZES,
        head_dim=8,
        sliding_window=7,
        rope_parameters={
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 5e5,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "attention_factor": 1.2,
                "beta_fast": 6.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        },
    ),
    "glm4": lambda: transformers.Glm4Config(**SIZES, head_dim=8, pad_token_id=0),
}


def make(name: str, directory=None):
    """A model with every weight random, norms and biases too, so that none can be forgotten unseen;
    saved where a directory is given.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * 0.2
                if parameter.ndim > 1
                else parameter + 0.1 * torch.randn_like(parameter)
            )
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.3)
    if directory:
        model.save_pretrained(directory)
    return model
