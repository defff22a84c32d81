"""Train a Vision Transformer on MNIST, or on another data set.

    tinyvit train                       the best recipe, 5 minutes on two cores
    tinyvit train --recipe note         the training of the technical note
    tinyvit train --data fashion/       idx, npz or CSV files, or pictures
    tinyvit train --resume runs/tuned-seed0     continue a run that was stopped

The folder of the run contains the model, a checkpoint, the history of the
training, and the evaluation on the test set as numbers and pictures.
"""

import shlex
import signal
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

from tinyvit import console
from tinyvit.backend import LOOPS, use_loops
from tinyvit.checkpoint import CHECKPOINT, MODEL
from tinyvit.classifier import VisionTransformer, fitting_config
from tinyvit.commands import CommandError, in_words, integer, make_option_folder, number, path, require_range, size
from tinyvit.data import DataError, load_dataset
from tinyvit.data.augment import Augmentation
from tinyvit.files import locked_folder
from tinyvit.gpu import get_backend
from tinyvit.kernels import PRECISIONS
from tinyvit.model import ViTConfig
from tinyvit.training import (
    NOTE,
    RECIPES,
    TUNED,
    Training,
    TrainingConfig,
    WorkerError,
    read_checkpoint,
    results,
)
from tinyvit.training.loop import TrainingDiverged, TrainingStopped
from tinyvit.training.progress import Progress
from tinyvit.training.step import KERNELS
from tinyvit.training.workers import CHUNK_TOKENS

# The settings of ViTConfig, TrainingConfig and Augmentation, with their texts in --help.
MODEL_SETTINGS = {
    "patch_size": "side of a patch in pixels, or ROWSxCOLUMNS; for images of another size their largest divisors up "
    "to a quarter",
    "width": "length of a token vector",
    "depth": "number of blocks",
    "heads": "number of attention heads per block",
    "mlp_width": "width of the hidden layer of each MLP",
    "classes": "number of classes; the default is that of the data set, for MNIST",
    "gelu": "form of GELU: 'erf' (exact) or 'tanh' (approximate)",
}
TRAINING_SETTINGS = {
    "epochs": "number of passes over the training set",
    "batch_size": "number of images per step",
    "learning_rate": "learning rate; the peak of the schedule, if it has one",
    "schedule": "learning-rate schedule: 'constant', or 'cosine', which falls to 0",
    "warmup_steps": "number of steps in which a cosine schedule rises to its peak",
    "weight_decay": "decoupled weight decay of matrices, per step and unit of learning rate",
    "beta1": "decay of Adam's first moment per step",
    "beta2": "decay of Adam's second moment per step",
    "clip": "largest norm of the gradient; 0 for no limit",
    "smoothing": "share of each label that is spread evenly over all classes",
    "average": "decay of the moving average of the weights, per 4 steps; 0 for no average",
    "validation": "number of images at the end of the training set that are held out for validation; "
    "the default is at most 1/12 of the set",
    "seed": "seed of all random numbers, an integer from 0",
}
AUGMENTATION_SETTINGS = {
    "rotation": "largest rotation in degrees, in both directions",
    "scale": "largest change of size: 0.1 for factors from 1/1.1 to 1.1",
    "shear": "largest shear in degrees, in both directions",
    "shift": "largest shift in pixels, along both axes",
    "flip": "probability that an image is mirrored",
}
SHORT = {"learning_rate": "--lr", "smoothing": "--label-smoothing"}


def flag(name):
    """Return the command-line flag of a setting."""
    return SHORT.get(name, "--" + name.replace("_", "-"))


def with_flag(text):
    """Return the text of an error in which the name of a setting at the beginning is replaced by its flag."""
    name = text.removeprefix("augmentation ").partition(" ")[0]
    if name not in {**MODEL_SETTINGS, **TRAINING_SETTINGS, **AUGMENTATION_SETTINGS}:
        return text
    text = flag(name) + text.removeprefix("augmentation ").removeprefix(name)
    if name == "learning_rate":
        text += f": the recipes have {TUNED.learning_rate} and {NOTE.learning_rate}"
    return text


