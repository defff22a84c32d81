"""Data sets: reading and writing idx files, and MNIST itself."""

from tinyvit.data.idx import DataError, IdxError, read_idx, write_idx
from tinyvit.data.mnist import DatasetError, ImageDataset, load_mnist
