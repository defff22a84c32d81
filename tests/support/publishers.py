"""Write data sets as their publishers do: the same file names, layouts, byte orders and orientations.

Each function takes a folder and the four arrays of a data set, `train_images`, `train_labels`, `test_images` and
`test_labels`, which are uint8 images (N, R, C) or (N, R, C, 3) and integer labels from 0.
"""

import csv
import gzip
import struct

import numpy as np
from PIL import Image

SPLITS = ("train", "test")
EMNIST_CLASSES = {"byclass": 62, "bymerge": 47, "balanced": 47, "letters": 26, "digits": 10, "mnist": 10}


def idx_bytes(array):
    """Return an array as an idx file, written without the library."""
    code = {"uint8": 0x08, "int32": 0x0C}[array.dtype.name]
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_file(path, data):
    """Write bytes, packed by gzip if the name ends with .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, 1) if path.name.endswith(".gz") else data)


def write_mnist(folder, arrays, suffix=".gz", separator="-", prefix="", test="t10k"):
    """Write the four idx files of MNIST, Fashion-MNIST and KMNIST."""
    for split, images, labels in zip(("train", test), arrays[::2], arrays[1::2], strict=True):
        labels = labels.astype(np.uint8)
        write_file(folder / f"{prefix}{split}-images{separator}idx3-ubyte{suffix}", idx_bytes(images))
        write_file(folder / f"{prefix}{split}-labels{separator}idx1-ubyte{suffix}", idx_bytes(labels))


def write_emnist(folder, arrays, split, suffix=".gz"):
    """Write one split of EMNIST: the images are transposed, and the letters are labelled from 1."""
    first = int(split == "letters")
    stored = [array.swapaxes(1, 2).copy() if array.ndim == 3 else array + first for array in arrays]
    write_mnist(folder, stored, suffix, prefix=f"emnist-{split}-", test="test")


def write_qmnist(folder, arrays, suffix=".gz"):
    """Write QMNIST: big-endian int32 labels (N, 8), which begin with class, series and writer."""
    for split, images, labels in zip(SPLITS, arrays[::2], arrays[1::2], strict=True):
        extended = np.zeros((len(labels), 8), np.int32)
        index = np.arange(len(labels))
        columns = [labels, 0 * index + 4, 2100 + index % 500, index % 150, labels + 30, index]
        extended[:, :6] = np.stack(columns, axis=1)
        write_file(folder / f"qmnist-{split}-images-idx3-ubyte{suffix}", idx_bytes(images))
        write_file(folder / f"qmnist-{split}-labels-idx2-int{suffix}", idx_bytes(extended))


def write_keras(folder, arrays, name="mnist.npz"):
    """Write Keras' mnist.npz."""
    names = ("x_train", "y_train", "x_test", "y_test")
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / name, **dict(zip(names, arrays, strict=True)))


def write_kuzushiji(folder, arrays, prefix="kmnist"):
    """Write the four npz files of Kuzushiji-MNIST or Kuzushiji-49."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, images, labels in zip(SPLITS, arrays[::2], arrays[1::2], strict=True):
        np.savez_compressed(folder / f"{prefix}-{split}-imgs.npz", images)
        np.savez_compressed(folder / f"{prefix}-{split}-labels.npz", labels)


def write_medmnist(folder, arrays, name="pathmnist.npz", validation=5):
    """Write an npz file of MedMNIST: labels (N, 1), and the last training images for validation."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels, test_images, test_labels = arrays
    np.savez_compressed(
        folder / name,
        train_images=images[:-validation],
        val_images=images[-validation:],
        test_images=test_images,
        train_labels=labels[:-validation, None],
        val_labels=labels[-validation:, None],
        test_labels=test_labels[:, None],
    )


def write_table(path, images, labels=None, header=None, label_last=False, names=None):
    """Write a CSV file with one image per row. `header` is a list of names, and `names` are texts for the labels."""
    rows = images.reshape(len(images), -1).tolist()
    if labels is not None:
        texts = [label if names is None else names[label] for label in labels.tolist()]
        rows = [[*row, text] if label_last else [text, *row] for row, text in zip(rows, texts, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(([header] if header else []) + rows)


def write_kaggle(folder, arrays):
    """Write the files of Kaggle's digit recogniser: a test file without labels, and a sample of a submission."""
    pixels = [f"pixel{i}" for i in range(arrays[0][0].size)]
    write_table(folder / "train.csv", arrays[0], arrays[1], ["label", *pixels])
    write_table(folder / "test.csv", arrays[2], None, pixels)
    rows = "".join(f"{i + 1},0\n" for i in range(len(arrays[2])))
    (folder / "sample_submission.csv").write_text(f"ImageId,Label\n{rows}")


def write_sign_language(folder, arrays):
    """Write the files of Kaggle's Sign Language MNIST."""
    pixels = [f"pixel{i + 1}" for i in range(arrays[0][0].size)]
    write_table(folder / "sign_mnist_train.csv", arrays[0], arrays[1], ["label", *pixels])
    write_table(folder / "sign_mnist_test.csv", arrays[2], arrays[3], ["label", *pixels])


def write_optdigits(folder, arrays):
    """Write UCI's optdigits: pixels from 0 to 16, and the label last."""
    for suffix, images, labels in zip(("tra", "tes"), arrays[::2], arrays[1::2], strict=True):
        write_table(folder / f"optdigits.{suffix}", images, labels, label_last=True)


def write_cifar(folder, arrays, kind=10):
    """Write the binary version of CIFAR-10 or CIFAR-100 from RGB images of 32 x 32 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels, test_images, test_labels = arrays

    def records(images, labels):
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        columns = [labels[:, None]] if kind == 10 else [labels[:, None] // 5, labels[:, None]]
        return np.hstack([*columns, planes]).astype(np.uint8).tobytes()

    if kind == 10:
        for i, rows in enumerate(np.array_split(np.arange(len(images)), 5)):
            (folder / f"data_batch_{i + 1}.bin").write_bytes(records(images[rows], labels[rows]))
        (folder / "test_batch.bin").write_bytes(records(test_images, test_labels))
        names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        (folder / "batches.meta.txt").write_text("\n".join([*names, "", ""]))
        (folder / "readme.html").write_text('<meta HTTP-EQUIV="REFRESH" content="0">')
        return
    (folder / "train.bin").write_bytes(records(images, labels))
    (folder / "test.bin").write_bytes(records(test_images, test_labels))
    (folder / "fine_label_names.txt").write_text("".join(f"fine{i}\n" for i in range(100)))
    (folder / "coarse_label_names.txt").write_text("".join(f"coarse{i}\n" for i in range(20)))


def write_pictures(folder, arrays, names=None, splits=("train", "test"), suffix=".png"):
    """Write pictures, one sub-folder per class, in a folder per split or, for the split "", in `folder` itself."""
    for split, images, labels in zip(splits, arrays[::2], arrays[1::2], strict=False):
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            path = folder / split / (names[label] if names else str(label)) / f"{i:05}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
