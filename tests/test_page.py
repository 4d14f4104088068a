"""The page in a browser: it draws without errors, answers pointer and keys, is accessible."""

import html
import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT
from made_runs import write_runs

from jaxpt.report import figures
from jaxpt.report.page import write_report


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a base and its child, as text."""
    root = tmp_path_factory.mktemp("page")
    write_report(write_runs(root), root / "page.html")
    return (root / "page.html").read_text()


@pytest.fixture(scope="module")
def see(tmp_path_factory):
    """Return a function that runs a script in a page and returns (DOM, console lines)."""
    program = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if not program:
        pytest.skip("no chromium on PATH")
    home = tmp_path_factory.mktemp("browser")
    quiet = ("gpu", "quic", "background-networking", "component-update", "sync")
    flags = [
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        *(f"--disable-{part}" for part in quiet),
        f"--user-data-dir={home / 'profile'}",
    ]

    def show(page, script, width=800):
        head, _, _ = page.rpartition("</body>")
        (home / "page.html").write_text(f"{head}<script>{script}</script></body></html>")
        command = [
            program,
            *flags,
            "--enable-logging=stderr",
            "--virtual-time-budget=6000",
            f"--window-size={width},900",
            "--dump-dom",
            f"file://{home / 'page.html'}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return show


def kept(dom, name):
    """What a script left in the page for us."""
    return json.loads(html.unescape(re.findall(rf'<template id="{name}" title="([^"]*)"', dom)[-1]))


KEEP = """const keep = (id, found) => document.body.append(
  Object.assign(document.createElement("template"), {id, title: JSON.stringify(found)}));"""


def test_the_page_draws_and_answers_pointer_and_keys_without_console_messages(page, see):
    dom, console = see(
        page,
        KEEP
        + """setTimeout(() => {
      keep("drawn", document.querySelectorAll(".plot .marks").length);
      const plot = document.querySelector("#loss .plot");
      const read = () => document.querySelector("#vg-tooltip-element").innerText;
      for (const key of ["ArrowRight", "ArrowRight", "End"]) {
        plot.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
        keep(key, read());
      }
      document.querySelectorAll("section:not(#loss), header, nav").forEach(each => each.remove());
      const box = document.querySelector("#loss svg").getBoundingClientRect();
      for (const x of [60, 80]) {
        const at = {clientX: box.left + x, clientY: box.top + 100, bubbles: true,
          view: window, pointerType: "mouse"};
        const mark = document.elementFromPoint(at.clientX, at.clientY);
        for (const name of ["pointerover", "pointermove"])
          mark.dispatchEvent(new PointerEvent(name, at));
        mark.dispatchEvent(new MouseEvent("mousemove", at));
      }
      keep("pointed", read()) }, 1500)""",
    )
    assert console == []
    assert kept(dom, "drawn") == page.count(figures.PLOT_ATTRIBUTE) > 5
    assert "<title>base and child</title>" in dom, "the script in a sample did not run"
    walked, end, pointed = (kept(dom, name) for name in ("ArrowRight", "End", "pointed"))
    assert re.match(r"base\s+step\s+4\s+loss\s+\d\.\d", walked), walked
    assert re.match(r"child\s+step\s+180\s+loss\s+\d\.\d", end), end
    assert re.match(r"(base|child)\s+step\s+\d+\s+loss\s+\d\.\d", pointed), pointed


CONTRAST = """const luminance = rgb => rgb.map(part => part / 255)
    .map(part => part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4)
    .reduce((sum, part, i) => sum + part * [.2126, .7152, .0722][i], 0);
  const brush = Object.assign(document.createElement("canvas"), {width: 1, height: 1})
    .getContext("2d", {willReadFrequently: true});
  const see = (...layers) => {  // what is seen of colors painted over each other
    for (const layer of layers) { brush.fillStyle = layer; brush.fillRect(0, 0, 1, 1); }
    return [...brush.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  };
  const faint = () => {
    const found = [];
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      const {parentElement: at, textContent: text} = texts.currentNode;
      if (!text.trim() || !at.checkVisibility() || at.closest("script, style, #vg-tooltip-element")
        || at.closest(":has(:disabled)")) continue;
      const grounds = [];
      for (let each = at; each; each = each.parentElement)
        grounds.unshift(getComputedStyle(each).backgroundColor);
      const style = getComputedStyle(at), ground = see("white", ...grounds);
      const ink = see("white", ...grounds, at.closest("svg") ? style.fill : style.color);
      const [high, low] = [luminance(ink), luminance(ground)].sort((a, b) => b - a);
      const ratio = (high + .05) / (low + .05);
      if (ratio < 4.5) found.push(`${text.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
      count += 1;
    }
    return found;
  };
  let count = 0;
"""


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overflows_and_every_text_stands_out_in_light_and_dark(page, see, width):
    """A contrast of 4.5 at least (WCAG AA). Tables and the list of sections scroll."""
    look = """setTimeout(() => {
      document.querySelectorAll("details").forEach(each => each.open = true);
      const root = document.documentElement;
      const outside = [...document.querySelectorAll("main *, header *, nav *")]
        .filter(each => each.getBoundingClientRect().right > root.clientWidth + 1)
        .filter(each => !each.closest(".wide, nav, .context, .cells, svg"));
      keep("overflow", [root.scrollWidth - root.clientWidth, outside.length]);
      keep("light", faint());
      const style = document.querySelector("style");
      style.textContent = style.textContent.replace("and (prefers-color-scheme: dark)", "");
      keep("dark", faint());
      keep("count", count);
    }, 1500)"""
    dom, _ = see(page, KEEP + CONTRAST + look, width)
    assert kept(dom, "overflow") == [0, 0]
    assert kept(dom, "count") > 500, "it looked"
    assert kept(dom, "light") == kept(dom, "dark") == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["", "plan/", "course/lesson1_why_pretraining/"])
def test_the_site_overflows_nowhere_and_its_texts_stand_out(see, name, width):
    site = ROOT / "site" / name / "index.html"
    if not site.is_file():
        pytest.skip("no site: bash scripts/docs.sh builds it")
    look = """setTimeout(() => {
      const root = document.documentElement;
      const outside = [...document.querySelectorAll("main *, header *")]
        .filter(each => each.checkVisibility())
        .filter(each => each.getBoundingClientRect().right > root.clientWidth + 1)
        .filter(each => !each.closest(".md-typeset__scrollwrap, pre, .md-sidebar, .md-search"));
      keep("overflow", [root.scrollWidth - root.clientWidth, outside.length]);
      for (const scheme of ["default", "slate"]) {
        document.body.setAttribute("data-md-color-scheme", scheme);
        keep(scheme, faint());
      }
      keep("count", count);
    }, 1500)"""
    base = f'<base href="{site.as_uri()}"><style>* {{transition: none !important}}</style>'
    page = site.read_text(encoding="utf-8").replace("<head>", f"<head>{base}")
    dom, _ = see(page, KEEP + CONTRAST + look, width)
    assert kept(dom, "overflow") == [0, 0]
    assert kept(dom, "count") > 500, "it looked"
    assert kept(dom, "default") == kept(dom, "slate") == []


def test_curves_are_redrawn_over_tokens_smoothed_and_on_logarithmic_axes(page, see):
    look = """const wait = () => new Promise(done => setTimeout(done, 700));
      const form = document.querySelector(".controls");
      const svg = () => document.querySelector("#loss .plot svg");
      const title = () => [...svg().querySelectorAll(".role-axis-title")].map(t => t.textContent);
      const ticks = () => [...svg().querySelectorAll(".role-axis-label text")]
        .map(label => label.textContent);
      const change = () => { form.dispatchEvent(new Event("input")); return wait() };
      setTimeout(async () => {
        keep("steps", title());
        const bent = svg().querySelector(".mark-line path").getAttribute("d");
        form.axis.value = "tokens"; await change(); keep("tokens", [title(), ticks()]);
        form.axis.value = "seconds"; form.log_x.checked = form.log_y.checked = true;
        await change(); keep("time", [title(), ticks()]);
        form.reset(); form.smooth.value = .9; await change();
        const lines = [...svg().querySelectorAll(".mark-line path")].map(p => p.getAttribute("d"));
        keep("smooth", [lines.length, lines[0] === bent, lines.at(-1) === bent]);
        keep("range", [logTicks([3.41, 3.59]), logTicks([0.02, 700]), logTicks([2, 11])]);
      }, 1500)"""
    dom, console = see(page, KEEP + look)
    assert console == []
    assert "step" in kept(dom, "steps")
    titles, ticks = kept(dom, "tokens")
    assert "million tokens" in titles and "2.0" in ticks
    titles, ticks = kept(dom, "time")
    assert "minutes" in titles and {"0.1", "4", "5"} <= set(ticks), ticks
    assert kept(dom, "smooth") == [4, True, False], "the curves themselves stay, thin"
    narrow, wide, middle = kept(dom, "range")
    assert narrow == [3.45, 3.5, 3.55] and wide == [0.1, 1, 10, 100]
    assert middle == [2, 5, 10] or len(middle) >= 4


def test_axe_finds_no_serious_issue_in_light_or_dark(page, see):
    axe = ROOT / "node_modules" / "axe-core" / "axe.min.js"
    if not axe.is_file():
        pytest.skip("no axe-core: npm install --no-save axe-core")
    look = """setTimeout(async () => {
      document.querySelectorAll("details").forEach(each => each.open = true);
      for (const scheme of ["light", "dark"]) {
        if (scheme === "dark") {
          const style = document.querySelector("style");
          const query = "and (prefers-color-scheme: dark)";
          style.textContent = style.textContent.replace(query, "");
        }
        const found = await axe.run(document);
        const issues = found.violations.map(
          each => `${each.impact}: ${each.help}: ${each.nodes[0].html}`);
        const ground = getComputedStyle(document.body).backgroundColor;
        keep(scheme, {passes: found.passes.length, ground, issues});
      } }, 1500)"""
    dom, _ = see(page, axe.read_text().replace("</script", "<\\/script") + ";" + KEEP + look)
    found = [kept(dom, scheme) for scheme in ("light", "dark")]
    assert found[0]["ground"] != found[1]["ground"]
    for each in found:
        assert each["passes"] > 20, "it looked"
        assert [
            issue for issue in each["issues"] if issue.startswith(("serious", "critical"))
        ] == []
