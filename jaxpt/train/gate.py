"""Is this model what it claims to be? Its held-out losses before the first update."""

from __future__ import annotations

import math
import pathlib

from jaxpt.config import Config
from jaxpt.data import loader
from jaxpt.evaluate import likelihood
from jaxpt.sharding import batch_sharding, n_shards
from jaxpt.spec import ModelSpec, UserError
from jaxpt.stage import say


class Heldout:
    """Held-out loss per source over the same rows each time: train.eval_rows of each, evenly spaced."""

    def __init__(self, settings: Config, packed: list[pathlib.Path], mesh):
        self.rows = loader.open_rows(packed, split="heldout")
        self.settings, self.mesh, self.steps = settings, mesh, {}
        pieces = n_shards(mesh, "batch")
        self.batch_rows = -(-min(settings.train.batch_rows, 32) // pieces) * pieces

    def losses(self, spec: ModelSpec, params) -> dict[str, float]:
        """Nats per token of each source."""
        if spec not in self.steps:
            self.steps[spec] = likelihood.nats_step(spec, self.mesh, self.settings.train.compute_dtype)
        return {name: likelihood.heldout_loss(self.steps[spec], params, self.batches(name)) for name in self.rows.names}

    def batches(self, name: str):
        n_rows = min(self.settings.train.eval_rows, self.rows.n_rows[name])
        return loader.heldout_batches(self.rows, name, batch_sharding(self.mesh), self.batch_rows, n_rows, self.settings.mixture.document_mask)


def check_start(losses: dict[str, float], unigram_nats: dict[str, float], spec: ModelSpec, grown: bool) -> None:
    """A model that comes with weights must know more than how often each token occurs; a newborn by growth may have to learn it again.

    Raises UserError naming the likely causes.
    """
    known = {name: loss for name, loss in losses.items() if name in unigram_nats}
    if not known or any(loss < unigram_nats[name] for name, loss in known.items()):
        return
    name, loss = next(iter(known.items()))
    finding = (
        f"held-out loss on {name} is {loss:.2f} nats a token; counting tokens alone gives {unigram_nats[name]:.2f}, "
        f"guessing {math.log(spec.vocab_size):.2f}"
    )
    if grown:
        say(f"note: {finding}. The growth broke the model's function; training has to mend it first")
    else:
        raise UserError(
            f"initialize.source: {finding}. The weights do not fit the rows: most likely the rows were packed with another tokenizer, "
            "or config.json's rope theta or norm eps is not the model's."
        )
