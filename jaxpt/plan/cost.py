"""What a run is worth before any device is paid for: does it fit, tokens a second, hours, money, energy, on each target."""

from __future__ import annotations

import logging
import textwrap
from typing import Any

from jaxpt.config import Config
from jaxpt.plan import compile, flops, hardware, hlo, layouts, roofline
from jaxpt.plan.hardware import GIB, Chip
from jaxpt.spec import ModelSpec
from jaxpt.train.metrics import DeviceCost
from jaxpt.weights import checkpoint, growth, hub, huggingface, initialize

log = logging.getLogger(__name__)

DEFAULT_MEM_FRAC = 0.75  # NVIDIA: what JAX takes of a card's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
ORBAX_RESTORE_BYTES = 96 * 10**9  # bytes that Orbax 0.12 reads into a host's memory at a time
# Power of host, network and cooling beside the boards: a DGX H100 is rated 10.2 kW for 8 boards of 0.7 kW, and boards in
# training draw some 85 % of their rating.
POWER_OVERHEAD = 1.5


def plan_targets(
    settings: Config, target_names: list[str], calibrations: dict[str, float] | None = None
) -> dict[str, Any]:
    """The plan of a config on each target: {"model", "tokens", "targets": [record, ...], "notes"}, plain numbers, as plan.json holds it.

    calibrations  {chip: measured seconds of a step over those planned for it}, see check.py

    Raises UserError for an unknown chip, a slice that is not offered, or sizes that a target cannot cut evenly.
    """
    targets = [hardware.parse_target(each) for each in target_names]
    spec, _ = resolve_model_spec(settings)
    found = make_plan_header(settings)
    for target in targets:
        missing = compile.find_missing_package(target)
        way = f"{missing} is not installed: estimating" if missing else "compiling the train step"
        log.info(f"plan: {target.name}: {way} ...")
        measured = compile.analyze_step(spec, settings, target)
        done = "refused by the compiler" if measured["over_memory"] else measured["method"]
        log.info(f"plan: {target.name}: {done} in {measured['seconds']:.0f} s")
        found["targets"].append(
            project_target(
                spec,
                settings,
                target,
                measured,
                found["tokens"],
                (calibrations or {}).get(target.chip.name, 1.0),
            )
        )
        if not found["targets"][-1]["fits"]:
            found["notes"].append(
                f"{target.name}: {layouts.suggest_layout(spec, settings, target)}"
            )
    return found | {"notes": found["notes"] + collect_assumptions(found["targets"])}


def make_plan_header(settings: Config) -> dict[str, Any]:
    """A plan with no targets yet."""
    spec, notes = resolve_model_spec(settings)
    train, seq_len = settings.train, settings.pack.seq_len
    model = {
        "n_params": flops.count_matmul_params(spec),
        "seq_len": seq_len,
        "batch_size": train.batch_size,
        "grad_accum_steps": train.grad_accum_steps,
        "spec": spec.to_json(),
    }
    return {"model": model, "tokens": get_token_budget(settings), "targets": [], "notes": notes}


def get_token_budget(settings: Config) -> float:
    """The token budget."""
    return settings.plan.tokens or float(
        settings.train.steps * settings.train.batch_size * settings.pack.seq_len
    )


def resolve_model_spec(settings: Config) -> tuple[ModelSpec, list[str]]:
    """The model that a run of this config would train, growth included, and what had to be guessed."""
    asked, notes = settings.initialize, []
    if asked.source == "random":
        spec = initialize.make_random_spec(settings, settings.tokenizer.vocab_size)
        if not settings.model.vocab_size:
            notes.append(
                f"model.vocab_size is 0 (take the tokenizer's): planned with tokenizer.vocab_size, {spec.vocab_size:,} when rounded up."
            )
    else:
        spec = read_source_spec(asked.source)
    if settings.train.grow:
        notes.append(
            "planned at the size after the last growth of train.grow; the steps before it are cheaper."
        )
    for text in (*asked.grow, *(text for _, text in settings.train.grow)):
        spec = growth.plan_growth(text, growth.Parent(spec)).child
    return spec, notes


def read_source_spec(source: str) -> ModelSpec:
    """The shape of a run, a checkpoint, a Hugging Face directory or hf:NAME; its weights are not read."""
    directory = hub.download_model(source)
    step_dir = checkpoint.find_checkpoint(directory)
    return (
        ModelSpec.load(step_dir / "spec.json") if step_dir else huggingface.read_hf_spec(directory)
    )


