"""Laws of the growth experiment (benchmarks/growth.py): rates, equal FLOPs, and what is fitted."""

import dataclasses
import re

import pytest
from conftest import ROOT

from jaxpt.plan import scaling, transfer

pytest.importorskip("matplotlib", reason="the experiment draws plots")
import growth
import growth_forecast
import growth_runs
import growth_tables

FULL = "4 layers, "  # how the full size's arms begin
LAW = scaling.ScalingLaw(2.0, 60.0, 0.34, 30_000.0, 0.75, "made up", (1e5, 1e6), 1e8)


def test_rates_are_tried_until_the_best_is_not_at_the_edge():
    assert growth.list_rates({}) == [0.004, 0.008]
    assert growth.list_rates({0.004: 3.3, 0.008: 3.2}) == [0.004, 0.008, 0.016]
    assert growth.list_rates({0.004: 3.2, 0.008: 3.3}) == [0.002, 0.004, 0.008]
    whole = {0.004: 3.3, 0.008: 3.2, 0.016: 3.4}
    assert growth.list_rates(whole) == [0.004, 0.008, 0.016]
    assert growth.list_rates({**whole, 0.016: 3.1})[-1] == 0.032


def test_a_seed_that_chose_rates_compares_no_arms():
    start = [run for run in growth.plan_arms([]) if not growth.is_rival(run.arm)]
    assert {run.seed for run in start} == {growth.ARM_RATE_SEED}
    done = [
        make_result(run, loss=3.0 + abs(rate - 0.008))
        for rate in (0.004, 0.008, 0.016)
        for run in growth.make_arms(rate, 0)
    ]
    first = [run for run in growth.plan_arms(done) if run.seed > 0]
    assert {run.arm for run in first} >= set(growth.DECIDING)
    results = [*done, *map(make_result, first)]
    planned = [run for run in growth.plan_arms(results) if run.seed > 0]
    twice = [run for run in planned if growth.is_deciding(run.arm)]
    assert {(run.seed, run.peak_lr) for run in twice} == {
        (seed, rate) for seed in (1, 2, 3, 4, 5) for rate in growth.ARM_RATES
    }
    others = [run for run in planned if run not in twice]
    assert {run.peak_lr for run in others if run.arm not in growth.FRONTIER_RATES} == {0.008}
    n_arms = len(growth.make_arms(0.008, 0))
    assert len(first) < len(planned) and len(others) + len(twice) / 2 == 5 * n_arms
    for runs in first, planned:
        compared = [*done, *(make_result(run, 3.0 + run.peak_lr) for run in runs)]
        tables = [run for run in growth.select_compared(compared) if run["part"] == "arms"]
        assert {run["seed"] for run in tables} == {1, 2, 3, 4, 5}
        assert len(tables) == len(runs) - len(twice) / 2
        rates = {run["peak_lr"] for run in tables if growth.is_deciding(run["arm"])}
        assert rates == {0.004}, "what decides takes the rate that is best over these seeds"


@pytest.mark.parametrize("run", growth.make_arms(0.004, 0), ids=lambda run: run.arm)
def test_arms_spend_the_same_flops(run):
    share = float(run.arm.split(", ")[1].split()[0]) if "of the FLOPs" in run.arm else 1.0
    spent = make_result(run)["flops"]
    step = growth_runs.flops_per_step(growth.FULL.make_spec(), growth.BATCH)
    assert abs(spent - share * growth.BUDGET) < step


def test_a_fit_finds_the_law_and_the_factor_that_made_the_results():
    results = []
    for run in (*growth.plan_frontier([]), *growth.make_arms(0.004, 1)):
        result = make_result(run)
        sizes = growth_forecast.measure_sizes(result)
        tokens = sizes.tokens
        if sizes.base_tokens:
            worth = transfer.compute_worth(LAW, *sizes[:3])
            tokens = transfer.count_effective_tokens(tokens, worth, 1.3)
        results.append({**result, "loss": LAW.predict_loss(sizes.n_params, tokens)})
    law = growth_forecast.fit_law(results, growth.HOLDOUT.n_layers)
    assert law.predict_loss(3e5, 5e6) == pytest.approx(LAW.predict_loss(3e5, 5e6), rel=1e-3)
    fitted = growth_forecast.fit_methods(results, law, FULL)
    assert fitted.keys() == set(growth_forecast.METHODS)
    for found in fitted.values():
        assert found.factors == pytest.approx([1.3] * len(found.factors), rel=0.02)