def add_arguments(parser):
    parser.usage = "%(prog)s [options]"
    group = parser.add_argument_group("the run")
    text = "best settings found (tuned) or those of the technical note (note); options override them (default: tuned)"
    group.add_argument("--recipe", choices=list(RECIPES), help=text)
    text = "device that computes; auto: a GPU if one works, else the CPU (default: auto)"
    group.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto", help=text)
    text = "precision of matrix products on a GPU (default: float32)"
    group.add_argument("--precision", choices=PRECISIONS, help=text)
    text = "mode of a GPU: one CUDA graph per step, single launches of kernels, or no kernels (default: graph)"
    group.add_argument("--kernels", choices=KERNELS, help=text)
    text = "number of processes that share a batch (default: one per core, each with at least 8 images)"
    group.add_argument("--workers", type=integer, metavar="N", help=text)
    text = "costly operations on a CPU as loops compiled by Numba; auto: on if Numba is installed (default: auto)"
    group.add_argument("--loops", choices=LOOPS, help=text)
    text = "folder for the results (default: runs/RECIPE-seedN)"
    group.add_argument("--out", type=path, metavar="DIR", help=text)
    text = "continue the run in this folder, with its settings, where it stopped (default: start a new run)"
    group.add_argument("--resume", type=path, metavar="DIR", help=text)
    text = "stop when N epochs are done; --resume continues the run (default: do not stop)"
    group.add_argument("--stop-after", type=integer, metavar="N", help=text)

    group = parser.add_argument_group("data")
    text = "folder or file of a data set, or sklearn:digits (default: MNIST in the package)"
    group.add_argument("--data", "--data-dir", type=path, metavar="PATH", help=text)
    text = "train on only the first N training images (default: all)"
    group.add_argument("--train-limit", type=integer, metavar="N", help=text)
    text = "test on only the first N test images (default: all)"
    group.add_argument("--test-limit", type=integer, metavar="N", help=text)

    models = {name: ViTConfig() for name in RECIPES}
    augmentations = {name: recipe.augmentation for name, recipe in RECIPES.items()}
    for title, settings, config, defaults in (
        ("model", MODEL_SETTINGS, ViTConfig(), models),
        ("training", TRAINING_SETTINGS, TrainingConfig(), RECIPES),
        ("augmentation (0 turns it off)", AUGMENTATION_SETTINGS, Augmentation(), augmentations),
    ):
        group = parser.add_argument_group(title)
        for name, text in settings.items():
            values = {recipe: getattr(default, name) for recipe, default in defaults.items()}
            values = {recipe: f"{x:g}" if isinstance(x, float) else str(x) for recipe, x in values.items()}
            shown = ", ".join(f"{recipe} {value}" for recipe, value in values.items())
            if len(set(values.values())) == 1:
                shown = values["tuned"]
            kinds = {int: (integer, "N"), float: (number, "X"), str: (str, "WORD")}
            kind, metavar = (size, "N") if name == "patch_size" else kinds[type(getattr(config, name))]
            text = f"{text} (default: {shown})"
            group.add_argument(flag(name), dest=name, type=kind, metavar=metavar, help=text)


def memory_advice(options):
    size = options.batch_size or RECIPES[options.recipe or "tuned"].batch_size
    text = "try a smaller model or batch"
    if size > 1:
        text += f", such as --batch-size {size // 2} in place of {size}"
    return text + (", in a new run, because --resume keeps both" if options.resume else "")


def run(options):
    with ExitStack() as locks:  # the folder is locked from the first look at its files to the last result
        run_in_folder(options, locks)


