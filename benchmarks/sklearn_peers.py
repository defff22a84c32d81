"""Compare TinyViTClassifier with scikit-learn's MLPClassifier: accuracy and seconds, on digits and on MNIST.

    python benchmarks/sklearn_peers.py                                    both data sets, about a quarter of an hour
    python benchmarks/sklearn_peers.py --data digits --seeds 0 1 2 --json FILE

Both classifiers have their default settings, except that TinyViTClassifier trains for the ten epochs of its recipe on
MNIST and has one worker per core. They train one after the other on the same images and may use all cores. A quarter
of the digits and the published test images of MNIST are for testing. MLPClassifier needs small numbers, so a scaler
before it divides the pixels by their largest number. TinyViTClassifier scales pixels itself.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler
from turns import conditions

from tinyvit.backend import available_cores
from tinyvit.data import load_mnist
from tinyvit.sklearn import TinyViTClassifier

EPOCHS = {"digits": 20, "mnist": 10}


def digits(seed):
    """Return the images for training and for testing, (N, 64), and the labels of both. The seed chooses the split."""
    images, labels = load_digits(return_X_y=True)
    return train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=seed)


def mnist(seed):
    """Return the images for training and for testing, (N, 784), and the labels of both."""
    data = load_mnist()
    images = data.train_images.reshape(-1, 784), data.test_images.reshape(-1, 784)
    return *images, data.train_labels, data.test_labels


DATA = {"digits": digits, "mnist": mnist}


def contestants(epochs, seed):
    """Yield the name, the estimator and the classifier inside it."""
    classifier = MLPClassifier(random_state=seed)
    yield "MLPClassifier", make_pipeline(MaxAbsScaler(), classifier), classifier
    classifier = TinyViTClassifier(max_iter=epochs, workers=available_cores(), random_state=seed)
    yield "TinyViTClassifier", classifier, classifier


def measure(data, seed, epochs, images):
    """Yield one record per classifier, which trains on at most `images` images."""
    train_images, test_images, train_labels, test_labels = DATA[data](seed)
    train_images, train_labels = train_images[:images], train_labels[:images]
    for name, estimator, classifier in contestants(epochs or EPOCHS[data], seed):
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the record has the number of epochs
            estimator.fit(train_images, train_labels)
        fitted = time.perf_counter()
        accuracy = estimator.score(test_images, test_labels)
        yield {
            "data": data,
            "classifier": name,
            "seed": seed,
            "train_images": len(train_images),
            "test_images": len(test_images),
            "accuracy": accuracy,
            "epochs": classifier.n_iter_,
            "fit_seconds": fitted - began,
            "score_seconds": time.perf_counter() - fitted,
        }


def line(record):
    """Return a record as one line."""
    return (
        f"{record['data']:7} {record['classifier']:18} seed {record['seed']}: "
        f"test accuracy {100 * record['accuracy']:.2f} %, {record['epochs']} epochs, "
        f"{record['fit_seconds']:.1f} s to fit, "
        f"{record['score_seconds']:.2f} s for {record['test_images']:,} test images"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", choices=DATA, default=list(DATA), metavar="NAME", help="data sets: digits, mnist (both)")
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="seeds (0)")
    add("--epochs", type=int, metavar="N", help="epochs of TinyViTClassifier (20 on digits, 10 on MNIST)")
    add("--images", type=int, metavar="N", help="train on the first N images (all)")
    add("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    options = parser.parse_args()
    records = []
    for data in options.data:
        for seed in options.seeds:
            for record in measure(data, seed, options.epochs, options.images):
                records.append(record)
                print(line(record), flush=True)
    if options.json:
        found = {"conditions": conditions("numba", "scikit-learn"), "records": records}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
