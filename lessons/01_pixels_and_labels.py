# %% [markdown]
r"""
# 01 Pixels and labels

**Goal.** To turn the bytes of a published file into images and labels, with nothing but arithmetic, and to know what
the numbers are before any of them is learned from.

**The one equation.** Where in the file is the pixel in row $r$ and column $c$ of image $n$?

$$
\mathrm{place}(n, r, c) = 16 + 28 \cdot 28 \, n + 28 \, r + c
$$

**Source.** Y. LeCun, C. Cortes and C. J. C. Burges, *The MNIST database of handwritten digits*, "The idx file
format".

**Time.** Half an hour to read and play, ten minutes an exercise. The script runs in a few seconds.
"""

# %%
import gzip
import importlib.resources

import numpy as np
from kit import Lesson, show

from tinyvit.data import load_mnist, read_idx
from tinyvit.model import ViTConfig

lesson = Lesson("01_pixels_and_labels")

# %% [markdown]
# ## A file is a row of numbers
#
# MNIST is 70,000 digits that people wrote by hand: 60,000 to learn from, and 10,000 to be tested on. It comes with
# this package, as the four files in which it was published. We open the largest and unpack it. What we hold then is a
# row of bytes, each a number from 0 to 255, and nothing else.

# %%
folder = importlib.resources.files("tinyvit.data") / "mnist"
image_bytes = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())

print(f"unpacked, the training images are {len(image_bytes):,} bytes; the first sixteen are")
print("   ", *image_bytes[:16])

# %% [markdown]
# ## The header says how to read the rest
#
# The first two bytes are zero. The third is the type of the elements, and 8 stands for a whole number from 0 to 255
# in one byte. The fourth is the number of dimensions: 3. Then the size of each dimension follows, in four bytes each.
#
# One byte counts to 255 only, so four bytes $b_0 b_1 b_2 b_3$ are read as the digits of one number in base 256, the
# most significant first ("big-endian"), just as the digits 6, 0 are read as sixty in base 10:
#
# $$
# b_0 \cdot 256^3 + b_1 \cdot 256^2 + b_2 \cdot 256 + b_3
# $$


# %%
def big_endian(four_bytes):
    """Return the number that four bytes spell, the most significant first."""
    number = 0
    for byte in four_bytes:
        number = 256 * number + byte  # what was read so far moves one place to the left
    return number


images, rows, columns = (big_endian(image_bytes[start : start + 4]) for start in (4, 8, 12))
print(f"{images:,} images of {rows} rows and {columns} columns")

assert images == int.from_bytes(image_bytes[4:8], "big")  # Python's own way
assert len(image_bytes) == 16 + images * rows * columns  # header and pixels, and no byte is left over

# %% [markdown]
# ## From a place in the file to a pixel
#
# After the sixteen bytes of the header come the pixels, one byte each: image after image, within an image row after
# row, within a row from left to right. To reach the pixel $(n, r, c)$ we skip the header, $n$ whole images of
# $28 \cdot 28$ bytes, $r$ whole rows of 28 bytes, and $c$ single bytes. That is the equation at the top.
#
# Let us use it as it stands, a pixel at a time, to print the first image: 0 is paper, and 255 is the darkest ink.


# %%
def place(n, r, c):
    """Return where in the file the pixel in row r and column c of image n is."""
    return 16 + rows * columns * n + columns * r + c