def project_target(
    spec: ModelSpec,
    settings: Config,
    target: hardware.Target,
    analysis: dict[str, Any],
    tokens: float,
    time_calibration: float = 1.0,
) -> dict[str, Any]:
    """One target of plan.json. Bytes are of one device; "low" and "high" stand for the slow and the fast end of what is assumed, the
    plain numbers for their middle.

    calibration  a measured step's seconds over those planned for it, which a run of the same kind of device gave (see check.py)
    """
    chip, n = target.chip, target.n_devices
    flops_per_token = flops.count_flops_per_token(spec, settings.pack.seq_len)
    usd_per_hour, priced = resolve_usd_per_hour(chip, settings)
    peak = analysis["peak_bytes"]
    batch = settings.train.batch_size * settings.pack.seq_len
    peak_flops = n * getattr(chip, settings.train.compute_dtype)
    roof = roofline.compute_roofline(analysis, target, settings)

    def at(step_seconds: float) -> dict[str, Any]:
        hours = tokens / batch * step_seconds * time_calibration / 3600
        return {
            "mfu": batch * flops_per_token / (step_seconds * time_calibration * peak_flops),
            "tokens_per_second": batch / (step_seconds * time_calibration),
            "step_seconds": step_seconds * time_calibration,
            "hours": hours,
            "usd": None if usd_per_hour is None else hours * n * usd_per_hour,
            "kwh": None if chip.watts is None else hours * n * chip.watts / 1000 * POWER_OVERHEAD,
        }

    return {
        "on": target.name,
        "method": analysis["method"],
        "missing": analysis["missing"],
        "devices": n,
        "mesh": analysis["mesh"],
        "attention": analysis["attention"],
        "fits": not analysis["over_memory"]
        and max(peak, analysis["export_bytes"]) <= target.usable_bytes,
        "peak_bytes_per_device": peak,
        "peak_is_lower_bound": analysis["over_memory"],
        "usable_bytes_per_device": target.usable_bytes,
        "params_bytes": analysis["params_bytes"],
        "opt_bytes": analysis["opt_bytes"],
        "kept_bytes": analysis["kept_bytes"],
        "temporary_bytes": None
        if analysis["over_memory"]
        else peak - analysis["params_bytes"] - analysis["opt_bytes"],
        "restore_bytes": analysis["restore_bytes"],
        "export_bytes": analysis["export_bytes"],
        # a checkpoint is written behind the training, from a copy of the state in the hosts' memory
        "host_save_bytes": target.devices_per_host * analysis["restore_bytes"],
        "host_restore_bytes": min(
            target.devices_per_host * analysis["restore_bytes"], ORBAX_RESTORE_BYTES
        ),
        "host_export_bytes": analysis["export_bytes"] - analysis["params_bytes"],
        "needs_mem_fraction": chip.platform == "cuda"
        and peak > chip.memory_bytes * DEFAULT_MEM_FRAC,
        "flops_per_token": flops_per_token,
        "executed_flops_per_token": analysis["executed_flops"] / batch,
        "once_flops": analysis["once_flops"],
        "compiler_flops": analysis["compiler_flops"],
        "layers": analysis["layers"],
        "moved_bytes_per_layer": analysis["moved_bytes"] / max(spec.n_layers, 1),
        "compute_seconds": roof.compute_seconds,
        "memory_seconds": roof.memory_seconds,
        "network_seconds": roof.network_seconds,
        **at(roof.expected_seconds),
        "low": at(roof.slow_seconds),
        "high": at(roof.fast_seconds),
        "efficiency": list(chip.efficiency[0]),
        "efficiency_source": chip.efficiency[1],
        "calibration": time_calibration,
        "usd_per_hour": usd_per_hour,
        "priced": priced,
        "compile_seconds": analysis["seconds"],
    }


def resolve_usd_per_hour(chip: Chip, settings: Config) -> tuple[float | None, str]:
    """US dollars for one device and hour, and whose price that is."""
    if settings.plan.usd_per_hour:
        return settings.plan.usd_per_hour, "config.plan.usd_per_hour"
    return chip.usd_per_hour, chip.price_source


def detect_device_cost(spec: ModelSpec, settings: Config) -> DeviceCost:
    """What turns a running job's speed into MFU and money on the devices that JAX sees here; None for what is not known of them."""
    import jax

    kind = jax.devices()[0].device_kind
    chip = hardware.find_chip(kind)
    usd_per_hour = settings.plan.usd_per_hour or (
        chip.usd_per_hour if chip and chip.platform != "cpu" else None
    )
    return DeviceCost(
        flops.count_flops_per_token(spec, settings.pack.seq_len),
        hardware.get_peak_flops(kind, settings.train.compute_dtype),
        usd_per_hour,
    )


