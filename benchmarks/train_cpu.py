"""Tokens per second of training on CPU: jaxpt's step, Hugging Face's Trainer, a torch.compile loop
and Levanter, in turn.

    python benchmarks/train_cpu.py --shapes S M --rounds 5
    python benchmarks/train_cpu.py --shapes course --contenders jaxpt hf hf-bf16
    python benchmarks/train_cpu.py --contenders jaxpt levanter \\
        --python levanter=PATH/TO/ITS/bin/python

Every turn is a process of its own that warms up, times whole steps and prints tokens/s. A round is
one turn of each, so that a machine whose speed drifts still compares fairly: read the ratios. All
train float32 weights with AdamW (decay 0.1, clip 1) on random tokens, without recomputation, on all
cores. Peers need torch and transformers: sdpa attention, fused AdamW.
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

V = 32_000
# name: L, D, F, N, K, T, B, timed steps, first steps not counted
SHAPES = {
    "S": (8, 256, 704, 8, 4, 512, 8, 3, 2),
    "M": (12, 1024, 4096, 32, 8, 512, 1, 3, 2),
    # configs/course.py after its growth, with its recomputation
    "course": (16, 1024, 4096, 32, 8, 32, 2, 6, 2),
}


def tokens_of(shape: str):
    import numpy as np

    *_, T, B, timed, first = SHAPES[shape]
    return np.random.default_rng(0).integers(0, V, (timed + first, B, T))


def rate(shape: str, seconds: list[float]) -> float:
    *_, T, B, timed, first = SHAPES[shape]
    return B * T / statistics.median(seconds[first : first + timed])


def jaxpt(shape: str) -> float:
    """The step that train.py runs, on one device that has all cores."""
    from jaxpt import stage

    stage.use_large_pages()  # as train.py does
    import jax
    import numpy as np

    from jaxpt import config, sharding
    from jaxpt.model import transformer
    from jaxpt.spec import Batch, ModelSpec
    from jaxpt.train import state, step

    L, D, F, N, K, T, B, *_ = SHAPES[shape]
    recipe = "configs/course.py" if shape == "course" else "configs/base.py"
    settings = config.load_config(
        ROOT / recipe, [f"--config.pack.seq_len={T}", f"--config.train.batch_size={B}"]
    )
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    spec = ModelSpec(
        n_layers=L,
        d_model=D,
        d_ff=F,
        n_heads=N,
        n_kv_heads=K,
        d_head=D // N,
        vocab_size=V,
        max_seq_len=2048,
    )
    run = step.build_step(spec, settings.train, settings.optim, settings.pack.seq_len, mesh)
    now = state.init_state(transformer.init_params(spec, 0, mesh), spec, settings.optim, mesh)
    ones = np.ones((B, T), np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    seconds = []
    for tokens in tokens_of(shape).astype(np.int32):
        start = time.perf_counter()
        batch = Batch(tokens, np.roll(tokens, -1, 1), ones, positions, ones.astype(np.float32))
        now, metrics = run(now, jax.device_put(batch, sharding.make_batch_sharding(mesh)))
        assert np.isfinite(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    return rate(shape, seconds)


def torch_llama(shape: str, dtype: str = "float32"):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(os.cpu_count())
    L, D, F, N, K, *_ = SHAPES[shape]
    settings = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=K,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
        dtype=dtype,
    )
    return torch, LlamaForCausalLM(settings).to(getattr(torch, dtype))


def hf(shape: str, dtype: str = "float32") -> float:
    """transformers.Trainer with its default optimizer, AdamW fused; sdpa attention."""
    import transformers

    torch, model = torch_llama(shape, dtype)
    *_, B, timed, first = SHAPES[shape]
    rows = [
        {"input_ids": row, "labels": row}
        for row in torch.from_numpy(tokens_of(shape)).flatten(0, 1)
    ]
    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            ends.append(time.perf_counter())

        def on_train_end(self, *_, **__):
            ends.append(time.perf_counter())

    arguments = transformers.TrainingArguments(
        "/tmp/jaxpt-benchmark",
        per_device_train_batch_size=B,
        max_steps=timed + first,
        optim="adamw_torch_fused",
        weight_decay=0.1,
        gradient_checkpointing=shape == "course",
        bf16=dtype == "bfloat16",
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return rate(shape, [end - begin for begin, end in itertools.pairwise(ends)])


def torch_compile(shape: str) -> float:
    """A bare loop around the compiled model, with fused AdamW."""
    torch, model = torch_llama(shape)
    model = torch.compile(model)
    adamw = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    seconds = []
    for tokens in torch.from_numpy(tokens_of(shape)):
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        assert math.isfinite(loss.item())
        seconds.append(time.perf_counter() - start)
    return rate(shape, seconds)


def levanter(shape: str) -> float:
    """Its Trainer's train_step, without recomputation (its default recomputes)."""
    import haliax as hax
    import jax
    from levanter.models.llama import LlamaConfig
    from levanter.models.lm_model import LmExample
    from levanter.optim import AdamConfig
    from levanter.tracker import NoopConfig
    from levanter.trainer import Trainer, TrainerConfig

    L, D, F, N, K, T, B, timed, first = SHAPES[shape]
    settings = LlamaConfig(
        max_seq_len=T,
        hidden_dim=D,
        intermediate_dim=F,
        num_layers=L,
        num_heads=N,
        num_kv_heads=K,
        gradient_checkpointing=shape == "course",
    )
    adam = AdamConfig(learning_rate=3e-4, weight_decay=0.1).build(timed + first)
    trainer = TrainerConfig(
        id="benchmark",
        tracker=NoopConfig(),
        train_batch_size=B,
        num_train_steps=timed + first,
        require_accelerator=False,
        log_jaxprs=False,
        log_xla_hlo=False,
    )

    def loss(model, example, *, key=None):
        return model.compute_next_token_loss(example, key=key)

    Batch, Vocab = hax.Axis("batch", B), hax.Axis("vocab", V)
    seconds = []
    with Trainer(trainer, adam, loss, add_default_hooks=False) as trainer:
        now = trainer.initial_state(
            jax.random.key(0), model_init=lambda: settings.build(Vocab, key=jax.random.key(1))
        )
        for tokens in tokens_of(shape).astype("int32"):
            start = time.perf_counter()
            rows = [LmExample.causal(hax.named(row, settings.max_Pos)) for row in tokens]
            example = jax.tree.map(
                lambda *each: hax.stack(Batch, each),
                *rows,
                is_leaf=lambda leaf: isinstance(leaf, hax.NamedArray),
            )
            info = trainer.train_step(now, example)
            now = info.state
            assert math.isfinite(float(info.loss))
            seconds.append(time.perf_counter() - start)
    return rate(shape, seconds)


