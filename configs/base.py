"""Every knob of jaxpt with its default, unit and consequence. Printed by `python -m jaxpt.config`; do not edit.

A recipe starts from these defaults and changes what it needs: see configs/quickstart.py.
"""

from jaxpt.config import defaults


def get_config():
    c = defaults()

    # prepare: raw text -> a clean corpus
    # where text comes from: KIND:WHERE or NAME=KIND:WHERE, see docs/prepare.md for the kinds
    c.prepare.sources = ()
    # rules, in order: none, course, gopher, c4, fineweb, prose or code; see docs/prepare.md
    c.prepare.preset = "none"
    # changes to the preset: '-language' drops a rule, 'min_chars(least=50)' sets or adds one, 'NAME before OTHER' places it, MODULE:FUNCTION is yours
    c.prepare.rules = ()
    # drop near-duplicates by MinHash over word 5-grams, first kept; about doubles the stage's time
    c.prepare.near_dedup = False
    # benchmark files; a document that shares words in a row with an item is dropped
    c.prepare.decontaminate = ()
    # so many words in a row: GPT-3's 13 are hardly ever shared by chance, and shorter items cannot be found
    c.prepare.decontaminate_words = 13
    # a record or file that cannot be read: stop, or skip and count it (a file from the place on where it breaks)
    c.prepare.on_error = "stop"
    # share of documents kept out of training, chosen by hash of the text, per source
    c.prepare.heldout_frac = 0.02
    # MB of text taken from each source at most, after a hash shuffle; 0 takes all. For samples
    c.prepare.limit_mb = 0.0
    # MB of text in a parquet shard, about; smaller shards spread over more cores
    c.prepare.shard_mb = 128
    # where Daft runs, for pack too: local, ray, or ray://HOST:PORT of a running cluster
    c.prepare.engine = "local"

    # tokenizer: text -> token ids
    # train one on the corpus, or the path of a SentencePiece .model, a tokenizer.json or a Hugging Face directory
    c.tokenizer.source = "train"
    # what is trained: bpe, also saved as SentencePiece .model; unigram, in Hugging Face form alone
    c.tokenizer.model = "bpe"
    # pieces; larger packs more bytes into a token and costs V x D weights twice
    c.tokenizer.vocab_size = 32_000
    # MB of corpus text the training reads, spread evenly over the documents
    c.tokenizer.sample_mb = 64

    # pack: documents -> rows of token ids
    # tokens in a row: the longest context training sees
    c.pack.row_len = 1_024
    # best_fit: short documents whole, padding at the end; course: concatenated and cut
    c.pack.method = "best_fit"

    # mixture: which rows, in which shares
    # directories that pack.py wrote; empty means WORKDIR/packed
    c.mixture.packed = ()
    # ((from step, {source: share of tokens}), ...); empty means all rows in proportion
    c.mixture.phases = ()
    # ((source or all, epochs), ...): refuse a run that reads a source more often than this
    c.mixture.max_epochs = ()
    # a token sees only its own document; off lets it see the whole row, as the course does
    c.mixture.document_mask = True
    # of the order of rows; another seed is another order of the same rows
    c.mixture.seed = 0
    # fingerprint of other rows than a run has read, which it may go on with all the same; it says what that breaks
    c.mixture.accept = ""

    # model: the shape, when a model is born at random; a start from weights brings its own
    # blocks
    c.model.n_layers = 12
    # width of the residual stream
    c.model.d_model = 768
    # width of the gated feed-forward
    c.model.d_ff = 2_048
    # query heads
    c.model.n_heads = 12
    # key-value heads; divides n_heads. Fewer make the decoding cache smaller
    c.model.n_kv_heads = 4
    # width of a head; even
    c.model.d_head = 64
    # rows of the embedding; 0 means the tokenizer's pieces, rounded up to a multiple of 128
    c.model.vocab_size = 0
    # longest sequence the model claims to understand, in tokens
    c.model.max_positions = 4_096
    # added under the root in RMSNorm
    c.model.norm_eps = 1e-05
    # base of the rotary wavelengths; 500,000 for long contexts
    c.model.rope_theta = 10000.0
    # use the embedding as output head too; saves V x D weights, right for small models
    c.model.tied = False

    # initialize: where the first weights come from
    # random, a run or checkpoint directory, a Hugging Face directory, or hf:NAME of its hub
    c.initialize.source = "random"
    # continue: step 0, fresh moments, new schedule; resume: all of the source run goes on; grow: that too, moments mapped
    c.initialize.start = "continue"
    # growth operators applied in order, such as 'depth_upscale(m=4)'; see docs/growth.md
    c.initialize.grow = ()
    # Adam's moments through a growth that keeps the schedule: fresh, copy, copy_scaled, or reset_new, which re-warms new parts
    c.initialize.moments = "reset_new"
    # of the parameters while training; bfloat16 halves memory and rounds small updates away
    c.initialize.dtype = "float32"
    # of random weights
    c.initialize.seed = 0

    # train: the loop
    # optimizer updates in the whole run
    c.train.steps = 1_000
    # growth inside the run: ((after so many steps, operator), ...), rising
    c.train.grow = ()
    # rows in a step over all devices; tokens a step = batch_rows x row_len
    c.train.batch_rows = 32
    # micro-batches a step is cut into; same result, activations / accumulate, somewhat slower
    c.train.accumulate = 1
    # of matrix products; bfloat16 on GPU and TPU, float32 on CPU
    c.train.compute_dtype = "float32"
    # auto takes the kernel of the platform where it can do the run; see docs/performance.md
    c.train.attention = "auto"
    # what backward keeps of a layer, most first: none keeps all; then dots, minimal, full; offload is dots in host memory
    c.train.remat = "none"
    # weight of log(Z)^2, keeps logits small; 1e-4 where bfloat16 runs for long
    c.train.z_loss = 0.0
    # skip an update whose gradient norm exceeds this many times its running mean; 0 skips only non-finite ones
    c.train.spike_factor = 0.0
    # skipped updates in a row that stop the run
    c.train.max_skips = 20
    # steps between console lines and metrics.jsonl records
    c.train.log_every = 10
    # steps between held-out losses; 0 measures at the end only
    c.train.eval_every = 200
    # held-out rows read for each source and measurement, at most
    c.train.eval_rows = 256
    # nats a token by which a source's held-out loss may exceed the parent's before on_forgetting; 0: any
    c.train.max_forgetting = 0.0
    # past max_forgetting: say so, stop the run at a checkpoint, or double that source's share from here on (up to half)
    c.train.on_forgetting = "stop"
    # steps between checkpoints; at most so many are lost by a kill
    c.train.checkpoint_every = 500
    # one more whenever so many minutes passed without one, at the next log line; 0: by steps alone
    c.train.checkpoint_minutes = 0.0
    # newest checkpoints kept; each takes 3 x parameters x 4 bytes
    c.train.keep = 2
    # checkpoints at multiples of so many steps stay for good; 0: none
    c.train.keep_every = 0
    # a checkpoint that cannot be written (full disk): stop the run, or go on and try the next
    c.train.on_failed_save = "stop"
    # project of Weights & Biases that gets every record too (pip install wandb); empty: none
    c.train.wandb = ""
    # (first, last) steps recorded by the JAX profiler into WORKDIR/tensorboard
    c.train.profile = ()

    # optim: the optimizer and its schedule
    # adamw; muon orthogonalizes the updates of a layer's matrices, half their moments. Keep the one a base was trained with
    c.optim.name = "adamw"
    # learning rate after warm-up
    c.optim.peak_lr = 0.0003
    # learning rate at the last step, as a share of peak_lr
    c.optim.end_lr_frac = 0.1
    # after warm-up: wsd stays and falls over decay_frac; cosine, linear; constant
    c.optim.schedule = "wsd"
    # steps of linear rise from 0; too few and the first updates are noise
    c.optim.warmup_steps = 100
    # last share of the steps in which wsd falls, linearly
    c.optim.decay_frac = 0.2
    # ((group, factor of the learning rate), ...), multiplied; 0 freezes. Groups: old, new (by the last growth), a weight's name, layers A-B
    c.optim.rates = ()
    # Adam's decay of the mean
    c.optim.b1 = 0.9
    # Adam's decay of the square; 0.999 for small batches and short runs
    c.optim.b2 = 0.95
    # added to Adam's root
    c.optim.eps = 1e-08
    # decoupled, on matrices only (by name: never on norms, biases, embedding)
    c.optim.weight_decay = 0.1
    # gradients are scaled down to this global norm; 0 leaves them
    c.optim.clip_norm = 1.0

    # mesh: devices along each axis; -1 on one axis takes what the others leave
    # copies of the model, data parallel between slices or hosts (slow links)
    c.mesh.replica = 1
    # data parallel with parameters cut into as many pieces (fast links)
    c.mesh.fsdp = -1
    # heads and feed-forward cut; must divide n_kv_heads
    c.mesh.tensor = 1
    # positions of a row cut; must divide row_len
    c.mesh.context = 1

    # plan: what a run is worth
    # tokens to train for; 0 means train.steps x batch_rows x row_len
    c.plan.tokens = 0.0
    # price of one device and hour; 0 takes the list price in plan/hardware.py
    c.plan.usd_per_hour = 0.0

    return c
