r"""Draw the README's picture: the page that klfast report makes of bench/results/hymba_report, in a headless Chromium.

    .venv/bin/python docs/picture.py

The results are those of these commands:

    klfast sweep hymba --spec int4-g64-sym --spec int6-g64-sym --spec int8-g64-sym --windows 8 --length 256 \
        --out sensitivities.json
    klfast plan sensitivities.json --mean-bits 4.75 --out plan.json
    klfast quantize hymba plan.json --out hymba-mixed
    klfast compare hymba hymba-mixed --length 1024 --windows 24 --out card.json
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS, PICTURE = ROOT / "bench" / "results" / "hymba_report", ROOT / "docs" / "report.png"
_WIDTH, _HEIGHT = 1000, 1180
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    """Make the page and draw its upper part."""
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        sys.exit(f"the picture needs a browser: {' or '.join(_BROWSERS)}")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        subprocess.run([sys.executable, "-m", "klfast", "report", str(RESULTS), "--html", str(page)], check=True)
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
        ]
        taken = [f"--window-size={_WIDTH},{_HEIGHT}", f"--screenshot={PICTURE}"]
        subprocess.run([browser, *flags, *taken, page.as_uri()], check=True, stderr=subprocess.DEVNULL)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
