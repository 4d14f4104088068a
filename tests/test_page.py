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

    def show(page, script):
        head, _, _ = page.rpartition("</body>")
        (home / "page.html").write_text(f"{head}<script>{script}</script></body></html>")
        command = [
            program,
            *flags,
            "--enable-logging=stderr",
            "--virtual-time-budget=6000",
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
