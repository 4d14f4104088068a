"""Files on disks and in buckets: nothing lost, nobody else's removed, every fault a sentence."""

import builtins
import concurrent.futures
import contextlib
import dataclasses
import errno
import io as std_io
import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import buckets
import faults_power
import pytest
from conftest import ROOT
from hypothesis import given, strategies

from jaxpt import io
from jaxpt.io import bucket, cache, lock
from jaxpt.spec import Record, UserError


@dataclasses.dataclass(frozen=True)
class Losses(Record):
    loss: float
    last: float | None
    by_source: dict[str, float]


FLOATS = strategies.floats()


@given(
    strategies.builds(Losses, FLOATS, FLOATS, strategies.dictionaries(strategies.text(), FLOATS))
)
def test_json_never_holds_a_number_that_it_has_no_word_for(record):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    values = json.loads(json.dumps(record.to_json()), parse_constant=refuse)
    again = Losses.from_json(values)
    for read, wrote in zip(
        [again.loss, *again.by_source.values()],
        [record.loss, *record.by_source.values()],
        strict=True,
    ):
        assert read == wrote if math.isfinite(wrote) else math.isnan(read)


@pytest.fixture(scope="module", params=["gs", "s3"])
def server(request):
    """The scheme and proxy of a server that runs for all tests of it."""
    with buckets.lead_to(request.param) as proxy:
        yield request.param, proxy


@pytest.fixture
def place(server, request, tmp_path, monkeypatch):
    """A new prefix in a bucket, with a cache of its own. No folder of its name may be left."""
    scheme, proxy = server
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    proxy.faults.clear()
    proxy.answers.clear()
    yield io.path(f"{scheme}://bucket") / request.node.name
    assert not [name for name in os.listdir(tmp_path) if ":" in name]


@pytest.fixture
def proxy(server):
    return server[1]


def publish_files(out, contents):
    """Publish name -> text as a stage does. Return the manifest."""
    working = io.working_directory(out)
    for name, text in contents.items():
        file = working / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (working / ".request").write_text("what the stage was asked")
    (working / f".cut.{os.getpid()}-0123abcd").write_text("what a killed process left")
    sealed = io.seal(working, ignore=[".request"])
    manifest = {
        "outputs": {name: file.checksum for name, file in sealed.items()},
        "sizes": {name: file.n_bytes for name, file in sealed.items()},
    }
    io.publish(working, out, manifest)
    return manifest


def read_all(out):
    return {name: io.read_text(out / name) for name in io.list_files(out)}


# ---- sentences


def test_a_librarys_error_without_a_number_is_known_by_the_systems_words(tmp_path):
    """Arrow and SentencePiece raise a full disk as text alone."""
    said = r"x: could not be written .* The disk is full: make"
    with pytest.raises(io.FileError, match=said), io.explain("written", tmp_path / "x"):
        raise OSError("Error writing bytes to file. Detail: No space left on device")


# ---- names


