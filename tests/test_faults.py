"""Short forms of benchmarks/faults.py: a small pipeline under cuts of power, failing calls of the
system, two starts at once and damaged files."""

import shutil

import faults_calls
import faults_files
import faults_pipeline
import faults_power
import faults_starts
import pytest
from faults_pipeline import BY_NAME, Commands, Trial


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def commands(scratch):
    with Commands(scratch) as commands:
        yield commands


@pytest.fixture(scope="module")
def before(scratch, commands):
    """The pipeline as it is before each stage, and at its end."""
    return faults_pipeline.make_reference(scratch, commands)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pack", "train the child"])
def test_a_cut_of_power_leaves_a_stage_that_goes_on_and_ends_equal(
    name, commands, before, tmp_path
):
    reason = faults_power.unsupported_reason(tmp_path)
    if reason:
        pytest.skip(f"a cut of power {reason}")
    found, wrong = faults_power.try_power(commands, Trial(BY_NAME[name], before, tmp_path, n=3))
    assert not wrong, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_tokenizer", "initialize", "report"])
def test_a_failing_call_is_a_sentence_and_the_next_start_ends_equal(name, before, tmp_path):
    if not shutil.which("cc"):
        pytest.skip("failing calls need a C compiler")
    failing = faults_calls.FailingCalls(tmp_path)
    try:
        found, wrong = faults_calls.try_calls(failing, Trial(BY_NAME[name], before, tmp_path, n=4))
    finally:
        failing.commands.close()
    assert not wrong, found


@pytest.mark.slow
def test_of_two_starts_at_once_one_says_who_works_there(commands, before, tmp_path):
    with Commands(tmp_path) as other:
        for name in ("pack", "train"):
            trial = Trial(BY_NAME[name], before, tmp_path, n=1)
            found, wrong = faults_starts.try_starts((commands, other), trial)
            assert not wrong, found


@pytest.mark.slow
def test_a_damaged_file_is_a_sentence_or_does_not_matter(commands, before, tmp_path):
    found, wrong = faults_files.try_files(commands, before, tmp_path, n=12, seed=3)
    assert not wrong, found


@pytest.mark.slow
def test_what_was_damaged_is_told_from_what_is_whole(commands, before, tmp_path):
    """The comparison itself: a bit of a result is another result."""
    home = tmp_path / "home"
    for name, file in (
        ("pack", "base/packed/train/sea/dataset_info.json"),
        ("evaluate", "child/eval/jax.json"),
    ):
        faults_pipeline.restore(home, before[""])
        assert faults_pipeline.find_differences(BY_NAME[name], home, before[""]) == []
        data = bytearray((home / file).read_bytes())
        data[len(data) // 2] ^= 1
        (home / file).write_bytes(data)
        assert faults_pipeline.find_differences(BY_NAME[name], home, before[""])
