"""Import then export of a random Llama of 1.1 billion parameters in bfloat16, or of a Mixtral of
1.0 billion, beside transformers' from_pretrained and save_pretrained.

    python benchmarks/import_export.py [rounds] [llama or mixtral]

Each in a process of its own, on the CPU, in turn. transformers maps the file and holds no weights
of its own until something
writes to them; "copied" makes it hold them, as training does. Seconds are those of the calls,
without the start of Python
and packages. Memory is the process's largest resident size less the weights: packages,
mapped files, buffers.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"


def jaxpt(source: pathlib.Path, out: pathlib.Path) -> list[float]:
    """The time at the start, after the import and after the export."""
    from jaxpt import config, sharding
    from jaxpt.weights import huggingface

    mesh = sharding.make_mesh(config.MeshConfig())
    times = [time.perf_counter()]
    spec, params = huggingface.load_hf_model(source, mesh, "bfloat16")
    times.append(time.perf_counter())
    huggingface.write_hf_model(spec, params, out)
    return [*times, time.perf_counter()]


def transformers(source: pathlib.Path, out: pathlib.Path, copied: bool = False) -> list[float]:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    times = [time.perf_counter()]
    model = AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")
    for parameter in model.parameters() if copied else ():
        parameter.data = parameter.data.clone()
    times.append(time.perf_counter())
    model.save_pretrained(out)
    return [*times, time.perf_counter()]


WAYS = {
    "jaxpt": jaxpt,
    "transformers": transformers,
    "transformers, copied": lambda source, out: transformers(source, out, copied=True),
}


SHAPES = {
    "llama": {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "mixtral": {
        "num_hidden_layers": 12,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
    },
}


def make(source: pathlib.Path, family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **SHAPES[family], vocab_size=32_000)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(source)


def child(*arguments) -> list[float]:
    output = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return [float(number) for number in output.partition("MEASURED")[2].split()]


def main(rounds: str = "2", family: str = "llama") -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, out = pathlib.Path(folder, "source"), pathlib.Path(folder, "out")
        child("make", source, family)
        n_bytes = (source / "model.safetensors").stat().st_size
        print(
            "| | import s | export s | together s | MB above the weights |\n|---|---|---|---|---|"
        )
        for _ in range(int(rounds)):
            for way in WAYS:
                shutil.rmtree(out, ignore_errors=True)
                os.sync()
                start, middle, end, peak = child(way, source, out)
                print(
                    (
                        f"| {way} | {middle - start:.1f} | {end - middle:.1f} | "
                        f"{end - start:.1f} | {(peak - n_bytes) / 1e6:,.0f} |"
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", source, family]:
            make(pathlib.Path(source), family)
        case [way, source, out]:
            times = WAYS[way](pathlib.Path(source), pathlib.Path(out))
            peak = (
                int(
                    pathlib.Path("/proc/self/status")
                    .read_text(encoding="utf-8")
                    .split("VmHWM:")[1]
                    .split()[0]
                )
                * 1024
            )
            print("MEASURED", *times, peak)
        case arguments:
            main(*arguments)
