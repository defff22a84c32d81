"""Put a trained model and its card into the package: tinyvit/pretrained/mnist.safetensors and README.md.

    python examples/train_mnist.py --epochs 100 ... --out runs/long
    python benchmarks/publish_weights.py runs/long

All figures of the card come from the run's metrics.json and from the files. A test compares the card with the model.
The run must use all images of the MNIST in the package, because the model is evaluated on them.
"""

import argparse
import hashlib
import json
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
from turns import ROOT

from tinyvit.checkpoint import MODEL
from tinyvit.classifier import VisionTransformer
from tinyvit.commands.train import flag
from tinyvit.data import load_mnist
from tinyvit.data.augment import Augmentation
from tinyvit.evaluate import misclassified
from tinyvit.files import write_atomically
from tinyvit.pretrained import WEIGHTS, ModelCard
from tinyvit.training import RECIPES, TrainingConfig
from tinyvit.training.results import read_metrics

FOLDER = ROOT / "tinyvit" / "pretrained"


def training_command(metrics):
    """Return the command that trains this model, with the flags that differ from the recipe and the workers."""
    training = metrics["training"]
    recipe = RECIPES[metrics["recipe"]].as_dict()
    flags = [] if metrics["recipe"] == "tuned" else ["--recipe", metrics["recipe"]]
    names = [field.name for field in fields(TrainingConfig) if field.name != "augmentation"]
    pairs = [(name, training[name], recipe[name]) for name in names]
    changes, default = training["augmentation"], recipe["augmentation"]
    pairs += [(field.name, changes[field.name], default[field.name]) for field in fields(Augmentation)]
    for name, value, usual in pairs:
        if value != usual:
            text = f"{value:g}" if isinstance(value, float) else str(value)
            flags += [flag(name), text]
    return shlex.join(["python", "examples/train_mnist.py", *flags, "--workers", str(metrics["workers"])])


def card_of(metrics, model):
    """Return the `ModelCard` of a run and its model. Raises `ValueError` if the run does not fit the package."""
    origin = metrics.get("origin", {})
    if not metrics.get("history") or metrics["device"] != "cpu":
        raise ValueError("expected the metrics.json of a finished training run on the CPU")
    if any(origin.get(name) for name in ("data_dir", "train_limit", "test_limit")):
        raise ValueError("expected a run on all of the MNIST of the package: no --data-dir, no --train-limit")
    data = load_mnist()
    evaluation = model.evaluate(data.test_images, data.test_labels)
    if abs(evaluation.accuracy - metrics["test_accuracy"]) > 1.5e-4:  # rounding may change one image
        raise ValueError(
            f"the model has test accuracy {evaluation.accuracy}, not {metrics['test_accuracy']} as in metrics.json"
        )
    wrong = misclassified(evaluation)
    two_best = np.sort(evaluation.probabilities, axis=1)[:, -2:]
    by_margin = np.argsort(two_best[:, 1] - two_best[:, 0], kind="stable")
    return ModelCard(
        command=training_command(metrics),
        data="MNIST",
        seed=metrics["seed"],
        epochs=len(metrics["history"]),
        parameters=metrics["parameters"],
        validation_accuracy=metrics["history"][-1]["validation_accuracy"],
        validation_images=metrics["validation_images"],
        test_accuracy=metrics["test_accuracy"],
        test_loss=metrics["test_loss"],
        test_images=metrics["test_images"],
        misread=wrong.tolist(),
        barely_read=by_margin[~np.isin(by_margin, wrong)][:20].tolist(),
        versions={name: metrics["versions"][name] for name in ("python", "numpy", "blas", "cpu")},
    )


def card_in_words(card, config, weights):
    """Return tinyvit/pretrained/README.md: `card`, a `ModelCard`, for `weights`, the bytes of the file."""
    return f"""# The trained model in the package

`tinyvit.load_pretrained()` returns the model. `tinyvit.pretrained.pretrained_card()` returns the numbers below.

| | |
| --- | --- |
| model | a Vision Transformer for handwritten digits with the architecture of the technical note |
| size | {card.parameters:,} parameters, float32: {config.depth} blocks of width {config.width}, \
{config.heads} heads, MLP {config.mlp_width}, patches of {config.patch_size} x {config.patch_size} pixels |
| file | `{WEIGHTS}`, {len(weights) / 1e6:.1f} MB, SHA-256 `{hashlib.sha256(weights).hexdigest()}` |
| trained by | `{card.command}` |
| data | {card.data}: 60,000 images without the last {card.validation_images:,}, which are for validation |
| seed | {card.seed} |
| epochs | {card.epochs} |
| validation accuracy | **{100 * card.validation_accuracy:.2f} %** of {card.validation_images:,} images |
| test accuracy | **{100 * card.test_accuracy:.2f} %** of {card.test_images:,} images: \
{len(card.misread)} are misclassified |
| test loss | {card.test_loss:.4f} nats |
| trained with | Python {card.versions["python"]}, NumPy {card.versions["numpy"]} ({card.versions["blas"]}), \
{card.versions["cpu"]} |

The weights are the moving average of the training, taken after the last epoch. The settings of the recipe were chosen
on validation images. The command's other settings were fixed in advance and tried once. No setting was chosen on the
test set, which was evaluated once, after the training. A test of the project evaluates the model again and compares
the result with this card.

## Intended use

The model classifies one handwritten digit, 0 to 9, in an image of 28 x 28 pixels as in MNIST. The ink is white on
black. The digit is scaled to fit 20 x 20 pixels, and its centre of mass is close to the centre of the image.
`tinyvit/pretrained/pictures.py` prepares such an image from a photograph or from pen strokes. The model is for
teaching and for experiments.

## Limits

* **No important decisions.** The model was not tested on cheques, forms, ballots or exams.
* **Digits only.** Every image gets one of ten classes. A letter or a scribble is classified as a digit too, often
  with a high probability. The labels were smoothed during training, so a probability is not the expected share of
  correct predictions.
* **Other handwriting.** American census workers and high-school students wrote the digits of MNIST around 1990. The
  accuracy on other styles, such as a 1 with a long upstroke or a 7 with a bar, was not measured.
* **Several digits, printed digits, mirrored or rotated digits.** The training set contains none of these.
"""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run of train_mnist.py")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="output folder (tinyvit/pretrained)")
    options = parser.parse_args(arguments)
    try:
        model = VisionTransformer.load(options.run / MODEL)
        card = card_of(read_metrics(options.run), model)
        options.out.mkdir(parents=True, exist_ok=True)
        model.save(options.out / WEIGHTS, {"card": asdict(card)})
        weights = (options.out / WEIGHTS).read_bytes()
        write_atomically(options.out / "README.md", card_in_words(card, model.config, weights))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {options.run}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(card), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
