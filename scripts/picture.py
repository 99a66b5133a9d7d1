"""A picture of a run's report for the README: python scripts/picture.py runs/quickstart/report.html docs/img/report.png

The top of the page as headless Chromium draws it, without a network. Needs chromium on the PATH.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import headless


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1000, help="CSS pixels; below 500 a phone")
    parser.add_argument("--height", type=int, default=1150)
    parser.add_argument("--dark", action="store_true")
    asked = parser.parse_args()
    with headless.opened(asked.report, width=asked.width, height=asked.height, dark=asked.dark) as page:
        asked.picture.parent.mkdir(parents=True, exist_ok=True)
        asked.picture.write_bytes(page.screenshot(full=False))
    print(f"{asked.picture}: {asked.picture.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
