"""The picture of docs/report.md: a report of three methods on the photographs of the gallery, in Chromium.

`make report-picture` draws it. The network is that of the gallery; Chromium must be on PATH.
"""

import csv
import shutil
import subprocess
import tempfile
from pathlib import Path

from gallery import NETWORK, PHOTOGRAPHS, load, photograph
from PIL import Image

from pyfast_xai import datasets, report

METHODS = ("eigen-cam", "fixations", "guided-backprop")
LABELS = {"a tabby": "tabby", "an espresso": "espresso", "a palace": "palace", "a space shuttle": "space shuttle"}
WINDOW = (880, 720)  # in pixels
OUT = Path(__file__).parents[1] / "docs" / "report.png"


def screenshot(page: Path, picture: Path) -> None:
    """Writes what Chromium shows of a page."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        raise SystemExit("no Chromium on PATH")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000")
    size = ",".join(map(str, WINDOW))
    command = [browser, *flags, f"--window-size={size}", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    loaded = load(NETWORK)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with (place / "list.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label"])
            for name in PHOTOGRAPHS:
                photograph(name).save(place / f"{LABELS[name]}.png")
                writer.writerow([f"{LABELS[name]}.png", loaded.labels.index(LABELS[name])])
        for method in METHODS:
            datasets.explain(place / "list.csv", loaded, method=method, out=place / method)
        report.write([place / method for method in METHODS], place / "report.html")
        screenshot(place / "report.html", place / "report.png")
        with Image.open(place / "report.png") as picture:
            picture.convert("RGB").save(OUT, optimize=True)


if __name__ == "__main__":
    main()
