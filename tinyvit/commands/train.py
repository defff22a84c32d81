"""Train a Vision Transformer on MNIST, or on any data set of the same form.

    tinyvit train                       the best recipe, 5 minutes on two cores
    tinyvit train --recipe note         the technical note's training
    tinyvit train --data fashion/       a folder with the usual four idx files
    tinyvit train --resume runs/tuned-seed0     continue a run that was stopped

The run's folder gets the model, a checkpoint, its history and the evaluation
on the test set, in numbers and in pictures.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tinyvit.classifier import VisionTransformer, fitting_patch_size
from tinyvit.commands import CommandError, require_range
from tinyvit.data import DataError, load_mnist
from tinyvit.data.augment import Augmentation
from tinyvit.gpu import get_backend
from tinyvit.kernels import PRECISIONS
from tinyvit.model import ViTConfig
from tinyvit.training import CHECKPOINT, RECIPES, Training, TrainingConfig, WorkerError, read_checkpoint, results
from tinyvit.training.loop import TrainingDiverged, TrainingStopped
from tinyvit.training.progress import Progress
from tinyvit.training.step import KERNELS

MODEL_SETTINGS = {  # setting of ViTConfig: what --help says
    "patch_size": "side of a patch, pixels",
    "width": "length of a token",
    "depth": "blocks",
    "heads": "attention heads",
    "mlp_width": "hidden width of the MLPs",
    "classes": "classes, numbered from 0",
    "gelu": "'erf' (exact) or 'tanh'",
}
TRAINING_SETTINGS = {  # setting of TrainingConfig
    "epochs": "passes over the training set",
    "batch_size": "images per step",
    "learning_rate": "per step; the peak, if the schedule has one",
    "schedule": "'constant', or 'cosine' down to 0",
    "warmup_steps": "steps up to the peak",
    "weight_decay": "decoupled, on matrices",
    "beta1": "Adam's first decay",
    "beta2": "Adam's second decay",
    "clip": "largest norm of the gradient; 0 does not clip",
    "smoothing": "share of a label that all classes get",
    "average": "decay of the weights' average, per 4 steps; 0 for none",
    "validation": "images at the end of the training set that only validate; of a small set a twelfth",
    "seed": "decides everything random",
}
AUGMENTATION_SETTINGS = {  # setting of Augmentation
    "rotation": "degrees, either way",
    "scale": "share to grow or shrink by: 0.1 for 1/1.1 to 1.1",
    "shear": "degrees, either way",
    "shift": "pixels, any way",
    "flip": "probability of a mirror image",
}
SHORT = {"learning_rate": "--lr", "smoothing": "--label-smoothing"}


def flag(name):
    """Return the flag of a setting."""
    return SHORT.get(name, "--" + name.replace("_", "-"))


def folder_name(text):
    if not text:
        raise argparse.ArgumentTypeError("the name of a folder cannot be empty")
    return Path(text)


def add_arguments(parser):
    parser.usage = "%(prog)s [options]"
    group = parser.add_argument_group("the run")
    group.add_argument("--recipe", choices=list(RECIPES), help="default settings, which flags override (tuned)")
    text = "where to compute; auto is a GPU if one computes, else the CPU (auto)"
    group.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto", help=text)
    group.add_argument("--precision", choices=PRECISIONS, help="of a GPU's matrix products (float32)")
    text = "how a GPU takes a step: one CUDA graph, kernels one by one, or plain operations (graph)"
    group.add_argument("--kernels", choices=KERNELS, help=text)
    text = "processes that share a batch (one per core, each with at least 8 images)"
    group.add_argument("--workers", type=int, metavar="N", help=text)
    group.add_argument("--out", type=folder_name, metavar="DIR", help="folder for the results (runs/RECIPE-seedN)")
    group.add_argument("--resume", type=folder_name, metavar="DIR", help="continue the run in DIR, bit for bit")
    group.add_argument("--stop-after", type=int, metavar="N", help="stop after N epochs, to resume later")

    group = parser.add_argument_group("data")
    text = "folder with four idx files, raw or .gz (MNIST)"
    group.add_argument("--data", "--data-dir", type=folder_name, metavar="PATH", help=text)
    group.add_argument("--train-limit", type=int, metavar="N", help="use the first N training images only")
    group.add_argument("--test-limit", type=int, metavar="N", help="test on the first N images only")

    models = {name: ViTConfig() for name in RECIPES}
    augmentations = {name: recipe.augmentation for name, recipe in RECIPES.items()}
    for title, settings, config, defaults in (
        ("model", MODEL_SETTINGS, ViTConfig(), models),
        ("training", TRAINING_SETTINGS, TrainingConfig(), RECIPES),
        ("augmentation (each 0 for none)", AUGMENTATION_SETTINGS, Augmentation(), augmentations),
    ):
        group = parser.add_argument_group(title)
        for name, text in settings.items():
            values = {recipe: getattr(default, name) for recipe, default in defaults.items()}
            shown = ", ".join(f"{recipe} {value}" for recipe, value in values.items())
            if len(set(values.values())) == 1:
                shown = str(values["tuned"])
            kind = type(getattr(config, name))
            metavar = {int: "N", float: "X", str: "WORD"}[kind]
            group.add_argument(flag(name), dest=name, type=kind, metavar=metavar, help=f"{text} ({shown})")


def memory_advice(options):
    size = options.batch_size or RECIPES[options.recipe or "tuned"].batch_size
    text = "try a smaller model or batch"
    if size > 1:
        text += f", such as --batch-size {size // 2}, half of the present {size}"
    return text + (", in a new run, as --resume keeps both" if options.resume else "")


def run(options):
    for name in ("stop-after", "train-limit", "test-limit"):
        require_range(options, name, 1)
    backend = get_backend(options.device)
    training, data, folder = resume(options, backend) if options.resume else start(options, backend)
    options.batch_size = training.config.batch_size  # for `memory_advice`
    state, epochs, restart = training.state, training.config.epochs, f"tinyvit train --resume {folder}"
    if training.finished and (folder / results.METRICS).exists():
        print(f"all {epochs} epochs in {folder} are done\nto test the model again: tinyvit evaluate {folder}")
        return
    print(f"model: {state.parameters.flat.size:,} parameters")
    print(f"data: {training.train_images:,} training, {len(training.validation[1]):,} validation and "
          f"{len(data.test_images):,} test images")  # fmt: skip
    print(f"device: {backend.device}, {describe(training.step)}\nresults: {folder}", flush=True)
    try:
        if training.config.augmentation:
            results.write_augmentation_sheet(folder, data.train_images[:6], training.config.augmentation)
        with Progress(training) as progress:
            training.run(folder, progress.on_step, progress.on_epoch, options.stop_after)
        if not training.finished:
            print(f"stopped after epoch {state.epoch} of {epochs}; to continue: {restart}")
            return
        finish(training, data, folder, backend)
    except TrainingStopped as error:
        text = f"stopped in epoch {state.epoch + 1}; nothing is lost; to continue: {restart}"
        raise CommandError(text, 130) from error
    except KeyboardInterrupt as error:
        raise CommandError(f"interrupted; to continue from the last checkpoint: {restart}", 130) from error
    except TrainingDiverged as error:
        kept = (folder / CHECKPOINT).exists()
        good = f"the last good checkpoint is {folder / CHECKPOINT}" if kept else "there is no checkpoint yet"
        raise CommandError(f"error: {error}; {good}", 1) from error
    except WorkerError as error:
        text = f"error: {error}\nonly the last seconds are lost; to continue: {restart}"
        raise CommandError(text, 1) from error


def describe(step):
    """Return what takes the steps of a run, in words."""
    if step.mode == "plain":
        return "plain operations" if step.asynchronous else f"{step.workers} worker{'s' * (step.workers > 1)}"
    what = "one graph of kernels" if step.mode == "graph" else "kernels one by one"
    return f"{what} in {step.precision}, compiled in {step.compile_seconds:.1f} s"


def settings_of(options, names):
    """Return the settings among `names` that a flag sets."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def start(options, backend):
    """Return a new run, its data and its folder, which now exists."""
    recipe = options.recipe or "tuned"
    model_settings = settings_of(options, MODEL_SETTINGS)
    config = replace(RECIPES[recipe], **settings_of(options, TRAINING_SETTINGS))
    augmentation = replace(config.augmentation, **settings_of(options, AUGMENTATION_SETTINGS))
    origin = {
        "recipe": recipe,
        "data_dir": options.data and str(options.data.resolve()),
        "train_limit": options.train_limit,
        "test_limit": options.test_limit,
        "precision": options.precision or "float32",
    }
    data = load_data(origin, ViTConfig(classes=model_settings.get("classes", ViTConfig.classes)).classes)
    side = data.train_images.shape[1]
    if side % ViTConfig.patch_size:
        model_settings.setdefault("patch_size", fitting_patch_size(side))
    validation = config.validation
    if options.validation is None:  # of a small set most images are for training
        validation = min(validation, len(data.train_images) // 12)
    training = Training(
        ViTConfig(image_size=side, **model_settings),
        replace(config, augmentation=augmentation, validation=validation),
        data.train_images,
        data.train_labels,
        backend,
        workers=options.workers,
        precision=origin["precision"],
        kernels=options.kernels,
    )
    training.state.origin = origin
    if options.out is None:
        return training, data, new_folder(Path("runs") / f"{recipe}-seed{config.seed}")
    if (options.out / CHECKPOINT).exists():
        raise ValueError(
            f"{options.out} holds a run already: continue it with --resume {options.out}, or give another --out"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    return training, data, options.out


def load_data(origin, classes):
    """Return the data set of a run, as its `origin` describes it."""
    data = load_mnist(origin.get("data_dir"), classes=classes)
    train, test = origin.get("train_limit"), origin.get("test_limit")
    return replace(
        data,
        train_images=data.train_images[:train],
        train_labels=data.train_labels[:train],
        test_images=data.test_images[:test],
        test_labels=data.test_labels[:test],
    )


def new_folder(folder):
    """Make and return `folder`, or the first of folder-2, folder-3, ... that does not exist."""
    number, candidate = 1, folder
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:  # an earlier run, or one that started just now, has it
            number += 1
            candidate = folder.with_name(f"{folder.name}-{number}")


def resume(options, backend):
    """Return the run to continue, its data and its folder; its settings are the checkpoint's."""
    _, info = read_checkpoint(options.resume)
    origin, before = info["origin"], info["training"]
    fixed = {**info["model"], **before, **before["augmentation"]}
    fixed |= {name: origin.get(name) for name in ("recipe", "train_limit", "test_limit")}
    for name in set(fixed) - {"epochs"}:
        value = getattr(options, name, None)
        if value is not None and value != fixed[name]:
            raise ValueError(f"--resume keeps {flag(name)} at {fixed[name]}: it cannot become {value} half-way")
    if options.out not in (None, options.resume):
        raise ValueError(f"--resume continues in its own folder {options.resume}: leave out --out")
    if options.data:
        origin["data_dir"] = str(options.data.resolve())
    try:
        data = load_data(origin, info["model"]["classes"])
    except DataError as error:
        raise ValueError(f"{error} (the data of this run; if it has moved, give --data)") from error
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
    )
    training.state.origin = origin
    if origin["precision"] != earlier:
        print(f"note: from here on in {origin['precision']}, not {earlier} as before", file=sys.stderr)
    if (workers := training.step.record["workers"]) != info["workers"]:
        print(f"note: --workers {workers}, not {info['workers']} as before: not the same bits", file=sys.stderr)
    epochs = training.config.epochs
    if epochs != before["epochs"] and training.config.schedule == "cosine":
        print(
            f"note: the learning rate was to fall over {before['epochs']} epochs and now falls over\n"
            f"{epochs}: the weights differ from those of a run that began with {epochs} epochs.\n"
            f"To stop early and resume to the same weights, begin with\n--epochs {epochs} --stop-after N",
            file=sys.stderr,
        )
    return training, data, options.resume


def finish(training, data, folder, backend):
    """Test the model once, and write all results."""
    state, step, config = training.state, training.step, training.config
    model = VisionTransformer(training.model_config, state.weights)
    model.save(folder / results.MODEL, {"recipe": state.origin["recipe"], "seed": config.seed})
    evaluation = results.write_evaluation(folder, model, data.test_images, data.test_labels, step.workers)
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
        "seed": config.seed,
        "recipe": state.origin["recipe"],
        "versions": results.versions(backend),
        "origin": state.origin,
        "train_images": training.train_images,
        "validation_images": len(training.validation[1]),
        "test_images": len(data.test_images),
        "model": training.model_config.as_dict(),
        "training": config.as_dict(),
        "history": state.history,
    }
    results.write_history(folder, state.history)
    results.write_metrics(folder, metrics)
    print(f"test accuracy {100 * evaluation.accuracy:.2f} %, loss {evaluation.loss:.4f}, "
          f"{len(data.test_images):,} images, {state.seconds:.0f} s of training\nresults: {folder}")  # fmt: skip
