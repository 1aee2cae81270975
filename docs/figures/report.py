"""Take the pictures of docs/how-to/read-the-report.md: the report's beginning, wide and on a phone, light and dark.

    python docs/figures/report.py runs/digits/eval/report.html docs/figures

Needs the extra browser, and chromium.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

SIZES = {1440: 1500, 390: 2000}
COLOURS = 96  # of a palette; the page has few


def main() -> None:
    """Take the four pictures."""
    report, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for (width, height), colours in ((size, colours) for size in SIZES.items() for colours in ("light", "dark")):
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=colours)
            page.goto(report.as_uri())
            picture = Image.open(io.BytesIO(page.screenshot()))
            file = folder / f"report-{width}-{colours}.png"
            picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
            print(f"written: {file}, {file.stat().st_size / 1e3:.0f} kB")
        browser.close()


if __name__ == "__main__":
    main()
