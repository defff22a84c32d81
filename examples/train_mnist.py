"""Train a Vision Transformer on MNIST, or on any data set of the same shape, and write all there is to know of it.

    python examples/train_mnist.py                        the best recipe, about five minutes on two cores
    python examples/train_mnist.py --recipe note          the technical note's training
    python examples/train_mnist.py --data-dir fashion/    any folder with the usual four idx files
    python examples/train_mnist.py --resume runs/tuned-seed0      go on with a run that was stopped
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from tinyvit.checkpoint import CheckpointError, save_model
from tinyvit.data import DataError, load_mnist
from tinyvit.data.augment import Augmentation
from tinyvit.gpu import DeviceError, get_backend
from tinyvit.gpu.diagnosis import is_out_of_memory, one_line
from tinyvit.kernels import PRECISIONS
from tinyvit.model import ViTConfig
from tinyvit.training import (
    CHECKPOINT,
    KERNELS,
    RECIPES,
    Training,
    TrainingConfig,
    TrainingDiverged,
    TrainingStopped,
    WorkerError,
    read_info,
)
from tinyvit.training.results import (
    METRICS,
    MODEL,
    versions,
    write_augmentation_sheet,
    write_evaluation,
    write_history,
    write_metrics,
)

MODEL_SETTINGS = {  # flag: what --help says; the names are ViTConfig's
    "patch_size": "side of a patch, pixels",
    "width": "length of a token",
    "depth": "blocks",
    "heads": "attention heads",
    "mlp_width": "hidden width of the MLPs",
    "classes": "classes, numbered from 0",
    "gelu": "'erf' (exact) or 'tanh'",
}
TRAINING_SETTINGS = {  # likewise, of TrainingConfig
    "epochs": "passes over the training set",
    "batch_size": "images a step",
    "learning_rate": "per step; the peak, if the schedule has one",
    "schedule": "'constant', or 'cosine' down to 0",
    "warmup_steps": "steps up to the peak",
    "weight_decay": "decoupled, on matrices",
    "beta1": "Adam's first decay",
    "beta2": "Adam's second decay",
    "clip": "largest norm of the gradient; 0 does not clip",
    "smoothing": "share of a label that goes to all classes",
    "average": "decay of the weights' average, per 4 steps; 0 for none",
    "validation": "last training images, held back to validate; at most a twelfth if not given",
    "seed": "from which everything random follows",
}
AUGMENTATION_SETTINGS = {  # likewise, of Augmentation
    "rotation": "degrees, either way",
    "scale": "share by which to grow or shrink, 0.1 for 1/1.1 to 1.1",
    "shear": "degrees, either way",
    "shift": "pixels, any way",
    "flip": "probability of a mirror image",
}
SHORT = {"learning_rate": "--lr", "smoothing": "--label-smoothing"}


def flag(name):
    return SHORT.get(name, "--" + name.replace("_", "-"))


def folder_name(text):
    if not text:
        raise argparse.ArgumentTypeError("the name of a folder cannot be empty")
    return Path(text)


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("the run")
    group.add_argument("--recipe", choices=list(RECIPES), help="where settings come from that no flag gives (tuned)")
    devices, text = ["auto", "cpu", "gpu"], "where to compute; auto is a GPU if one does, else the CPU (auto)"
    group.add_argument("--device", choices=devices, default="auto", help=text)
    text = "of a GPU's matrix products; sums, weights and all else are float32 (float32)"
    group.add_argument("--precision", choices=PRECISIONS, help=text)
    text = "how a GPU takes a step: one CUDA graph, kernels one by one, or plain operations (graph)"
    group.add_argument("--kernels", choices=KERNELS, help=text)
    text = "processes side by side (one a core, as long as each has 8 images of a batch)"
    group.add_argument("--workers", type=int, metavar="N", help=text)
    group.add_argument("--out", type=folder_name, metavar="DIR", help="folder for the results (runs/RECIPE-seedN)")
    group.add_argument("--resume", type=folder_name, metavar="DIR", help="go on with the run in DIR, bit for bit")
    group.add_argument("--stop-after", type=int, metavar="N", help="leave after N epochs, to be resumed")

    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", type=folder_name, metavar="DIR", help="four idx files, raw or .gz (MNIST)")
    group.add_argument("--train-limit", type=int, metavar="N", help="use the first N training images only")
    group.add_argument("--test-limit", type=int, metavar="N", help="test on the first N images only")

    for title, settings, config, of_recipe in (
        ("model", MODEL_SETTINGS, ViTConfig(), lambda recipe: ViTConfig()),
        ("training", TRAINING_SETTINGS, TrainingConfig(), lambda recipe: recipe),
        ("augmentation (each 0 for none)", AUGMENTATION_SETTINGS, Augmentation(), lambda recipe: recipe.augmentation),
    ):
        group = parser.add_argument_group(title)
        for name, text in settings.items():
            defaults = {r: getattr(of_recipe(recipe), name) for r, recipe in RECIPES.items()}
            shown = ", ".join(f"{r} {value}" for r, value in defaults.items())
            if len(set(defaults.values())) == 1:
                shown = str(defaults["tuned"])
            kind = type(getattr(config, name))
            metavar = {int: "N", float: "X", str: "WORD"}[kind]
            group.add_argument(flag(name), dest=name, type=kind, metavar=metavar, help=f"{text} ({shown})")
    return parser.parse_args(arguments)


def given(options, names):
    """Return the settings among `names` that the command line gave."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def load_data(data_dir, train_limit, test_limit, classes):
    for name, limit in (("--train-limit", train_limit), ("--test-limit", test_limit)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} must be at least 1, not {limit}")
    data = load_mnist(data_dir, classes=classes)
    return replace(
        data,
        train_images=data.train_images[:train_limit],
        train_labels=data.train_labels[:train_limit],
        test_images=data.test_images[:test_limit],
        test_labels=data.test_labels[:test_limit],
    )