def test_a_name_is_a_disks_or_a_buckets_and_nothing_between(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = io.path("gs://bucket/runs//a/./b.txt")
    assert str(run) == "gs://bucket/runs/a/b.txt" and str(run.parent) == "gs://bucket/runs/a"
    assert (run.name, run.stem, run.suffix) == ("b.txt", "b", ".txt")
    assert str(run.with_name("c") / "d/e") == "gs://bucket/runs/a/c/d/e"
    assert run.relative_to(io.path("gs://bucket/runs")).as_posix() == "a/b.txt"
    assert [str(path) for path in io.path("s3://bkt/a/b").parents] == ["s3://bkt/a", "s3://bkt"]
    assert io.path("runs/x") == pathlib.Path("runs/x") and io.path(run) is run
    with pytest.raises(TypeError):  # no library takes it for a local name
        pathlib.Path(run)
    with pytest.raises(TypeError):
        open(run, "w", encoding="utf-8")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gcs://b/run", "Write gs://b/run."),
        ("GS://b/run", "Write gs://b/run."),
        ("gz://b/run", "got gz://. Write a path without scheme."),
        ("file:///tmp/x", "got file://"),
        ("gs:/b/run", "with two slashes"),
        ("s3:b/run", "with two slashes"),
        ("gs://", "expected a bucket's name"),
        ("gs:///run", "expected a bucket's name"),
        ("s3://bucket/../c", '".." has no meaning'),
        ("", "expected the name of a file"),
        ("a\0b", "expected the name of a file"),
        ("~nobody-here/run", "~nobody-here has no home directory"),
        ("x\x1b[2J://b", "x\\x1b[2J"),
    ],
)
def test_a_mistyped_name_is_refused_in_one_sentence(text, message):
    with pytest.raises(UserError) as caught:
        io.path(text)
    assert message in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_bucket_without_its_package_names_the_command(scheme, monkeypatch):
    package, requirements = bucket.PACKAGES[scheme]
    assert (ROOT / requirements).read_text().splitlines()[-1].startswith(package)
    monkeypatch.setitem(sys.modules, package, None)
    bucket.import_package.cache_clear()
    with pytest.raises(UserError, match=f"pip install -r {requirements}"):
        io.read_text(io.path(f"{scheme}://bucket/x"))


# ---- single files


def exercise_small_files(root):
    note = root / "a" / "note.json"
    assert io.size(note) is None and not io.exists(root / "a")
    assert io.read_text_if_there(note) is None and io.read_lines(note) == []
    with pytest.raises(io.MissingFileError, match=r"could not be read \(No such file"):
        io.read_text(note)
    io.write_text(note, "first, ünï\n")
    io.write_json(note, {"step": 7})
    assert io.read_json(note) == {"step": 7}
    assert io.find(root, "*.json") == [] and io.find(root, "*/*.json") == [note]
    assert io.size(note) == len(io.read_bytes(note)) and io.exists(root / "a")
    assert io.size(root / "a") is None and io.list_names(root / "a") == ["note.json"]
    assert io.list_names(root) == ["a"] and list(io.list_files(root)) == ["a/note.json"]
    strange = root / "a" / "x #1?y%20*[z]"
    io.write_bytes(strange, b"0123456789")
    assert io.read_range(strange, 3, 4) == b"3456"
    io.copy_file(strange, root / "copy")
    assert io.read_bytes(root / "copy") == b"0123456789"
    with io.open_read(root / "copy") as file:
        assert file.read(4) == b"0123"
    with pytest.raises(ZeroDivisionError), io.open_write(root / "copy") as file:
        file.write(b"half of")
        _ = 1 / 0
    assert io.read_bytes(root / "copy") == b"0123456789"
    io.remove(root / "copy")
    io.remove(root / "copy")
    assert list(io.list_files(root)) == ["a/note.json", "a/x #1?y%20*[z]"]
    log = io.LineLog(root / "log.jsonl")
    log.append("one")
    log.append("two")
    log.close()
    io.append_line(root / "log.jsonl", "three")
    assert io.read_lines(root / "log.jsonl") == [b"one", b"two", b"three"]
    # what a cut leaves
    torn = io.read_bytes(root / "log.jsonl") + b'{"step": 4'
    io.write_bytes(root / "log.jsonl", torn)
    assert io.read_lines(root / "log.jsonl") == [b"one", b"two", b"three"]
    io.append_line(root / "log.jsonl", "four")
    assert io.read_lines(root / "log.jsonl") == [b"one", b"two", b"three", b"four"]
    io.write_bytes(root / "bad", b"ab\xff")
    with pytest.raises(UserError, match="expected UTF-8, got byte 0xff at 2"):
        io.read_text(root / "bad")
    io.write_text(root / "bad", '{"step": \n')
    with pytest.raises(UserError, match="expected JSON"):
        io.read_json(root / "bad")


def test_small_files_are_whole_on_a_disk(tmp_path):
    exercise_small_files(tmp_path)


