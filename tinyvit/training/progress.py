"""Show the progress of a run: a bar on a terminal, and one line per epoch."""

import contextlib
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

if TYPE_CHECKING:
    from tinyvit.training.loop import Training


class Progress:
    """A progress bar over all images of a run, and one line per epoch.

    Use it as a context manager, and pass `on_step` and `on_epoch` to `Training.run`.

    Parameters
    ----------
    run : Training
        The run to show.
    silent : bool, optional
        If true, nothing is shown.
    """

    def __init__(self, run: "Training", silent: bool = False) -> None:
        self.silent = silent
        self.bar = tqdm(
            total=run.config.epochs * run.train_images,
            initial=run.state.epoch * run.train_images + run.images_done,
            unit=" images",
            disable=silent or sys.stderr is None or not sys.stderr.isatty(),
            ncols=80,
            smoothing=0.05,
        )
        self.shown = time.monotonic()

    def __enter__(self) -> "Progress":
        self._resources = contextlib.ExitStack()
        self._resources.callback(self.bar.close)
        if not self.bar.disable:  # notes go above the bar
            self._resources.enter_context(logging_redirect_tqdm([logging.getLogger("tinyvit")]))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._resources.__exit__(*exception)

    def on_step(self, run: "Training") -> None:
        """Update the bar, at most four times per second.

        Parameters
        ----------
        run : Training
            The run, after a step.
        """
        if self.bar.disable or time.monotonic() - self.shown < 0.25:
            return
        self.shown = time.monotonic()
        self.bar.set_description(f"epoch {run.state.epoch + 1}/{run.config.epochs}", refresh=False)
        if run.images_done and not run.step.asynchronous:
            loss_sum, _ = run.step.totals()
            self.bar.set_postfix_str(f"loss {loss_sum / run.images_done:.3f}", refresh=False)
        self.bar.update(run.state.epoch * run.train_images + run.images_done - self.bar.n)

    def on_epoch(self, run: "Training") -> None:
        """Print the line of the last epoch.

        Parameters
        ----------
        run : Training
            The run, after an epoch.
        """
        if self.silent:
            return
        self.bar.update(run.state.epoch * run.train_images - self.bar.n)
        self.bar.clear()
        print(epoch_line(run), flush=True)
        self.bar.refresh()


def epoch_line(run: "Training") -> str:
    """Return the losses, accuracies and seconds of the last epoch in one line.

    Parameters
    ----------
    run : Training
        A run with at least one finished epoch.

    Returns
    -------
    str
        At most 80 characters.
    """
    *earlier, record = run.state.history
    seconds = record["seconds"] - (earlier[-1]["seconds"] if earlier else 0.0)
    line = f"epoch {record['epoch']:2d}/{run.config.epochs}"
    line += f"  loss {_loss(record['train_loss'])}, {100 * record['train_accuracy']:.2f} %"
    if record["validation_loss"] is not None:
        line += f"  validation {_loss(record['validation_loss'])}, {100 * record['validation_accuracy']:.2f} %"
    return line + f"  {seconds:.0f} s"


def _loss(value):
    """Return a loss in at most seven characters."""
    return f"{value:.4f}"[:7]  # losses of 100 and more have fewer decimals, so that the line stays short
