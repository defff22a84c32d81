"""The model behind the page: a bounded queue of digits to read, and a thread that reads all that wait at once.

One digit takes the model 1 ms alone and 0.4 ms among sixteen. Digits that arrive while the model is at work wait for
it, so the thread then takes all of them, up to a limit, as one batch. It never waits for a batch to fill.
"""

import asyncio
import contextlib
import json
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tinyvit.backend import one_blas_thread
from tinyvit.evaluate import rollout_of_attention
from tinyvit.model import block_attention, vit_forward
from tinyvit.ops import softmax_forward

MOST_SECONDS = 8.0  # in the queue: less than the page waits (10) and a connection may take (20)
DIGITS = 5  # of a probability or a share of attention, in an answer


class Busy(Exception):
    """The queue is full."""


@dataclass(eq=False)
class Job:
    """One digit to be read: how to prepare it, and the future that gets the answer."""

    prepare: object  # a function without arguments that returns a `Prepared`
    answer: asyncio.Future


class Reader:
    """Reads digits for a web server, in the order in which they come.

    model: a `VisionTransformer` on the CPU; most_at_once: digits per batch; most_waiting: digits in the queue, beyond
    which `read` raises `Busy`. Use it as an asynchronous context: it owns a thread.
    """

    def __init__(self, model, most_at_once=16, most_waiting=256):
        for name, value in (("most_at_once", most_at_once), ("most_waiting", most_waiting)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.model, self.most_at_once, self.most_waiting = model, most_at_once, most_waiting
        self._jobs = deque()

    async def __aenter__(self):
        self._exits = contextlib.ExitStack()
        self._exits.enter_context(one_blas_thread())  # the second core is the server's own
        self._pool = self._exits.enter_context(ThreadPoolExecutor(1, thread_name_prefix="reader"))
        self._came = asyncio.Event()
        self._task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *exception):
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        for job in self._jobs:
            job.answer.cancel()
        self._jobs.clear()
        self._exits.close()

    async def read(self, prepare):
        """Return the answer, JSON in bytes as `describe` makes it, for what `prepare()` gives in the reader's thread.

        Raises `Busy` at once if the queue is full, or after `MOST_SECONDS`, and what `prepare` raises, `PictureError`
        above all.
        """
        if len(self._jobs) >= self.most_waiting:
            raise Busy
        job = Job(prepare, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._came.set()
        try:
            return await asyncio.wait_for(job.answer, MOST_SECONDS)  # a timeout cancels the job
        except asyncio.TimeoutError:
            raise Busy from None

    async def _serve(self):
        loop = asyncio.get_running_loop()
        while True:
            await self._came.wait()
            count = min(self.most_at_once, len(self._jobs))
            jobs = [self._jobs.popleft() for _ in range(count)]
            if not self._jobs:
                self._came.clear()
            jobs = [job for job in jobs if not job.answer.cancelled()]  # their clients have waited too long
            if not jobs:
                continue
            try:
                answers = await loop.run_in_executor(self._pool, read_batch, self.model, [j.prepare for j in jobs])
            except asyncio.CancelledError:  # the server stops
                for job in jobs:
                    job.answer.cancel()
                raise
            except Exception as error:  # every job gets an answer, and the next batch may work
                answers = [error] * len(jobs)
            for job, answer in zip(jobs, answers, strict=True):
                if job.answer.done():
                    continue
                if isinstance(answer, Exception):
                    job.answer.set_exception(answer)
                else:
                    job.answer.set_result(answer)


def read_batch(model, preparations):
    """Return for each function in `preparations` the answer to what it gives, JSON in bytes, or what it raised."""
    answers = []
    for prepare in preparations:
        try:
            answers.append(prepare())
        except Exception as error:  # a bad drawing or a bug affects one digit: the others are read
            answers.append(error)
    sound = [i for i, prepared in enumerate(answers) if not isinstance(prepared, Exception)]
    if sound:
        images = np.stack([answers[i].image for i in sound])
        logits, cache = vit_forward(images, model.parameters, model.config)
        probabilities, _ = softmax_forward(logits.astype(np.float64))
        blocks = block_attention(cache)
        rollout = rollout_of_attention(blocks)
        asking = np.stack([weights[:, :, 0] for weights in blocks], axis=1)  # (B, depth, H, T): the class token's
        for place, i in enumerate(sound):
            answers[i] = describe(answers[i], probabilities[place], asking[place], rollout[place])
    return answers


def describe(prepared, probabilities, attention, rollout):
    """Return one answer as JSON, in bytes.

    prepared: `Prepared`; probabilities (classes,); attention (depth, H, T): how the class token shares its attention
    between itself, which comes first, and the patches; rollout (N,).
    """
    left, top, side = prepared.frame
    return json.dumps(
        {
            "digit": int(probabilities.argmax()),
            "probabilities": _numbers(probabilities),
            "pixels": prepared.image.tolist(),
            "frame": {"left": round(left, DIGITS), "top": round(top, DIGITS), "side": round(side, DIGITS)},
            "attention": _numbers(attention),
            "rollout": _numbers(rollout),
        },
        separators=(",", ":"),
        allow_nan=False,
    ).encode()


def _numbers(array):
    return array.astype(np.float64).round(DIGITS).tolist()