def test_tables_average_a_part_alone_and_only_seeds_that_all_arms_have(capsys):
    """Losses of the seed that chooses rates are 5, of an unfinished seed 7, of another part 9."""
    results = []
    for make, part in ((growth.make_arms, "arms"), (growth.make_pretrained, "pretrained")):
        for rate, loss in ((0.004, 5.5), (0.008, 5.0), (0.016, 5.6)):
            results += [make_result(run, loss) for run in make(rate, growth.ARM_RATE_SEED)]
        for seed, loss in ((1, 3.0), (2, 3.25), (3, 7.0)):
            rates = growth.find_arm_rates(results, part, growth.TUNED_PARTS[part])
            runs = [run for run in make(0.008, seed) if growth.name_tuned(run.arm) in rates]
            runs = [
                dataclasses.replace(run, peak_lr=rates[growth.name_tuned(run.arm)]) for run in runs
            ]
            runs = runs[1:] if seed == 3 else runs
            results += [make_result(run, loss - number / 1e3) for number, run in enumerate(runs)]
    results += [make_result(run, 9.0) for run in growth.plan_holdout(results)]
    results += [
        make_result(run, 4.0 + run.shape.n_layers / 100) for run in growth.plan_frontier([])
    ]
    chosen = growth.select_compared(results)
    growth_tables.print_tables(chosen, FULL, len(growth.SHORTER) + 1, ())
    growth_forecast.print_forecast(chosen, growth.HOLDOUT.n_layers, FULL)
    printed = capsys.readouterr().out
    controls = "4 layers, 1 of the FLOPs", "4 layers from scratch", "base of"
    n_tables = 0
    for table in printed.split("\n\n"):
        if any(f"less {control}" in table for control in controls):
            n_tables += 1
            for row in table.splitlines()[2:]:
                assert row.endswith("| 2 |") and re.search(r"\| 3\.\d+", row), row
    assert n_tables == 2 + len(growth.TOKENS_PER_PARAM)
    assert "| base of 20 tokens per parameter, stack | 0.008 | " in printed
    assert "| 4 layers from scratch | 3.1" in printed  # beside each base's forecasts
    assert "right in" in printed and "nan" not in printed


def test_a_result_that_a_kill_cut_is_dropped_before_the_next(tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text('{"key": "a"}\n{"key": "b", "lo')
    assert [each["key"] for each in growth_runs.read_results(results)] == ["a"]
    growth_runs.drop_torn_line(results)
    with open(results, "a", encoding="utf-8") as file:
        file.write('{"key": "c"}\n')
    assert [each["key"] for each in growth_runs.read_results(results)] == ["a", "c"]


def test_a_base_and_what_comes_of_it_read_different_text():
    for run in growth.make_pretrained(0.008, 1):
        parts = [segment.text for segment in run.segments]
        later = parts[-2:]
        assert later == [growth.LATER_TEXT] * 2 and set(parts[:-2]) <= {growth.BASE_TEXT}
        assert {segment.peak_lr for segment in run.segments[:-2]} <= {growth.PRETRAINED_RATE}
    assert growth.BASE_TEXT[1] <= growth.LATER_TEXT[0]


def test_the_planners_factors_are_those_of_the_committed_results():
    results = growth_runs.read_results(ROOT / "benchmarks/growth_results/results.jsonl")
    chosen = growth.select_compared(results)
    ends = growth_forecast.find_transfer_ends(chosen, growth.HOLDOUT.n_layers, FULL)
    arms = [run for run in chosen if run["part"] == "arms"]  # `holdout` has some of these names
    for name, known in transfer.TRANSFERS.items():
        assert (known.low, known.high) == pytest.approx(ends[name], abs=0.006), name
        run = next(run for run in arms if run["arm"] == known.arm)
        growth_there = run["n_params"] / growth_forecast.measure_sizes(run).base_params
        assert known.growth == pytest.approx(growth_there, abs=0.006), name


def make_result(run: growth_runs.Run, loss: float = 3.0) -> dict:
    """Return a run's result as it would stand in the file, without training."""
    spec = run.shape.make_spec()
    n_steps = sum(segment.n_steps for segment in run.segments)
    for segment in run.segments:
        if segment.operator:
            parent = growth_runs.Parent(spec)
            spec = growth_runs.plan_growth(segment.operator, parent).child
    result = {
        "key": run.key,
        **growth_runs.dataclasses.asdict(run),
        "n_params": growth_runs.transformer.count_params(spec),
        "tokens": n_steps * run.batch_size * growth_runs.SEQ_LEN,
        "loss": loss,
    }
    return {**result, "flops": growth_tables.count_flops_at(result, n_steps)}
