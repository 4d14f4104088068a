"""Laws of the loader: targets stay in their document, the same batch on any mesh and host count,
resumed as if never cut, damage is named.
"""

import dataclasses
import json
import logging
import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from test_pack import SEQ_LEN, packing, prepared, split_documents
from test_tokenizer import asking, write_corpus

from jaxpt import config, io, sharding, stage
from jaxpt.data import loader, pack, prepare, storage, tokenizer
from jaxpt.data.mixture import MixtureSchedule
from jaxpt.model import transformer
from jaxpt.spec import UserError

BATCH_SIZE = 16
MESHES = [
    {"fsdp": 8},
    {"replica": 2, "fsdp": 2, "context": 2},
    {"fsdp": 2, "tensor": 2, "context": 2},
    {"fsdp": 1, "context": 8},
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = prepared(tmp_path_factory.mktemp("packed"))
    pack.pack_corpus(packing(), workdir)
    return workdir


@pytest.fixture(scope="module")
def dataset(workdir):
    return loader.open_packed([workdir / "packed"])


@pytest.fixture(scope="module")
def mixture(dataset):
    return MixtureSchedule(
        config.MixtureConfig(phases=((0, {"english": 0.7, "code": 0.3}), (2, {"code": 1.0}))),
        dataset.n_sequences,
        BATCH_SIZE,
    )


def mesh_of(sizes: dict) -> jax.sharding.NamedSharding:
    return sharding.make_batch_sharding(
        sharding.make_mesh(
            config.MeshConfig(**{"fsdp": 1, **sizes}),
            jax.devices()[: np.prod(list(sizes.values()))],
        )
    )


def batches(n, *arguments, **keywords):
    """The first n batches of a stream as numpy."""
    stream = loader.iterate_batches(*arguments, **keywords)
    try:
        return [jax.tree.map(np.asarray, next(stream)) for _ in range(n)]
    finally:
        stream.close()


def assert_equal(left, right):
    for name, a, b in zip(left._fields, left, right, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_sequences_on_disk_equal_those_that_datasets_reads(workdir, dataset):
    import datasets

    assert dataset.names == ["code", "english"]
    for name in dataset.names:
        theirs = datasets.load_from_disk(str(workdir / "packed" / "train" / name))
        assert dataset.n_sequences[name] == len(theirs)
        for i in (0, 1, len(theirs) // 2, len(theirs) - 1):
            row = dataset.read_sequence(name, i)
            assert row.tokens.tolist() == theirs[i]["input_ids"]
            assert row.doc_lens.tolist() == theirs[i]["doc_lens"]
            assert row.loss_from.tolist() == theirs[i]["loss_from"]
            assert dataset.read_document_ids(name, i) == theirs[i]["doc_ids"]
            assert row.tokens.dtype == np.int32
        for i in (-1, len(theirs)):
            with pytest.raises(IndexError):
                dataset.read_sequence(name, i)


def test_sequences_are_found_across_record_batches_and_shards(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "BATCH_TOKENS", 7 * SEQ_LEN)
    for part in ("corpus", "tokenizer"):
        shutil.copytree(workdir / part, tmp_path / part)
    pack.pack_corpus(packing(), tmp_path)
    one, many = loader.open_packed([workdir / "packed"]), loader.open_packed([tmp_path / "packed"])
    assert len(many.sources["english"].index) > 20
    for i in range(one.n_sequences["english"]):
        for a, b in zip(
            one.read_sequence("english", i), many.read_sequence("english", i), strict=True
        ):
            np.testing.assert_array_equal(a, b)
        assert one.read_document_ids("english", i) == many.read_document_ids("english", i)


def random_sequences(rng, n=6, seq_len=37) -> list[loader.PackedSequence]:
    """Segments of 1 token and more, sequences full, not full and empty, loss that starts late."""
    made = []
    for i in range(n):
        lengths = []
        while i and sum(lengths) < seq_len and rng.random() > 0.1:
            lengths.append(int(rng.integers(1, min(14, seq_len - sum(lengths)) + 1)))
        tokens = np.zeros(seq_len, np.int32)
        tokens[: sum(lengths)] = rng.integers(1, 99, sum(lengths))
        loss_from = np.array(
            [rng.choice([0, 0, rng.integers(0, n + 1)]) for n in lengths], np.int32
        )
        made.append(loader.PackedSequence(tokens, np.array(lengths, np.int32), loss_from))
    return made


@pytest.mark.parametrize("document_mask", [True, False])
def test_a_batch_follows_its_definition_token_by_token(document_mask):
    """A target is the next token of the same document (without document_mask, of the sequence), and
    counts if it is trained.
    """
    rng = np.random.default_rng(3)
    for _ in range(20):
        sequences = random_sequences(rng)
        batch = loader.make_batch(sequences, document_mask)
        assert [field.dtype for field in batch[:5]] == [np.int32] * 4 + [np.float32]
        for b, sequence in enumerate(sequences):
            where = [
                (segment, k) for segment, n in enumerate(sequence.doc_lens) for k in range(n)
            ]  # (segment, place in it) of each token
            for t in range(len(sequence.tokens)):
                got = tuple(field[b, t] for field in batch[:5])
                if t >= len(where):
                    assert got == (0, 0, 0, 0, 0.0)
                    continue
                segment, k = where[t]
                there = t + 1 < len(where) and (not document_mask or where[t + 1][0] == segment)
                trained = there and where[t + 1][1] >= sequence.loss_from[where[t + 1][0]]
                target = sequence.tokens[t + 1] if trained else 0
                expected = (
                    sequence.tokens[t],
                    target,
                    segment + 1 if document_mask else 1,
                    k if document_mask else t,
                    float(trained),
                )
                assert got == expected


def test_from_disk_to_logits_a_document_does_not_attend_to_its_neighbors(
    workdir, dataset, spec, one
):
    """Whatever its neighbors are and wherever it begins; without document_mask it sees them."""
    spec = spec.replace(vocab_size=704, max_seq_len=SEQ_LEN)
    params = transformer.init_params(spec, 0, one)

    @jax.jit
    def logits(batch):
        inputs = batch.tokens, batch.segment_ids, batch.positions
        return transformer.compute_logits(spec, params, *inputs)

    name, i = next(
        (n, i)
        for n in dataset.names
        for i in range(dataset.n_sequences[n])
        if len(dataset.read_sequence(n, i).doc_lens) > 2
    )
    row = dataset.read_sequence(name, i)
    ends = np.cumsum([0, *row.doc_lens])
    together, seen = (
        np.asarray(logits(loader.make_batch([row], mask)))[0] for mask in (True, False)
    )
    for k, length in enumerate(row.doc_lens):
        piece = np.zeros_like(row.tokens)
        piece[:length] = row.tokens[ends[k] : ends[k + 1]]
        alone = loader.make_batch(
            [loader.PackedSequence(piece, row.doc_lens[k : k + 1], row.loss_from[k : k + 1])], True
        )
        np.testing.assert_allclose(
            together[ends[k] : ends[k + 1]], np.asarray(logits(alone))[0, :length], atol=2e-5
        )
        assert (
            k == 0
            or np.abs(seen[ends[k] : ends[k + 1]] - together[ends[k] : ends[k + 1]]).max() > 1e-2
        )


@pytest.mark.parametrize(
    "sizes", MESHES, ids=lambda sizes: "-".join(f"{k}{v}" for k, v in sizes.items())
)
def test_any_mesh_gets_the_batch_of_one_device(sizes, dataset, mixture):
    alone = batches(4, dataset, mixture, mesh_of({"fsdp": 1}), BATCH_SIZE, 0, True)
    spread = batches(4, dataset, mixture, mesh_of(sizes), BATCH_SIZE, 0, True)
    for i, (left, right) in enumerate(zip(alone, spread, strict=True)):
        assert_equal(left, right)
        places = [mixture.sequence_at(i * BATCH_SIZE + slot) for slot in range(BATCH_SIZE)]
        assert_equal(
            left, loader.make_batch([dataset.read_sequence(*place) for place in places], True)
        )
    assert {name for name, _ in places} == {"code"}, "the second phase has begun"


def test_a_stream_resumed_at_any_sequence_equals_the_uninterrupted_stream(dataset, mixture):
    """Also with another batch size from then on: no sequence is repeated or skipped."""
    one = mesh_of({"fsdp": 1})
    tokens = np.concatenate(
        [batch.tokens for batch in batches(6, dataset, mixture, one, BATCH_SIZE, 0, True)]
    )
    random = (
        np.random.default_rng().integers((0, 1), (95, 17), (4, 2)).tolist()
    )  # other sequences every time
    for first_sequence, batch_size in ((48, 16), (7, 16), (32, 4), (95, 1), *random):
        resumed = batches(1, dataset, mixture, one, batch_size, first_sequence, True)[0]
        expected = tokens[first_sequence : first_sequence + batch_size]
        np.testing.assert_array_equal(resumed.tokens[: len(expected)], expected)
        assert len(resumed.tokens) == batch_size, (first_sequence, batch_size)
    far = batches(1, dataset, mixture, one, BATCH_SIZE, 10**12, True)[0]
    np.testing.assert_array_equal(
        far.tokens[0], dataset.read_sequence(*mixture.sequence_at(10**12)).tokens
    )


HOST = """
import json, sys, threading
import jax, numpy as np
rank, n_hosts, port, workdir = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.config.update("jax_num_cpu_devices", 8 // n_hosts)
jax.distributed.initialize(f"localhost:{port}", n_hosts, rank)
from jaxpt import config, sharding
from jaxpt.data import loader
from jaxpt.data.mixture import MixtureSchedule

dataset = loader.open_packed([workdir + "/packed"])
read, real = [], dataset.read_sequence

def counted(name, i):
    # the stream's threads read ahead, and may still do so after its end
    if threading.current_thread() is threading.main_thread():
        read.append((name, i))
    return real(name, i)

dataset.read_sequence = counted
mixture = MixtureSchedule(config.MixtureConfig(), dataset.n_sequences, 16)
found = {}
meshes = {"sequences": dict(replica=2, fsdp=4), "positions": dict(fsdp=2, context=4)}
meshes["replicated"] = dict(fsdp=1, tensor=8)
for label, sizes in meshes.items():
    place = sharding.make_batch_sharding(sharding.make_mesh(config.MeshConfig(**sizes)))
    stream = loader.iterate_batches(dataset, mixture, place, 16, 32, True)
    batch = next(stream)
    stream.close()
    parts = {}
    for shard in batch.targets.addressable_shards:
        parts[str([(s.start or 0) for s in shard.index])] = np.asarray(shard.data).tolist()
    read.clear()
    heldout = next(loader.iterate_heldout_batches(dataset, "code", place, 16, 16, True))
    found[label] = {"parts": parts, "n_read": len(read), "shape": batch.tokens.shape}
    found[label]["n_heldout"] = len(heldout.tokens.addressable_shards)
print("FOUND" + json.dumps(found), flush=True)
jax.distributed.shutdown()
"""


def test_hosts_get_the_same_batch_and_read_only_their_own_sequences(workdir, dataset):
    """Real processes, joined by jax.distributed."""
    mix = MixtureSchedule(config.MixtureConfig(), dataset.n_sequences, BATCH_SIZE)
    whole = loader.make_batch(
        [dataset.read_sequence(*mix.sequence_at(32 + slot)) for slot in range(BATCH_SIZE)], True
    ).targets
    for n_hosts in (2, 4):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        hosts = [
            subprocess.Popen(
                [sys.executable, "-c", HOST, str(rank), str(n_hosts), str(port), str(workdir)],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(n_hosts)
        ]
        found = [json.loads(host.communicate(timeout=120)[0].split("FOUND")[1]) for host in hosts]
        for label in ("sequences", "positions", "replicated"):
            rebuilt = np.full_like(whole, -1)
            for host in found:
                for start, values in host[label]["parts"].items():
                    (r, t), values = json.loads(start), np.array(values)
                    rebuilt[r : r + len(values), t : t + values.shape[1]] = values
                assert host[label]["shape"] == [BATCH_SIZE, SEQ_LEN]
            np.testing.assert_array_equal(rebuilt, whole)
        assert [host["sequences"]["n_read"] for host in found] == [BATCH_SIZE // n_hosts] * n_hosts
        assert [host["positions"]["n_read"] for host in found] == [BATCH_SIZE // 2] * n_hosts, (
            "4 devices share a row's positions"
        )
        assert [host["replicated"]["n_read"] for host in found] == [BATCH_SIZE] * n_hosts


def test_heldout_batches_hold_each_sequence_once_and_mask_empty_ones(workdir):
    dataset = loader.open_packed([workdir / "packed"], split="heldout")
    assert dataset.names == ["english"]
    n = dataset.n_sequences["english"]
    for sizes in ({"fsdp": 1}, {"fsdp": 4, "context": 2}):
        found = list(
            loader.iterate_heldout_batches(dataset, "english", mesh_of(sizes), 8, 10**9, True)
        )
        assert [batch.tokens.shape for batch in found] == [(8, SEQ_LEN)] * -(-n // 8)
        whole = loader.make_batch([dataset.read_sequence("english", i) for i in range(n)], True)
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
        assert_equal(whole, jax.tree.map(lambda x: x[:n], joined))
        assert not any(x[n:].any() for x in jax.tree.leaves(joined))
    few = next(loader.iterate_heldout_batches(dataset, "english", mesh_of({"fsdp": 1}), 8, 5, True))
    chosen = [
        next(
            i
            for i in range(n)
            if np.array_equal(dataset.read_sequence("english", i).tokens, tokens)
        )
        for tokens in few.tokens[:5]
    ]
    assert chosen == [k * n // 5 for k in range(5)], "evenly spread"
    assert not few.loss_mask[5:].any()


def other_packed(workdir, directory, name="other", vocab_size=700, seq_len=SEQ_LEN):
    """A packed directory with one more source."""
    write_corpus(directory, {name: split_documents()[0]["english"][:20]})
    if vocab_size == 700:
        shutil.copytree(workdir / "tokenizer", directory / "tokenizer")
    else:
        tokenizer.train_tokenizer(asking(vocab_size=vocab_size), directory)
    pack.pack_corpus(packing(seq_len=seq_len), directory)
    return directory / "packed"


def test_several_packed_directories_make_one_dataset(workdir, dataset, tmp_path):
    other = other_packed(workdir, tmp_path)
    both = loader.open_packed([workdir / "packed", other])
    assert both.names == ["code", "english", "other"]
    assert both.n_sequences == dataset.n_sequences | loader.open_packed([other]).n_sequences
    assert both.fingerprint != dataset.fingerprint
    assert both.fingerprint == loader.open_packed([other, workdir / "packed"]).fingerprint
    assert both.tokenizer == tokenizer.load_tokenizer(workdir / "tokenizer").fingerprint
    assert (both.seq_len, both.vocab_size) == (SEQ_LEN, 700)
    assert set(both.unigram_nats) == set(both.names)


def damaged(workdir, directory, change, name="data-00000.arrow"):
    shutil.copytree(workdir / "packed", directory / "packed")
    file = directory / "packed" / "train" / "english" / name
    content = file.read_bytes()
    file.unlink()
    if change != "missing":
        middle = len(content) // 2
        file.write_bytes(
            content[:middle]
            if change == "truncated"
            else content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        )
    return [directory / "packed"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (lambda w, d: [], "no packed directory"),
        (lambda w, d: [d / "nowhere"], "no manifest.json"),
        (
            lambda w, d: [w / "packed", w / "tokenizer"],
            "was made by tokenizer, expected packed sequences",
        ),
        (
            lambda w, d: [w / "packed", w / "packed"],
            "source code was opened from another directory",
        ),
        (
            lambda w, d: [w / "packed", other_packed(w, d, seq_len=64)],
            "its sequences have 64 tokens",
        ),
        (
            lambda w, d: [w / "packed", other_packed(w, d, vocab_size=650)],
            "Pack both with one tokenizer",
        ),
        (lambda w, d: damaged(w, d, "missing"), "data-00000.arrow: missing"),
        (lambda w, d: damaged(w, d, "truncated"), "data-00000.arrow: .* bytes, expected"),
        (lambda w, d: damaged(w, d, "one bit"), "data-00000.arrow: the checksum of bytes"),
        (lambda w, d: damaged(w, d, "one bit", pack.INDEX_FILE), "batches.npy: its checksum"),
        (lambda w, d: damaged(w, d, "missing", pack.INDEX_FILE), "batches.npy: missing"),
    ],
    ids=[
        "none",
        "missing",
        "not packed",
        "twice",
        "seq_len",
        "tokenizer",
        "shard gone",
        "shard cut",
        "shard damaged",
        "index damaged",
        "index gone",
    ],
)
def test_packed_data_that_cannot_be_trusted_is_refused_in_one_sentence(
    paths, message, workdir, tmp_path
):
    with pytest.raises(UserError, match=message) as error:
        loader.open_packed(paths(workdir, tmp_path))
    assert "\n" not in str(error.value)


def test_small_record_batches_are_read_once_and_hold_no_file_open(workdir, tmp_path, monkeypatch):
    """As those of a thousand small sources are: what stays open is bounded by bytes, not number."""
    monkeypatch.setattr(pack, "BATCH_TOKENS", SEQ_LEN)
    for part in ("corpus", "tokenizer"):
        shutil.copytree(workdir / part, tmp_path / part)
    pack.pack_corpus(packing(), tmp_path)
    dataset = loader.open_packed([tmp_path / "packed"])
    places = [(name, i) for name in dataset.names for i in range(dataset.n_sequences[name])]
    assert len(places) > 300
    n_files = len(os.listdir("/proc/self/fd"))
    first = [dataset.read_sequence(*place).tokens for place in places]
    assert len(os.listdir("/proc/self/fd")) == n_files
    monkeypatch.setattr(storage.LocalStorage, "read_range", None)  # is not called again
    for tokens, place in zip(first, places, strict=True):
        np.testing.assert_array_equal(dataset.read_sequence(*place).tokens, tokens)


def test_of_a_set_too_large_to_check_at_once_no_damaged_sequence_is_trained_on(
    workdir, tmp_path, monkeypatch
):
    monkeypatch.setattr(pack, "BATCH_TOKENS", 40 * SEQ_LEN)
    monkeypatch.setattr(loader, "MAX_BYTES_VERIFIED_AT_OPEN", 0)
    monkeypatch.setattr(loader, "MAX_OPEN_BYTES", 50_000)
    for part in ("corpus", "tokenizer"):
        shutil.copytree(workdir / part, tmp_path / part)
    pack.pack_corpus(packing(), tmp_path)
    dataset = loader.open_packed(damaged(tmp_path, tmp_path / "other", "one bit"))
    source = dataset.sources["english"]
    n_bytes = (tmp_path / "packed/train/english/data-00000.arrow").stat().st_size
    bad = next(
        k
        for k in range(len(source.index))
        if source.get_byte_range(k).start + source.get_byte_range(k).n_bytes > n_bytes // 2
    )
    sound = loader.open_packed([tmp_path / "packed"])
    for k in range(len(source.index)):
        i = int(source.first_sequences[k])
        if k == bad:
            with pytest.raises(
                UserError, match=r"train/english/data-00000\.arrow: the checksum of bytes"
            ):
                dataset.read_sequence("english", i)
        else:
            np.testing.assert_array_equal(
                dataset.read_sequence("english", i).tokens, sound.read_sequence("english", i).tokens
            )
            assert dataset.read_document_ids("english", i) == sound.read_document_ids("english", i)
    assert (
        len(dataset.open_batches) == 3 and source.is_verified.sum() == len(source.is_verified) - 1
    )

    dataset = loader.open_packed([tmp_path / "other" / "packed"])
    mix = MixtureSchedule(
        config.MixtureConfig(phases=((0, {"code": 1.0}),)), dataset.n_sequences, BATCH_SIZE
    )  # reads nothing of the damaged source
    stream = loader.iterate_batches(dataset, mix, mesh_of({"fsdp": 1}), BATCH_SIZE, 0, True)
    with pytest.raises(UserError, match=r"train/english/data-00000\.arrow: the checksum of bytes"):
        for _ in range(1000):
            next(stream)
            dataset.verification.join()


@pytest.fixture
def bucket(workdir, tmp_path, monkeypatch):
    """Packed data and its tokenizer in an S3 server on loopback; yields (address, client)."""
    server = pytest.importorskip(
        "moto.server", reason="needs moto[server], an S3 server"
    ).ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    import boto3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs = pytest.importorskip("s3fs", reason="pip install -r requirements-s3.txt")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(pack, "BATCH_TOKENS", 40 * SEQ_LEN)
    for part in ("corpus", "tokenizer"):
        shutil.copytree(workdir / part, tmp_path / part)
    pack.pack_corpus(packing(), tmp_path)
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="packed")
    for file in [*(tmp_path / "packed").rglob("*"), *(tmp_path / "tokenizer").rglob("*")]:
        if file.is_file():
            client.put_object(
                Bucket="packed", Key=f"run/{file.relative_to(tmp_path)}", Body=file.read_bytes()
            )
    yield "s3://packed/run/packed", client
    server.stop()


def test_a_bucket_gives_what_is_on_disk_and_each_range_is_fetched_once(
    bucket, tmp_path, monkeypatch
):
    address, _ = bucket
    here, there = loader.open_packed([tmp_path / "packed"]), loader.open_packed([address])
    assert here.fingerprint == there.fingerprint and here.n_sequences == there.n_sequences
    fetched, read_range = [], io.read_range

    def count_range(path, start, n_bytes):
        if isinstance(path, io.BucketPath):
            fetched.append(n_bytes)
        return read_range(path, start, n_bytes)

    monkeypatch.setattr(io, "read_range", count_range)
    there.read_sequence("english", 0)
    assert fetched == [there.sources["english"].get_byte_range(0).n_bytes], (
        "a record batch, no more"
    )
    mix = MixtureSchedule(config.MixtureConfig(), here.n_sequences, BATCH_SIZE)
    one = mesh_of({"fsdp": 2, "context": 2})
    n = sum(here.n_sequences.values()) // BATCH_SIZE
    for left, right in zip(
        batches(n, here, mix, one, BATCH_SIZE, 0, True),
        batches(n, there, mix, one, BATCH_SIZE, 0, True),
        strict=True,
    ):
        assert_equal(left, right)
    assert [here.read_document_ids("code", i) for i in range(9)] == [
        there.read_document_ids("code", i) for i in range(9)
    ]
    every = sum(len(source.index) for source in there.sources.values())
    assert len(fetched) == every, "read ahead, by threads, and kept"
    again = loader.open_packed([address])
    assert_equal(
        batches(1, again, mix, one, BATCH_SIZE, 0, True)[0],
        batches(1, here, mix, one, BATCH_SIZE, 0, True)[0],
    )
    assert len(fetched) == every, "another start finds them on its disk"


def test_the_cache_of_a_bucket_keeps_its_bounds_and_trusts_no_damaged_file(
    bucket, tmp_path, monkeypatch
):
    address, _ = bucket
    here = loader.open_packed([tmp_path / "packed"])
    limit = 3.5 * here.sources["english"].get_byte_range(0).n_bytes
    monkeypatch.setattr(storage, "CACHE_BYTES", limit)
    monkeypatch.setattr(loader, "MAX_OPEN_BYTES", 1)
    (directory,) = [storage.cache_directory() / here.sources["code"].fingerprint]
    for _ in range(2):
        there = loader.open_packed([address])
        for i in range(0, here.n_sequences["english"], 7):
            np.testing.assert_array_equal(
                there.read_sequence("english", i).tokens, here.read_sequence("english", i).tokens
            )
            assert sum(file.stat().st_size for file in directory.iterdir()) <= limit
        kept = list(directory.iterdir())
        assert 2 <= len(kept) <= 4
        for file in kept:
            file.write_bytes(file.read_bytes()[:-9] + b"\1" * 9)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("cut", "bytes, expected"),
        ("gone", "data-00000.arrow: missing"),
        ("flipped", "the checksum of bytes"),
        ("no bucket", "s3://nowhere/packed"),
    ],
)
def test_a_broken_object_is_named(bucket, harm, message):
    address, client = bucket
    key = "run/packed/train/english/data-00000.arrow"
    whole = client.get_object(Bucket="packed", Key=key)["Body"].read()
    if harm == "gone":
        client.delete_object(Bucket="packed", Key=key)
    else:
        client.put_object(
            Bucket="packed",
            Key=key,
            Body=whole[:-100]
            if harm == "cut"
            else whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:],
        )
    with pytest.raises(UserError, match=message) as error:
        loader.open_packed(
            ["s3://nowhere/packed" if harm == "no bucket" else address]
        ).read_sequence("english", 0)
    assert "\n" not in str(error.value)


def test_hosts_verify_parts_that_together_are_everything(workdir):
    dataset = loader.open_packed([workdir / "packed"])
    for source in dataset.sources.values():
        source.is_verified[:] = False
        for part in range(3):
            source.verify(part, 3)
        assert source.is_verified.all()


def test_a_prompt_is_masked_from_file_to_batch(workdir, tmp_path):
    """jsonl with two fields -> corpus -> sequences -> batch: each completion and its end are
    trained, and nothing else of a document.
    """
    records = [
        {"question": f"What is {i} + {i}?\n", "answer": f"It is {2 * i}, I say 日本."}
        for i in range(90)
    ]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    asked = config.PrepareConfig(
        sources=(f"tasks=jsonl:{tmp_path}/tasks.jsonl#question+answer",), heldout_frac=0.0
    )
    prepare.prepare_corpus(asked, tmp_path)
    shutil.copytree(workdir / "tokenizer", tmp_path / "tokenizer")
    counts = pack.pack_corpus(packing(), tmp_path).counts["train"]["tasks"]
    dataset, words = (
        loader.open_packed([tmp_path / "packed"]),
        tokenizer.load_tokenizer(tmp_path / "tokenizer"),
    )
    trained, by_document = 0, {}
    for i in range(dataset.n_sequences["tasks"]):
        row = dataset.read_sequence("tasks", i)
        batch = loader.make_batch([row], True)
        trained += int(batch.loss_mask.sum())
        for k, document in enumerate(dataset.read_document_ids("tasks", i)):
            here = batch.segment_ids[0] == k + 1
            by_document.setdefault(document, []).append(
                (batch.tokens[0][here], batch.targets[0][here & (batch.loss_mask[0] > 0)])
            )
    for n, record in enumerate(records, 1):
        (tokens, targets), *more = by_document[f"tasks/tasks.jsonl:{n}"]
        assert not more, "it fits into a row"
        assert words.decode(tokens.tolist()) == record["question"] + record["answer"]
        assert targets[-1] == words.eos_id
        assert words.decode(targets.tolist()).strip() == record["answer"]
    assert trained == counts["n_trained_tokens"] < counts["n_tokens"] / 1.5


def test_a_batch_that_the_mesh_cannot_shard_is_refused(dataset, mixture):
    for sizes, batch_size in (({"fsdp": 8}, 12), ({"fsdp": 1, "context": 5}, 16)):
        with pytest.raises(UserError, match="cannot be sharded evenly"):
            next(loader.iterate_batches(dataset, mixture, mesh_of(sizes), batch_size, 0, True))


def a_run(workdir, tmp_path, **changes):
    """A run directory as the loop leaves it."""
    settings = dataclasses.replace(
        config.Config(),
        mixture=config.MixtureConfig(
            packed_paths=(str(workdir / "packed"),),
            phases=((0, {"english": 0.7, "code": 0.3}), (2, {"code": 1.0})),
        ),
        train=config.TrainConfig(batch_size=BATCH_SIZE, steps=9),
    )
    dataset = loader.open_packed([workdir / "packed"])
    phases = MixtureSchedule(
        settings.mixture, dataset.n_sequences, BATCH_SIZE, fingerprint=dataset.fingerprint
    ).phases
    (tmp_path / "config.json").write_text(json.dumps({**stage.to_jsonable(settings), **changes}))
    (tmp_path / "phases.json").write_text(json.dumps([phase.to_json() for phase in phases]))
    shutil.copytree(workdir / "tokenizer", tmp_path / "tokenizer")
    return tmp_path


def test_trace_names_the_documents_of_a_step(workdir, dataset, mixture, tmp_path):
    run = a_run(workdir, tmp_path)
    step = 2
    batch = batches(step, dataset, mixture, mesh_of({"fsdp": 1}), BATCH_SIZE, 0, True)[step - 1]
    seen = list(loader.trace_step(run, step, dataset.tokenizer))
    rebuilt = [
        np.concatenate([each.tokens for each in seen if each.slot == slot])
        for slot in range(BATCH_SIZE)
    ]
    for tokens, row in zip(rebuilt, batch.tokens, strict=True):
        np.testing.assert_array_equal(tokens, row[: len(tokens)])
        assert not row[len(tokens) :].any()
    texts, words = split_documents()[0], tokenizer.load_tokenizer(workdir / "tokenizer")
    for each in seen:
        assert (
            words.decode(each.tokens.tolist()).strip()
            in texts[each.source][int(each.document.split("-")[1])]
        )

    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "trace.py", "--workdir", run, "--step", str(step)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(result.stdout.splitlines()) == len(seen)
    assert seen[0].document in result.stdout.splitlines()[0]


def test_trace_refuses_what_it_cannot_read(workdir, dataset, tmp_path):
    with pytest.raises(UserError, match=r"no readable config\.json"):
        next(loader.trace_step(tmp_path, 1, dataset.tokenizer))
    run = a_run(workdir, tmp_path)
    for step in (0, 10):
        with pytest.raises(UserError, match="a step of the run, 1 to 9"):
            next(loader.trace_step(run, step, dataset.tokenizer))
    with pytest.raises(UserError, match="packed with"):
        next(loader.trace_step(run, 1, "another"))
    phases = json.loads((run / "phases.json").read_text())
    (run / "phases.json").write_text(
        json.dumps([{**each, "fingerprint": "others"} for each in phases])
    )
    with pytest.raises(UserError, match="step 1 read other sequences"):
        next(loader.trace_step(run, 1, dataset.tokenizer))
