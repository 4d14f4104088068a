"""Begin, end and padding tokens: one account of tokenizer and config files."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxpt import config, export, initialize
from jaxpt.data import tokenizer
from jaxpt.model import transformer
from jaxpt.spec import ModelSpec, SpecialTokens, UserError
from jaxpt.train import begin
from jaxpt.weights import huggingface, load, tokenizer_files

SPEC = ModelSpec(
    n_layers=2,
    d_model=24,
    d_ff=40,
    n_heads=6,
    n_kv_heads=2,
    d_head=8,
    vocab_size=259,
    max_seq_len=64,
    bos_id=256,
    eos_ids=(257,),
)
SETTINGS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
NAMES = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]  # 256, 257, 258


def write_tokenizer(directory, *more, **settings):
    """Bytes as tokens, and Llama 3's control tokens behind them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([*NAMES, *more])
    directory.mkdir(parents=True, exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    write(directory / "tokenizer_config.json", SETTINGS | settings)
    return directory


def write(file, value):
    """Write JSON."""
    file.write_text(json.dumps(value))


def read(file):
    """Read JSON."""
    return json.loads(file.read_text())


def edit(file, **keys):
    """Change keys of a JSON file."""
    write(file, read(file) | keys)


@pytest.fixture(scope="module")
def made(tmp_path_factory, one):
    """A model's directory, with a tokenizer."""
    directory = write_tokenizer(tmp_path_factory.mktemp("model") / "made")
    huggingface.write_hf_model(SPEC, transformer.init_params(SPEC, 0, one), directory)
    return directory


@pytest.fixture
def given(tmp_path, made):
    """A copy of it, to be changed."""
    return shutil.copytree(made, tmp_path / "given")


def export_to(given, out, monkeypatch):
    """Export, with transformers' word taken for granted; return config and generation_config."""
    monkeypatch.setattr(tokenizer_files, "find_difference", lambda *_: "")
    export.export_model(given, out)
    return read(out / "config.json"), read(out / "generation_config.json")


@pytest.mark.parametrize(
    "in_config, in_generation, expected",
    [
        ([257, 258], None, [257, 258]),
        (257, [258, 257], [258, 257]),
        ([257, 258], 257, [257, 258]),
        (258, [256, 257], [256, 257, 258]),
        (None, None, 258),  # the tokenizer's
    ],
)
def test_every_end_token_of_an_import_is_one_of_its_export(
    given, tmp_path, monkeypatch, caplog, in_config, in_generation, expected
):
    edit(given / "config.json", eos_token_id=in_config)
    edit(given / "generation_config.json", eos_token_id=in_generation)
    files = export_to(given, tmp_path / "out", monkeypatch)
    assert [file["eos_token_id"] for file in files] == [expected, expected]
    disagree = in_generation is not None and in_generation != in_config
    assert ("every end token" in caplog.text) == disagree
    assert ("names no end token" in caplog.text) == (expected == 258)


def test_sampling_defaults_and_padding_travel_from_import_to_export(given, tmp_path, monkeypatch):
    ours = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "suppress_tokens": [3, 5]}
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    write(given / "generation_config.json", {**ours, **ids, "transformers_version": "4.1"})
    spec, generation = export_to(given, tmp_path / "out", monkeypatch)
    assert generation == ours | ids
    assert spec["pad_token_id"] == 258 and "temperature" not in spec


def test_a_random_model_takes_the_tokenizers_tokens(tmp_path):
    encoder = tokenizer.load_tokenizer(write_tokenizer(tmp_path, pad_token="<|end_of_text|>"))
    assert encoder.special_tokens == SpecialTokens(256, (258,), 257)
    assert encoder.bos_id is None, "named, though not put before a text"
    architecture = config.ModelConfig()
    spec = initialize.make_random_spec(architecture, 300, encoder.special_tokens)
    assert (spec.bos_id, spec.eos_ids, spec.pad_id) == (256, (258,), 257)
    architecture = config.ModelConfig(fields=(("eos_ids", (5, 7)),))
    spec = initialize.make_random_spec(architecture, 300, encoder.special_tokens)
    assert spec.eos_ids == (5, 7), "what is asked for comes first"


def test_a_run_ends_texts_as_the_documents_that_it_reads(caplog):
    class Dataset:
        special_tokens = SpecialTokens(256, (258,), None)

    model = load.LoadedModel(SPEC, {}, None, None, None, None, {})
    assert begin.end_as_documents(model, Dataset).spec.eos_ids == (257, 258)
    assert "token 258" in caplog.text and "[257]" in caplog.text


def test_tokenizer_and_model_that_disagree_are_told(given, one, caplog):
    edit(given / "tokenizer_config.json", pad_token="<|end_of_text|>")
    edit(given / "config.json", pad_token_id=7)
    load.open_tokenizer(load.load_model(given, one))
    assert "documents end by <|eot_id|> (258)" in caplog.text and "[257]" in caplog.text
    assert "pad_id is 257 in the tokenizer, 7 in the model's config" in caplog.text


