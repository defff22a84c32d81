"""Train on MNIST. This script accepts the flags of `tinyvit train` and does the same.

    python examples/train_mnist.py
    python examples/train_mnist.py --help
"""

import sys
from pathlib import Path

# With the checkout on Python's search path, tinyvit works without an installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tinyvit.commands import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