def test_small_files_are_whole_in_a_bucket(place):
    exercise_small_files(place)


def test_a_log_in_a_bucket_is_written_anew_by_each_flush(place):
    io.append_line(place / "log", "zero")
    log = io.LineLog(place / "log")
    log.append("one")
    assert io.read_lines(place / "log") == [b"zero"]
    log.flush()
    assert io.read_lines(place / "log") == [b"zero", b"one"]


def test_text_is_utf8_whatever_the_locale(tmp_path):
    locales = tmp_path / "locales"
    locales.mkdir()
    made = subprocess.run(
        ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(locales / "en_US.ISO-8859-1")],
        capture_output=True,
    )
    if made.returncode:
        pytest.skip(f"localedef cannot make ISO-8859-1 here: {made.stderr.decode()[:80]}")
    code = "import locale, sys; from jaxpt import io; where = io.path(sys.argv[1])\n"
    code += "assert locale.getpreferredencoding() == 'ISO-8859-1'\n"
    code += "io.write_text(where, 'gr\\xfc\\xdfe'); assert io.read_text(where) == 'gr\\xfc\\xdfe'\n"
    environment = {**os.environ, "LOCPATH": str(locales), "LC_ALL": "en_US.ISO-8859-1"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")], env=environment, cwd=ROOT, check=True
    )
    assert (tmp_path / "x").read_bytes() == "grüße".encode()


# ---- publishing


def exercise_publishing(out):
    first = {"data/a.bin": "aaa", "data/b.bin": "bb", "new": "a file, then a directory"}
    manifest = publish_files(out, first)
    assert json.loads(io.read_text(out / "manifest.json")) == manifest
    assert manifest["sizes"] == {"data/a.bin": 3, "data/b.bin": 2, "new": 24}
    assert io.find_damage(out, verify=True) is None
    io.write_text(out / "mine.txt", "a user's")
    publish_files(out, {"data/a.bin": "AAAA", "new/c": "c"})
    found = read_all(out)
    del found["manifest.json"]
    assert found == {"data/a.bin": "AAAA", "new/c": "c", "mine.txt": "a user's"}
    assert io.find_damage(out, verify=True) is None
    assert not io.exists(io.working_directory(out))
    io.write_text(out / "new/c", "d")
    assert io.find_damage(out) is None
    assert io.find_damage(out, verify=True) == ("new/c", "was changed (its checksum differs)")
    io.write_text(out / "new/c", "")
    assert io.find_damage(out) == ("new/c", "has 0 bytes, expected 1")
    io.remove(out / "new/c")
    assert io.find_damage(out) == ("new/c", "is missing")
    io.remove_published(out)
    assert read_all(out) == {"mine.txt": "a user's"}


def test_what_is_published_is_named_with_size_and_checksum(tmp_path):
    exercise_publishing(tmp_path / "out")


def test_what_is_published_in_a_bucket_is_named_with_size_and_checksum(place):
    exercise_publishing(place / "out")


def test_publishing_goes_through_a_link_and_onto_another_disk(tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "far" / "there")
    publish_files(tmp_path / "out", {"a": "1"})
    assert (tmp_path / "far/there/a").read_text() == "1"
    rename = os.rename

    def refuse(source, to):
        if ".partial" in str(source) and ".partial" not in str(to):
            raise OSError(errno.EXDEV, "another disk")
        rename(source, to)

    monkeypatch.setattr(os, "rename", refuse)
    publish_files(tmp_path / "out", {"b": "2"})
    assert io.find_damage(tmp_path / "out", verify=True) is None
    assert set(read_all(tmp_path / "out")) == {"b", "manifest.json"}


STEPS = ("rename", "link", "unlink", "rmdir", "fsync", "open", "mkdir", "stat", "listdir")


