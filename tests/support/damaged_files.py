"""Damage files at random, and judge what their readers do with them.

A reader may refuse a damaged file with one clear error that names it, or return what the undamaged file contains. A
file whose structure was changed and whose checksum was computed again is another file, and so is each damaged file of
a format without checksums. A reader may return what this other file says, if the values are usable. Everything else
is a finding.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import json
import math
import signal
import struct
import time
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import publishers
from PIL import Image, ImageDraw

from tinyvit.checkpoint import CheckpointError, load_model, save_model
from tinyvit.classifier import VisionTransformer
from tinyvit.data import DataError, IdxError, load_dataset, read_idx, write_idx
from tinyvit.data.augment import Augmentation
from tinyvit.gpu import get_backend
from tinyvit.model import ViTConfig, initialise
from tinyvit.pretrained.pictures import PictureError, load_picture, prepare_picture
from tinyvit.training import CHECKPOINT, Training, TrainingConfig, TrainingDiverged, TrainingStopped, read_checkpoint
from tinyvit.training.progress import epoch_line

try:
    import resource
except ImportError:  # Windows
    resource = None

LIMIT = 0.1  # seconds of processor time for one file; other programs do not count
HANG = 10  # seconds of real time after which a reader is interrupted
FINDINGS = ("WRONG", "crashed", "slow", "large")
OUTCOMES = ("refused", "identical", "as the file says", *FINDINGS)

MODEL = ViTConfig(image_size=8, patch_size=4, width=8, depth=2, heads=2, mlp_width=12, classes=4)
IMAGES = np.random.default_rng(0).integers(0, 256, (30, 8, 8)).astype(np.uint8)
LABELS = (np.arange(30) % 4).astype(np.uint8)
SETTINGS = TrainingConfig(epochs=3, batch_size=8, average=0.9, validation=6, clip=1.0)

# Values that a damaged entry gets. Python's json cannot write the last two, so these texts stand for them.
LONG, DEEP = "a number of 5,000 digits", "a list in 50,000 lists"
VALUES = (
    *(0, -1, 1, 2, 3, 7, 10, 1000, 1024, 1025, 100_000, 100_001, 2**31, 2**32, 2**53, 2**63, 2**64, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1e-320, -1e-9, 1e30, -1e30, 1e308, math.nan, math.inf, -math.inf),
    *(None, True, False, "", "x", "erf", "tanh", "cosine", "off", "\0", "x" * 10_000, [], {}, [1], {"x": 1}),
    *(LONG, DEEP),
)
TEXTS = (b"\n\n,,,,\n", b"1e999,-1", b'""","\r\n;', b"nan,inf,")
FLOATS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 3e38, -3e38, 1e-45)


# ---- damage to any bytes ----


def damage_bytes(rng, content):
    """Return the name of a random damage, and the damaged bytes, which differ from `content`."""
    kinds = (flip, truncate, overwrite, insert, delete, swap_blocks)
    while True:
        kind = kinds[rng.integers(len(kinds))]
        damaged = bytes(kind(rng, bytearray(content)))
        if damaged != content:
            return kind.__name__, damaged