def run_in_folder(options, locks):
    """Start or resume a run. The lock of its folder is entered into `locks`, an `ExitStack`."""
    for name in ("stop-after", "train-limit", "test-limit"):
        require_range(options, name, 1)
    require_range(options, "workers", 1, 1024)
    backend = get_backend(options.device)
    try:
        training, data, folder = (resume if options.resume else start)(options, backend, locks)
    except ValueError as error:
        raise ValueError(with_flag(str(error))) from error
    options.batch_size = training.config.batch_size  # for `memory_advice`
    state, epochs = training.state, training.config.epochs
    restart = f"tinyvit train --resume {shlex.quote(str(folder))}"
    if training.finished and (folder / results.METRICS).exists():
        print(f"all {epochs} epochs in {folder} are done")
        print(f"to test the model again: tinyvit evaluate {shlex.quote(str(folder))}")
        print(f"to train longer: {restart} --epochs {2 * epochs}")
        return
    console.require_memory(memory_needed(training))
    print(f"model: {state.parameters.flat.size:,} parameters")
    print(f"data set: {data.description}")
    print(f"data: {training.train_images:,} training, {len(training.validation[1]):,} validation and "
          f"{len(data.test_images):,} test images")  # fmt: skip
    print(f"device: {backend.device}, {describe(training.step)}\nresults: {folder}", flush=True)
    try:
        with console.cleanup_after_signals():
            if training.config.augmentation:
                results.write_augmentation_sheet(folder, data.train_images[:6], training.config.augmentation)
            with Progress(training) as progress:
                training.run(folder, progress.on_step, progress.on_epoch, options.stop_after)
            if not training.finished:
                print(f"stopped after epoch {state.epoch} of {epochs}; to continue: {restart}")
                return
            finish(training, data, folder, backend)
    except TrainingStopped as error:
        place = "after the last epoch" if training.finished else f"in epoch {state.epoch + 1}"
        status = 128 + (error.signal or signal.SIGINT)
        raise CommandError(f"stopped {place}; nothing is lost; to continue: {restart}", status) from error
    except KeyboardInterrupt as error:
        word, status = console.interruption()
        raise CommandError(f"{word}; {advice_to_continue(folder)}", status) from error
    except TrainingDiverged as error:
        kept = (folder / CHECKPOINT).exists()
        good = f"the last good checkpoint is {folder / CHECKPOINT}" if kept else "there is no checkpoint"
        raise CommandError(f"error: {error}; {good}", 1) from error
    except WorkerError as error:
        raise CommandError(f"error: {error}\n{advice_to_continue(folder)}", 1) from error
    except OSError as error:
        if not (folder / CHECKPOINT).exists():
            raise
        raise CommandError(f"error: {in_words(error)}; {advice_to_continue(folder)}", 2) from error


def advice_to_continue(folder):
    """Return how to continue an interrupted run, which may be without a checkpoint."""
    if not (folder / CHECKPOINT).exists():
        return "there is no checkpoint yet: start the run again"
    return f"to continue from the last checkpoint: tinyvit train --resume {shlex.quote(str(folder))}"


def memory_needed(training):
    """Return about how many bytes a run will still take: threads, pictures, copies of the weights, activations."""
    config, size = training.model_config, training.state.parameters.flat.size
    per_token = config.depth * (16 * config.width + 4 * config.mlp_width + config.heads * config.tokens)
    return 200e6 + 110e6 * training.step.workers + 64 * size + 4 * CHUNK_TOKENS * per_token


def describe(step):
    """Return the mode of a GPU, or the number of workers on a CPU, in words."""
    if step.mode == "plain":
        loops = ", compiled loops" if step.loops == "on" else ""
        return "mode plain" if step.asynchronous else f"{step.workers} worker{'s' * (step.workers > 1)}{loops}"
    return f"mode {step.mode}, {step.precision}, kernels compiled in {step.compile_seconds:.1f} s"


