"""Train, test, save, load and use a model from Python, with a tenth of MNIST. It takes a minute on two cores.

    python examples/train_from_python.py
"""

import sys
from dataclasses import replace
from pathlib import Path

# With the checkout on Python's search path, tinyvit works without an installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tinyvit
from tinyvit.training import TUNED

data = tinyvit.load_mnist()  # uint8 images (N, 28, 28) and integer labels (N,), like arrays of your own
images, labels = data.train_images[:6000], data.train_labels[:6000]
print(f"{len(images):,} images of {data.name}, {images.shape[1]} x {images.shape[2]} pixels")

# TUNED is the best recipe found for 55,000 images. A training with fewer steps needs a shorter warm-up and average.
recipe = replace(TUNED, batch_size=32, warmup_steps=100, average=0.99)
model = tinyvit.train(images, labels, epochs=8, recipe=recipe, model={"depth": 3}, device="auto", seed=0)
print(model)

result = model.evaluate(data.test_images, data.test_labels)
print(f"on {len(result.labels):,} test images: accuracy {100 * result.accuracy:.2f} %, loss {result.loss:.4f}")

path = Path("digits.safetensors")
model.save(path, {"trained on": f"{len(images)} images of {data.name}"})
print(f"saved to {path}, {path.stat().st_size / 1e6:.1f} MB; to test it again: tinyvit evaluate {path}")

model = tinyvit.VisionTransformer.load(path)
some = data.test_images[:5]
for digit, probabilities, label in zip(
    model.predict(some), model.predict_proba(some), data.test_labels[:5], strict=True
):
    print(f"read {digit} ({100 * probabilities.max():.1f} %), labelled {label}")