# ---- the same arithmetic for a run that somebody tells about


def compute_implied_mfu(
    flops_per_token: float, tokens: float, n_devices: int, hours: float, peak: float
) -> float:
    """The share of peak that a run must have reached to finish in so many hours."""
    return flops_per_token * tokens / (n_devices * hours * 3600 * peak)


def compute_implied_usd_per_hour(usd: float, n_devices: int, hours: float) -> float:
    """US dollars for one device and hour."""
    return usd / (n_devices * hours)


def compare_growth_flops(
    child: ModelSpec,
    base: ModelSpec,
    seq_len: int,
    *,
    scratch_tokens: float,
    grown_tokens: float,
    base_tokens: float,
) -> dict[str, float]:
    """FLOPs to reach one loss from scratch and by growing a base, given the tokens that each takes; no law of scaling is assumed.

    scratch_tokens  the child needs them from random weights
    grown_tokens    the child needs them after it was grown
    base_tokens     the base was trained for; saved_with_base_frac counts them, saved_frac takes the base as given
    """
    scratch = flops.count_flops_per_token(child, seq_len) * scratch_tokens
    grown = flops.count_flops_per_token(child, seq_len) * grown_tokens
    base_flops = flops.count_flops_per_token(base, seq_len) * base_tokens
    return {
        "scratch_flops": scratch,
        "grown_flops": grown,
        "base_flops": base_flops,
        "saved_frac": 1 - grown / scratch,
        "saved_with_base_frac": 1 - (grown + base_flops) / scratch,
    }


# ---- on the terminal


def format_plan(plan: dict[str, Any]) -> str:
    """The plan as text: one column a target, then what the numbers rest on."""
    model, tokens, records = plan["model"], plan["tokens"], plan["targets"]
    shape = f"{model['batch_size']:,} rows of {model['seq_len']:,}"
    head = f"{model['n_params']:,} parameters; {model['batch_size'] * model['seq_len']:,} tokens a step ({shape}); {abbreviate_count(tokens)} tokens in all"
    rows = [("", [each["on"] for each in records])]
    rows += [(label, [show(each) for each in records]) for label, show in PLAN_TABLE_ROWS]
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(records))]
    left = max(len(label) for label, _ in rows)
    lines = [
        f"{label:<{left}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for label, cells in rows
    ]
    wrapped = [
        textwrap.fill(note, 120, initial_indent="- ", subsequent_indent="  ")
        for note in plan["notes"]
    ]
    return "\n".join([head, "", *(line.rstrip() for line in lines), "", *wrapped])


def format_method(each: dict[str, Any]) -> str:
    if each["missing"]:
        return "estimated, not compiled"
    return "refused by the compiler" if each["peak_is_lower_bound"] else "compiled"


def format_fit(each: dict[str, Any]) -> str:
    spare = (each["usable_bytes_per_device"] - each["peak_bytes_per_device"]) / GIB
    if each["fits"]:
        return f"yes, {spare:.1f} GiB to spare"
    return f"no, {'at least ' if each['peak_is_lower_bound'] else ''}{-spare:.1f} GiB too much"


def format_memory(n_bytes: float | None) -> str:
    if n_bytes is None:
        return "unknown"
    return f"{n_bytes / GIB:.2f} GiB" if n_bytes >= GIB / 10 else f"{n_bytes / 2**20:.1f} MiB"