def start(options, backend):
    """Return a new run, its data and its folder, which is made here."""
    recipe = options.recipe or "tuned"
    model_settings = given(options, MODEL_SETTINGS)
    origin = {
        "recipe": recipe,
        "data_dir": options.data_dir and str(options.data_dir.resolve()),
        "train_limit": options.train_limit,
        "test_limit": options.test_limit,
        "precision": options.precision or "float32",
    }
    classes = ViTConfig(classes=model_settings.get("classes", ViTConfig.classes)).classes
    config = replace(RECIPES[recipe], **given(options, TRAINING_SETTINGS))
    config = replace(config, augmentation=replace(config.augmentation, **given(options, AUGMENTATION_SETTINGS)))
    data = load_data(options.data_dir, options.train_limit, options.test_limit, classes)
    if options.validation is None:  # of a small set most is for training
        config = replace(config, validation=min(config.validation, len(data.train_images) // 12))
    model_config = ViTConfig(image_size=data.train_images.shape[1], **model_settings)
    run = Training(
        *(model_config, config, data.train_images, data.train_labels, backend, options.workers),
        *(origin["precision"], options.kernels),
    )
    run.origin = origin
    if options.out is None:
        return run, data, new_folder(Path("runs") / f"{recipe}-seed{config.seed}")
    if (options.out / CHECKPOINT).exists():
        raise ValueError(
            f"{options.out} holds a run already: go on with it by --resume {options.out}, or give another --out"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    return run, data, options.out


def new_folder(folder):
    """Make and return `folder`, or the first of folder-2, folder-3, ... that is not there yet."""
    number, candidate = 1, folder
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:  # by an earlier run, or one that started just now
            number += 1
            candidate = folder.with_name(f"{folder.name}-{number}")


def resume(options, backend):
    """Return the run to go on with, its data and its folder; its settings are the checkpoint's."""
    info = read_info(options.resume)
    fixed = {
        **info["model"],
        **info["training"],
        **info["training"]["augmentation"],
        **{name: info["origin"].get(name) for name in ("recipe", "data_dir", "train_limit", "test_limit")},
    }
    for name in set(fixed) - {"epochs", "data_dir"}:
        value = getattr(options, name, None)
        if value is not None and value != fixed[name]:
            raise ValueError(f"--resume keeps {flag(name)} at {fixed[name]}: it cannot become {value} half-way")
    if options.out not in (None, options.resume):
        raise ValueError(f"--resume goes on in its own folder {options.resume}: leave out --out")
    origin = info["origin"]
    if options.data_dir:
        origin["data_dir"] = str(options.data_dir.resolve())
    limits = origin.get("train_limit"), origin.get("test_limit")
    try:
        data = load_data(origin.get("data_dir"), *limits, info["model"]["classes"])
    except DataError as error:
        raise ValueError(f"{error} (the data of this run; if it has moved, give --data-dir)") from error
    if data.train_images.shape[1] != info["model"]["image_size"]:
        found = "{} x {}".format(*data.train_images.shape[1:])
        raise ValueError(f"{data.source}: the run reads images of another size, found {found} pixels")
    before = origin.get("precision", "float32")
    kept = before if backend.device == "gpu" and options.kernels != "off" else "float32"
    origin["precision"] = options.precision or kept
    if origin["precision"] != before:
        print(f"note: from here on in {origin['precision']}, not {before} as before", file=sys.stderr)
    run = Training.resume(
        *(options.resume, data.train_images, data.train_labels, backend, options.epochs, options.workers),
        *(origin["precision"], options.kernels),
    )
    run.origin = origin
    if (workers := run.cpu_workers) != info["workers"]:
        print(f"note: --workers {workers}, not {info['workers']} as before: not the same bits", file=sys.stderr)
    if run.config.epochs != info["training"]["epochs"] and run.config.schedule == "cosine":
        print(
            f"note: the learning rate was to fall over {info['training']['epochs']} epochs and now falls over "
            f"{run.config.epochs}: not the weights of a run that was begun so. To stop early and go on to the same "
            f"weights, begin with --epochs {run.config.epochs} --stop-after N",
            file=sys.stderr,
        )
    return run, data, options.resume


class Progress:
    """A bar over all images of a run where there is a terminal, and one line an epoch everywhere."""

    def __init__(self, run):
        self.total = run.config.epochs * len(run.images)
        done = run.epoch * len(run.images) + run.place
        self.bar = tqdm(
            total=self.total,
            initial=done,
            unit=" images",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            smoothing=0.05,
        )
        self.shown = time.monotonic()

    def on_step(self, run):
        if self.bar.disable or time.monotonic() - self.shown < 0.25:
            return
        self.shown = time.monotonic()
        self.bar.set_description(f"epoch {run.epoch + 1}/{run.config.epochs}", refresh=False)
        if run.backend.device == "cpu":  # a GPU would have to be waited for
            loss, accuracy = float(run.loss_sum) / run.place, int(run.correct) / run.place
            self.bar.set_postfix_str(f"loss {loss:.4f}, accuracy {100 * accuracy:.2f} %", refresh=False)
        self.bar.update(run.epoch * len(run.images) + run.place - self.bar.n)

    def on_epoch(self, run):
        record = run.history[-1]
        before = run.history[-2]["seconds"] if len(run.history) > 1 else 0.0
        seconds = record["seconds"] - before
        line = f"epoch {record['epoch']:2d}/{run.config.epochs}"
        line += f"  train loss {record['train_loss']:.4f} accuracy {100 * record['train_accuracy']:.2f} %"
        if record["validation_loss"] is not None:
            line += f"  validation loss {record['validation_loss']:.4f}"
            line += f" accuracy {100 * record['validation_accuracy']:.2f} %"
        line += f"  {len(run.images) / seconds:,.0f} images/s  {seconds:.0f} s"
        self.bar.update(run.epoch * len(run.images) - self.bar.n)
        self.bar.clear()
        print(line, flush=True)
        self.bar.refresh()


def finish(run, data, folder, backend):
    """Read the test set once, and write everything."""
    model = run.model()
    save_model(folder / MODEL, model, {"recipe": run.origin["recipe"], "seed": run.config.seed})
    evaluation = write_evaluation(folder, model, data.test_images, data.test_labels, run.workers)
    images_seen = run.config.epochs * len(run.images)
    metrics = {
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "parameters": int(model.parameters.flat.size),
        "seconds": run.seconds,
        "images_per_second": images_seen / run.seconds,
        "device": backend.device,
        "precision": run.precision,
        "kernels": run.kernels,
        "compile_seconds": run.compile_seconds,
        "workers": run.workers,
        "seed": run.config.seed,
        "recipe": run.origin["recipe"],
        "versions": versions(backend),
        "origin": run.origin,
        "train_images": len(run.images),
        "validation_images": len(run.validation[1]),
        "test_images": len(data.test_images),
        "model": run.model_config.as_dict(),
        "training": run.config.as_dict(),
        "history": run.history,
    }
    write_history(folder, run.history)
    write_metrics(folder, metrics)
    print(
        f"test accuracy {100 * evaluation.accuracy:.2f} %, loss {evaluation.loss:.4f}, on {len(data.test_images):,} "
        f"images, after {run.seconds:.0f} s of training; all results are in {folder}"
    )


def how(run):
    """Say what takes the steps of a run."""
    if run.backend.device == "cpu":
        return f"{run.workers} workers"
    if run.kernels == "off":
        return "plain operations"
    what = "a graph of kernels" if run.kernels == "graph" else "kernels"
    return f"{what} in {run.precision}, compiled in {run.compile_seconds:.1f} s"


def too_little_memory(error, options, run):
    """Return what to say of an error for want of memory; run: the `Training`, None if it had not come to be."""
    size = run.config.batch_size if run else options.batch_size or RECIPES[options.recipe or "tuned"].batch_size
    text = "not enough memory: try a smaller model or batch"
    if size > 1:
        text += f", such as --batch-size {size // 2}, half of the present {size}"
    if options.resume:
        text += ", which takes a new run, as --resume keeps both"
    return f"{text} ({one_line(error)})"


def main(arguments=None):
    options, run = parse_arguments(arguments), None
    try:
        if options.stop_after is not None and options.stop_after < 1:
            raise ValueError(f"--stop-after must be at least 1, not {options.stop_after}")
        backend = get_backend(options.device)
        run, data, folder = resume(options, backend) if options.resume else start(options, backend)
        if run.finished and (folder / METRICS).exists():
            print(f"all {run.epoch} epochs in {folder} are done; to evaluate again: evaluate_mnist.py {folder}")
            return 0
        print(
            f"{run.parameters.flat.size:,} parameters, {len(run.images):,} training, {len(run.validation[1]):,} "
            f"validation and {len(data.test_images):,} test images, device {backend.device}, {how(run)}; "
            f"results go to {folder}",
            flush=True,
        )
        if run.config.augmentation:
            write_augmentation_sheet(folder, data.train_images[:6], run.config.augmentation)
        progress = Progress(run)
        try:
            run.run(folder, progress.on_step, progress.on_epoch, options.stop_after)
        finally:
            progress.bar.close()
        if run.finished:
            finish(run, data, folder, backend)
        else:
            print(f"stopped after epoch {run.epoch} of {run.config.epochs}; go on with --resume {folder}")
    except TrainingStopped:
        print(f"stopped in epoch {run.epoch + 1}; nothing is lost: go on with --resume {folder}", file=sys.stderr)
        return 130
    except TrainingDiverged as error:
        good = folder / CHECKPOINT
        kept = f"; the last good checkpoint is {good}" if good.exists() else "; it came before the first checkpoint"
        print(f"error: {error}{kept}", file=sys.stderr)
        return 1
    except WorkerError as error:
        print(f"error: {error}\nnothing but the last seconds is lost: go on with --resume {folder}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; if training had begun, --resume goes on from its last checkpoint", file=sys.stderr)
        return 130
    except (DataError, DeviceError, CheckpointError, ArithmeticError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:  # a GPU's may be either
        if not is_out_of_memory(error):
            raise
        print(f"error: {too_little_memory(error, options, run)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