def settings_of(options, names):
    """Return the settings among `names` that the command line sets, as a dict."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def start(options, backend, locks):
    """Return a new run, its data and its folder, which it creates and locks."""
    recipe = options.recipe or "tuned"
    model_settings = settings_of(options, MODEL_SETTINGS)
    config = replace(RECIPES[recipe], **settings_of(options, TRAINING_SETTINGS))
    augmentation = replace(config.augmentation, **settings_of(options, AUGMENTATION_SETTINGS))
    origin = {
        "recipe": recipe,
        "data_dir": options.data and str(options.data),
        "train_limit": options.train_limit,
        "test_limit": options.test_limit,
        "precision": options.precision or "float32",
    }
    classes = model_settings.get("classes")
    data = load_data(origin, classes if classes is None else ViTConfig(classes=classes).classes)
    model_settings |= {"classes": data.classes, "class_names": data.class_names}
    if origin["data_dir"] is None:  # also for a part of MNIST
        model_settings |= {"pixel_mean": ViTConfig.pixel_mean, "pixel_deviation": ViTConfig.pixel_deviation}
    validation = config.validation
    if options.validation is None:  # a small set keeps most of its images for training
        validation = min(validation, len(data.train_images) // 12)
        if data.validation and not options.train_limit:
            validation = data.validation
    training = Training(
        fitting_config(data.train_images, data.train_labels, **model_settings),
        replace(config, augmentation=augmentation, validation=validation),
        data.train_images,
        data.train_labels,
        backend,
        workers=options.workers,
        precision=origin["precision"],
        kernels=options.kernels,
        loops=options.loops,
    )
    training.state.origin = origin
    if options.out is None:
        folder = new_folder(Path("runs") / f"{recipe}-seed{config.seed}")
        locks.enter_context(locked_folder(folder))
        return training, data, folder
    if options.out.suffix == ".safetensors":
        raise ValueError(f"--out {options.out}: expected a folder for the results: leave out the file name")
    make_option_folder("--out", options.out)
    locks.enter_context(locked_folder(options.out))
    if (options.out / CHECKPOINT).exists():
        other = f"continue it with --resume {shlex.quote(str(options.out))}"
        if (options.out / results.METRICS).exists():
            other = f"test it with tinyvit evaluate {shlex.quote(str(options.out))}"
        raise ValueError(f"--out {options.out}: this folder contains a run: {other}, or give another folder")
    return training, data, options.out


def load_data(origin, classes):
    """Return the data set of a run, which its `origin` describes, and put its full path there."""
    data = load_dataset(origin.get("data_dir"), classes=classes)
    origin["data_dir"] = origin.get("data_dir") and data.source
    train, test = origin.get("train_limit"), origin.get("test_limit")
    return replace(
        data,
        train_images=data.train_images[:train],
        train_labels=data.train_labels[:train],
        test_images=data.test_images[:test],
        test_labels=data.test_labels[:test],
    )


def new_folder(folder):
    """Create and return `folder`, or the first of folder-2, folder-3, ... that does not exist."""
    make_option_folder("--out", folder.parent)
    number, candidate = 1, folder
    while True:
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError:  # an earlier run, or a run that started in this moment, uses it
            number += 1
            candidate = folder.with_name(f"{folder.name}-{number}")


def resume(options, backend, locks):
    """Return the run to continue, with the settings of its checkpoint, its data and its folder, which it locks."""
    if options.resume.is_file():
        raise ValueError(f"--resume {options.resume}: expected the folder of a run: give {options.resume.parent}")
    if not options.resume.is_dir():
        raise ValueError(f"--resume {options.resume}: there is no such folder: give the folder of a run")
    if not (options.resume / CHECKPOINT).exists():
        raise ValueError(f"--resume {options.resume}: this folder has no {CHECKPOINT}: give the folder of a run")
    locks.enter_context(locked_folder(options.resume))
    _, info = read_checkpoint(options.resume)
    origin, before = info["origin"], info["training"]
    fixed = {**info["model"], **before, **before["augmentation"]}
    fixed |= {name: origin.get(name) for name in ("recipe", "train_limit", "test_limit")}
    for name in set(fixed) - {"epochs"}:
        value = getattr(options, name, None)
        if value is not None and value != fixed[name]:
            raise ValueError(
                f"--resume keeps {flag(name)} at {fixed[name]}, so that it cannot be {value}: leave it out, or start "
                "a new run"
            )
    if options.out not in (None, options.resume):
        raise ValueError(f"--resume writes its results into {options.resume}: leave out --out")
    if options.data:
        origin["data_dir"] = str(options.data)
    try:
        data = load_data(origin, info["model"]["classes"])
    except DataError as error:
        raise ValueError(f"{error}; this is the data of the run: if it has moved, give --data") from error
    earlier = origin.get("precision", "float32")
    kept = earlier if backend.device == "gpu" and options.kernels != "off" else "float32"
    origin["precision"] = options.precision or kept
    training = Training.resume(
        options.resume,
        data.train_images,
        data.train_labels,
        backend,
        epochs=options.epochs,
        workers=options.workers,
        precision=origin["precision"],
        kernels=options.kernels,
        loops=options.loops,
    )
    training.state.origin = origin
    if origin["precision"] != earlier:
        print(f"note: the run continues in {origin['precision']}, not in {earlier} as before", file=sys.stderr)
    if (workers := training.step.record["workers"]) != info["workers"]:
        print(
            f"note: the run continues with --workers {workers}, not {info['workers']} as before:\n"
            "the weights differ in their last digits from those of a run with one number",
            file=sys.stderr,
        )
    if info["loops"] in ("on", "off") and (loops := training.step.record["loops"]) != info["loops"]:
        print(
            f"note: the run continues with --loops {loops}, not {info['loops']} as before:\n"
            "the weights differ in their last digits from those of a run that keeps its choice of --loops",
            file=sys.stderr,
        )
    epochs = training.config.epochs
    if epochs != before["epochs"] and training.config.schedule == "cosine":
        print(
            f"note: the learning rate falls over {epochs} epochs, not over {before['epochs']} as before:\n"
            f"the weights differ from those of a run that begins with {epochs} epochs.\n"
            f"To stop early and resume to the same weights, begin with\n--epochs {epochs} --stop-after N",
            file=sys.stderr,
        )
    return training, data, options.resume


def finish(training, data, folder, backend):
    """Test the model and write all results."""
    state, step, config = training.state, training.step, training.config
    model = VisionTransformer(training.model_config, state.weights)
    model.save(folder / MODEL, {"recipe": state.origin.get("recipe"), "seed": config.seed})
    with use_loops("off") if step.loops == "off" else nullcontext():
        evaluation = results.write_evaluation(
            folder,
            model=model,
            images=data.test_images,
            labels=data.test_labels,
            workers=step.workers,
        )
    metrics = {
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "parameters": int(state.parameters.flat.size),
        "seconds": state.seconds,
        "images_per_second": config.epochs * training.train_images / state.seconds,
        "device": backend.device,
        "precision": step.precision,
        "kernels": "off" if step.mode == "plain" else step.mode,
        "compile_seconds": step.compile_seconds,
        "workers": step.workers,
        "loops": step.loops,
        "seed": config.seed,
        "recipe": state.origin.get("recipe"),
        "versions": results.versions(backend),
        "origin": state.origin,
        "train_images": training.train_images,
        "validation_images": len(training.validation[1]),
        "test_images": len(data.test_images),
        "model": training.model_config.as_dict(),
        "training": config.as_dict(),
        "warning": training.no_learning(),
        "history": state.history,
    }
    results.write_history(folder, state.history, config)
    results.write_metrics(folder, metrics)
    print(f"test accuracy {100 * evaluation.accuracy:.2f} %, loss {evaluation.loss:.4f}, "
          f"{len(data.test_images):,} images, {state.seconds:.0f} s of training\nresults: {folder}")  # fmt: skip