def flip(rng, content):
    for place in rng.integers(8 * len(content), size=rng.integers(1, 4)):
        content[place // 8] ^= 1 << (place % 8)
    return content


def truncate(rng, content):
    return content[: rng.integers(len(content))]


def overwrite(rng, content):
    start, size = rng.integers(len(content)), 2 ** rng.integers(8)
    runs = (bytes(size), b"\xff" * size, rng.bytes(size), b" " * size, *TEXTS)
    run = runs[rng.integers(len(runs))][: len(content) - start]
    content[start : start + len(run)] = run
    return content


def insert(rng, content):
    start = rng.integers(len(content) + 1)
    content[start:start] = rng.bytes(2 ** rng.integers(8))
    return content


def delete(rng, content):
    start = rng.integers(len(content))
    del content[start : start + 2 ** rng.integers(8)]
    return content


def swap_blocks(rng, content):
    size = min(2 ** rng.integers(8), len(content) // 2)
    first, second = sorted(rng.integers(len(content) - size, size=2))
    second = max(second, first + size)
    content[first : first + size], content[second : second + size] = (
        content[second : second + size],
        content[first : first + size],
    )
    return content


# ---- damage to the structure of a safetensors file ----


def places(tree):
    """Return (container, key) of every value in nested dicts and lists."""
    found = []
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        found += [(tree, key), *places(value)]
    return found


def damage_json(rng, tree):
    """Change one or two values or names in nested dicts and lists."""
    kind = rng.choice(["replace", "replace", "replace", "swap", "remove", "rename", "nudge"])
    found = places(tree)
    (container, key), (other, name) = (found[i] for i in rng.integers(len(found), size=2))
    if kind == "swap":
        container[key], other[name] = json.loads(json.dumps([other[name], container[key]]))
    elif kind == "remove":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        container[key[:-1] + "x"] = container.pop(key)
    elif kind == "nudge" and isinstance(container[key], int | float):
        container[key] += type(container[key])(rng.integers(-3, 4))
    else:
        container[key] = VALUES[rng.integers(len(VALUES))]
    return f"{kind} {key}"


def damage_arrays(rng, header, data):
    """Change what the header says about two arrays, or one value. Returns the name of the damage."""
    names = [name for name in header if name != "__metadata__"]
    one, two = rng.choice(names, size=2, replace=len(names) < 2)
    kind = rng.choice(["offsets", "names", "entry", "value", "shape"])
    if kind == "offsets":
        first, second = header[one]["data_offsets"], header[two]["data_offsets"]
        header[one]["data_offsets"], header[two]["data_offsets"] = second, first
    elif kind == "names":
        header[one], header[two] = header[two], header[one]
    elif kind == "entry":
        damage_json(rng, header[one])
    elif kind == "shape":
        header[one]["shape"] = [[], header[one]["shape"][::-1], [1, *header[one]["shape"]], [2**40]][rng.integers(4)]
    else:
        start = 4 * rng.integers(len(data) // 4)
        data[start : start + 4] = struct.pack("<f", FLOATS[rng.integers(len(FLOATS))])
    return f"{kind} {one}"


def opened(content):
    """Return the header, the metadata of tinyvit and the data of a safetensors file."""
    (size,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + size])
    return header, json.loads(header["__metadata__"]["info"]), bytearray(content[8 + size :])


def sealed(header, info, data, checksum):
    """Return the bytes of a safetensors file. `checksum` is None to compute it."""
    text = json.dumps(info).replace(json.dumps(LONG), "9" * 5000)
    text = text.replace(json.dumps(DEEP), "[" * 50_000 + "]" * 50_000)
    text = json.dumps({**header, "__metadata__": {"checksum": checksum or "#" * 64, "info": text}}).encode()
    text += b" " * (-len(text) % 8)
    content = struct.pack("<Q", len(text)) + text + bytes(data)
    if checksum is None:
        before, after = content.split(b"#" * 64, 1)
        content = before + hashlib.sha256(before + after).hexdigest().encode() + after
    return content


class Files:
    """Undamaged files of a format and their contents. A subclass says how they are damaged, read, judged and used."""

    limit, memory = LIMIT, math.inf  # processor seconds, and bytes by which the process may grow
    warnings = "ignore"  # "error" if the reader may not warn
    name = "damaged"

    def write(self, folder, content, index):
        """Write a damaged file, and return the path to read, which a message must name."""
        path = folder / self.name
        path.write_bytes(content)
        return path


class Safetensors(Files):
    """Files that tinyvit writes."""

    error = CheckpointError

    def damaged(self, rng, index):
        """Return the name of a damage, the damaged bytes, and whether the checksum was computed again."""
        original = self.originals[index]
        if rng.random() < 0.4:
            return *damage_bytes(rng, original), False
        again = rng.random() < 0.6
        while True:
            header, info, data = opened(original)
            checksum = None if again else header["__metadata__"]["checksum"]
            kind = damage_json(rng, info) if rng.random() < 0.7 else damage_arrays(rng, header, data)
            content = sealed(header, info, data, checksum)
            if content != original:
                return f"{kind}, {'new' if again else 'old'} checksum", content, again

    def judge(self, content, index, sealed_again):
        if not sealed_again:  # no damage may remain unnoticed, not even one that changes no value
            return "WRONG"
        return "identical" if self.same(content, self.contents[index]) else "as the file says"


def same_arrays(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and first[name].tobytes() == second[name].tobytes()
        for name in first
    )


class ModelFiles(Safetensors):
    def __init__(self, folder):
        self.originals, self.contents = [], []
        for seed, dtype in ((1, np.float32), (2, np.float64)):
            save_model(folder / "model", initialise(MODEL, seed, dtype), MODEL, {"recipe": "tuned", "seed": seed})
            self.originals.append((folder / "model").read_bytes())
            self.contents.append(load_model(folder / "model"))

    def read(self, path):
        return load_model(path)

    def same(self, one, other):
        return one[1] == other[1] and same_arrays(one[0], other[0])

    def use(self, path, content):
        """Predict one image. A model with extreme settings may raise an error about the logits."""
        parameters, config = content
        with contextlib.suppress(ArithmeticError, ValueError):
            image = np.zeros((1, config.image_size, config.image_size), np.uint8)
            VisionTransformer(config, parameters).predict_proba(image)


class CheckpointFiles(Safetensors):
    name = CHECKPOINT

    def __init__(self, folder):
        self.originals, self.contents = [], []
        rng = np.random.default_rng(1)
        plain = TrainingConfig(epochs=2, batch_size=8, validation=0, augmentation=Augmentation(shift=1, flip=0.5))
        for config, epoch, done in ((SETTINGS, 1, 2), (SETTINGS, 3, 0), (plain, 1, 1), (plain, 0, 0)):
            run = Training(MODEL, config, IMAGES, LABELS, get_backend("cpu"), workers=1, loops="off")
            state = run.state
            for array in state.arrays().values():
                array[...] = rng.random(array.shape) / 10
            steps = epoch * run.steps_per_epoch + done
            state.epoch, state.done, state.seconds, state.adam.steps = epoch, done, epoch + 0.5, steps
            state.loss_sum, state.correct = 1.5 * 8 * done, 5 * done
            state.origin = {"recipe": "tuned", "data_dir": None, "train_limit": 30, "test_limit": None}
            state.history = [
                {
                    "epoch": number,
                    "train_loss": 1.4 / number,
                    "train_accuracy": 0.4,
                    "validation_loss": 1.3 if config.validation else None,
                    "validation_accuracy": 0.5 if config.validation else None,
                    "first_learning_rate": 1e-3,
                    "last_learning_rate": 1e-4,
                    "seconds": float(number),
                }
                for number in range(1, epoch + 1)
            ]
            if state.average is not None:
                state.average.steps = steps // 4
            run.save(folder)
            self.originals.append((folder / CHECKPOINT).read_bytes())
            self.contents.append((*read_checkpoint(folder), None))

    def read(self, path):
        """Return the arrays, the metadata and the run that resumes from them."""
        run = Training.resume(path.parent, IMAGES, LABELS, get_backend("cpu"), workers=1, loops="off")
        return *read_checkpoint(path.parent), run

    def same(self, one, other):
        return one[1] == other[1] and same_arrays(one[0], other[0])

    def use(self, path, content):
        """Show the progress, and take up to three steps. A run with extreme settings may diverge."""
        run = content[2]
        if run.state.history:
            epoch_line(run)
        first = run.state.epoch * run.steps_per_epoch + run.state.done

        def stop(run):
            run.stop_requested = run.state.epoch * run.steps_per_epoch + run.state.done >= first + 3

        with contextlib.suppress(TrainingDiverged, TrainingStopped):
            run.run(on_step=stop)


# ---- idx files and pictures, which have no checksum of their own ----


class IdxFiles(Files):
    """Raw idx files, whose bytes all count, and compressed ones, which have a checksum."""

    error = IdxError
    codes = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}  # noqa: RUF012

    def __init__(self, folder):
        rng = np.random.default_rng(2)
        arrays = [rng.integers(0, 256, (4, 5, 6)).astype(np.uint8), rng.integers(0, 10, 40).astype(np.uint8)]
        arrays += [rng.standard_normal((3, 4)), rng.integers(-9, 9, (2, 3, 2)).astype(np.int16), np.float32(1.5)]
        self.originals, self.contents = [], []
        for array in arrays:
            for name in ("file", "file.gz"):
                write_idx(folder / name, array)
                self.originals.append((folder / name).read_bytes())
                self.contents.append(np.asarray(array))

    def damaged(self, rng, index):
        original = self.originals[index]
        packed = original[:2] == b"\x1f\x8b"
        if rng.random() < 0.5:
            kind, content = damage_bytes(rng, original)
            return kind, content, not packed  # nothing protects raw bytes
        raw = bytearray(gzip.decompress(original) if packed else original)
        place = rng.integers(2, 4 + 4 * raw[3])
        if place >= 4 and rng.random() < 0.7:
            place -= place % 4
            size = (0, 1, 2, 2**16, 2**31, 2**32 - 1, rng.integers(2**32))[rng.integers(7)]
            raw[place : place + 4] = struct.pack(">I", size)
        else:
            raw[place] = rng.integers(256)
        return f"header byte {place}", gzip.compress(raw, mtime=0) if packed else bytes(raw), True

    def read(self, path):
        return read_idx(path)

    def judge(self, content, index, sealed_again):
        expected = self.contents[index]
        if same_arrays({"": content}, {"": expected}):
            return "identical"
        return "as the file says" if sealed_again else "WRONG"

    def use(self, path, content):
        """Compare the array with what its bytes say, read in another way."""
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        rank = data[3]
        shape = struct.unpack_from(f">{rank}I", data, 4)
        dtype = np.dtype(self.codes[data[2]])
        assert data[:2] == b"\0\0"
        assert content.shape == shape
        assert content.dtype == dtype.newbyteorder("=")
        assert len(data) == 4 + 4 * rank + content.nbytes
        assert content.astype(dtype).tobytes() == data[4 + 4 * rank :]


class Pictures(Files):
    """Pictures of a digit. Most formats protect nothing, so the reader must only return grey levels.

    The limit is that of an undamaged picture with 60 million pixels, since a damaged size may say so.
    """

    error, limit = PictureError, 0.5

    def __init__(self, folder):
        picture = Image.new("L", (48, 40), 230)
        ImageDraw.Draw(picture).line([(14, 8), (32, 8), (20, 33)], fill=20, width=4)
        colours = picture.convert("RGB")
        forms = [(picture, "PNG"), (colours.convert("RGBA"), "PNG"), (picture, "JPEG"), (colours, "WEBP")]
        forms += [(colours, "BMP"), (picture, "GIF"), (picture, "TIFF"), (colours, "PPM")]
        forms += [(picture.convert("I;16"), "PNG")]
        self.originals, self.contents = [], []
        for image, form in forms:
            stream = io.BytesIO()
            image.save(stream, form)
            self.originals.append(stream.getvalue())
            (folder / "file").write_bytes(stream.getvalue())
            self.contents.append(load_picture(folder / "file"))

    def damaged(self, rng, index):
        original = self.originals[index]
        if rng.random() < 0.6:
            return *damage_bytes(rng, original), True
        content = bytearray(original)
        place = rng.integers(min(80, len(content) - 4))
        value = (0, 1, 255, 2**15, 2**31, 2**32 - 1, rng.integers(2**32))[rng.integers(7)]
        content[place : place + 4] = struct.pack("<>"[rng.integers(2)] + "I", value)
        if content[12:16] == b"IHDR":  # its checksum is computed again
            content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        return f"number at byte {place}", bytes(content), True

    def read(self, path):
        return load_picture(path)

    def judge(self, content, index, sealed_again):
        return "identical" if np.array_equal(content, self.contents[index]) else "as the file says"

    def use(self, path, content):
        """Check the grey levels, and prepare them for the model. A picture without a digit is refused there."""
        assert content.ndim == 2
        assert 1 <= min(content.shape) <= max(content.shape) <= 768
        assert content.dtype == np.float32
        assert 0 <= content.min() <= content.max() <= 1
        with contextlib.suppress(PictureError):
            image = prepare_picture(content).image
            assert image.shape == (28, 28)
            assert np.isfinite(image).all()


# ---- data sets of many forms ----


class DataSets(Files):
    """A data set of a form, of which one file is damaged. Most forms protect nothing, so usable arrays are enough."""

    error, limit, memory, warnings = DataError, 1.0, 300 * 2**20, "error"

    def __init__(self, folder, write_data_set):
        self.folder = folder / "data"
        write_data_set(self.folder)
        self.paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        self.originals = [path.read_bytes() for path in self.paths]
        self.contents = [load_dataset(self.folder)] * len(self.paths)
        self.last = 0

    def damaged(self, rng, index):
        suffix, content = self.paths[index].suffix, self.originals[index]
        if suffix in (".gz", ".npz") and rng.random() < 0.5:
            kind, content = damage_inside(rng, content)
        else:
            kind, content = damage_ends(rng, content)
        return f"{kind} in {self.paths[index].name}", content, True

    def write(self, folder, content, index):
        self.paths[self.last].write_bytes(self.originals[self.last])
        self.paths[index].write_bytes(content)
        self.last = index
        return self.folder

    def read(self, path):
        return load_dataset(path)

    def judge(self, content, index, sealed_again):
        equal = map(np.array_equal, arrays_of(content), arrays_of(self.contents[index]))
        return "identical" if all(equal) else "as the file says"

    def use(self, path, content):
        for images, labels in zip(arrays_of(content)[::2], arrays_of(content)[1::2], strict=True):
            assert images.dtype == np.uint8
            assert len(images) == len(labels)
            assert labels.max(initial=0) < content.classes
        assert len(content.train_images) > 0
        assert 0 < len(content.description.replace(str(path), "")) < 500
        assert "\n" not in content.description


def arrays_of(data):
    return [data.train_images, data.train_labels, data.test_images, data.test_labels]


def damage_ends(rng, content):
    """Damage bytes at least once: anywhere, or in the first or last 64 bytes, where formats have their headers."""
    kinds = []
    while not kinds or (content and rng.random() < 0.4):
        size = len(content)
        start, stop = ((0, size), (0, 64), (max(0, size - 64), size))[rng.integers(3)]
        kind, piece = damage_bytes(rng, content[start:stop])
        content = content[:start] + piece + content[stop:]
        kinds.append(kind)
    return ", ".join(kinds), content


def damage_inside(rng, content):
    """Damage what a gzip or npz file contains, and pack it again, so that no checksum reveals the damage."""
    if content[:2] == b"\x1f\x8b":
        kind, damaged = damage_ends(rng, gzip.decompress(content))
        return f"{kind}, packed again", gzip.compress(damaged, 1, mtime=0)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
        method = archive.infolist()[0].compress_type
    name = list(members)[rng.integers(len(members))]
    kind, members[name] = damage_ends(rng, members[name])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return f"{kind} of {name}, packed again", stream.getvalue()


def data_set(side=8, colour=False):
    """Return four arrays of a small data set of random images with ten classes."""
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, side, side, *[3] * colour), np.uint8) for n in (24, 12))
    return [train, np.arange(24, dtype=np.uint8) % 10, test, np.arange(12, dtype=np.uint8) % 10]


