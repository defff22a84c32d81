"""Train on MNIST. This script accepts the flags of `tinyvit train` and does the same.

    python examples/train_mnist.py
    python examples/train_mnist.py --help
"""

import os
import sys

# With the checkout on Python's search path, tinyvit works without an installation.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    sys.argv[:1] = ["tinyvit", "train"]  # before the import, so that Ctrl-C is answered from here on
    from tinyvit.commands import main

    sys.exit(main())
