"""Draw docs/img/report-*.png: run `python benchmarks/report_images.py RUN ... [--to docs/img]`.

Needs chromium, and pypdfium2 for the printed page. The first run alone is shown on a desktop, a
phone and in the dark; all runs together on a desktop, and printed.
"""

import argparse
import pathlib
import shutil
import subprocess
import tempfile

from jaxpt.report.page import write_report

FLAGS = ["--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars", "--disable-gpu"]
FLAGS += ["--virtual-time-budget=6000"]
DARK = "--blink-settings=preferredColorScheme=0"


def call_chromium(page: pathlib.Path, home: pathlib.Path, *flags: str) -> None:
    """Run chromium on a page, with a profile of its own."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "no chromium on PATH"
    command = [program, *FLAGS, f"--user-data-dir={home}", *flags, page.as_uri()]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path("docs/img"))
    arguments = parser.parse_args()
    to = arguments.to.resolve()
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        home = pathlib.Path(place)
        one, several, pdf = home / "one.html", home / "several.html", home / "several.pdf"
        write_report(arguments.runs[:1], one)
        write_report(arguments.runs, several)
        shots = [(several, "desktop", "1280,800"), (one, "phone", "390,844")]
        for page, name, size in shots:
            flags = [f"--window-size={size}", f"--screenshot={to / f'report-{name}.png'}"]
            call_chromium(page, home / "profile", *flags)
        flags = [DARK, "--window-size=1280,800", f"--screenshot={to / 'report-dark.png'}"]
        call_chromium(one, home / "profile", *flags)
        call_chromium(several, home / "profile", "--no-pdf-header-footer", f"--print-to-pdf={pdf}")
        print_pages(pdf, to / "report-print.png")


if __name__ == "__main__":
    main()
