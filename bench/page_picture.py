"""Takes the picture of a report's page that README shows: python bench/page_picture.py [RECORDS] [--out PNG].

Needs playwright and a chromium on the path. The page is made anew from the committed records.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from pathlib import Path

from ldmperf.profiling import cli

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "bench/results/cpu-intel-xeon-2-cores/2026-11-26-c947fbb.jsonl"
PICTURE = ROOT / "docs/page-light.png"
# In CSS pixels, and pixels of the picture for each.
WIDTH, HEIGHT, SCALE = 1200, 1730, 0.85


def picture(page: Path, scheme: str, width: int, height: int, scale: float = SCALE) -> bytes:
    """The top of a page as PNG, all its charts drawn. scheme: "light" or "dark"; sizes in CSS pixels."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        context = browser.new_context(
            offline=True,
            color_scheme=scheme,
            viewport={"width": width, "height": height},
            device_scale_factor=scale,
        )
        tab = context.new_page()
        tab.goto(page.resolve().as_uri())
        tab.wait_for_selector("html[data-drawn]", state="attached")
        image = tab.screenshot()
        browser.close()
    return bytes(image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="?", type=Path, default=RECORDS)
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--height", type=int, default=HEIGHT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        with contextlib.suppress(SystemExit):
            cli.main(["report", str(options.records), "-o", str(page)])
        options.out.write_bytes(picture(page, options.scheme, options.width, options.height))
    print(f"{options.out}: {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
