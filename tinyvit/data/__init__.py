"""MNIST and data sets of many other forms, and reading and writing of idx files."""

from tinyvit.data.datasets import load_dataset
from tinyvit.data.idx import DataError, IdxError, read_idx, write_idx
from tinyvit.data.mnist import DatasetError, ImageDataset, load_mnist
