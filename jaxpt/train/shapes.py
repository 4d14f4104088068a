"""Find the shape of a step's batch: train.shape_schedule changes it as the run goes on.

All shapes read the same packed sequences, in the same order. A step of shorter ones cuts each
packed sequence into equal parts, which follow each other in the batch, so that a position in the
data is a number of packed sequences whatever the shape.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from jaxpt.config import Config, TrainConfig


class StepShape(NamedTuple):
    """The shape of a batch: [batch_size, seq_len] tokens."""

    batch_size: int
    seq_len: int

    @property
    def n_tokens(self) -> int:
        """Return the tokens of a step."""
        return self.batch_size * self.seq_len

    def count_sequences(self, packed_len: int) -> int:
        """Return the packed sequences of so many tokens that a step reads."""
        return self.n_tokens // packed_len


def list_shapes(config: Config) -> dict[int, StepShape]:
    """Return the steps done before each shape -> the shape, the first from step 0 on."""
    if not config.train.shape_schedule:
        return {0: StepShape(config.train.batch_size, config.pack.seq_len)}
    return {start: StepShape(*shape) for start, *shape in config.train.shape_schedule}


def find_shape(config: Config, step: int) -> StepShape:
    """Return the shape of the batch that is read after so many steps."""
    shapes = list_shapes(config)
    starts = list(shapes)
    return shapes[starts[bisect.bisect_right(starts, step) - 1]]


def list_sequences_per_step(config: Config) -> tuple[tuple[int, int], ...]:
    """Return ((from step, packed sequences per step), ...)."""
    packed_len = config.pack.seq_len
    found = list_shapes(config).items()
    return tuple((start, shape.count_sequences(packed_len)) for start, shape in found)


def count_tokens(config: Config, first: int = 0) -> int:
    """Return the tokens that a run reads after its first steps, padding included."""
    shapes = list_shapes(config)
    ends = [*list(shapes)[1:], config.train.steps]
    total = 0
    for (start, shape), end in zip(shapes.items(), ends, strict=True):
        n_steps = min(end, config.train.steps) - max(start, first)
        total += max(n_steps, 0) * shape.n_tokens
    return total


def find_largest(shapes: Iterable[StepShape]) -> StepShape:
    """Return the shape with the most tokens; of equals, the one with the longest sequences."""
    return max(shapes, key=lambda shape: (shape.n_tokens, shape.seq_len))


def plan_largest(config: Config) -> Config:
    """Return a config whose steps all have the largest shape; its budget keeps all tokens."""
    if not config.train.shape_schedule:
        return config
    batch_size, seq_len = find_largest(list_shapes(config).values())
    tokens = config.plan.tokens or float(count_tokens(config))
    train = dataclasses.replace(config.train, shape_schedule=(), batch_size=batch_size)
    pack = dataclasses.replace(config.pack, seq_len=seq_len)
    plan = dataclasses.replace(config.plan, tokens=tokens)
    return dataclasses.replace(config, train=train, pack=pack, plan=plan)


def list_rate_factors(train: TrainConfig, power: float) -> list[tuple[int, float]]:
    """Return [(from step, factor of the learning rate), ...].

    It is the tokens of a step over those of the first one, to a power: 0.5 keeps the noise of
    Adam's updates (2205.10287).
    """
    n_tokens = [size * length for _, size, length in train.shape_schedule]
    starts = [start for start, _, _ in train.shape_schedule]
    return [(start, (n / n_tokens[0]) ** power) for start, n in zip(starts, n_tokens, strict=True)]
