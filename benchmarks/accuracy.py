"""Train the recipes with several seeds, and report the mean and the standard deviation of the test accuracy.

    python benchmarks/accuracy.py --recipe tuned note --seeds 0 1 2
    python benchmarks/accuracy.py --recipe note --name note-flip-half --flip 0.5      a variant with a name
    python benchmarks/accuracy.py --collect                                           summarise the recorded runs

Every run is `python examples/train_mnist.py --recipe R --seed N --workers W` with any other flags. Its files
metrics.json, history.csv and classification_report.txt are copied to benchmarks/results/accuracy/NAME-seedN/. The
summary of all recorded runs is benchmarks/results/accuracy.json. A run reads the test set once, at its end.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from checkout import ROOT, environment

RESULTS = ROOT / "benchmarks" / "results"
RECORDS = RESULTS / "accuracy"
KEPT = ("metrics.json", "history.csv", "classification_report.txt")


def record(recipe, seed, workers, name, flags):
    """Train once and copy the results to the folder of `name` and `seed`."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        command = [sys.executable, str(ROOT / "examples" / "train_mnist.py")]
        command += ["--recipe", recipe, "--seed", str(seed), "--workers", str(workers), "--out", str(out), *flags]
        subprocess.run(command, check=True, env=environment())
        folder = RECORDS / f"{name}-seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for file in KEPT:
            shutil.copyfile(out / file, folder / file)


def summary():
    """Return the summary of the recorded runs, a dict from name to figures."""
    runs = {}
    for path in sorted(RECORDS.glob("*/metrics.json")):
        metrics = json.loads(path.read_text())
        runs.setdefault(path.parent.name.rsplit("-seed", 1)[0], []).append(metrics)
    result = {}
    for name, metrics in runs.items():
        tested = [m["test_accuracy"] for m in metrics]
        validated = [m["history"][-1]["validation_accuracy"] for m in metrics]
        result[name] = {
            "seeds": [m["seed"] for m in metrics],
            "test_accuracy": tested,
            "test_accuracy_mean": statistics.mean(tested),
            "test_accuracy_deviation": statistics.stdev(tested) if len(tested) > 1 else None,
            "validation_accuracy_mean": statistics.mean(validated),
            "epochs": metrics[0]["training"]["epochs"],
            "workers": metrics[0]["workers"],
            "seconds": [round(m["seconds"], 1) for m in metrics],
            "versions": metrics[0]["versions"],
        }
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", nargs="+", default=["tuned", "note"], metavar="R", help="recipes (tuned note)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="seeds (0 1 2)")
    add("--workers", type=int, default=2, metavar="W", help="worker processes of a run (2)")
    add("--name", help="name of the recorded runs (the recipe's name)")
    add("--collect", action="store_true", help="train nothing and summarise the recorded runs")
    options, flags = parser.parse_known_args()
    if options.name is None and flags:
        parser.error(f"a variant with the flags {' '.join(flags)} needs a name; give --name NAME")
    if not options.collect:
        for recipe in options.recipe:
            for seed in options.seeds:
                record(recipe, seed, options.workers, options.name or recipe, flags)
    result = summary()
    (RESULTS / "accuracy.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, figures in result.items():
        deviation = figures["test_accuracy_deviation"]
        spread = f" +- {100 * deviation:.2f}" if deviation is not None else ""
        mean = 100 * figures["test_accuracy_mean"]
        print(f"{name}: {mean:.2f}{spread} % on the test set, seeds {figures['seeds']}")


if __name__ == "__main__":
    main()
