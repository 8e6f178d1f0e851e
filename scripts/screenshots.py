"""Takes the screenshots of docs/images: the report that `make demo` writes, in a headless Chromium.

    python scripts/screenshots.py [REPORT.html] [--out docs/images]

A browser is looked for as chromium, chromium-browser and google-chrome; without one the exit status is 2.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MAX_BYTES = 200_000
WIDTH = 980
DARK = "--blink-settings=preferredColorScheme=0"

# File: (the one section to show, empty for the top of the page; height in pixels; options of the browser).
SHOTS = {
    "report.png": ("", 1050, []),
    "report-map.png": ("map", 690, [DARK]),
    "report-labels.png": ("labels", 620, []),
    "report-dynamics.png": ("dynamics", 640, []),
    "report-drift.png": ("drift", 480, [DARK]),
}


def browser() -> str:
    """Path of the browser."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        print(f"no browser was found (looked for {', '.join(BROWSERS)}): install chromium", file=sys.stderr)
        sys.exit(2)
    return found


def take(command: str, page: Path, target: Path, section: str, height: int, options: list[str]) -> None:
    """Take one screenshot; fails if it is missing or too large to be committed."""
    target.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as work:
        # A browser without a window does not scroll: what stands above is left out.
        alone = f"main > :not(#{section}) {{ display: none; }} main {{ padding-top: 1rem; }}\n</style>"
        text = page.read_text(encoding="utf-8")
        shown = Path(work, "report.html")
        shown.write_text(text.replace("</style>", alone, 1) if section else text, encoding="utf-8")
        words = [
            command, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options,
            f"--user-data-dir={work}/profile", f"--window-size={WIDTH},{height}",
            "--virtual-time-budget=3000",
            f"--screenshot={target}", shown.as_uri(),
        ]  # fmt: skip
        subprocess.run(words, check=True, capture_output=True, timeout=120)
    size = target.stat().st_size
    print(f"{target}: {size / 1000:.0f} kB")
    if size > MAX_BYTES:
        sys.exit(f"{target} has {size} bytes, expected at most {MAX_BYTES}: make it lower")


def main() -> None:
    """Take all of them."""
    parser = argparse.ArgumentParser(description="Screenshots of the demo's report.")
    default = ROOT / "mld_data" / "exports" / "digits_cnn_v1_report.html"
    parser.add_argument(
        "page", type=Path, nargs="?", default=default, help="the report (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="default: %(default)s")
    arguments = parser.parse_args()
    if not arguments.page.is_file():
        parser.error(f"there is no file {arguments.page}: `make demo` writes one")
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = browser()
    for name, (section, height, options) in SHOTS.items():
        take(command, arguments.page, arguments.out / name, section, height, options)


if __name__ == "__main__":
    main()
