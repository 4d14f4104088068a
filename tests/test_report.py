import datetime
import html.parser
import json
import math
import re
import resource
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from made_runs import HOSTILE, SPEC, Page, growth, write_json, write_manifest, write_runs

from jaxpt import io, stage
from jaxpt.report import evaluation, figures, head, live, plan, read, summary, training
from jaxpt.report import growth as growth_module
from jaxpt.report.format import format_seconds
from jaxpt.report.page import SECTIONS, render_page, write_report
from jaxpt.report.read import MAX_DROPPED, MAX_EXCERPT, load_run, load_runs
from jaxpt.report.records import Comparison, Phase, RunEvent, Strategy, Target
from jaxpt.spec import UserError


@pytest.fixture
def runs(tmp_path):
    return write_runs(tmp_path)


def test_the_page_shows_every_section_of_a_base_and_its_child(runs, tmp_path):
    write_report(runs, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.found["h2"] == [section.title for section in SECTIONS]
    for expected in (
        "591 k",
        "886 k",
        "depth_upscale(m=1)",
        "× 1.55",
        "Healthy: it starts +0.72",
        "loss after 20 steps",
        "The loss right after growth does not rank operators.",
        "60,009",
        "43,598",
        "2.113",
        "± 0.048",
        "the old man",
        "v5p:2x2x2",
        "optim.peak_lr",
        "0.0004",
    ):
        assert expected in page.text, expected
    assert (
        "svg",
        "aria-label",
        "5 layers became 8; child layers come from parent layers 0, 1, 2, 3, 1, 2, 3, 4; "
        "new are child layers 4, 5, 6",
    ) in page.attributes


def test_the_page_loads_nothing_from_other_hosts_and_stays_small(runs, tmp_path):
    write_report(runs, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "data", "action", "poster"):
            assert value.startswith(("#", "data:")), (tag, name, value)
    assert not re.search(r"@import|url\(", page.found["style"][0]) and page.found["style"][0].count(
        "{"
    ) == page.found["style"][0].count("}")
    assert (tmp_path / "page.html").stat().st_size < 1_200_000


@pytest.mark.slow
def test_many_long_runs_still_make_a_page_below_two_megabytes(runs, tmp_path):
    base, _ = runs
    record = json.loads((base / "metrics.jsonl").read_text().splitlines()[3])
    lines = [
        json.dumps(
            {**record, "step": step, "loss": 2 + math.sin(step) ** 2, "grad_norm": 1 + step % 7}
        )
        for step in range(1, 20_001)
    ]
    (base / "metrics.jsonl").write_text("\n".join(lines))
    write_json(
        base / "eval" / "samples.json",
        {
            "models": ["m"],
            "prompts": [{"prompt": "p" * 9_000, "outputs": [{"model": "m", "text": "t" * 50_000}]}]
            * 60,
        },
    )
    copies = [shutil.copytree(base, tmp_path / f"copy{i}") for i in range(6)]
    write_report([base, *copies], tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 2_000_000


def test_a_downsampled_curve_keeps_its_spikes():
    points = [(step, 99.0 if step == 5_417 else 1.0) for step in range(10_001)]
    kept = figures.downsample_points(points, 200)
    assert (
        (5_417, 99.0) in kept
        and kept[-1] == points[-1]
        and len(kept) <= 202
        and kept == sorted(kept)
    )


def test_text_from_data_is_inert(runs, tmp_path):
    base, child = runs
    hostile = child.with_name("<b>child")
    child.rename(hostile)
    found = json.loads((hostile / "growth.json").read_text())
    write_json(
        hostile / "growth.json",
        {
            **found,
            "verdict": HOSTILE,
            "operators": [HOSTILE],
            "moments": HOSTILE,
            "measured": {HOSTILE: [HOSTILE]},
        },
    )
    funnel = json.loads((base / "corpus" / "funnel.json").read_text())
    funnel["steps"][0]["rule"] = HOSTILE
    write_json(base / "corpus" / "funnel.json", funnel)
    lines = (
        (base / "metrics.jsonl")
        .read_text()
        .replace('"heldout": {"prose"', f'"heldout": {{{json.dumps(HOSTILE)}')
    )
    (base / "metrics.jsonl").write_text(lines)
    write_report([base, hostile], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "img" not in page.found and "b" not in [
        tag for tag in page.found if page.found[tag] == ["child"]
    ]
    assert len(page.found["script"]) == len(page.plots) + 2  # the library and ours
    assert page.text.count(HOSTILE) >= 4 and "<b>child" in page.text
    assert any(json.loads(data)["data"] for data in page.plots)


def test_edits_and_unreadable_inputs_are_listed_under_their_source_and_inert(runs, tmp_path):
    base, _ = runs
    funnel = json.loads((base / "corpus" / "funnel.json").read_text())
    funnel["steps"][2]["edits"] = {"prose": 1_234, "code": 0}
    funnel["unread"] = {
        "code": {
            "counts": {"cannot be read": 3, "HTTP status 404": 17},
            "first": [f"a.jsonl:7: {HOSTILE}"],
        }
    }
    write_json(base / "corpus" / "funnel.json", funnel)
    write_report([base], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    (row,) = [row for row in page.rows if row[:1] == ["paragraph repetition"] and len(row) == 7]
    assert row[:5] == ["paragraph repetition", "52,327", "30", "1,234", "187.60"], (
        "code had no edits, so it has no column"
    )
    text = page.text
    passed = text.index("Skipped while reading: 3 times cannot be read, 17 times HTTP status 404.")
    assert passed < text.index("What could not be read") < text.index(f"a.jsonl:7: {HOSTILE}")


def test_samples_of_what_each_rule_dropped_are_folded_under_their_source_and_inert(runs, tmp_path):
    base, _ = runs
    (base / "corpus" / "dropped").mkdir()
    columns = ("id", "source", "text", "reason")
    rows = [
        (f"web/{i}", "prose", f"{HOSTILE} number {i} " + "n" * 5_000, "2 lines") for i in range(7)
    ] + [("code/1", "code", "pass", None)]
    for rule in ("paragraph_repetition", "line_length"):
        table = pa.table(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)))
        pq.write_table(table, base / "corpus" / "dropped" / f"{rule}.parquet")
    (base / "corpus" / "dropped" / "language.parquet").write_text("no parquet")
    write_report([base], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    shown = [text for text in page.found["pre"] if text.startswith(HOSTILE)]
    assert (
        len(shown) == 2 * MAX_DROPPED
        and all(len(text) == MAX_EXCERPT for text in shown)
        and "img" not in page.found
    )
    assert page.text.index("line length", page.text.index("Samples of what")) < page.text.index(
        "paragraph repetition", page.text.index("Samples of what")
    )
    assert (
        page.text.count("web/2: 2 lines") == 2
        and page.text.count("web/3: 2 lines") == 0
        and "code/1: no reason recorded" in page.text
    )
    assert "language.parquet: cannot be read" in page.text


def test_the_mixture_is_listed_from_the_step_where_it_starts(runs, tmp_path):
    base, child = runs
    settings = json.loads((base / "config.json").read_text())
    settings["mixture"]["phases"] = [[0, {"prose": 3.0, "code": 1.0}], [120, {"prose": 1.0}]]
    write_json(base / "config.json", settings)
    account = [
        {"step": step, "row": 8 * step, "batch_size": 8, "shares": shares}
        for step, shares in ((0, {"code": 1.0}), (60, {"prose": 0.375, "code": 0.625}))
    ]
    write_json(child / "phases.json", account)  # what the run has read counts, not its config
    write_report(runs, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    rows = [
        ["base", "0", "75 %", "25 %"],
        ["base", "120", "100 %", ""],
        ["child", "0", "", "100 %"],
        ["child", "60", "37.5 %", "62.5 %"],
    ]
    assert [row for row in page.rows if row in rows] == rows
    drawn = [json.loads(plot)["data"]["values"] for plot in page.plots if '"title":"share"' in plot]
    assert [(point["step"], point["value"]) for point in drawn[0] if point["name"] == "prose"] == [
        (0, 0.75),
        (120, 0.75),
        (120, 1.0),
        (300, 1.0),
    ]
    (child / "phases.json").write_text('[{"step": 0, "shares": {"prose": "much"}}]')
    assert (
        load_run(child).phases == [] and "its mixture cannot be read" in load_run(child).warnings[0]
    )
    settings["mixture"]["phases"] = []
    write_json(base / "config.json", settings)
    assert load_run(base).phases == [
        Phase(0, {"prose": 98_211 / 122_218, "code": 24_007 / 122_218})
    ], "in proportion to the sequences"


def test_forgetting_is_the_childs_loss_above_its_parents(runs, tmp_path):
    _, child = runs
    settings = json.loads((child / "config.json").read_text())
    settings["train"]["max_forgetting"] = 0.25
    write_json(child / "config.json", settings)
    write_report(runs, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    heldout = [
        json.loads(line)
        for line in (child / "metrics.jsonl").read_text().splitlines()
        if "parent" in line
    ]
    rise = [record["heldout"]["prose"] - 3.912 for record in heldout]
    assert [
        "child",
        "prose",
        f"{rise[0]:+.3f}",
        f"{rise[0]:+.3f} step 0",
        f"\N{MINUS SIGN}{-rise[-1]:.3f}",
    ] in page.rows
    (plot,) = [json.loads(plot) for plot in page.plots if "above the parent" in plot]
    assert [
        point["value"] for point in plot["data"]["values"] if point["name"] == "prose"
    ] == pytest.approx(rise, rel=1e-3)
    assert {"value": 0.25} in [
        value for layer in plot["layer"] for value in layer.get("data", {}).get("values", [])
    ]
    assert not training.make_forgetting(load_runs([runs[0]])), (
        "a run from scratch has nothing to forget"
    )


def test_a_skipped_update_is_shown_with_what_it_measured_and_read(runs, tmp_path):
    _, child = runs
    write_report(runs, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    (row,) = [row for row in page.rows if row[:2] == ["child", "91"]]
    assert row[2:4] == ["9.75", "not finite"] and row[4].startswith(
        f"code/lib/heapq.py, {HOSTILE}, prose/moby.txt38 more"
    )
    assert (
        row[4].endswith("prose/28.txt and 9 that jaxpt trace names")
        and f"jaxpt trace --workdir {child} --step 91 --losses" in page.text
    )


def test_what_the_run_took_is_listed_below_its_plan(runs, tmp_path):
    _, child = runs
    planned = json.loads((child / "plan.json").read_text())
    write_json(child / "plan.json", {**planned, "tokens": 3e9})
    (child / "starts.jsonl").write_text(
        '{"n_devices": 1, "device_kind": "cpu"}\n'
        '{"n_devices": 8, "device_kind": "NVIDIA H100 80GB HBM3"}\n'
    )
    found = load_run(child)
    lines = []
    for point in found.metrics.train:
        record = point.to_json() | {"usd": 0.79 * point.step / 180}
        lines.append(json.dumps(record) + "\n")
    (child / "metrics.jsonl").write_text("".join(lines))
    write_report([child], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    (row,) = [row for row in page.rows if row[1:2] == ["measured"]]
    assert row[:3] == ["NVIDIA H100 80GB HBM3", "measured", "8"] and row[7:] == [
        "1.97 minutes",
        "0.79",
    ]
    hours = 0.8 * 118 / 3600 * 3e9 / (180 * 16 * 512)
    assert (
        "planned on h100:8 were 34.1 hours and 818 USD for 3 B tokens; "
        f"at the measured pace it is {hours:.3g} hours" in page.text
    )
    assert load_run(runs[0]).start is None
    assert "measured pace" not in render_page(load_runs([runs[0]]))


def test_time_that_a_plan_does_not_know_is_an_empty_cell_and_never_is_said_of_a_strategy():
    for fields in (
        {},
        {"hours": None},
        {"hours": math.nan},
        {"expected": {}, "slow": {"hours": 2}},
    ):
        target = Target.from_json({"target": "h100:8", **fields})
        assert plan.list_target(target)[-2:] == ["", ""], fields
    known = Target.from_json({"target": "h100:8", "hours": 0.5, "low": {"hours": 0.25}})
    assert plan.list_target(known)[-2] == "30 minutes"
    for hours, cell in (
        (None, ""),
        ((), ""),
        ((None, None), "never"),
        ((0.25, None), "15–never minutes"),
        ((2.0, 3.5), "2–3.5 hours"),
    ):
        table = plan.make_comparison_table(Comparison((Strategy("stack", hours=hours),)))
        assert table.rows[0][4:] == [cell, ""], hours


def test_documents_on_which_two_models_differ_are_shown_by_token_in_colors_and_in_numbers(
    runs, tmp_path
):
    write_report(runs, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    section = text[text.index('<section id="differences">') :]
    cells = re.findall(
        r'<i class="([bw]\d)">(.*?)</i>', "".join(re.findall("<pre>.*?</pre>", section, flags=re.S))
    )
    shown = [(kind, html.unescape(piece)) for kind, piece in cells]
    assert shown == [
        ("b3", "def"),
        ("b1", "push"),
        ("b2", HOSTILE),
        ("w1", "Call"),
        ("w3", " Ishmael"),
    ]
    assert (
        "What child finds more likely than base" in page.text
        and "def heappush(" + HOSTILE + ", item):" in page.text
        and "Call me Ishmael" in page.text
    )
    assert (
        "code/lib/heapq.py: 3.301 → 2.618 nats per token over 498 tokens, from token 40"
        in page.text
        and "img" not in page.found
    )
    listed = [
        row
        for row in page.rows
        if len(row) == 4 and row[0] in ("def", "Call·me·Ishmael", "def·heap")
    ]
    minus = "\N{MINUS SIGN}"
    assert listed == [
        ["def", "4.10", "1.20", f"{minus}2.90"],
        ["def·heap", "3.90", "3.80", f"{minus}0.10"],
        ["Call·me·Ishmael", "7.00", "9.90", "+2.90"],
    ]
    assert "·Ishmael7.00 → 9.90" in page.text and "·me2.00 → 2.20" in page.text, (
        "each token's loss, of those without a color too"
    )
    assert [name for tag, name, _ in page.attributes if tag == "details"].count("open") == 2, (
        "the first of each direction stands open"
    )


def shown_growth(workdir, **changes):
    """The page of a run that has only this growth.json."""
    write_json(workdir / "growth.json", growth(**changes))
    write_report([workdir], workdir / "page.html")
    return Page(workdir / "page.html")


def test_a_growth_in_width_shows_sizes_and_no_map(tmp_path):
    spec = {"parent": SPEC, "child": {**SPEC, "d_model": 192, "n_kv_heads": 4}}
    page = shown_growth(
        tmp_path,
        operators=["widen(d=192)"],
        layer_map=[0, 1, 2, 3, 4],
        new_layers=[],
        spec=spec,
        copy_similarity=None,
    )
    rows = [row for row in page.rows if row and row[0] in ("width", "heads", "key-value heads")]
    assert rows == [["width", "96", "192", "× 2.00"], ["key-value heads", "2", "4", "× 2.00"]], (
        "what stayed is not listed"
    )
    assert "svg" not in page.found


def test_a_layer_without_a_source_is_new_and_a_parent_layer_without_a_copy_is_left_out(tmp_path):
    page = shown_growth(tmp_path, layer_map=[0, None, 2, 4], new_layers=[1], copy_similarity=[])
    assert (
        "svg",
        "aria-label",
        "5 layers became 4; child layers come from parent layers 0, none, 2, 4; "
        "new are child layers 1",
    ) in page.attributes
    drawn = [value for tag, name, value in page.attributes if (tag, name) == ("rect", "class")]
    assert (
        drawn == ["", "unused", "", "unused", "", "", "new", "", ""]
        and "1 new" in page.found["text"]
    )
    assert "Dashed: left out." in page.text


def test_each_layer_of_parent_and_child_is_drawn_and_listed_in_a_table(tmp_path):
    page = shown_growth(tmp_path)
    for plot, key in zip(page.plots, ("rms", "influence"), strict=True):
        for name, layers in growth()["layers"].items():
            values = [
                value for value in json.loads(plot)["data"]["values"] if value["name"] == name
            ]
            assert [value["layer"] for value in values] == list(range(len(layers)))
            assert [value["value"] for value in values] == pytest.approx(
                [layer[key] for layer in layers], rel=1e-4
            )
    assert ["4", "0.652", "0.652", "0.254", "0.041"] in page.rows and [
        "7",
        "",
        "4.469",
        "",
        "0.297",
    ] in page.rows


def test_of_many_copies_the_twelve_pairs_that_differ_most_are_shown(tmp_path):
    pairs = [
        {"source": i, "layers": [i, i + 30], "cosine": (7 * i % 30) / 30 - 0.1} for i in range(30)
    ]
    page = shown_growth(tmp_path, copy_similarity=pairs)
    cosines = [float(row[2]) for row in page.rows if len(row) == 3]
    assert (
        cosines == pytest.approx([i / 30 - 0.1 for i in range(12)], abs=6e-4)
        and "12 of 30" in page.text
    )


def test_what_the_operators_measured_is_shown(tmp_path):
    page = shown_growth(
        tmp_path, measured={"influence": [0.614, 0.18123], "dropped": [2, 3], "kept": {"heads": 4}}
    )
    assert all(
        expected in page.found["p"]
        for expected in (
            "Measured influence: 0.614, 0.181",
            "Measured dropped: 2, 3",
            "Measured kept: heads 4",
        )
    )


def test_what_was_not_measured_is_left_out(tmp_path):
    page = shown_growth(
        tmp_path,
        **dict.fromkeys(
            (
                "flops_per_token",
                "heldout_loss",
                "heldout_sequences",
                "layers",
                "copy_similarity",
                "probe",
                "moments",
            )
        ),
    )
    assert "Growth" in page.found["h2"] and page.plots == [] and "not measured" in page.text
    assert "None" not in page.text and "FLOPs" not in page.text and "moments" not in page.text


def test_a_child_whose_loss_is_not_finite_is_shown_as_such(tmp_path):
    loss = {"parent": {"prose": 3.9}, "child": {"prose": math.nan}}
    page = shown_growth(
        tmp_path,
        heldout_loss=loss,
        layers={
            "parent": [{"rms": 1.0, "influence": 0.5}],
            "child": [{"rms": math.inf, "influence": math.nan}] * 8,
        },
    )
    assert ["prose", "3.900", "nan", "+nan"] in page.rows


@pytest.mark.parametrize(
    "changes",
    [
        {"verdict": 3},
        {"copy_similarity": 7},
        {"layers": {"parent": []}},
        {"new_layers": [99]},
        {"probe": {"steps": 3}},
        {"n_params": {}},
        {"operators": [1]},
    ],
)
def test_a_malformed_growth_is_one_sentence(tmp_path, changes):
    page = shown_growth(tmp_path, **changes)
    assert "Growth" not in page.found["h2"] and "Summary" in page.found["h2"]
    assert (
        len(
            [
                line
                for line in page.found["li"]
                if "growth.json" in line
                and ("has an unexpected form" in line or "does not hold" in line)
            ]
        )
        == 1
    )


def test_growth_inside_a_run_is_an_upright_line_in_its_loss_and_no_point_of_it(runs, tmp_path):
    base, _ = runs
    whole = load_run(base)
    record = json.dumps({"step": 90, "grown": "stack(g=2)", "n_layers": 10, "n_params": 1_111_111})
    lines = (base / "metrics.jsonl").read_text().splitlines()
    at = max(i for i, line in enumerate(lines) if json.loads(line)["step"] == 90)
    (base / "metrics.jsonl").write_text("\n".join([*lines[: at + 1], record, *lines[at + 1 :]]))
    write_json(
        base / "growth.json",
        growth(parent=str(base / "checkpoints" / "90"), operators=["stack(g=2)"], at_step=90),
    )
    grown, _ = write_report(runs, tmp_path / "page.html")
    assert grown.metrics.train == whole.metrics.train
    assert grown.metrics.heldout == whole.metrics.heldout
    page = Page(tmp_path / "page.html")
    assert (
        "stack(g=2), at step 90 of the run" in page.text
        and "grown at step 90 by stack(g=2)" in page.text
    )
    marks = json.loads(page.plots[0])["layer"][-1]["data"]["values"]
    assert {"name": "base", "step": 90, "what": "grown by stack(g=2)"} in marks
    assert "Upright: base was grown by stack(g=2) at step 90." in page.text


@pytest.mark.parametrize(
    "gone",
    [
        "manifest.json",
        "config.json",
        "spec.json",
        "growth.json",
        "metrics.jsonl",
        "eval",
        "plan.json",
    ],
)
def test_a_missing_file_is_named(runs, tmp_path, gone):
    _, child = runs
    shutil.rmtree(child / gone) if (child / gone).is_dir() else (child / gone).unlink()
    write_report([child], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    expected = {
        "metrics.jsonl": "no metrics.jsonl",
        "growth.json": "no growth.json",
        "eval": "no eval/NAME.json",
        "plan.json": "no plan.json",
        "config.json": "no config.json",
    }
    assert expected.get(gone, "") in page.text and "Summary" in page.found["h2"]


def test_the_page_of_an_empty_directory_names_all_that_is_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    write_report([tmp_path / "empty"], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "no corpus/funnel.json, written by jaxpt prepare" in text and "no growth.json" in text


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "config.json",
        "spec.json",
        "growth.json",
        "eval/jax.json",
        "eval/samples.json",
        "eval/differences.json",
        "plan.json",
    ],
)
@pytest.mark.parametrize(
    "content",
    [
        '{"half',
        "[1, 2]",
        "{}",
        '{"results": 3, "prompts": null, "models": {}, "better": 1, "targets": {}, '
        '"layer_map": "x", "inputs": [1], "counts": 7}',
    ],
)
def test_broken_json_is_a_sentence_and_not_a_traceback(runs, tmp_path, name, content):
    _, child = runs
    (child / name).write_text(content)
    found = write_report(runs, tmp_path / "page.html")
    summary.format_summary_table(found, tmp_path / "page.html")
    if content in ('{"half', "[1, 2]"):
        assert f"{child / name}: " in html.unescape((tmp_path / "page.html").read_text())


def test_a_half_written_last_line_of_the_metrics_is_left_out_and_named(runs, tmp_path):
    base, _ = runs
    path = base / "metrics.jsonl"
    whole = load_run(base)
    path.write_text(path.read_text() + '{"step": 302, "loss": 3.')
    run = load_run(base)
    assert (
        run.metrics.train == whole.metrics.train
        and run.metrics.heldout == whole.metrics.heldout
        and run.metrics.events == [RunEvent(160)]
    )
    assert "half-written" in run.warnings[0]


def test_a_page_with_losses_that_are_not_finite_is_valid_json(runs, tmp_path):
    base, _ = runs
    (base / "metrics.jsonl").write_text(
        '{"step": 1, "loss": NaN, "grad_norm": Infinity, "lr": 0.1}\n'
        '{"step": 2, "loss": 3.5, "grad_norm": 0.0, "lr": 0.1}\n'
    )
    write_report([base], tmp_path / "page.html")
    for data in Page(tmp_path / "page.html").plots:
        json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_step_written_again_after_a_kill_counts_once(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 5}\n{"step": 2, "loss": 4}\n'
        '{"step": 1, "resumed": true}\n{"step": 2, "loss": 3}\n'
    )
    run = load_run(tmp_path)
    assert [(record.step, record.loss) for record in run.metrics.train] == [(1, 5), (2, 3)]


def test_a_page_that_is_made_again_reads_only_the_records_that_are_new(tmp_path, monkeypatch):
    """And all of them again where a resumed run has cut its records and written others."""
    path = tmp_path / "metrics.jsonl"
    parsed = []
    parse = read.parse_metric
    monkeypatch.setattr(read, "parse_metric", lambda fields: parsed.append(1) or parse(fields))
    readers: read.Readers = {}

    def load():
        parsed.clear()
        run = load_run(tmp_path, readers)
        return {point.step: point.loss for point in run.metrics.train}, len(parsed)

    lines = [f'{{"step": {step}, "loss": {step / 4}}}\n' for step in range(1, 6)]
    path.write_text("".join(lines[:3]))
    assert load() == ({1: 0.25, 2: 0.5, 3: 0.75}, 3)
    path.write_text("".join(lines[:4]) + lines[4][:9])
    assert load() == ({1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}, 1)
    path.write_text("".join(lines))
    assert load() == ({1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0, 5: 1.25}, 1)
    path.write_text("".join(lines[:2]) + '{"step": 3, "loss": 9.0, "lr": 0.1}\n' * 3)
    assert load() == ({1: 0.25, 2: 0.5, 3: 9.0}, 5)


def test_runs_are_shown_in_the_order_given(runs, tmp_path):
    base, child = runs
    for order in ([base, child], [child, base]):
        found = write_report(order, tmp_path / "page.html")
        assert [run.directory for run in found] == order
        assert Page(tmp_path / "page.html").found["strong"][:2] == [
            directory.name for directory in order
        ]


def test_runs_of_one_name_get_different_names(runs, tmp_path):
    _, child = runs
    (tmp_path / "again").mkdir()
    copy = shutil.copytree(child, tmp_path / "again" / "child")
    assert [run.name for run in load_runs([child, copy])] == [
        f"{tmp_path.name}/child",
        "again/child",
    ]


def test_lineage_goes_from_the_corpus_to_the_child_even_after_a_move(runs, tmp_path):
    base, child = runs
    names = ["corpus", "tokenizer", "packed", "base", "child"]
    assert [node.path.name for node in load_run(child).lineage_nodes] == names
    (tmp_path / "elsewhere").mkdir()
    moved = [run.rename(tmp_path / "elsewhere" / run.name) for run in (base, child)]
    found = load_run(moved[1])
    assert [node.path.name for node in found.lineage_nodes] == names and all(
        node.manifest for node in found.lineage_nodes
    )
    (moved[1] / "manifest.json").unlink()  # the run is still running
    assert [node.path.name for node in load_run(moved[1]).lineage_nodes] == names


def test_a_model_grown_in_its_own_directory_is_between_parent_and_child(runs, tmp_path):
    base, child = runs
    grown = tmp_path / "grown"
    given = {"initialize": {"path": str(base), "fingerprint": stage.fingerprint_path(base)}}
    grown.mkdir()
    manifest = stage.make_manifest(
        stage.StageRequest("initialize", {}, given, 0),
        sealed={},
        counts={"n_params": 886_368},
        tokenizer=None,
        seconds=6.4,
    )
    io.write_json(grown / "manifest.json", manifest)
    write_manifest(
        child, "train", {"packed": base / "packed", "initialize": grown}, {"steps": 180}, 118.0
    )
    run = load_run(child)
    assert [node.path.name for node in run.lineage_nodes] == [
        "corpus",
        "tokenizer",
        "packed",
        "base",
        "grown",
        "child",
    ]
    assert summary.sum_seconds_by_stage(run) == {
        "corpus": 38.2,
        "tokenizer": 21.7,
        "packed": 47.5,
        "grown": 6.4,
        "train": 118.0,
        "eval": 49.3,
    }
    assert summary.sum_seconds_by_stage(load_run(base)).get("grown", 0) == 0, (
        "a parent did not need its child's growth"
    )


def test_what_a_teacher_took_is_not_the_students_own(runs, tmp_path):
    base, child = runs
    teacher, samples = tmp_path / "teacher", tmp_path / "samples"
    write_manifest(teacher, "initialize", {}, {"n_params": 886_368}, 600.0)
    write_manifest(samples, "teacher_logits", {"teacher": teacher}, {"n_samples": 16}, 70.0)
    given = {"packed": base / "packed", "teacher": teacher}
    write_manifest(child, "train", given, {"steps": 180}, 118.0)
    assert "grown" not in summary.sum_seconds_by_stage(load_run(child))
    write_manifest(child, "train", {**given, "initialize": teacher}, {"steps": 180}, 118.0)
    assert summary.sum_seconds_by_stage(load_run(child))["grown"] == 600.0, "it began with it too"
    write_manifest(child, "train", {**given, "teacher": samples}, {"steps": 180}, 118.0)
    nodes = {node.path.name: node for node in load_run(child).lineage_nodes}
    assert (nodes["samples"].kind, nodes["teacher"].kind) == ("samples", "grown")
    assert summary.describe_stage_size(nodes["samples"]) == "16 samples per token"


def test_a_score_is_shown_with_the_score_without_items_seen_in_training(runs, tmp_path):
    write_report(runs, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert [
        "truthfulqa_mc2 acc",
        "child jax",
        "3 of 100",
        "0.531 ± 0.048",
        "0.517 ± 0.052",
    ] in page.rows
    assert ["winogrande acc", "base hf", "0 of 200", "0.512 ± 0.035", ""] in page.rows, (
        "without an overlap there is no other score"
    )
    assert (
        "At most 17 items" in page.text
        and "truthfulqa_mc2, item 41, in web/8812: "
        f"if you crack your knuckles a lot you may {HOSTILE}"
        in page.found["li"]
    )


def test_the_difference_between_jax_and_hf_is_stated(runs, tmp_path):
    _, child = runs
    for backend, score in (("jax", 2.0), ("hf", 2.03125)):
        result = {
            "results": {"bits_per_byte/prose": {"bits_per_byte,none": score}},
            "model": str(child / "hf"),
            "backend": backend,
        }
        write_json(child / "eval" / f"{backend}.json", result)
    write_report([child], tmp_path / "page.html")
    assert "They differ by 3e-02 at most." in Page(tmp_path / "page.html").text


def write_results(path, results, **more):
    write_json(path, {"results": results, "model": "other", "backend": "jax", **more})


def test_each_kind_of_measure_has_its_axis_and_direction(tmp_path):
    results = {
        "lambada": {
            "acc,none": 0.31,
            "acc_stderr,none": 0.02,
            "perplexity,none": 48.0,
            "perplexity_stderr,none": 3.0,
        },
        "winogrande": {"acc,none": 0.52, "acc_stderr,none": 0.03},
    }
    better = {"lambada": {"acc": True, "perplexity": False}, "winogrande": {"acc": True}}
    write_results(tmp_path / "run/eval/all.json", results, higher_is_better=better)
    shown = evaluation.make_evaluation([load_run(tmp_path / "run")])
    assert "Higher is better: acc. Lower is better: perplexity." in shown.table.caption
    drawn = {}
    for figure in shown.benchmarks:
        values = figure.spec["data"]["values"]
        title = figure.spec["layer"][1]["encoding"]["x"]["title"]
        drawn[title] = [value["score"] for value in values], figure.caption.split(". ")[0]
    assert drawn == {
        "acc": ([0.31, 0.52], "Acc: higher is better"),
        "perplexity": ([48.0], "Perplexity: lower is better"),
    }


def test_a_long_context_is_drawn_in_a_figure_for_each_task(tmp_path):
    positions, depths = ("128-255", "0-63", "64-127"), ("0", "0.5", "1")
    by_position, needle = {}, {"acc,none": 0.4, "acc_stderr,none": 0.1}
    for metrics, names in (
        (by_position, [f"nats_{place}" for place in positions]),
        (needle, [f"acc_depth_{place}" for place in depths]),
    ):
        for k, name in enumerate(names):
            metrics |= {f"{name},none": 0.25 * k, f"{name}_stderr,none": 0.1}
    results = {"by_position/books": by_position, "needle/books": needle}
    better = {"by_position/books": {f"nats_{place}": False for place in positions}}
    write_results(tmp_path / "run/eval/all.json", results, higher_is_better=better)
    first, whole, last = evaluation.make_evaluation([load_run(tmp_path / "run")]).benchmarks
    for figure, task, axis, places in (
        (first, "by_position/books", "position", ["0-63", "64-127", "128-255"]),
        (last, "needle/books", "depth", list(depths)),
    ):
        x = figure.spec["encoding"]["x"]
        assert (figure.title, x["field"], x["sort"]) == (task, axis, places)
        assert {value[axis] for value in figure.spec["data"]["values"]} == set(places)
    assert first.caption.startswith("Nats per token: lower is better.")
    assert [value["task"] for value in whole.spec["data"]["values"]] == ["needle/books acc"]


def test_a_score_that_is_no_number_shows_why(tmp_path):
    write_results(
        tmp_path / "run/eval/all.json",
        {"prose": {"bits_per_byte,none": None}, "code": {"bits_per_byte,none": 1.5}},
        reasons={"prose": {"bits_per_byte,none": "the text is lost"}},
        contamination={
            "unknown": [],
            "tasks": {
                "prose": {
                    "items": 7,
                    "overlapping": 2,
                    "short": 0,
                    "examples": [],
                    "without": {"bits_per_byte,none": None},
                },
                "code": {"items": 5, "overlapping": 1, "short": 0, "examples": [], "without": {}},
            },
        },
    )
    samples = {
        "prompts": [],
        "bits_per_byte": {"sea.txt": {"base": None, "child": 1.25}},
        "reasons": {"sea.txt": {"base": "its characters are lost"}},
    }
    write_json(tmp_path / "run/eval/samples.json", samples)
    runs = write_report([tmp_path / "run"], tmp_path / "page.html")
    assert not runs[0].warnings
    page = Page(tmp_path / "page.html")
    assert ["prose bits per byte", "- the text is lost"] in page.rows
    assert ["sea.txt", "- its characters are lost", "1.250"] in page.rows


@pytest.mark.parametrize(
    "content",
    [
        {"results": {"hellaswag": {"acc": 0.3, "acc_norm": 0.4}}},  # of another version
        {"results": {"hellaswag": 0.3}},
        {"results": {"hellaswag": {"acc,none": 0.3}}, "n-samples": [3]},
        {"results": {"hellaswag": {"acc,none": 0.3}}, "higher_is_better": {"hellaswag": [1]}},
        {"results": {"hellaswag": {"acc,none": 10**400}}, "n-samples": {"hellaswag": 3}},
        {"results": {"hellaswag": {"acc,none": [0.3]}}, "reasons": 3},
        {"rows": []},
    ],
)
def test_a_results_file_of_another_form_is_named_and_costs_its_own_row(runs, tmp_path, content):
    base, _ = runs
    whole = evaluation.make_evaluation([load_run(base)])
    write_json(base / "eval/foreign.json", content)
    run = load_run(base)
    assert [warning for warning in run.warnings if "foreign.json" in warning]
    assert evaluation.make_evaluation([run]) == whole


def test_a_served_page_follows_its_run(runs, capfd):
    base, _ = runs
    with live.make_server([base], 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()

        def read(path):
            return (
                urllib.request.urlopen(f"http://127.0.0.1:{running.server_port}/{path}")
                .read()
                .decode()
            )

        before, page = read("stamp"), read("")
        assert page.replace(live.FOLLOW_SCRIPT, "", 1) == render_page(
            load_runs([base])
        ) and page.endswith(live.FOLLOW_SCRIPT + "</body></html>\n")
        assert read("stamp") == before
        with open(base / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": 10_001, "loss": 1.0625}) + "\n")
        assert read("stamp") != before and "1.062" in read("")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            read("../config.json")
        for name in ("attacker.example", "127.0.0.1.attacker.example", ""):
            asked = urllib.request.Request(
                f"http://127.0.0.1:{running.server_port}/stamp", headers={"Host": name}
            )
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(asked)
        assert live.is_loopback("localhost:80") and live.is_loopback("[::1]:80")
        with pytest.raises(UserError, match=r"--serve \d+: cannot listen there"):
            live.make_server([base], running.server_port)
        base.rename(base.with_name("moved"))
        with pytest.raises(urllib.error.HTTPError, match="404") as gone:
            read("")
        assert (
            "base: no such directory" in gone.value.read().decode() and capfd.readouterr().err == ""
        ), "and nobody sees a traceback"
        running.shutdown()


def test_sources_have_one_order_on_the_whole_page(runs):
    labels = [label.strip() for label, _, _ in summary.summarize_runs(load_runs(runs))]
    assert [label for label in labels if label in ("prose", "code")] == ["prose", "code"] * 2


def test_parameters_counted_from_the_shape_are_the_models_own(tmp_path):
    from jaxpt.model import transformer
    from jaxpt.spec import ModelSpec

    for changes in (
        {},
        {"tie_embeddings": False, "qkv_bias": True},
        {"out_bias": True, "mlp_bias": True, "qk_norm": True},
    ):
        spec = {**SPEC, **changes}
        write_json(tmp_path / "spec.json", spec)
        assert load_run(tmp_path).n_params == transformer.count_params(ModelSpec.from_json(spec))


def test_the_script_prints_a_table_of_at_most_80_columns_and_the_path_of_the_page(runs, tmp_path):
    base, child = runs
    to = tmp_path / "out" / "page.html"
    done = run_script("--workdir", base, "--workdir", child, "--to", to)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    assert str(to) in done.stdout.splitlines()[-1]
    for expected in (
        "parameters",
        "591 k",
        "886 k",
        "held-out",
        "bits per byte",
        "2.113",
        "packed",
        "47.5 s",
    ):
        assert expected in done.stdout, expected


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--workdir", "no/such/run", "--to", "x.html"], "no such directory"),
        (["--workdir", "tests", "--to", "tests"], "is a directory"),
    ],
)
def test_bad_input_is_one_sentence(flags, expected):
    done = run_script(*flags)
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: ")
        and expected in done.stderr
        and done.stderr.count("\n") == 1
    )


def run_script(*flags):
    return subprocess.run(
        [sys.executable, "scripts/report.py", *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_output_is_a_file_and_not_a_directory(tmp_path):
    with pytest.raises(UserError, match="is a directory"):
        write_report([tmp_path], tmp_path)


def test_too_little_address_space_for_the_plots_is_a_sentence(tmp_path, monkeypatch):
    """V8 aborts the process, without a word of ours."""
    runs = write_runs(tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (16 * 10**9, 16 * 10**9))
    with pytest.raises(UserError, match=r"need 70 GB of address space.*allows 16.0 GB.*ulimit -v"):
        write_report(runs, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def write_sign(run, age):
    """A sign of life, given so many seconds ago."""
    at = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age)
    write_json(run / "spent.json", {"seconds": 71.0, "n_devices": 1, "at": at.isoformat()})
    return at


def test_the_head_tells_whether_a_run_goes_on(runs):
    base, _ = runs
    now = datetime.datetime.now(datetime.UTC)
    find = lambda: head.find_state(load_run(base), now)
    assert find().kind == "finished" and find().when.startswith("20")
    (base / "manifest.json").unlink()
    assert find() == ("waiting", "not finished", "")
    write_sign(base, 20)
    assert find() == ("running", "running", "")
    died = write_sign(base, 2 * head.ALIVE_SECONDS)
    assert find() == ("dead", "dead since", f"{died:%Y-%m-%d %H:%M} UTC")
    (base / "metrics.jsonl").unlink()
    (base / "spent.json").unlink()
    assert find() == ("waiting", "not trained yet", "")


def test_the_head_of_a_running_run_shows_progress_and_what_is_left(runs, tmp_path):
    _, child = runs
    (child / "manifest.json").unlink()
    write_sign(child, 3)
    settings = json.loads((child / "config.json").read_text())
    settings["train"]["steps"] = 720
    write_json(child / "config.json", settings)
    versions = {"python": "3.11.7", "jax": "0.10.2"}
    start = {"command": "jaxpt train <b>", "commit": "c6e0fc9c43852066a", "host": "box"}
    start |= {"n_devices": 8, "device_kind": "TPU v5p", "versions": versions, "n_processes": 2}
    (child / "starts.jsonl").write_text(json.dumps(start) + "\n")
    write_report([child], tmp_path / "page.html")
    text = Page(tmp_path / "page.html").text
    left = 540 * 118 / 180
    assert f"180 of 720 steps, {format_seconds(left)} left at this pace" in text
    for expected in (
        "running",
        "8 × TPU v5p on box and 1 more",
        "commit c6e0fc9c43",
        "jaxpt train <b>",
        "python 3.11.7, jax 0.10.2",
        "tokens/s",
        "goodput80%",
    ):
        assert expected in text, expected
    assert "width:25.0%" in (tmp_path / "page.html").read_text()


def test_state_figures_and_the_loss_curve_come_before_any_table(runs, tmp_path):
    for shown in (runs[:1], runs):
        write_report(shown, tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        places = [page.index(mark) for mark in ('class="state', "<dl", 'class="plot"', "<table")]
        assert places == sorted(places)


def test_several_runs_have_a_row_each_with_their_outcome(runs, tmp_path):
    write_report(runs, tmp_path / "page.html")
    rows = [row for row in Page(tmp_path / "page.html").rows if row[1:2] and "finished" in row[1]]
    assert [(row[0], row[2]) for row in rows] == [("base", "300"), ("child", "180")]
    assert all("→" in row[4] for row in rows)
    write_report(runs[:1], tmp_path / "page.html")
    assert not [row for row in Page(tmp_path / "page.html").rows if "finished" in "".join(row)]


def test_a_run_has_one_color_everywhere_and_no_source_has_it(runs):
    base, child = load_runs(runs)
    colors = figures.color_runs([base, child]).colors
    [growth_view] = growth_module.make_growth([base, child])
    assert growth_view.models == (["parent", "child"], colors, False)
    [alone] = growth_module.make_growth([child])
    assert alone.models.colors == ["var(--dim)", colors[0]]
    models = evaluation.make_evaluation([base, child]).models
    assert dict(zip(*models[:2], strict=True)) == {"base": colors[0], "child": colors[1]}
    sources = training.make_forgetting([base, child]).sources
    assert sources.is_of_domains and not set(sources.colors) & set(colors)
    style = (ROOT / "jaxpt/report/page.css").read_text()
    for scheme in style.split("@media screen")[:2]:
        values = re.findall(r"--([cd])\d:(#\w+)", scheme)
        assert len(values) == len({value for _, value in values}) == 16


def test_curves_can_be_drawn_over_what_the_steps_took(runs):
    losses = training.make_losses(load_runs(runs))
    axes = losses.axes["child"]
    assert list(axes) == ["step", "tokens", "FLOPs", "seconds"]
    assert axes["step"][0] == axes["tokens"][0] == 0 and axes["step"][-1] == 180
    at = axes["step"].index(90)
    assert axes["tokens"][at] == 90 * 16 * 512 and axes["seconds"][at] == pytest.approx(59)
    assert losses.training.spec["usermeta"] == {"over": "step", "smooth": True}


def test_tokens_are_counted_where_they_were_packed_and_estimates_elsewhere(runs, tmp_path):
    base, _ = runs
    funnel = json.loads((base / "corpus" / "funnel.json").read_text())
    for part in (*(step["kept"] for step in funnel["steps"]), funnel["train"]):
        part["code"]["tokens"] = 7_654_321
    write_json(base / "corpus" / "funnel.json", funnel)
    write_report([base], tmp_path / "page.html")
    rows = Page(tmp_path / "page.html").rows
    tokens = [row[-2] for row in rows if row[:1] in (["read"], ["kept for training"])]
    assert tokens == ["", f"{98_211 * 509:,}", "≈ 7.65 M", f"{24_007 * 509:,}"]


def test_the_runs_in_a_directory_are_found_or_it_is_said_what_to_give(runs, tmp_path):
    base, child = runs
    assert read.find_runs([tmp_path]) == read.find_runs([base, child]) == [base, child]
    copy = shutil.copytree(base, tmp_path / "more" / "seeds" / "base")
    assert read.find_runs([tmp_path / "more"]) == [copy]
    other = tmp_path / "other"
    (other / "notes").mkdir(parents=True)
    with pytest.raises(UserError, match=r"other: is no run directory.*jaxpt train"):
        read.find_runs([other])
    (other / "notes").rmdir()
    assert read.find_runs([other]) == [other], "it may just have begun"
