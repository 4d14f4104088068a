"""Laws of GGUF files: llama.cpp makes the same tokens and says the same, or it is refused."""

import json
import shutil

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
import variants
from conftest import SMALL_SPEC
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxpt import export, io
from jaxpt.data.tokenizer import load_tokenizer
from jaxpt.spec import UserError
from jaxpt.weights import gguf_file
from jaxpt.weights.gguf_tokenizer import PRE_TOKENIZERS, UNUSED, describe_tokenizer

SPEC = SMALL_SPEC.replace(vocab_size=512, eos_ids=(1, 3))
TEXTS = [
    "Hello world, it's 1234 o'clock!  \n\n  Naïve café — “quotes” 你好\tタブ <s> </s>",
    "def f(x):\n    return x**2  # 3.14159\n",
    "   leading",
    "trailing   ",
    "",
    "🙂🙂 emoji We'LL they'Re",
]
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
# family, with a switch of it -> (config, its tokenizer's pre-tokenizer)
MODELS = {
    "llama": (
        lambda: transformers.LlamaConfig(**SIZES, head_dim=16, rope_parameters=variants.LLAMA3),
        "llama-bpe",
    ),
    "llama, biases": (
        lambda: transformers.LlamaConfig(
            **SIZES, head_dim=16, attention_bias=True, rope_parameters=LINEAR
        ),
        "smollm",
    ),
    "mistral": (
        lambda: transformers.MistralConfig(**SIZES, head_dim=24, sliding_window=64),
        "spm",
    ),
    "qwen2": (lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True), "qwen2"),
    "qwen3": (lambda: transformers.Qwen3Config(**SIZES, head_dim=16), "gpt-2"),
}


def make_byte_level(name):
    """A tokenizer with one of llama.cpp's pre-tokenizers."""
    ((steps, ignore_merges),) = [key for key, known in PRE_TOKENIZERS.items() if known == name]
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    parts = []
    for step in steps:
        if step == "GPT-2":
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
        elif step == "digits":
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            parts.append(pre_tokenizers.Split(tokenizers.Regex(step), "isolated"))
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    if name == "llama-bpe":
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    return backend


def save_model(directory, name, texts=None):
    """A directory with a random model and a tokenizer of its pre-tokenizer; the model."""
    make_config, pre = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make_config()).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            noise = 0.15 * torch.randn_like(weight)
            weight.copy_(noise if weight.ndim > 1 else weight + noise)
    model.save_pretrained(directory)
    if pre == "spm":
        for file in (texts / "base/tokenizer").iterdir():
            shutil.copy(file, directory)
        (directory / "manifest.json").unlink()
        return model
    make_byte_level(pre).save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_makes_the_same_tokens_and_says_the_same(tmp_path, texts, name):
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed: see requirements-gguf.txt"
    )
    model = save_model(tmp_path / "hf", name, texts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = [5, 7, 9, 30, 33, 120]
    tokens = torch.tensor([prompt])
    # no end token: both go on
    greedy = model.generate(tokens, max_new_tokens=20, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        logits = model(tokens).logits[0].numpy()
    # of f16: the weights are rounded
    for dtype, atol in (("f32", 2e-4), ("f16", 2e-2)):
        export.export_gguf(io.path(tmp_path / "hf"), io.path(tmp_path / dtype), dtype)
        file = str(tmp_path / dtype / "model.gguf")
        float32 = {"type_k": 0, "type_v": 0}  # of the cache
        runner = llama_cpp.Llama(
            file, n_ctx=64, n_threads=1, logits_all=True, verbose=False, **float32
        )
        for text in TEXTS:
            ids = runner.tokenize(text.encode(), add_bos=True, special=True)
            assert ids == tokenizer(text).input_ids, text
        runner.eval(prompt)
        np.testing.assert_allclose(runner.scores[: len(prompt)], logits, atol=atol)
        runner.reset()
        generated = runner.generate(prompt, temp=0.0)
        assert prompt + [next(generated) for _ in range(20)] == greedy[0].tolist()


def test_a_file_holds_every_tensor_in_its_dtype(tmp_path, texts):
    save_model(tmp_path / "hf", "llama")
    weights = {}
    for dtype in gguf_file.FILE_TYPES:
        manifest = export.export_gguf(io.path(tmp_path / "hf"), io.path(tmp_path / dtype), dtype)
        reader = gguf.GGUFReader(tmp_path / dtype / "model.gguf")
        weights[dtype] = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            for tensor in reader.tensors
        }
        assert manifest.counts["bytes"] == sum(
            tensor.n_bytes for tensor in reader.tensors if tensor.name != "rope_freqs.weight"
        )
        assert set(manifest.outputs) >= {"model.gguf", "README.md"}
    assert len(weights["f32"]) == 3 * 9 + 4
    steps = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 0.6 / 127}
    for dtype, step in steps.items():
        for name, exact in weights["f32"].items():
            error = np.abs(weights[dtype][name] - exact).max()
            assert error <= step * np.abs(exact).max(), (dtype, name)
            assert (error == 0) == (exact.ndim == 1), (dtype, name)