class Shim:
    """Fails the nth call of the system's functions below a directory."""

    def __init__(self, monkeypatch, root):
        self.n, self.error, self.n_calls, self.root = 0, 0, 0, str(root)
        self.once = True
        monkeypatch.setattr(os, "fsync", lambda handle: None)  # the disk itself is not tried here
        for name in STEPS:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))
        monkeypatch.setattr(builtins, "open", self.wrap(builtins.open))
        monkeypatch.setattr(std_io, "open", self.wrap(std_io.open))

    def wrap(self, function):
        def call(*arguments, **keywords):
            if self.n and self.concerns(arguments[0]):
                self.n_calls += 1
                if self.n_calls == self.n or (self.n_calls > self.n and not self.once):
                    raise OSError(self.error, os.strerror(self.error), str(arguments[0]))
            return function(*arguments, **keywords)

        return call

    def concerns(self, argument):
        return isinstance(argument, int) or str(argument).startswith(self.root)

    def fail_at(self, n, error, *, once=True):
        self.n, self.error, self.n_calls, self.once = n, error, 0, once


ERRORS = ["EIO", "EROFS", "EACCES", "EMFILE", "ENOSPC", "ENAMETOOLONG", "ESTALE"]


@pytest.mark.parametrize("name", ERRORS)
def test_every_failing_call_is_a_sentence_and_loses_nothing(name, tmp_path, monkeypatch):
    out, number = tmp_path / "out", getattr(errno, name)
    shim = Shim(monkeypatch, tmp_path)

    def work():
        publish_files_by_io(out, generation)
        assert io.find_damage(out, verify=True) is None
        io.append_line(tmp_path / "log", "line")
        with io.hold(out) as held:
            held.check()
        io.remove_published(out)

    n_failed = 0
    for n in range(1, 1000):
        generation = n
        shim.fail_at(n, number)
        try:
            work()
        except UserError as error:
            n_failed += 1
            assert os.strerror(number) in str(error) and str(tmp_path) in str(error)
            assert "\n" not in str(error)
        reached = shim.n_calls >= n
        shim.fail_at(0, 0)
        io.finish_publishing(out)
        if io.exists(out / "manifest.json"):
            assert io.find_damage(out, verify=True) is None
        if not reached:
            break
    assert not reached and n_failed > 20


def publish_files_by_io(out, generation):
    """Publish files whose sizes and bytes tell their generation, through io alone."""
    working = io.working_directory(out)
    for name in ("a", "data/b"):
        io.write_text(working / name, f"{generation} " * (generation % 7 + 1))
    sealed = io.seal(working)
    manifest = {
        "outputs": {name: file.checksum for name, file in sealed.items()},
        "sizes": {name: file.n_bytes for name, file in sealed.items()},
    }
    io.publish(working, out, manifest)


def test_a_process_killed_while_it_publishes_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    """Every call from the nth on fails, as after a kill; the next start finishes."""
    out = tmp_path / "out"
    states = set()
    for n in range(1, 1000):
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(io.working_directory(out), ignore_errors=True)
        publish_files(out, {"a": "old", "only/old": "x"})
        with monkeypatch.context() as patch:
            shim = Shim(patch, tmp_path)
            shim.fail_at(n, errno.EIO, once=False)
            with contextlib.suppress(UserError, OSError):
                publish_files(out, {"a": "newer", "only/new": "yy"})
            reached = shim.n_calls >= n
        io.finish_publishing(out)
        assert io.find_damage(out, verify=True) is None
        found = read_all(out)
        found.pop("manifest.json")
        states.add(tuple(sorted(found.items())))
        if not reached:
            break
    assert states == {
        (("a", "old"), ("only/old", "x")),
        (("a", "newer"), ("only/new", "yy")),
    }


PUBLISHER = """
import pathlib, sys
from jaxpt import io
from jaxpt.io import files
if sys.argv[2] == "unsynced":
    files.sync = lambda path: None
out = pathlib.Path(sys.argv[1]) / "out"
for generation in range(1, 100_000):
    working = io.working_directory(out)
    for k in range(3):
        with io.open_write(working / f"data/{k}.bin") as file:
            file.write(f"{generation} {k} ".encode() * (500 + 37 * k + generation % 11))
    sealed = io.seal(working)
    outputs = {name: file.checksum for name, file in sealed.items()}
    sizes = {name: file.n_bytes for name, file in sealed.items()}
    manifest = {"generation": generation, "outputs": outputs, "sizes": sizes}
    io.publish(working, out, manifest)
    io.append_line(out.parent / "log", str(generation))
    print(generation, flush=True)
"""


