"""Takes the rows of a `gpu.csv` that `bench/gpu_check.py` wrote into `bench/data/gpu.csv`.

    python bench/gpu_rows.py results

Rows of a rehearsal, with errors or with wrong results are left out. A row that measures the same on the same device
replaces the one before.
"""

import csv
import json
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parent / "data" / "gpu.csv"
SAME = ("device", "kind", "name", "network", "batch", "shape", "dtype", "backend")  # what is measured, and where


def merged(before: list[dict[str, str]], rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Earlier rows and new ones, of those that measure the same the last."""
    saved = [row for row in rows if not row["error"] and row["right"] != "False"]
    return list({tuple(row[column] for column in SAME): row for row in [*before, *saved]}.values())


def read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def take(results: Path, data: Path = DATA) -> int:
    """Merge the rows of a folder into a table; how many it has.

    Raises:
        SystemExit: the folder has none, or is of a rehearsal.
    """
    if not (results / "gpu.csv").is_file():
        raise SystemExit(f"{results} has no gpu.csv, which bench/gpu_check.py writes")
    if json.loads((results / "gpu.json").read_text())["rehearsal"]:
        raise SystemExit(f"{results} is of a rehearsal on a CPU, whose times say nothing of a GPU")
    rows = read(results / "gpu.csv")
    table = merged(read(data), rows)
    if table:
        with data.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0] if rows else table[0]), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
    return len(table)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python bench/gpu_rows.py RESULTS")
    print(f"{DATA} has {take(Path(sys.argv[1]))} rows")