SHADES = " .:-=+*#%@"  # ten shades, from paper to ink
print("image 0, drawn with letters:")
for r in range(5, 25):
    print("   ", "".join(SHADES[image_bytes[place(0, r, c)] * 10 // 256] for c in range(columns)).rstrip())

# %% [markdown]
# ## An array is the same arithmetic, done for us
#
# 47 million calls of `place`, one after the other, would be slow. But an array of shape (60000, 28, 28) finds its
# elements by this very equation: the last index is the fastest, and every other one skips all that lies within it.
# How many bytes each index skips is the array's `strides`. So no pixel has to be moved: we only say where the first
# one is and what the shape is.

# %%
pixels = np.frombuffer(image_bytes, np.uint8, offset=16).reshape(images, rows, columns)  # (N, 28, 28)
print(f"an array of shape {pixels.shape}, dtype {pixels.dtype}, strides {pixels.strides}")

assert pixels.strides == (28 * 28, 28, 1)
for n, r, c in [(0, 5, 12), (1, 10, 20), (59_999, 27, 27)]:
    assert pixels[n, r, c] == image_bytes[place(n, r, c)]

# %% [markdown]
# The labels are a file of the same kind with one dimension: eight bytes of header, and then a byte for every image.

# %%
label_bytes = gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes())
labels = np.frombuffer(label_bytes, np.uint8, offset=8)  # (N,)
print("the first labels:", *labels[:10])

# %% [markdown]
# Is it right? The library reads the same files, with all the care that files of unknown origin need: what if the
# header lies, or the file ends too early? It must find the same numbers. From now on we use the library's readers.

# %%
assert np.array_equal(pixels, read_idx(folder / "train-images-idx3-ubyte.gz"))
assert np.array_equal(labels, read_idx(folder / "train-labels-idx1-ubyte.gz"))

mnist = load_mnist()
assert np.array_equal(pixels, mnist.train_images)
assert np.array_equal(labels, mnist.train_labels)
print("tinyvit.data.read_idx finds the same numbers, all", f"{pixels.size + labels.size:,} of them")

# %% [markdown]
# ## Look at the data
#
# Ten of each digit. Find a 4 that could be a 9, a 7 with a bar and one without, a 1 that leans. What tells a 3 from
# an 8, *whatever* the hand? That is what has to be learned.

# %%
figure, axes = lesson.figure(7, 7)
sheet = np.stack([pixels[labels == digit][:10] for digit in range(10)])  # (10 digits, 10 examples, 28, 28)
sheet = sheet.transpose(0, 2, 1, 3).reshape(280, 280)  # (digit, row, example, column): whole rows, one below another
show(axes, sheet, "The first ten of each digit")
axes.set_yticks(np.arange(10) * 28 + 14, range(10))
lesson.save(figure, "digits")

# %% [markdown]
# ## What a wrong shape looks like
#
# A file does not complain about a wrong shape. If we believe that a row has 27 pixels, every row begins one pixel
# earlier in the file than it should, and the next one two, so that the digit leans and wraps around the edge. If we
# forget that the header has 16 bytes, everything moves 16 pixels to the right. And if we take rows for columns, the
# digit is mirrored at its diagonal. No error, no warning; so look at what you read, always.

# %%
as_bytes = np.frombuffer(image_bytes, np.uint8)
readings = {
    "as it should be": pixels[0],
    "27 columns": as_bytes[16 : 16 + 27 * 27].reshape(27, 27),
    "header forgotten": as_bytes[: 28 * 28].reshape(28, 28),
    "rows taken for columns": pixels[0].T,
}
figure, panels = lesson.figure(7, 2.1, columns=4)
for axes, (title, image) in zip(panels, readings.items(), strict=True):
    show(axes, image, title)
lesson.save(figure, "wrong_shapes")

# %% [markdown]
# ## Know the numbers
#
# Before anything is learned: how many are there of each digit, and what are typical pixels? A guess of the most
# frequent digit is the least that any method has to beat.

# %%
counts = np.bincount(labels)  # (10,)
print("how many of each digit:", *counts)
print(f"always to guess {counts.argmax()} would be right for {counts.max() / counts.sum():.1%} of them")
assert counts.max() < 2 * counts.min()  # no digit is rare

empty = np.mean(pixels == 0)
print(f"{empty:.0%} of all pixels are 0, bare paper")

# %% [markdown]
# A network learns best from numbers of about the size of one, on both sides of zero. So pixels are divided by 255,
# then their mean is subtracted, and what remains is divided by their standard deviation. Both are numbers of the
# *training* images alone: the test images must not have a say in anything. They are the constants 0.1307 and 0.3081
# that stand in many a program for MNIST, the model of this library among them.

# %%
mean = pixels.mean() / 255
deviation = pixels.std() / 255
print(f"as numbers from 0 to 1, pixels have mean {mean:.4f} and standard deviation {deviation:.4f}")

config = ViTConfig()
assert abs(mean - config.pixel_mean) < 5e-5
assert abs(deviation - config.pixel_deviation) < 5e-5

# %% [markdown]
# ## The trap in a byte
#
# Arithmetic of `uint8` is arithmetic modulo 256: what does not fit begins again at zero, and silently. So the average
# of two pixels, or their difference, needs a wider type first. Exercise 2 is about this.

# %%
for dtype in (np.uint8, np.float64):
    light, dark = np.array([200], dtype), np.array([250], dtype)
    print(f"in {light.dtype}: 250 + 200 = {(dark + light)[0]:g}, and 200 - 250 = {(light - dark)[0]:g}")
    if dtype is np.uint8:
        assert (dark + light)[0] == (250 + 200) % 256
        assert (light - dark)[0] == (200 - 250) % 256

# %% [markdown]
# One more picture, as a bridge to what follows. The mean of all 3s, and that of all 8s; and the one minus the other.
# Where the difference is strong, a single pixel already speaks for one of the two digits. A linear layer, the next
# lesson, will weigh every pixel like this.

# %%
means = np.stack([pixels[labels == digit].mean(axis=0) for digit in range(10)])  # (10, 28, 28), 0 to 255
figure, panels = lesson.figure(7, 2.5, columns=3)
show(panels[0], means[3], "the mean 3")
show(panels[1], means[8], "the mean 8")
drawn = show(panels[2], means[8] - means[3], "mean 8 minus mean 3", signed=True)
figure.colorbar(drawn, ax=panels[2]).outline.set_visible(False)
lesson.save(figure, "means")

# %% [markdown]
# ## Exercises
#
# Replace the `...` and run the lesson again: the check prints what you have beside what is expected. Solutions are in
# `lessons/solutions/01_pixels_and_labels.py`.
#
# **1.** The way back. Which image, row and column does the byte at `place` belong to? (`place` is a whole number, 16
# or more; Python's `//` and `%` are all you need.)


# %%
def exercise_1(place):
    """Return n, r, c so that place == 16 + 784 n + 28 r + c."""
    return ...


lesson.check(1, exercise_1)

# %% [markdown]
# **2.** How different are two images? Return the mean over all pixels of the absolute difference, as one number. The
# images are `uint8`, as they come from the file.


# %%
def exercise_2(image, other):
    """Return the mean of |image - other| for two uint8 arrays of one shape."""
    return ...


lesson.check(2, exercise_2)

# %% [markdown]
# **3.** The loss of lesson 03 needs labels as rows with a single one: for ten classes, 3 becomes
# `[0, 0, 0, 1, 0, 0, 0, 0, 0, 0]`. Do it for all labels at once, without a loop.


# %%
def exercise_3(labels, classes):
    """Return a float64 array (N, classes) for labels (N,), with 1 in the column of the label and 0 elsewhere."""
    return ...


lesson.check(3, exercise_3)

# %% [markdown]
# **4.** A first classifier, with no training at all: take a digit for that class whose mean image is nearest to it,
# in the sum of squared differences of the pixels. Which share of the test images is classified correctly? (Mind that
# $|x - m|^2 = |x|^2 - 2\,x \cdot m + |m|^2$, and that $|x|^2$ is the same for all classes; so one product of matrices
# does most of it.)


# %%
def exercise_4(train_images, train_labels, test_images):
    """Return the predicted labels (M,), int64, of test_images (M, 28, 28), all images being uint8."""
    return ...


lesson.check(4, exercise_4)

# %% [markdown]
# ## Where this leads
#
# We can trust our numbers now. The next lesson weighs them: the linear layer, and the check that no gradient in this
# book escapes.