def try_cuts(tmp_path, way, pauses):
    """Return, for each cut, (generation promised before it, generation found and whole, lines)."""
    reason = faults_power.unsupported_reason(tmp_path)
    if reason:
        pytest.skip(f"a cut of power {reason}")
    image = faults_power.make_disk(tmp_path / "disk.img")
    found = []
    with faults_power.mounted(image, tmp_path / "disk") as disk:
        publisher = subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, disk, way], stdout=subprocess.PIPE, cwd=ROOT
        )
        promised = []
        reader = threading.Thread(target=lambda: promised.extend(map(int, publisher.stdout)))
        reader.start()
        while not promised:
            time.sleep(0.01)
        for pause in pauses:
            time.sleep(pause)
            publisher.send_signal(signal.SIGSTOP)
            time.sleep(0.02)  # what it printed is read
            before = promised[-1]
            faults_power.copy_disk(image, tmp_path / "cut.img")
            publisher.send_signal(signal.SIGCONT)
            with faults_power.mounted(tmp_path / "cut.img", tmp_path / "cut") as cut:
                found.append((before, find_generation(cut / "out"), io.read_lines(cut / "log")))
        publisher.kill()
        reader.join()
        publisher.wait()
    return found


def find_generation(out):
    """Return the generation that is published whole; 0 if none is."""
    try:
        io.finish_publishing(out)
        if io.find_damage(out, verify=True):
            return 0
        return json.loads(io.read_text(out / "manifest.json"))["generation"]
    except UserError:
        return 0


def test_a_cut_of_power_loses_nothing_that_was_published(tmp_path):
    pauses = random.Random(7)
    cuts = try_cuts(tmp_path, "synced", [pauses.uniform(0.01, 0.25) for _ in range(12)])
    for promised, generation, lines in cuts:
        assert generation in (promised, promised + 1)
        assert len(lines) >= promised
        assert lines == [str(i + 1).encode() for i in range(len(lines))]


def test_the_cut_of_power_is_a_real_one(tmp_path):
    """Without syncing, what was published six seconds ago is lost."""
    cuts = try_cuts(tmp_path, "unsynced", [6.5, 0.3])
    assert any(generation < promised for promised, generation, _ in cuts)


def test_a_bucket_that_is_busy_is_asked_again(place, proxy):
    proxy.faults.append(buckets.Fault("^(PUT|POST) ", 503, 2))
    publish_files(place / "out", {"a": "1", "b/c": "22"})
    assert io.find_damage(place / "out", verify=True) is None
    assert proxy.n_injected >= 2


def test_a_bucket_that_is_gone_is_a_sentence(place, proxy, capfd):
    scheme = str(place).partition(":")[0]
    with pytest.raises(UserError, match=r"could not be written.*the bucket's name"):
        io.write_text(io.path(f"{scheme}://no-such-bucket/a"), "x")
    proxy.faults.append(buckets.Fault(" .*secret", 403, 50))
    with pytest.raises(UserError, match=r"could not be read.*the credentials"):
        io.read_text(place / "secret")
    assert "Traceback" not in "".join(capfd.readouterr())