@pytest.mark.parametrize("is_old", [True, False])
def test_of_two_files_with_special_tokens_that_of_transformers_is_taken(tmp_path, caplog, is_old):
    added = {} if is_old else {"added_tokens_decoder": {}}
    write_tokenizer(tmp_path, **added)
    write(tmp_path / "special_tokens_map.json", {"eos_token": {"content": "<|end_of_text|>"}})
    assert tokenizer.load_tokenizer(tmp_path).eos_id == (257 if is_old else 258)
    assert "eos_token is '<|end_of_text|>'" in caplog.text


def test_a_padding_token_beyond_the_rows_is_no_hindrance(given, tmp_path, monkeypatch, caplog, one):
    write_tokenizer(given, "<pad>", pad_token="<pad>")
    edit(given / "generation_config.json", pad_token_id=259)
    spec, generation = export_to(given, tmp_path / "out", monkeypatch)
    assert spec["pad_token_id"] is generation["pad_token_id"] is None
    assert "pad_token_id is 259, but the model knows ids 0 to 258" in caplog.text
    write_tokenizer(given, "<end>", eos_token="<end>")
    with pytest.raises(UserError, match="gives ids up to 259"):
        load.open_tokenizer(load.load_model(given, one))


def test_named_chat_templates_travel(given, tmp_path, monkeypatch):
    (given / "chat_template.jinja").write_text("default {{ messages }}")
    (given / "additional_chat_templates").mkdir()
    (given / "additional_chat_templates/tool_use.jinja").write_text("tools {{ tools }}")
    export_to(given, tmp_path / "out", monkeypatch)
    named = tmp_path / "out/additional_chat_templates/tool_use.jinja"
    assert named.read_text() == "tools {{ tools }}"
    tokenizer.load_tokenizer(tmp_path / "out").save_tokenizer(tmp_path)
    assert read(tmp_path / "tokenizer_config.json")["chat_template"] == [
        {"name": "default", "template": "default {{ messages }}"},
        {"name": "tool_use", "template": "tools {{ tools }}"},
    ]


def test_a_tokenizer_that_transformers_reads_otherwise_is_written_anew(given, tmp_path):
    edit(given / "tokenizer_config.json", add_bos_token=True)  # AutoTokenizer does not read it
    encoder = tokenizer.load_tokenizer(given)
    ids = encoder.encode_probe_texts()
    assert {each[0] for each in ids} == {256}
    huggingface.copy_tokenizer(given, tmp_path / "copy")
    found = tokenizer_files.find_difference(encoder, SPEC, tmp_path / "copy")
    assert "of 19 texts otherwise than the run, such as 'a'" in found
    out = tmp_path / "out"
    tokenizer_files.export_tokenizer(encoder, given, SPEC, out)
    trial = tokenizer_files.encode_by_transformers(out, tokenizer.PROBE_TEXTS)
    assert trial.ids == ids


@pytest.mark.slow
def test_a_class_that_transformers_forces_is_refused_with_a_family_that_has_none(given, tmp_path):
    write_tokenizer(given)
    form = read(given / "tokenizer.json")
    form["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": False}, form["pre_tokenizer"]],
    }
    form["normalizer"] = {"type": "Lowercase"}
    write(given / "tokenizer.json", form)
    encoder = tokenizer.load_tokenizer(given)
    qwen = SPEC.replace(family="qwen2", qkv_bias=True)
    with pytest.raises(
        UserError, match=r"opens the tokenizer as Qwen2Tokenizer.*--family seed_oss"
    ):
        tokenizer_files.export_tokenizer(encoder, given, qwen, tmp_path / "out")
    other = qwen.replace(family="seed_oss")
    tokenizer_files.export_tokenizer(encoder, given, other, tmp_path / "out")


def test_a_sentencepiece_model_alone_is_a_tokenizer(given, tmp_path, data_dir, monkeypatch):
    (given / "tokenizer.json").unlink()
    model = data_dir / "tok_mistral_v1" / "tokenizer.model"
    (given / "tokenizer.model").write_bytes(model.read_bytes())
    write(given / "tokenizer_config.json", {"pad_token": "<pad>", "eos_token": "</s>"})
    write(given / "added_tokens.json", {"<pad>": 32000})
    encoder = tokenizer.load_tokenizer(given)
    assert (encoder.n_text_ids, encoder.vocab_size) == (32000, 32001)
    assert encoder.special_tokens == SpecialTokens(1, (2,), 32000)
    assert encoder.encode_batch(tokenizer.PROBE_TEXTS) == (
        tokenizer.load_tokenizer(model).encode_batch(tokenizer.PROBE_TEXTS)
    )
    monkeypatch.setattr(tokenizer_files, "find_difference", lambda *_: "")
    tokenizer_files.export_tokenizer(encoder, given, SPEC, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").is_file()
    write(given / "added_tokens.json", {"<pad>": 32007})
    with pytest.raises(UserError, match="'<pad>', added beside it, has the id 32007"):
        tokenizer.load_tokenizer(given)
