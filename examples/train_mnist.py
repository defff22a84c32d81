"""Train on MNIST, as `tinyvit train` does; all its flags work here too.

    python examples/train_mnist.py
    python examples/train_mnist.py --help
"""

import sys
from pathlib import Path

# A checkout works without an installation: its root is where Python finds tinyvit.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tinyvit.commands import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
