"""Photograph the report of a small run for the documentation, in light and in dark colours.

    python docs/images/make_report.py

Trains on digits, every tenth label wrong, ranks them, writes the page, and has a headless Chromium
(`apt-get install chromium`) draw it. Needs the `dev` extra.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from hydra_pipe import RunSpec, detect, report, run

FOLDER = Path(__file__).parent
SIZE = {"width": 1100, "height": 1250}
COLOURS = 96
"""Of the picture's palette, which keeps it small."""

SHOWS = """() => {
    document.querySelectorAll('#run, #scores .query, nav, header .sub').forEach(node => { node.style.display = 'none'; });
    document.querySelector('#ranked tbody tr:nth-child(3) details').open = true;
}"""
"""The run's address, which says where this was made, and what is less worth seeing, are left out."""


def page(folder: Path) -> Path:
    """Return the page of a small run, made in a folder, so that its paths say nothing of this machine."""
    os.chdir(folder)
    spec = RunSpec(recipe="digits", recipe_args={"label_noise": 0.1}, executor="serial", out="runs/digits")
    finished = run(spec)
    detect(finished)
    written = report(finished, to=folder / "digits.html", explain=[3])
    return Path(written.path)


def photograph(address: Path, chromium: str) -> None:
    """Write a picture a colour scheme."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            context: Any = browser.new_context(color_scheme=scheme, viewport=SIZE)
            opened = context.new_page()
            opened.goto(address.as_uri())
            opened.evaluate(SHOWS)
            picture = Image.open(io.BytesIO(opened.screenshot()))
            target = FOLDER / f"report-{scheme}.png"
            picture.convert("RGB").quantize(COLOURS).save(target, optimize=True)
            print(f"{target.name}: {target.stat().st_size:,} bytes")
        browser.close()


def main() -> None:
    """Make both pictures."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no chromium on this machine: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        photograph(page(Path(folder)), chromium)


if __name__ == "__main__":
    main()
