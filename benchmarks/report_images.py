"""Draw docs/img/report-*.png and site-*.png, of the report page and of the documentation site.

    python benchmarks/report_images.py RUN ... [--site site] [--to docs/img]

Needs chromium, and pypdfium2 for the printed pages. The first run alone is shown on a phone and in
the dark; all runs together on a desktop, and printed. The site is one that `bash scripts/docs.sh`
built: its first page.
"""

import argparse
import functools
import http.server
import pathlib
import shutil
import subprocess
import tempfile
import threading

from jaxpt.report.page import write_report

FLAGS = ["--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars", "--disable-gpu"]
FLAGS += ["--virtual-time-budget=6000"]
DARK = "--blink-settings=preferredColorScheme=0"
SHOTS = {
    "desktop": ["--window-size=1280,800"],
    "phone": ["--window-size=390,844"],
    "dark": [DARK, "--window-size=1280,800"],
}


def call_chromium(page: str, home: pathlib.Path, *flags: str) -> None:
    """Run chromium on an address, with a new profile: a site keeps its reader's scheme."""
    profile = tempfile.mkdtemp(dir=home)
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "no chromium on PATH"
    command = [program, *FLAGS, f"--user-data-dir={profile}", *flags, page]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def print_pages(pdf: pathlib.Path, to: pathlib.Path, n_pages: int = 3) -> None:
    """Write the first pages of a PDF side by side as one picture."""
    import pypdfium2
    from PIL import Image

    document = pypdfium2.PdfDocument(pdf)
    pages = [document[i].render(scale=0.8).to_pil() for i in range(min(n_pages, len(document)))]
    gap = 12
    width, height = pages[0].size
    sheet = Image.new("RGB", (len(pages) * (width + gap) - gap, height), "#ccc")
    for i, picture in enumerate(pages):
        sheet.paste(picture, (i * (width + gap), 0))
    sheet.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(to, optimize=True)


def draw(name: str, pages: dict[str, str], home: pathlib.Path, to: pathlib.Path) -> None:
    """Write NAME-desktop.png, -phone, -dark and -print from the addresses of each."""
    for kind, flags in SHOTS.items():
        call_chromium(pages[kind], home, *flags, f"--screenshot={to / f'{name}-{kind}.png'}")
    pdf = home / "page.pdf"
    call_chromium(pages["print"], home, "--no-pdf-header-footer", f"--print-to-pdf={pdf}")
    print_pages(pdf, to / f"{name}-print.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--site", type=pathlib.Path, help="a built site")
    parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path("docs/img"))
    arguments = parser.parse_args()
    to = arguments.to.resolve()
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        home = pathlib.Path(place)
        if arguments.runs:
            one, several = home / "one.html", home / "several.html"
            write_report(arguments.runs[:1], one)
            write_report(arguments.runs, several)
            alone, all_runs = one.as_uri(), several.as_uri()
            pages = {"desktop": all_runs, "phone": alone, "dark": alone, "print": all_runs}
            draw("report", pages, home, to)
        if arguments.site:
            handler = functools.partial(
                http.server.SimpleHTTPRequestHandler, directory=arguments.site
            )
            with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
                threading.Thread(target=server.serve_forever, daemon=True).start()
                address = f"http://127.0.0.1:{server.server_port}/"
                draw("site", dict.fromkeys([*SHOTS, "print"], address), home, to)
                server.shutdown()


if __name__ == "__main__":
    main()
