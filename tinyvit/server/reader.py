"""The model behind the page: a bounded queue of digits, and a thread that reads all waiting digits as one batch.

The model needs 1 ms for a single digit and 0.4 ms per digit of a batch of sixteen. Digits that arrive while the model
computes wait in the queue. The thread then takes all of them, up to a limit. It never waits for a batch to fill.
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

MOST_SECONDS = 8.0  # in the queue; less than the time limits of the page (10) and of a connection (20)
DIGITS = 5  # decimal places of the numbers in an answer


class Busy(Exception):
    """The queue is full."""


@dataclass(eq=False)
class Job:
    """A digit in the queue."""

    prepare: object  # function without arguments that returns a `Prepared`
    answer: asyncio.Future


class Reader:
    """Reads digits for a web server in the order of their arrival. It is an asynchronous context manager.

    model: a `VisionTransformer` on the CPU; most_at_once: the largest batch; most_waiting: the length of the queue.
    """

    def __init__(self, model, most_at_once=16, most_waiting=256):
        for name, value in (("most_at_once", most_at_once), ("most_waiting", most_waiting)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.model, self.most_at_once, self.most_waiting = model, most_at_once, most_waiting
        self._jobs = deque()

    async def __aenter__(self):
        self._exits = contextlib.ExitStack()
        self._exits.enter_context(one_blas_thread())  # the server uses the other cores
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
        """Return the answer for the digit of `prepare()`, which runs in the reader's thread, as JSON in bytes.

        Raises `Busy` if the queue is full or after `MOST_SECONDS`, and every exception of `prepare`.
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
            jobs = [job for job in jobs if not job.answer.cancelled()]  # jobs in the queue for too long are cancelled
            if not jobs:
                continue
            try:
                answers = await loop.run_in_executor(self._pool, read_batch, self.model, [j.prepare for j in jobs])
            except asyncio.CancelledError:  # the server is stopping
                for job in jobs:
                    job.answer.cancel()
                raise
            except Exception as error:  # becomes the answer of every job, so that the next batch can follow
                answers = [error] * len(jobs)
            for job, answer in zip(jobs, answers, strict=True):
                if job.answer.done():
                    continue
                if isinstance(answer, Exception):
                    job.answer.set_exception(answer)
                else:
                    job.answer.set_result(answer)


def read_batch(model, preparations):
    """Return the answer, as JSON in bytes, for each function in `preparations`, or the exception that it raised."""
    answers = []
    for prepare in preparations:
        try:
            answers.append(prepare())
        except Exception as error:  # affects this digit only
            answers.append(error)
    sound = [i for i, prepared in enumerate(answers) if not isinstance(prepared, Exception)]
    if sound:
        images = np.stack([answers[i].image for i in sound])
        logits, cache = vit_forward(images, model.parameters, model.config)
        probabilities, _ = softmax_forward(logits.astype(np.float64))
        blocks = block_attention(cache)
        rollout = rollout_of_attention(blocks)
        attention = np.stack([weights[:, :, 0] for weights in blocks], axis=1)  # of the class token, (B, depth, H, T)
        for place, i in enumerate(sound):
            answers[i] = describe(
                answers[i],
                probabilities=probabilities[place],
                attention=attention[place],
                rollout=rollout[place],
            )
    return answers


def describe(prepared, probabilities, attention, rollout):
    """Return one answer as JSON in bytes.

    prepared: `Prepared`; probabilities: (classes,); attention: (depth, H, T), of the class token to itself and to the
    patches; rollout: (N,).
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
