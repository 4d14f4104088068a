"""Every knob of jaxpt with default, unit and consequence.

Printed by `python -m jaxpt.config`.

A recipe starts from these defaults and changes what it needs: see configs/quickstart.py.
"""

from jaxpt.config import defaults


def get_config():
    c = defaults()

    # ---- prepare: Raw text -> a clean corpus.
    # Text to read: KIND:WHERE or NAME=KIND:WHERE; docs/prepare.md lists the kinds.
    c.prepare.sources = ()
    # Quality rules: none, course, gopher, c4, fineweb, prose or code; see docs/prepare.md.
    c.prepare.preset = "none"
    # Changes to the preset: '-language' drops a rule, 'min_chars(least=50)' sets or adds one, 'NAME
    # before OTHER' places it, MODULE:FUNCTION is your own.
    c.prepare.rules = ()
    # Drop near-duplicates by MinHash over word 5-grams, first kept. About 2 x the time.
    c.prepare.near_dedup = False
    # Benchmark files; a document that shares an n-gram with an item is dropped.
    c.prepare.decontaminate = ()
    # Words per n-gram. GPT-3's 13 are hardly ever shared by chance; shorter items are missed.
    c.prepare.decontaminate_ngram = 13
    # A record or file that cannot be read: stop, or skip and count it (a file from where it
    # breaks).
    c.prepare.on_error = "stop"
    # Fraction of documents kept out of training, by hash of the text, per source.
    c.prepare.heldout_frac = 0.02
    # MB of text per source at most, sampled by hash; 0 takes all. For quick trials.
    c.prepare.max_mb = 0.0
    # MB of text per parquet shard. Smaller shards use more cores.
    c.prepare.shard_mb = 128
    # Where prepare and pack run: local, ray, or ray://HOST:PORT of a running cluster.
    c.prepare.executor = "local"

    # ---- tokenizer: Text -> token ids.
    # Train one on the corpus, or the path of a SentencePiece .model, a tokenizer.json or a Hugging
    # Face directory.
    c.tokenizer.source = "train"
    # Algorithm when training: bpe (also saved as SentencePiece .model) or unigram.
    c.tokenizer.model = "bpe"
    # Tokens. More put more bytes into a token and cost V x D parameters twice.
    c.tokenizer.vocab_size = 32_000
    # MB of corpus text to train on, spread evenly over the documents.
    c.tokenizer.sample_mb = 64
    # More control tokens of a trained tokenizer, such as <|im_start|> for a chat template or
    # <|fim_prefix|>, <|fim_suffix|>, <|fim_middle|>. Text never becomes one.
    c.tokenizer.control_tokens = ()
    # File of a Jinja chat template for the tokenizer; '' keeps the one that it has.
    c.tokenizer.chat_template = ""

    # ---- pack: Documents -> packed sequences of token ids.
    # Tokens per sequence: the longest context that training sees.
    c.pack.seq_len = 1_024
    # best_fit keeps short documents whole and pads; course concatenates and splits.
    c.pack.method = "best_fit"
    # Share of the documents that train as fill-in-the-middle (half prefix-suffix-middle, half
    # suffix-prefix-middle). Code models use 0.5; needs a tokenizer with FIM tokens.
    c.pack.fim_rate = 0.0

    # ---- mixture: Which sequences to train on, and in which proportions.
    # Directories written by pack; empty means WORKDIR/packed.
    c.mixture.packed_paths = ()
    # ((from step, {source: share of tokens}), ...); empty takes all in proportion.
    c.mixture.phases = ()
    # ((source or all, epochs), ...): refuse a run that repeats a source more often.
    c.mixture.max_epochs = ()
    # Attend only within a document; off attends to the whole sequence, as the course does.
    c.mixture.document_mask = True
    # Seed for the order of sequences.
    c.mixture.seed = 0
    # Allow resuming on changed data with this fingerprint. The log lists what is no longer
    # reproducible.
    c.mixture.allow_changed_data = ""

    # ---- model: Architecture when training from scratch; ignored when loading weights.
    # Transformer layers.
    c.model.n_layers = 12
    # Width of the residual stream.
    c.model.d_model = 768
    # Width of the gated MLP.
    c.model.d_ff = 2_048
    # Query heads.
    c.model.n_heads = 12
    # Key-value heads; divides n_heads. Fewer shrink the KV cache.
    c.model.n_kv_heads = 4
    # Width of a head; even.
    c.model.d_head = 64
    # Embedding rows; 0 means the tokenizer's size, rounded up to a multiple of 128.
    c.model.vocab_size = 0
    # Longest sequence that the model supports, in tokens.
    c.model.max_seq_len = 4_096
    # Base of the rotary embedding; 500,000 for long contexts.
    c.model.rope_theta = 10000.0
    # Share embedding and output head; saves V x D parameters, good for small models.
    c.model.tie_embeddings = False
    # LAYERSxWIDTH at which the values of optim were found, such as 4x256. CompleteP transfers
    # rates, epsilon, decay and initial values to any depth and width, through growth too.
    c.model.base_shape = ""
    # ((name, value), ...) of further fields of ModelSpec (jaxpt/spec.py), such as (('norm_eps',
    # 1e-6), ('family', 'qwen3'), ('qk_norm', True)).
    c.model.fields = ()

    # ---- initialize: Where the initial weights come from.
    # random, a run or checkpoint directory, a Hugging Face directory or hf:NAME; of a model, or of
    # a LoRA adapter, which is merged into its base.
    c.initialize.source = "random"
    # Base of a LoRA adapter in source: a Hugging Face directory or hf:NAME; empty takes the one
    # that its adapter_config.json names.
    c.initialize.base = ""
    # continue: step 0, fresh optimizer, new schedule; resume: the source run with its optimizer,
    # schedule and data order; grow: resume with a grown model.
    c.initialize.mode = "continue"
    # Growth operators in order, such as 'depth_upscale(m=4)'; see docs/growth.md.
    c.initialize.grow = ()
    # Optimizer moments through growth: fresh, copy, copy_scaled, or reset_new, which re-warms new
    # parameters.
    c.initialize.moments = "reset_new"
    # Dtype of parameters in training; bfloat16 halves memory and rounds small updates away.
    c.initialize.param_dtype = "float32"
    # Seed for parameter initialization.
    c.initialize.seed = 0

    # ---- train: The training loop.
    # Optimizer steps in the whole run.
    c.train.steps = 1_000
    # Growth during the run: ((after this many steps, operator), ...), rising.
    c.train.grow = ()
    # Global batch in sequences. Tokens per step = batch_size x pack.seq_len.
    c.train.batch_size = 32
    # ((from step, batch size, tokens per sequence), ...) in place of batch_size x pack.seq_len:
    # packed sequences are cut into equal parts.
    c.train.shape_schedule = ()
    # Micro-batches per step. Same result, 1/n of the activation memory, somewhat slower.
    c.train.grad_accum_steps = 1
    # Dtype for matmuls and activations: bfloat16 on GPU and TPU, float32 on CPU.
    c.train.compute_dtype = "float32"
    # Dtype of the layers' large matmuls in training: compute_dtype, float8 (Hopper, Ada and newer,
    # TPU7x) or int8 in forward (TPU v5e, v5p, v6e). See docs/train.md.
    c.train.matmul_dtype = "compute"
    # Attention kernel; auto takes the platform's where it supports the run. See
    # docs/performance.md.
    c.train.attention = "auto"
    # Kernel for a mixture's experts; auto takes the platform's where it supports the run. See
    # docs/moe.md.
    c.train.experts = "auto"
    # Activation checkpointing policy, from most memory to least: none, dots, minimal, full. offload
    # is dots kept in host memory.
    c.train.remat = "none"
    # Layers in the body of the loop over layers: more take longer to compile, and a CPU less time
    # for a step; 0: as many as the run's length pays for there, one on an accelerator. See
    # docs/performance.md.
    c.train.unroll_layers = 0
    # Learn preferences from pairs (DPO), against the initial model: 0.1 is usual, less lets it move
    # further away. Needs data of pairs; 0: the next token.
    c.train.dpo_beta = 0.0
    # Weight of log(Z)^2, which keeps logits small; 1e-4 for long bfloat16 runs.
    c.train.z_loss_weight = 0.0
    # Skip an update whose gradient norm exceeds this many times its running mean; 0 skips only non-
    # finite ones.
    c.train.spike_factor = 0.0
    # Consecutive skipped updates that stop the run.
    c.train.max_consecutive_skips = 20
    # Stop a run whose loss stays above this many times the data's unigram entropy, and save nothing
    # there; 0: never.
    c.train.stop_above = 3.0
    # Steps between console lines and metrics.jsonl records.
    c.train.log_every = 10
    # Steps between held-out losses; 0 measures at the end only.
    c.train.eval_every = 200
    # Held-out sequences per source and evaluation, at most.
    c.train.eval_sequences = 256
    # Benchmarks scored with each held-out loss, as jaxpt evaluate names them (needs requirements-
    # eval.txt).
    c.train.eval_tasks = ()
    # Items of each benchmark: its first ones, the same each time.
    c.train.eval_items = 200
    # Where the benchmarks' files are, as of evaluate --data-dir; '': the harness's cache.
    c.train.eval_dir = ""
    # Nats per token by which a source's held-out loss may exceed the parent's before on_forgetting
    # acts; 0: any.
    c.train.max_forgetting = 0.0
    # Past max_forgetting: warn, stop at a checkpoint, or replay: double that source's share from
    # here on (up to half).
    c.train.on_forgetting = "stop"
    # Steps between checkpoints: the most that a kill loses.
    c.train.checkpoint_every = 500
    # Also save when this many minutes passed without a checkpoint; 0: by steps alone.
    c.train.checkpoint_minutes = 0.0
    # Newest checkpoints kept; each holds parameters, optimizer state and an average: 12 bytes per
    # parameter with float32 AdamW.
    c.train.max_to_keep = 2
    # Checkpoints at multiples of this many steps are kept for good; 0: none.
    c.train.keep_every = 0
    # A checkpoint that cannot be written (full disk): stop, or continue and try the next.
    c.train.on_save_error = "stop"
    # Weights & Biases project that also gets every record (pip install wandb).
    c.train.wandb_project = ""
    # NAME.prom that always holds the newest records in Prometheus' text format, in node_exporter's
    # textfile directory; '': none.
    c.train.prometheus_file = ""
    # (first, last) steps recorded by the JAX profiler into WORKDIR/tensorboard.
    c.train.profile_steps = ()

    # ---- optim: The optimizer and its schedule.
    # adamw; muon orthogonalizes the updates of a layer's matrices and needs half their moments;
    # adafactor keeps mean squares by row and column. Keep the one that a base model was trained
    # with.
    c.optim.name = "adamw"
    # Dtype of moments between updates: the parameters', bfloat16 (2 bytes each) or int8 (1, with a
    # scale per block); both are rounded stochastically.
    c.optim.moment_dtype = "params"
    # Learning rate after warm-up.
    c.optim.peak_lr = 0.0003
    # Learning rate at the last step, as a fraction of peak_lr.
    c.optim.end_lr_frac = 0.1
    # After warm-up: wsd is constant, then falls over decay_frac; cosine; linear; constant.
    c.optim.schedule = "wsd"
    # Initial fraction of the steps in which the rate rises. Too few are noisy updates.
    c.optim.warmup_frac = 0.1
    # Final fraction of the steps in which wsd decays, linearly.
    c.optim.decay_frac = 0.2
    # Average the weights on the device: 500 is the mean of the last 500 steps at the constant rate,
    # 0.999 the decay of a moving average over them all; 0: none. One more copy.
    c.optim.average = 0.0
    # ((group, multiplier), ...), multiplied together; 0 freezes. Groups: old, new (by the last
    # growth), a parameter's name, layers A-B.
    c.optim.lr_multipliers = ()
    # With train.shape_schedule: multiply the rate by (tokens per step / those of the first step) to
    # this power. 0.5 is the square-root rule.
    c.optim.batch_power = 0.0
    # Adam's decay of the mean.
    c.optim.b1 = 0.9
    # Adam's decay of the square; 0.999 for small batches and short runs.
    c.optim.b2 = 0.95
    # Adam's epsilon.
    c.optim.eps = 1e-08
    # Decoupled weight decay, on matrices only (not on norms, biases, embeddings).
    c.optim.weight_decay = 0.1
    # Clip gradients to this global norm; 0: do not clip.
    c.optim.clip_norm = 1.0

    # ---- lora: Training low-rank adapters on a frozen base.
    # Train adapters of this rank (LoRA) on the model of initialize.source and freeze the rest: only
    # adapters have optimizer state. 0 trains all weights. 8 to 64 are usual.
    c.lora.rank = 0
    # An adapter's output is times alpha / rank. Learning rates are about 10 x the usual.
    c.lora.alpha = 32.0
    # Matrices that get adapters, such as q and v; empty takes q, k, v, o and a dense MLP's gate,
    # up, down.
    c.lora.targets = ()

    # ---- distill: Learning from a frozen teacher: (1 - a) CE + a T^2 KL; see docs/distill.md.
    # A run, checkpoint, Hugging Face directory or hf:NAME with the student's tokenizer, or what
    # jaxpt teacher_logits wrote; empty: none. Its forward pass adds to each step's time.
    c.distill.teacher = ""
    # Weight a of the KL at the first and at the last step, linear between; 0 to 1.
    c.distill.alpha = (0.9, 0.5)
    # T, by which both models' logits are divided. Above 1 shows more of unlikely tokens.
    c.distill.temperature = 1.0
    # forward is KL(teacher || student), which covers all that the teacher holds likely; reverse is
    # KL(student || teacher), which avoids what it holds unlikely.
    c.distill.direction = "forward"

    # ---- mesh: Devices along each mesh axis; -1 on one axis takes the rest.
    # Data parallelism with whole copies, between slices or hosts.
    c.mesh.replica = 1
    # Data parallelism with sharded parameters (fast links).
    c.mesh.fsdp = -1
    # Data parallelism with sharded experts; divides n_experts.
    c.mesh.expert = 1
    # Tensor parallelism over heads and MLP; divides n_kv_heads.
    c.mesh.tensor = 1
    # Context parallelism over positions; divides seq_len.
    c.mesh.context = 1

    # ---- plan: Inputs of the planner.
    # Tokens to train for; 0 means train.steps x train.batch_size x pack.seq_len.
    c.plan.tokens = 0.0
    # Price of one device per hour; 0 takes the list price in hardware.py.
    c.plan.usd_per_hour = 0.0

    return c