def write_words(folder):
    """Write a CSV file with quoted words as labels."""
    words = [f'class "{i}", ä' for i in range(10)]
    publishers.write_table(folder / "train.csv", *data_set()[:2], names=words)


GREY, COLOUR = data_set(), data_set(32, colour=True)
DATA_SETS = {
    "mnist": lambda folder: publishers.write_mnist(folder, GREY, suffix=""),
    "mnist-gzip": lambda folder: publishers.write_mnist(folder, GREY),
    "emnist": lambda folder: publishers.write_emnist(folder, GREY, "letters"),
    "qmnist": lambda folder: publishers.write_qmnist(folder, GREY, suffix=""),
    "npz": lambda folder: publishers.write_keras(folder, GREY),
    "medmnist": lambda folder: publishers.write_medmnist(folder, COLOUR),
    "kuzushiji": lambda folder: publishers.write_kuzushiji(folder, GREY),
    "csv": lambda folder: publishers.write_sign_language(folder, GREY),
    "csv-words": write_words,
    "cifar": lambda folder: publishers.write_cifar(folder, COLOUR),
    "png": lambda folder: publishers.write_pictures(folder, GREY),
    "jpeg": lambda folder: publishers.write_pictures(folder, COLOUR, suffix=".jpg"),
    "tiff": lambda folder: publishers.write_pictures(folder, COLOUR, suffix=".tif"),
}
SINGLE_FILES = {"checkpoint": CheckpointFiles, "model": ModelFiles, "idx": IdxFiles, "picture": Pictures}
FORMATS = SINGLE_FILES | {name: functools.partial(DataSets, write_data_set=DATA_SETS[name]) for name in DATA_SETS}