def test_publishing_in_a_bucket_that_was_killed_is_finished_by_the_next_start(place, monkeypatch):
    out = place / "out"
    publish_files(out, {"a": "old", "only/old": "x"})
    upload = bucket.upload

    def fail(file, to):
        if to.name == "new":
            raise UserError("killed")
        upload(file, to)

    with monkeypatch.context() as patch:
        patch.setattr(bucket, "upload", fail)
        with pytest.raises(UserError, match="killed"):
            publish_files(out, {"a": "newer", "only/new": "yy"})
    with pytest.raises(io.MissingFileError):  # no reader meets the old manifest beside new files
        io.find_damage(out)
    assert io.finish_publishing(out)
    found = read_all(out)
    assert found.pop("manifest.json") and found == {"a": "newer", "only/new": "yy"}
    assert io.find_damage(out, verify=True) is None and not io.finish_publishing(out)


def test_what_a_library_wrote_into_a_bucket_has_the_stores_checksums(place, proxy):
    io.write_text(place / "step/a", "first")
    io.write_text(place / "step/d/0", "x" * 40)
    proxy.answers.clear()
    sealed = io.seal(place / "step")
    outputs = {name: file.checksum for name, file in sealed.items()}
    sizes = {name: file.n_bytes for name, file in sealed.items()}
    assert sizes == {"a": 5, "d/0": 40}
    assert not [r for r, _ in proxy.answers if "alt=media" in r or "step/d/0" in r]  # not read
    io.write_json(place / "step/manifest.json", {"outputs": outputs, "sizes": sizes})
    assert io.find_damage(place / "step", verify=True) is None
    io.write_text(place / "step/a", "other")
    assert io.find_damage(place / "step") is None
    assert io.find_damage(place / "step", verify=True).name == "a"


# ---- local copies


def test_a_library_gets_a_local_copy_of_this_version(place, proxy):
    io.write_text(place / "tokenizer/a.model", "first")
    io.write_text(place / "tokenizer/b/c", "cc")
    local = io.local_copy(place / "tokenizer")
    assert local.name == "tokenizer" and (local / "b/c").read_text() == "cc"
    proxy.answers.clear()
    assert io.local_copy(place / "tokenizer") == local
    assert not [r for r, _ in proxy.answers if r.startswith("GET") and "a.model?alt" in r]
    single = io.local_copy(place / "tokenizer/a.model")
    assert single.name == "a.model" and single.read_text() == "first"
    io.write_text(place / "tokenizer/a.model", "other")  # as many bytes
    assert io.local_copy(place / "tokenizer/a.model").read_text() == "other"
    assert (io.local_copy(place / "tokenizer") / "a.model").read_text() == "other"
    assert single.read_text() == "first"  # who holds the old one keeps it
    with pytest.raises(io.MissingFileError, match="not found"):
        io.local_copy(place / "none")


def test_a_damaged_or_cut_copy_is_fetched_again(place):
    io.write_text(place / "a", "whole")
    local = io.local_copy(place / "a")
    local.write_text("who")
    assert io.local_copy(place / "a").read_text() == "whole"


def test_the_cache_is_bounded_and_keeps_what_is_used(place, monkeypatch):
    monkeypatch.setattr(cache, "CACHE_BYTES", 25)
    old, used, new = place / "old", place / "used", place / "new"
    for path in (old, used, new):
        io.write_text(path, "0123456789")
    first = io.local_copy(old)
    code = (
        "import sys; from jaxpt import io; print(io.local_copy(io.path(sys.argv[1])), flush=True)"
    )
    code += "; sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(used)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    second = pathlib.Path(other.stdout.readline().strip())
    cache.held.pop(first.parent).close()  # as if this process had ended
    third = io.local_copy(new)
    assert not first.exists() and second.exists() and third.exists()
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    io.local_copy(old)
    assert not second.exists() and third.exists()
    assert oct(io.cache_directory().stat().st_mode)[-3:] == "700"


def test_a_disks_file_is_its_own_local_copy(tmp_path):
    assert io.local_copy(tmp_path / "x") == tmp_path / "x"


# ---- locks