def abbreviate_count(n: float) -> str:
    """40,265,318,400 -> "40.3B"."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if n >= unit:
            return f"{n / unit:.3g}{letter}"
    return f"{n:,.0f}"


def format_slow_fast(each: dict[str, Any], key: str, show) -> str:
    """The values at both ends of the assumed MFU, smaller first."""
    if each[key] is None:
        return "unknown"
    first, last = sorted((each["low"][key], each["high"][key]))
    return f"{show(first)} to {show(last)}"


def format_significant(n: float) -> str:
    return f"{n:,.0f}" if n >= 100 else f"{n:.3g}"


PLAN_TABLE_ROWS = (
    ("how", format_method),
    ("devices", lambda each: f"{each['devices']:,}"),
    (
        "mesh",
        lambda each: (
            " x ".join(f"{axis} {n}" for axis, n in each["mesh"].items() if n > 1) or "one device"
        ),
    ),
    ("parameters", lambda each: format_memory(each["params_bytes"])),
    ("optimizer", lambda each: format_memory(each["opt_bytes"])),
    ("gradients, activations", lambda each: format_memory(each["temporary_bytes"])),
    ("  kept for backward, about", lambda each: format_memory(each["kept_bytes"])),
    (
        "peak a device",
        lambda each: (
            f"{'> ' if each['peak_is_lower_bound'] else ''}{format_memory(each['peak_bytes_per_device'])}"
        ),
    ),
    ("  while restoring", lambda each: format_memory(each["restore_bytes"])),
    ("  while exporting", lambda each: format_memory(each["export_bytes"])),
    ("  a host, saving", lambda each: format_memory(each["host_save_bytes"])),
    ("  a host, restoring", lambda each: format_memory(each["host_restore_bytes"])),
    ("  a host, exporting", lambda each: format_memory(each["host_export_bytes"])),
    ("memory a device", lambda each: format_memory(each["usable_bytes_per_device"])),
    ("fits", format_fit),
    ("FLOPs a token, model", lambda each: f"{each['flops_per_token']:.3g}"),
    ("FLOPs a token, executed", lambda each: f"{each['executed_flops_per_token']:.3g}"),
    ("FLOPs, loops once: counted", lambda each: format_optional_flops(each["once_flops"])),
    ("  compiler's own", lambda each: format_optional_flops(each["compiler_flops"])),
    ("step at full speed: products, s", lambda each: format_significant(each["compute_seconds"])),
    ("  memory, s", lambda each: format_significant(each["memory_seconds"])),
    ("  links, s", lambda each: format_significant(each["network_seconds"])),
    ("efficiency assumed", lambda each: "{:.0%} to {:.0%}".format(*each["efficiency"])),
    ("MFU expected", lambda each: format_slow_fast(each, "mfu", "{:.0%}".format)),
    ("step, s", lambda each: format_slow_fast(each, "step_seconds", format_significant)),
    ("tokens/s", lambda each: format_slow_fast(each, "tokens_per_second", format_significant)),
    ("hours", lambda each: format_slow_fast(each, "hours", format_significant)),
    ("usd", lambda each: format_slow_fast(each, "usd", format_significant)),
    ("kWh", lambda each: format_slow_fast(each, "kwh", format_significant)),
)


def format_optional_flops(n: float | None) -> str:
    return "unknown" if n is None else f"{n:.3g}"


def collect_assumptions(records: list[dict[str, Any]]) -> list[str]:
    """What the numbers of targets rest on, as sentences: assumptions, prices with their dates, what the compiled programs move."""
    return list(dict.fromkeys(note for each in records for note in describe_assumptions(each)))


def describe_assumptions(each: dict[str, Any]) -> list[str]:
    """Of one target; those of one chip share some."""
    name = each["on"].partition(":")[0]
    low, high = each["efficiency"]
    found = [
        f"{name}: products are assumed to run at {low:.0%} to {high:.0%} {each['efficiency_source']}."
    ]
    if name == "cpu":
        found.append("cpu: a device stands for one core with 4 GiB.")
    if each["calibration"] != 1:
        found.append(
            f"{each['on']}: times are multiplied by {each['calibration']:.3g}, which a measured run gave."
        )
    if each["layers"]:
        found.append(
            f"{each['on']}: a layer runs {hlo.format_collectives(each['layers'])} (forward; backward)."
        )
    elif each["devices"] > 1:
        found.append(
            f"{each['on']}: a layer moves {each['moved_bytes_per_layer'] / 1e6:,.0f} MB to each device in a step, by arithmetic."
        )
    if each["network_seconds"] > each["compute_seconds"] / high:
        found.append(
            f"{each['on']}: the links need {each['network_seconds']:.3g} s of a step, the products {each['compute_seconds'] / high:.3g} s: they bound it. "
            "More train.batch_size, less train.grad_accum_steps or a smaller cut of the weights helps."
        )
    if each["usd_per_hour"] is None:
        found.append(
            f"{name}: {each['priced']}. Give yours: --config.plan.usd_per_hour=PRICE (a device and hour)."
        )
    else:
        found.append(
            f"{name}: {each['usd_per_hour']:.2f} usd a device and hour ({each['priced']})."
        )
    if each["missing"]:
        found.append(
            f"{name}: estimated, not compiled: install {each['missing']} to compile. Parameters and optimizer are exact, the rest to about 25 %."
        )
    if each["fits"] and each["needs_mem_fraction"]:
        found.append(
            f"{each['on']}: needs more than the {DEFAULT_MEM_FRAC:.0%} of a card that JAX takes: set XLA_PYTHON_CLIENT_MEM_FRACTION={hardware.MAX_MEM_FRAC}."
        )
    return found
