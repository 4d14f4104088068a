"""jaxpt: pretrain, grow and specialise Llama-family language models in JAX."""
