"""Adam, gradient clipping, averages of the weights and learning-rate schedules, on flat arrays of P elements."""

import contextvars
import copy
import itertools
import math
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

from tinyvit.backend import array_module, loops_for
from tinyvit.checks import require_arrays, require_scalar
from tinyvit.parameters import Parameters


class Adam:
    """Adam with bias correction and optional decoupled weight decay.

    Parameters
    ----------
    flat : ndarray of shape (P,)
        Parameters to update later. Only their number, dtype and device are used here.
    beta1 : float, default 0.9
        Decay of the first moment per step, from 0 to below 1.
    beta2 : float, default 0.999
        Decay of the second moment per step, from 0 to below 1.
    epsilon : float, default 1e-8
        Number added to the root of the second moment, above 0.
    weight_decay : float, default 0.0
        Weight decay, at least 0. A step subtracts ``learning_rate * weight_decay`` times each parameter.
    decayed : ndarray of shape (P,), optional
        Factor of the weight decay for each parameter, usually 0 or 1. The default is 1 for all.
    threads : int, default 1
        Number of threads, each of which updates one part of the parameters.

    Raises
    ------
    ValueError
        If a setting is out of range.

    Notes
    -----
    The state consists of the arrays `first_moment` and `second_moment` and the number of `steps`. A copy has its own.

    References
    ----------
    Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization", algorithm 1.
    Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2.
    """

    def __init__(
        self,
        flat: np.ndarray,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        decayed: np.ndarray | None = None,
        threads: int = 1,
    ) -> None:
        require_arrays("flat (P), decayed (P) or None", flat, decayed)
        require_scalar("beta1", beta1, minimum=0, maximum=1, below=True)
        require_scalar("beta2", beta2, minimum=0, maximum=1, below=True)
        require_scalar("epsilon", epsilon, minimum=0, maximum=math.inf, above=True, below=True)
        require_scalar("weight_decay", weight_decay, minimum=0, maximum=math.inf, below=True)
        xp = array_module(flat)
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.weight_decay, self.decayed = weight_decay, decayed
        self.first_moment = xp.zeros_like(flat)
        self.second_moment = xp.zeros_like(flat)
        self.steps = 0
        self._scratch = xp.empty_like(flat)
        self.use_threads(threads)

    def __copy__(self):
        return copy.deepcopy(self)

    def __getstate__(self):
        return self.__dict__ | {"_pool": None}  # threads cannot be copied

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.use_threads(len(self._parts))

    def use_threads(self, threads: int) -> None:
        """Set the number of threads.

        Parameters
        ----------
        threads : int
            Number of threads, each of which updates one part of the parameters.

        Raises
        ------
        ValueError
            If `threads` is below 1.
        """
        require_scalar("threads", threads, minimum=1, maximum=math.inf, integer=True)
        count = len(self._scratch)
        edges = [count * i // threads for i in range(threads + 1)]
        self._parts = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def step(self, flat: np.ndarray, gradient: np.ndarray, learning_rate: float) -> None:
        """Update the parameters in place.

        Parameters
        ----------
        flat : ndarray of shape (P,)
            Parameters.
        gradient : ndarray of shape (P,)
            Gradient of the loss, which stays unchanged.
        learning_rate : float
            Learning rate of this step, at least 0.

        Raises
        ------
        TypeError
            If an array is of another dtype than float32 and float64.
        ValueError
            If an array is of another shape, `flat` is read-only, or the learning rate is negative or not finite.
        ArithmeticError
            On a CPU, if the square of a finite element overflows, which happens from 1.8e19 in float32. With an
            infinite second moment, the parameter would never change again. Other parameters may have been updated. On
            a GPU the parameter becomes NaN instead, because reading the moment would wait for the device.
        """
        require_arrays("first_moment (P), flat (P), gradient (P)", self.first_moment, flat, gradient)
        require_scalar("learning_rate", learning_rate, minimum=0, maximum=math.inf, below=True)
        if not getattr(flat.flags, "writeable", True):  # before the moments change; CuPy has no such flag
            raise ValueError("flat is read-only, but a step updates it in place: give a copy, flat.copy()")
        self.steps += 1
        if self._pool is None:
            self._update(flat, gradient, learning_rate, part=slice(None))
            return
        # Each thread gets a copy of the context, so that the caller's np.errstate applies there too.
        jobs = [
            self._pool.submit(contextvars.copy_context().run, self._update, flat, gradient, learning_rate, part)
            for part in self._parts
        ]
        wait(jobs)  # for all, even if one fails, so that no thread writes into flat after the return
        for job in jobs:
            job.result()

    def _update(self, flat, gradient, learning_rate, part):
        """Update one part of the parameters, a slice, in place."""
        xp = array_module(flat)
        flat, gradient, scratch = flat[part], gradient[part], self._scratch[part]
        m, v = self.first_moment[part], self.second_moment[part]
        loops = loops_for(flat, gradient, m, v)
        if not loops:
            try:  # v = beta2 * v + (1 - beta2) * g**2, before anything else changes
                with np.errstate(over="raise"):
                    xp.multiply(gradient, gradient, out=scratch)
            except FloatingPointError as error:
                raise _too_large() from error
            scratch *= 1 - self.beta2
            v *= self.beta2
            v += scratch

        if self.weight_decay:  # flat -= learning_rate * weight_decay * decayed * flat
            xp.multiply(flat, learning_rate * self.weight_decay, out=scratch)
            if self.decayed is not None:
                scratch *= self.decayed[part]
            flat -= scratch

        # The moments start at 0. `rate` and `scale` contain the corrections for that.
        rate = learning_rate / (1 - self.beta1**self.steps)
        scale = 1 / math.sqrt(1 - self.beta2**self.steps)
        if loops:
            betas = [self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2]
            numbers = np.float32([*betas, rate, scale, self.epsilon])
            if loops.adam_step(flat, gradient, m, v, *numbers):
                raise _too_large()
            return

        m *= self.beta1  # m = beta1 * m + (1 - beta1) * g
        m += xp.multiply(gradient, 1 - self.beta1, out=scratch)

        # flat -= rate * m / (scale * sqrt(v) + epsilon)
        xp.sqrt(v, out=scratch)
        scratch *= scale
        scratch += self.epsilon
        if xp is not np:
            scratch += v - v  # NaN for an infinite moment, and 0 otherwise
        xp.divide(m, scratch, out=scratch)
        scratch *= rate
        flat -= scratch


def _too_large():
    return ArithmeticError("the gradient became too large for Adam's second moments, which contain its squares")


def matrices_only(parameters: Parameters) -> np.ndarray:
    """Return a mask of the weights of linear layers, on which weight decay usually acts.

    Biases, layer norms, the class token and the positions are excluded.

    Parameters
    ----------
    parameters : Parameters
        Parameters of a model.

    Returns
    -------
    ndarray of shape (P,)
        Array with 1 for each element of a weight matrix and 0 elsewhere, in the dtype of the parameters.
    """
    mask = parameters.with_flat(array_module(parameters.flat).zeros_like(parameters.flat))
    for name, view in mask.items():
        if name.endswith("weight") and view.ndim == 2:
            view[...] = 1
    return mask.flat


def clip_by_global_norm(gradient: np.ndarray, limit: float) -> np.ndarray:
    """Scale a gradient in place so that its Euclidean norm is at most a limit.

    If the norm is not finite, every element becomes NaN, so that training can report the failure.

    Parameters
    ----------
    gradient : ndarray of shape (P,)
        Gradient of all parameters.
    limit : float
        Largest norm, above 0.

    Returns
    -------
    ndarray of shape ()
        Norm before scaling. It stays on the device, so nothing waits for a GPU.

    Raises
    ------
    ValueError
        If `limit` is not above 0.

    References
    ----------
    Pascanu et al. 2013, "On the difficulty of training recurrent neural networks", algorithm 1.
    """
    require_arrays("gradient (P)", gradient)
    require_scalar("limit", limit, minimum=0, maximum=math.inf, above=True)
    xp = array_module(gradient)
    norm = xp.sqrt(xp.dot(gradient, gradient))
    gradient *= xp.where(xp.isfinite(norm), xp.minimum(1, limit / xp.maximum(norm, 1e-12)), xp.nan)
    return norm


class ExponentialMovingAverage:
    """Moving average of the parameters, ``average = decay * average + (1 - decay) * flat`` after each step.

    Parameters
    ----------
    flat : ndarray of shape (P,)
        Parameters to average later. Only their number, dtype and device are used here.
    decay : float, default 0.999
        Decay per step, from 0 to below 1.

    Raises
    ------
    ValueError
        If `decay` is out of range.

    Notes
    -----
    The state consists of the array `average` and the number of `steps`. Step n uses the decay ``(n - 1) / (n + 8)``
    if it is smaller than `decay`. So the average begins with the parameters of the first step and soon forgets them.
    """

    def __init__(self, flat: np.ndarray, decay: float = 0.999) -> None:
        require_arrays("flat (P)", flat)
        require_scalar("decay", decay, minimum=0, maximum=1, below=True)
        self.decay = decay
        self.steps = 0
        self.average = flat.copy()
        self._scratch = array_module(flat).empty_like(flat)

    def __copy__(self):
        return copy.deepcopy(self)

    def step(self, flat: np.ndarray) -> None:
        """Add the parameters of one more step to the average.

        Parameters
        ----------
        flat : ndarray of shape (P,)
            Parameters after the step.
        """
        require_arrays("average (P), flat (P)", self.average, flat)
        self.steps += 1
        array_module(flat).subtract(flat, self.average, out=self._scratch)
        self._scratch *= self.share(self.steps)
        self.average += self._scratch

    def share(self, update: int) -> float:
        """Return the factor of the new parameters in the average, which is 1 minus the decay.

        Parameters
        ----------
        update : int
            Number of the step, from 1.

        Returns
        -------
        float
            Factor, 1 for the first step.
        """
        require_scalar("update", update, minimum=1, maximum=math.inf)
        return 1 - min(self.decay, (update - 1) / (update + 8))


def constant(step: int, total_steps: int, peak: float, warmup_steps: int = 0) -> float:
    """Return a learning rate that rises linearly and then stays constant.

    Parameters
    ----------
    step : int
        Number of the step, from 0.
    total_steps : int
        Number of steps of the training. It has no effect here.
    peak : float
        Largest learning rate.
    warmup_steps : int, default 0
        Number of steps until the peak.

    Returns
    -------
    float
        Learning rate of this step.
    """
    _check_schedule(step, total_steps, peak, warmup_steps, final=0.0)
    return peak * min(1.0, (step + 1) / max(1, warmup_steps))


def warmup_cosine(step: int, total_steps: int, peak: float, warmup_steps: int = 0, final: float = 0.0) -> float:
    """Return a learning rate that rises linearly and then falls as half a period of a cosine.

    The first step has the rate ``peak / warmup_steps``, and the last one a rate slightly above `final`.

    Parameters
    ----------
    step : int
        Number of the step, from 0.
    total_steps : int
        Number of steps of the training.
    peak : float
        Largest learning rate.
    warmup_steps : int, default 0
        Number of steps until the peak.
    final : float, default 0.0
        Learning rate after the last step.

    Returns
    -------
    float
        Learning rate of this step.

    References
    ----------
    Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", equation 5, for one cycle.
    """
    _check_schedule(step, total_steps, peak, warmup_steps, final)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _check_schedule(step, total_steps, peak, warmup_steps, final):
    """Raise `ValueError` unless the arguments of a schedule are finite numbers of at least 0."""
    numbers = {"step": step, "total_steps": total_steps, "peak": peak, "warmup_steps": warmup_steps, "final": final}
    for name, value in numbers.items():
        require_scalar(name, value, minimum=0, maximum=math.inf, below=True)