HOLDER = """
import sys, time
from jaxpt import io
with io.hold(io.path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def held_by_another_process(directory):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def exercise_locks(directory):
    with held_by_another_process(directory) as process:
        message = f"in use by process {process.pid} on .* since 20"
        with pytest.raises(UserError, match=message):
            io.take(directory)
    with io.hold(directory) as mine:  # the dead one's is taken over
        mine.check()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
            io.take(directory)
    with io.hold(directory):  # a released one's too
        pass
    # all find the same dead holder, and one gets the number after it
    with held_by_another_process(directory):
        pass
    barrier = threading.Barrier(6)

    def race():
        barrier.wait()
        try:
            return io.take(directory)
        except UserError:
            return None

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        taken = [task.result() for task in [pool.submit(race) for _ in range(6)]]
    [winner] = [lock for lock in taken if lock]
    winner.release()


def test_one_process_at_a_time_holds_a_directory(tmp_path):
    exercise_locks(tmp_path / "run")
    assert os.listdir(tmp_path) == [".run.lock"]  # nothing is made before the stage makes it


def test_one_process_at_a_time_holds_a_directory_in_a_bucket(place, proxy):
    exercise_locks(place / "run")
    assert 412 in proxy.statuses()  # the server did refuse


def test_a_lock_whose_answer_was_lost_is_held(place, proxy):
    proxy.faults.append(buckets.Fault(r"^(PUT|POST) .*", 503, 1, is_answer_lost=True))
    with io.hold(place / "run") as mine:
        mine.check()
    assert 412 in proxy.statuses() and proxy.n_injected


def test_a_bucket_that_refuses_without_reason_is_asked_again_but_not_for_ever(place, proxy):
    creates = r"^(POST .*ifGenerationMatch=0|PUT /bucket/.*\.json)"
    proxy.faults.append(buckets.Fault(creates, 412, 1))
    io.take(place / "run").release()
    assert proxy.n_injected
    manifests = creates.replace(".*\\.json", ".*manifest\\.json")
    proxy.faults[:] = [buckets.Fault(manifests, 412, 2)]
    publish_files(place / "out", {"a": "1"})
    assert not proxy.faults[0].n and io.find_damage(place / "out", verify=True) is None
    proxy.faults.append(buckets.Fault(creates, 412, 1000))
    with pytest.raises(UserError, match="attempts to take this lock were refused"):
        io.take(place / "run")


def elsewhere(directory, monkeypatch):
    """Leave the lock of a holder on another machine; return its number."""
    with monkeypatch.context() as patch:
        patch.setattr(lock, "this_machine", lambda: "another boot")
        patch.setattr(lock.Lock, "beat", lambda self: None)
        return io.take(directory)


def test_a_holder_on_another_host_is_judged_by_its_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.2)
    other = elsewhere(tmp_path / "run", monkeypatch)
    ended = threading.Event()

    def beat():
        n = 0
        while not ended.wait(0.1):
            n += 1
            other.beat_once(n)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match="in use by process"):
        io.take(tmp_path / "run")
    ended.set()
    thread.join()
    mine = io.take(tmp_path / "run")  # it shows none any more
    mine.check()
    with pytest.raises(UserError, match="another one has taken it over"):
        other.check()
    other.release()  # its end is not mine
    mine.check()
    mine.release()


def test_a_number_that_another_process_has_now_is_no_sign_of_life(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(lock, "process_start", lambda pid: "an earlier time")
        patch.setattr(os, "getpid", lambda: 1)
        io.take(tmp_path / "run")
    io.take(tmp_path / "run").release()


def test_without_hard_links_a_file_is_created_once(tmp_path, monkeypatch):
    def refuse(source, to):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    assert io.create(tmp_path / "x", b"1") and not io.create(tmp_path / "x", b"2")
    assert io.read_bytes(tmp_path / "x") == b"1" and os.listdir(tmp_path) == ["x"]


# ---- removing


def test_only_what_a_manifest_names_is_removed(tmp_path):
    run, neighbor = tmp_path / "runs/a", tmp_path / "runs/b"
    publish_files(run, {"data/x": "1"})
    publish_files(neighbor, {"data/x": "1"})
    io.write_text(run / "notes.txt", "mine")
    for wrong in (tmp_path, tmp_path / "runs", run / "data", run / "notes.txt"):
        with pytest.raises(UserError):
            io.remove_published(wrong)
    for source in (run, run / "data/x"):
        with pytest.raises(UserError, match=r"is read by|holds"):
            io.remove_published(run, inputs=[source])
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(UserError, match="is read by"):
        io.check_output(tmp_path / "link", [run])
    io.check_output(run / "export", [run])
    io.remove_published(run, inputs=[neighbor])
    assert os.listdir(run) == ["notes.txt"]
    assert io.find_damage(neighbor, verify=True) is None


def test_a_manifest_that_leads_outside_removes_nothing(tmp_path):
    io.write_text(tmp_path / "victim", "precious")
    for name in ("../victim", str(tmp_path / "victim"), "a//b", ""):
        manifest = {"outputs": {name: "0"}, "sizes": {name: 8}}
        io.write_json(tmp_path / "out/manifest.json", manifest)
        with pytest.raises(UserError, match="not a manifest"):
            io.remove_published(tmp_path / "out")
    publish_files(tmp_path / "out", {"data/victim": "precious"})
    shutil.rmtree(tmp_path / "out/data")
    (tmp_path / "out/data").symlink_to(tmp_path)
    io.remove_published(tmp_path / "out")
    assert (tmp_path / "victim").read_text() == "precious"


def test_only_a_working_directory_is_removed_whole(tmp_path):
    working = io.working_directory(tmp_path / "out")
    io.write_text(working / "jobs/a", "x")
    io.remove_working(working / "jobs")
    assert working.is_dir() and not (working / "jobs").exists()
    with pytest.raises(ValueError, match="not a working directory"):
        io.remove_working(tmp_path)


def fail_nth(n, calls, function):
    """Return the function with an error in place of the nth call of all that share `calls`."""

    def call(*arguments, **keywords):
        calls.append(function)
        if len(calls) == n:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return function(*arguments, **keywords)

    return call


def test_what_is_half_removed_in_a_working_directory_is_not_found_again(tmp_path, monkeypatch):
    """Every call fails once: a job's result never stays without its data."""
    working = io.working_directory(tmp_path / "out")
    whole = {"jobs/data/0": "rows", "jobs/result/0": "done", "kept": "x"}
    for n in range(1, 100):
        shutil.rmtree(working, ignore_errors=True)
        for name, text in whole.items():
            io.write_text(working / name, text)
        calls = []
        with monkeypatch.context() as patch:
            for name in ("rename", "unlink", "rmdir"):
                patch.setattr(os, name, fail_nth(n, calls, getattr(os, name)))
            with contextlib.suppress(UserError):
                io.remove_working(working / "jobs")
        reached = len(calls) >= n
        assert set(io.seal(working)) in (set(whole), {"kept"})
        if not reached:
            break
    assert not reached and n > 4


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file/x", "File exists"),
        ("file/x/y", "Not a directory"),
        ("n" * 300, "File name too long"),
        ("/proc/x", "No such file|Permission|not permitted"),
        ("a\x1b[31m\n/x" + "y" * 300, r"a\\x1b\[31m\\n/"),
    ],
)
def test_a_path_that_cannot_be_written_is_a_sentence(tmp_path, name, reason):
    io.write_text(tmp_path / "file", "x")
    with pytest.raises(UserError, match=reason) as caught:
        io.write_text(tmp_path / name, "x")
    assert str(caught.value).isprintable()


def test_errors_name_what_where_and_what_to_do():
    assert io.printable("a\x1b\n\udcff ü") == "a\\x1b\\n\\udcff ü"
    with pytest.raises(io.FileError) as caught, io.explain("written", "out/x"):
        raise OSError(errno.EDQUOT, "whatever", "other")
    assert caught.value.errno == errno.EDQUOT
    expected = "out/x: could not be written (Disk quota exceeded). The quota is used up: make room."
    assert str(caught.value).startswith(expected)