# ---- one case after the other ----


def run_cases(format_name, first, count, seed, folder):
    """Damage `count` files, and read them.

    format_name: a name in FORMATS; first: number of the first case, which determines the case together with the seed;
    folder: an empty folder for the files. Returns a dict: "outcomes" counts by outcome, "slowest" is in seconds, and
    "findings" has the first few, each with the number of its case and the error.
    """
    files = FORMATS[format_name](Path(folder))
    outcomes, findings, slowest = Counter(dict.fromkeys(OUTCOMES, 0)), [], 0.0
    memory = peak_memory()
    for number in range(first, first + count):
        rng = np.random.default_rng([seed, number])
        index = int(rng.integers(len(files.originals)))
        kind, content, sealed_again = files.damaged(rng, index)
        path = files.write(Path(folder), content, index)
        outcome, text, seconds = judge(files, path, index, sealed_again)
        grown, memory = peak_memory() - memory, max(memory, peak_memory())
        if grown > files.memory:
            outcome, text = "large", f"{grown:,} more bytes: {outcome}: {text}"
        outcomes[outcome] += 1
        slowest = max(slowest, seconds)
        if outcome in FINDINGS and len(findings) < 20:
            findings.append({"case": number, "damage": kind, "outcome": outcome, "error": text[:500]})
    return {"outcomes": dict(outcomes), "slowest": slowest, "findings": findings}


