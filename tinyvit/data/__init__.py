"""MNIST and data sets in the same format, and reading and writing of idx files."""

from tinyvit.data.idx import DataError, IdxError, read_idx, write_idx
from tinyvit.data.mnist import DatasetError, ImageDataset, load_mnist
