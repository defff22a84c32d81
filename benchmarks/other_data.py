"""Train models on data sets other than MNIST with several seeds, and record their accuracy.

    python benchmarks/other_data.py --json benchmarks/results/other_data.json
    python benchmarks/other_data.py --data digits --seeds 0 --runs /tmp/runs
    python benchmarks/other_data.py --fashion FOLDER          where Fashion-MNIST is not that of Debian's package

The settings of each data set were chosen on its validation images (`NOTES.md`). A run reads the test set once, at its
end. The folder `--runs` keeps the runs: a finished run is not trained again, and an interrupted one continues.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from checkout import ROOT, environment
from turns import conditions

FASHION = "/usr/share/datasets/fashion-mnist"  # Debian: apt install dataset-fashion-mnist


class Training(NamedTuple):
    """A row of the table: the data set, its `--data`, the settings in words, and the flags of `tinyvit train`."""

    data: str
    path: str
    settings: str
    flags: str


TRAININGS = {
    "fashion": Training(
        "Fashion-MNIST",
        FASHION,
        "mirrored, shifted by 2 pixels, turned by 5 degrees",
        "--epochs 60 --lr 0.001 --weight-decay 0.2 --label-smoothing 0.1 --rotation 5 --shear 0 --shift 2 --flip 0.5",
    ),
    "digits": Training("scikit-learn's digits, 8 x 8", "sklearn:digits", "as for MNIST", "--epochs 100"),
}


def run(training, path, seed, folder):
    """Train once, or continue in the folder, and return the metrics."""
    metrics = folder / "metrics.json"
    if not metrics.exists():
        command = [sys.executable, "-m", "tinyvit", "train"]
        if (folder / "checkpoint.safetensors").exists():
            command += ["--resume", str(folder)]
        else:
            command += ["--data", path, *training.flags.split(), "--seed", str(seed), "--out", str(folder)]
        subprocess.run(command, check=True, cwd=ROOT, env=environment())
    return json.loads(metrics.read_text(encoding="utf-8"))


def row(training, runs):
    """Return the row of the record for the metrics of all seeds."""
    return {
        "data": training.data,
        "settings": training.settings,
        "parameters": runs[0]["parameters"],
        "epochs": runs[0]["training"]["epochs"],
        "seeds": [metrics["seed"] for metrics in runs],
        "test_percent": [round(100 * metrics["test_accuracy"], 4) for metrics in runs],
        "validation_percent": [round(100 * metrics["history"][-1]["validation_accuracy"], 4) for metrics in runs],
        "minutes": sum(metrics["seconds"] for metrics in runs) / len(runs) / 60,
        "command": f"tinyvit train --data {shlex.quote(training.path)} {training.flags}",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", choices=TRAININGS, default=list(TRAININGS), help="data sets (all)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="seeds (0 1 2)")
    add("--fashion", default=FASHION, metavar="FOLDER", help=f"folder with Fashion-MNIST ({FASHION})")
    add("--runs", type=Path, default=Path("runs/other-data"), metavar="FOLDER", help="runs (runs/other-data)")
    add("--json", type=Path, metavar="FILE", help="write the record to FILE")
    options = parser.parse_args()
    rows = []
    for name in options.data:
        training, path = TRAININGS[name], options.fashion if name == "fashion" else TRAININGS[name].path
        found = [run(training, path, seed, options.runs.absolute() / f"{name}-{seed}") for seed in options.seeds]
        rows.append(row(training, found))
        print("{data}: test {test_percent}, validation {validation_percent}".format_map(rows[-1]), flush=True)
    if options.json:
        record = {"conditions": conditions("numba"), "rows": rows}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
