"""Take the pictures of docs/how-to/serve.md: the page of a server that adapts, wide and on a phone, light and dark.

    python docs/figures/page.py runs/digits/caches/bundle docs/figures

The server gets noisy digits, and after a while inverted ones, until an alarm is raised. Needs the extras serve,
train and browser, and chromium.
"""

import contextlib
import io
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from sklearn.datasets import load_digits

WIDTHS, HEIGHT = (1440, 390), 900
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
COLOURS = 96  # of a palette; the page has few
QUIET, AFTER, PATIENCE = 80.0, 20.0, 600.0  # seconds
PAUSE = 0.06  # between two requests
SHOWN = 8  # the digit in the box
DATA: Any = load_digits()  # a Bunch, whatever its type says


class Traffic(threading.Thread):
    """Sends digits, one to three at a time, until it is stopped."""

    def __init__(self, address: str) -> None:
        """Begin with digits as the bundle knows them, with some noise."""
        super().__init__(daemon=True)
        self.address, self.inverted, self.stopped = address, False, False

    def run(self) -> None:
        """Send."""
        digits, rng = DATA.images, np.random.default_rng(0)
        while not self.stopped:
            drawn = digits[rng.integers(len(digits), size=rng.integers(1, 4))]
            drawn = np.clip(np.rint(drawn + rng.normal(0, 0.5, drawn.shape)), 0, 16).astype(np.uint8)
            images = (16 - drawn if self.inverted else drawn)[..., None]
            tensor = {"name": "images", "datatype": "UINT8", "shape": images.shape, "data": images.ravel().tolist()}
            with contextlib.suppress(urllib.error.HTTPError):  # refused: the next one follows
                ask(f"{self.address}/v2/models/gati/infer", json.dumps({"inputs": [tensor]}).encode())
            time.sleep(PAUSE)


def ask(url: str, body: bytes | None = None) -> str:
    """Return an answer of the server."""
    with urllib.request.urlopen(url, body, timeout=PATIENCE) as response:  # noqa: S310 (our own server)
        return response.read().decode()


def until(address: str, path: str, text: str = "") -> None:
    """Wait until the server answers with a text."""
    patience = time.monotonic() + PATIENCE
    while time.monotonic() < patience:
        with contextlib.suppress(urllib.error.HTTPError):
            if text in ask(address + path):
                return
        time.sleep(1)
    raise TimeoutError(f"{path} has not said {text!r}")


@contextlib.contextmanager
def serving(bundle: Path) -> Generator[str]:
    """Serve a copy of a bundle, beside which nothing has been adapted; yields the address."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(bundle, Path(folder) / "bundle")
        ports = [word for name in ("http", "grpc", "admin") for word in (f"--{name}-port", "0")]
        command = [sys.executable, "-m", "serve", "--bundle", str(copy), "--adapt", "--json", *ports]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:  # noqa: S603
            assert server.stdout is not None  # noqa: S101 (narrows the type)
            address = json.loads(server.stdout.readline())["http"]
            try:
                until(address, "/v2/health/ready")
                yield address
            finally:
                server.terminate()


def drop(page: Page) -> None:
    """Put a picture of a digit into the box."""
    digit = Image.fromarray((DATA.images[SHOWN] * 255 / 16).astype(np.uint8)).resize((256, 256))
    digit.save(file := io.BytesIO(), "png")
    picture = {"name": "digit.png", "mimeType": "image/png", "buffer": file.getvalue()}
    page.set_input_files("#file", files=[picture])  # pyright: ignore[reportArgumentType] (playwright's own FilePayload)
    page.locator("#answer .verdict").wait_for()


def save(page: Page, file: Path) -> None:
    """Take a picture of a whole page."""
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"written: {file}, {file.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    """Take the four pictures."""
    bundle, folder = Path(sys.argv[1]), Path(sys.argv[2])
    with serving(bundle) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        pages: dict[str, Page] = {}
        for width, colours in itertools.product(WIDTHS, SCHEMES):
            page = browser.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme=colours)
            page.set_default_timeout(PATIENCE * 1000)
            page.goto(address)
            page.locator("#exits tbody tr").first.wait_for()
            pages[f"page-{width}-{colours}.png"] = page
        traffic = Traffic(address)
        traffic.start()
        time.sleep(QUIET)
        for page in pages.values():
            drop(page)
        traffic.inverted = True
        until(address, "/metrics", 'gati_adaptation_events_total{kind="alarm",model="gati"} 1.0')
        time.sleep(AFTER)
        for name, page in pages.items():
            save(page, folder / name)
        traffic.stopped = True
        browser.close()


if __name__ == "__main__":
    main()