CONTENDERS = {
    "jaxpt": jaxpt,
    "hf": hf,
    "torch.compile": torch_compile,
    "levanter": levanter,
    "hf-bf16": lambda shape: hf(shape, "bfloat16"),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["S", "M"], choices=SHAPES)
    parser.add_argument(
        "--contenders", nargs="+", default=["jaxpt", "hf", "torch.compile"], choices=CONTENDERS
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--python",
        nargs="+",
        default=[],
        metavar="CONTENDER=PATH",
        help="the Python of a contender's own environment",
    )
    parser.add_argument(
        "--turn",
        nargs=2,
        metavar=("CONTENDER", "SHAPE"),
        help="one turn in this process; what the rounds start",
    )
    arguments = parser.parse_args()
    if arguments.turn:
        contender, shape = arguments.turn
        print(json.dumps(CONTENDERS[contender](shape)))
        return

    pythons = dict(pair.split("=", 1) for pair in arguments.python)
    for shape in arguments.shapes:
        speeds = {contender: [] for contender in arguments.contenders}
        for n in range(arguments.rounds):
            for contender, measured in speeds.items():
                command = [
                    pythons.get(contender, sys.executable),
                    __file__,
                    "--turn",
                    contender,
                    shape,
                ]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{contender} failed on {shape}:\n{done.stderr[-3000:]}")
                measured.append(json.loads(done.stdout.splitlines()[-1]))
                print(
                    f"{shape} round {n + 1} {contender} {measured[-1]:.1f} tokens/s",
                    file=sys.stderr,
                    flush=True,
                )
        print(
            f"\n| {shape}, {os.cpu_count()} cores | tokens/s, median of "
            f"{arguments.rounds} | jaxpt is faster by a factor of "
            "|\n|---|---|---|"
        )
        for contender, measured in speeds.items():
            ratios = [ours / theirs for ours, theirs in zip(speeds["jaxpt"], measured, strict=True)]
            compared = (
                ""
                if contender == "jaxpt"
                else f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
            )
            print(f"| {contender} | {statistics.median(measured):,.1f} | {compared} |", flush=True)


if __name__ == "__main__":
    main()