def test_ids_without_a_token_are_unused_and_bos_is_as_the_tokenizer_has_it(tmp_path):
    save_model(tmp_path, "llama")
    tokenizer = load_tokenizer(tmp_path)
    described = describe_tokenizer(tokenizer, SPEC)
    assert described.pre == "llama-bpe" and described.adds_bos and described.bos_id == 0
    assert described.eos_ids == (1, 3)
    n_known = tokenizer.vocab_size
    assert described.token_types[n_known:] == [UNUSED] * (512 - n_known)
    assert described.tokens[511] == "[PAD511]" and len(described.tokens) == 512


def refuse_tokenizer(directory, change):
    path = directory / "tokenizer.json"
    form = json.loads(path.read_text())
    change(form)
    path.write_text(json.dumps(form))


def change_pattern(form):
    form["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += r"|\d+"


NOT_IN_LLAMA_CPP = {
    "a pre-tokenizer without a name": (change_pattern, "the pre-tokenizers llama-bpe, qwen2"),
    "a normalizer": (
        lambda form: form.update(normalizer={"type": "Lowercase"}),
        "the pre-tokenizers llama-bpe",
    ),
    "merges that are not ignored": (
        lambda form: form["model"].update(ignore_merges=False),
        "the pre-tokenizers llama-bpe",
    ),
}


@pytest.mark.parametrize("name", NOT_IN_LLAMA_CPP)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused_with_the_way_out(tmp_path, name):
    change, expected = NOT_IN_LLAMA_CPP[name]
    save_model(tmp_path, "llama")
    refuse_tokenizer(tmp_path, change)
    with pytest.raises(UserError, match=rf"llama.cpp reads {expected}.*convert_hf_to_gguf"):
        describe_tokenizer(load_tokenizer(tmp_path), SPEC)


def test_a_model_that_llama_cpp_has_not_is_refused_by_field(spec):
    for changes, expected in {
        "family": ({"family": "gemma2"}, "writes llama, mistral, qwen2, qwen3, got a gemma2"),
        "query_scale": ({"query_scale": 0.3}, "query_scale: llama.cpp's llama has None, got 0.3"),
        "qkv_bias": ({"family": "qwen2"}, "qkv_bias: llama.cpp's qwen2 has True, got False"),
        "n_experts": ({"n_experts": 4, "n_experts_per_token": 2}, "n_experts: .* got 4"),
    }.values():
        with pytest.raises(UserError, match=expected):
            gguf_file.check_spec(spec.replace(**changes))
    gguf_file.check_spec(spec)


def test_a_fourth_end_token_is_refused(tmp_path):
    save_model(tmp_path, "llama")
    with pytest.raises(UserError, match=r"llama.cpp has 3 end tokens, got \[1, 2, 3, 4\]"):
        describe_tokenizer(load_tokenizer(tmp_path), SPEC.replace(eos_ids=(1, 2, 3, 4)))
