"""Put known bugs back one by one, and see that a test catches each.

    python benchmarks/mutate.py [NAME ...]

Each mutation replaces one text in a copy of the tree; its tests have to pass before and to fail
after. Exits 1 if a mutation survives, or if its text is not in the source any more.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
COPIED = ("jaxpt", "tests", "configs", "scripts", "pyproject.toml")


class Mutation(NamedTuple):
    """One bug: `file` with `old` replaced by `new`; `tests` are pytest's arguments."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = {
    "clips-at-twice-the-norm": Mutation(
        "jaxpt/train/step.py",
        "optim.clip_norm / grad_norm",
        "2 * optim.clip_norm / grad_norm",
        ("tests/test_optimizer.py", "-k", "six_steps"),
    ),
    "mean-takes-in-what-is-skipped": Mutation(
        "jaxpt/train/step.py",
        "norm_mean=jnp.where(good, mean, skips.norm_mean)",
        "norm_mean=mean",
        ("tests/test_train.py", "-k", "never_enters_the_mean"),
    ),
    "o-starts-too-large": Mutation(
        "jaxpt/model/attention.py",
        "out_std = (N * H) ** -0.5 * residual_scale",
        "out_std = (N * H) ** -0.5",
        ("tests/test_model.py", "-k", "root_of_the_writes"),
    ),
    "down-starts-too-large": Mutation(
        "jaxpt/model/mlp.py",
        "down_std = F**-0.5 * residual_scale",
        "down_std = F**-0.5",
        ("tests/test_model.py", "-k", "root_of_the_writes"),
    ),
    "mfu-of-one-device": Mutation(
        "jaxpt/flops.py",
        "/ (n_devices * self.peak_flops)",
        "/ self.peak_flops",
        ("tests/test_session.py", "-k", "mfu"),
    ),
    "money-in-thousands": Mutation(
        "jaxpt/flops.py",
        "seconds / 3600 * n_devices",
        "seconds / 3600 / 1000 * n_devices",
        ("tests/test_session.py", "-k", "money"),
    ),
    "gradients-are-not-divided": Mutation(
        "jaxpt/train/step.py",
        "scale = per_token\n",
        "scale = jnp.float32(1)\n",
        ("tests/test_optimizer.py", "-k", "six_steps"),
    ),
    "a-bad-step-updates": Mutation(
        "jaxpt/train/step.py",
        "jax.lax.cond(good,",
        "jax.lax.cond(True,",
        ("tests/test_optimizer.py", "-k", "skipped_bit_by_bit and lion"),
    ),
    "squares-grow-as-means": Mutation(
        "jaxpt/growth/moments.py",
        '{"nu": 2,',
        '{"nu": 1,',
        ("tests/test_optimizer.py", "-k", "by_the_square"),
    ),
}


def passes(mutation: Mutation, is_mutated: bool) -> bool:
    """Return whether the tests pass in a copy of the tree. Exit if they do not run."""
    with tempfile.TemporaryDirectory() as directory:
        tree = pathlib.Path(directory)
        for name in COPIED:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, tree / name)
        path = tree / mutation.file
        text = path.read_text()
        if text.count(mutation.old) != 1:
            sys.exit(f"{mutation.file}: expected {mutation.old!r} once, got another source.")
        if is_mutated:
            path.write_text(text.replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", *mutation.tests]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # pytest: 1 is a failed test, above it none has run
        sys.exit(f"{' '.join(mutation.tests)}: expected tests that run, got\n{done.stdout[-2000:]}")
    return done.returncode == 0


def main(names: list[str]) -> None:
    """Try the named mutations, or all of them."""
    unknown = [name for name in names if name not in MUTATIONS]
    if unknown:
        sys.exit(f"expected some of {', '.join(MUTATIONS)}, got {', '.join(unknown)}.")
    survivors = []
    for name in names or MUTATIONS:
        mutation = MUTATIONS[name]
        caught = passes(mutation, is_mutated=False) and not passes(mutation, is_mutated=True)
        print(f"{name:<32} {'caught' if caught else 'NOT CAUGHT'}", flush=True)
        if not caught:
            survivors.append(name)
    if survivors:
        sys.exit(f"{len(survivors)} not caught: {', '.join(survivors)}")


if __name__ == "__main__":
    main(sys.argv[1:])