def peak_memory():
    """Return the most bytes that this process has used so far, or 0 if the system does not say."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0


def judge(files, path, index, sealed_again):
    """Return the outcome of one damaged file, a text about it, and the seconds that its reader took."""
    seconds = math.inf
    for _ in range(3):  # another program may empty the caches in one attempt
        outcome, text, taken = read_once(files, path, index, sealed_again)
        seconds = min(seconds, taken)
        if seconds <= files.limit:
            return outcome, text, seconds
    return "slow" if outcome not in FINDINGS else outcome, f"{seconds:.3f} s: {outcome}: {text}", seconds


def read_once(files, path, index, sealed_again):
    with warnings.catch_warnings(), alarm(HANG):
        warnings.simplefilter(files.warnings)
        began = time.process_time()
        try:
            content = files.read(path)
        except files.error as error:
            taken, text = time.process_time() - began, str(error)
            clear = str(path) in text and "\n" not in text and len(text.replace(str(path), "")) <= 500
            return "refused" if clear else "crashed", text, taken
        except Exception as error:
            return "crashed", f"{type(error).__name__}: {error}", time.process_time() - began
        taken = time.process_time() - began
        outcome = files.judge(content, index, sealed_again)
        try:
            if outcome == "as the file says":
                files.use(path, content)
        except files.error as error:
            return "refused", str(error), taken
        except Exception as error:
            return "crashed", f"in use: {type(error).__name__}: {error}", taken
        return outcome, "", taken


@contextlib.contextmanager
def alarm(seconds):
    """Raise `TimeoutError` in a reader that does not end, where the system has such alarms."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number, frame):
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
