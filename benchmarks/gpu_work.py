"""The contestants of gpu.py: tinyvit on a GPU, its single kernels, and PyTorch. Each runs in a separate process.

CuPy and PyTorch bring CUDA libraries, often of different versions. In one process both would use the libraries that
were loaded first. A CUDA error also makes a whole process unusable. Each class is built once in its process. It then
builds one case after the other. A case is a batch size and a precision.
"""

import statistics
import time
from contextlib import ExitStack
from dataclasses import replace

import floors
import numpy as np
import peers

from tinyvit.data import load_mnist
from tinyvit.gpu import get_backend
from tinyvit.model import ViTConfig, initialise
from tinyvit.training import NOTE, Training, TrainingConfig
from tinyvit.training.state import new_state
from tinyvit.training.step import make_step

BATCHES = 8  # used in turn by PyTorch
RATE = NOTE.learning_rate


def images_of(limit):
    """Return the first `limit` training images and labels of MNIST, or all if `limit` is None."""
    data = load_mnist()
    return data.train_images[:limit], data.train_labels[:limit]


def known(function):
    """Return the result of `function`, or None if it fails."""
    try:
        return function()
    except Exception:  # the kind depends on library and version; a missing figure must not stop the benchmark
        return None


class _OnGPU:
    """The backend "gpu", its properties, and one training step at a time.

    Raises `DeviceError` if no GPU computes.
    """

    def __init__(self):
        self.backend = get_backend("gpu")
        self.step, self._steps = None, ExitStack()

    def about(self):
        """Return the known properties of the card and of the libraries, a dict."""
        xp = self.backend.xp
        properties = known(lambda: xp.cuda.runtime.getDeviceProperties(xp.cuda.runtime.getDevice())) or {}
        name = properties.get("name", b"unknown")
        return {
            "card": name.decode() if isinstance(name, bytes) else str(name),
            "compute_capability": self.backend.compute_capability(),
            "multiprocessors": properties.get("multiProcessorCount"),
            "level_2_cache_bytes": properties.get("l2CacheSize"),
            "memory_bytes": properties.get("totalGlobalMem"),
            "cupy": xp.__version__,
            "cuda_of_the_driver": known(lambda: xp.cuda.runtime.driverGetVersion()),
            "cuda_runtime": known(lambda: xp.cuda.runtime.runtimeGetVersion()),
            "nvrtc": known(lambda: "{}.{}".format(*xp.cuda.nvrtc.getVersion())),
            "cublas": known(lambda: xp.cuda.cublas.getVersion(xp.cuda.device.get_cublas_handle())),
        }

    def megabytes(self):
        """Return the peak memory of the arrays of this case in megabytes, or None if it is unknown."""
        return known(lambda: self.backend.xp.get_default_memory_pool().total_bytes() / 1e6)

    def _forget(self):
        """Free the memory of the previous case."""
        self._steps.close()
        self.step = None
        known(lambda: self.backend.xp.get_default_memory_pool().free_all_blocks())

    def _make_step(self, batch, precision, depth, limit, kernels):
        """Free the previous case, and return a training step of the note's model and recipe on this backend."""
        self._forget()
        images, labels = images_of(limit)
        if len(images) < 2 * batch:
            raise ValueError(f"two batches of {batch} need at least {2 * batch} images, not {len(images)}")
        self.batch, self.full_steps = batch, len(images) // batch
        model_config, config = ViTConfig(depth=depth), replace(NOTE, batch_size=batch)
        self.step = make_step(
            new_state(model_config, config, self.backend),
            images,
            labels,
            model_config,
            config,
            self.backend,
            precision=precision,
            kernels=kernels,
        )
        return self._steps.enter_context(self.step)


class Ours(_OnGPU):
    """Training steps of tinyvit, from images on the device to new weights, with augmentation.

    mode: "graph", "launches" or "off", as for `make_step`: kernels in a CUDA graph, single launches of the same
    kernels, or plain operations on CuPy.
    """

    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def build(self, batch, precision, depth, limit):
        """Build steps of `batch` images and take a few. Return the seconds that this took."""
        began = time.perf_counter()
        self._make_step(
            batch,
            precision,
            depth=depth,
            limit=limit,
            kernels=self.mode,
        )
        self.epochs, self.left = 0, 0
        self.steps(3)  # the first step compiles or loads, and the second is recorded
        return time.perf_counter() - began

    def steps(self, count):
        """Take `count` steps and return the seconds of one, without the time to begin an epoch.

        The totals add up over all epochs, and reading them waits for the device. A smaller last batch of an epoch is
        skipped.
        """
        step, seconds, done = self.step, 0.0, 0
        while done < count:
            if self.left == 0:
                step.begin_epoch(self.epochs, totals=step.totals())
                self.epochs += 1
                self.left = self.full_steps
            part = min(count - done, self.left)
            step.totals()
            began = time.perf_counter()
            for _ in range(part):
                step()
            step.totals()
            seconds += time.perf_counter() - began
            self.left -= part
            done += part
        return seconds / count

    def turn(self, count):
        """Take two uncounted steps, then `count` steps. Return the seconds of one of these and their mean loss."""
        self.steps(2)
        before, _ = self.step.totals()
        seconds = self.steps(count)
        after, _ = self.step.totals()
        return seconds, (after - before) / (count * self.batch)

    def train(self, precision, epochs, depth, limit):
        """Train with `Training`, without validation, and return the figures, a dict.

        "seconds" is the time of `Training.run`: augmentation, shuffling, steps, and the history of every epoch.
        """
        self._forget()
        images, labels = images_of(limit)
        config = TrainingConfig(epochs=epochs, augmentation=NOTE.augmentation, validation=0, seed=NOTE.seed)
        began = time.perf_counter()
        run = Training(
            ViTConfig(depth=depth),
            config,
            images,
            labels,
            self.backend,
            precision=precision,
            kernels=self.mode,
        )
        built = time.perf_counter()
        run.run()
        seconds = time.perf_counter() - built
        last = run.state.history[-1]
        return {
            "images": len(images),
            "batch": config.batch_size,
            "steps": epochs * run.steps_per_epoch,
            "seconds": seconds,
            "building_seconds": built - began,
            "train_loss": last["train_loss"],
            "train_accuracy": last["train_accuracy"],
        }


class KernelTimes(_OnGPU):
    """The single kernels of a step, and the highest speeds of the card."""

    NOTHING = 'extern "C" __global__ void nothing(int* place) { if (place) place[0] = 0; }'
    COPY = """
    extern "C" __global__ void copy(const float* source, float* target, int count) {
        for (int i = 0; i < 4; i++) {
            int place = ((int)blockIdx.x * 4 + i) * (int)blockDim.x + (int)threadIdx.x;
            if (place < count) target[place] = source[place];
        }
    }
    """

    def ceilings(self, side, megabytes):
        """Return the speeds of copies and matrix products, and the seconds between launches, a dict.

        side: the side of the square matrices; megabytes: the size of the copied array. Copies are in bytes per
        second, products in operations per second. A measurement that fails gives a text with the reason.
        """
        measures = {
            "copy": lambda: self._copy(megabytes * 1_000_000),
            "copy_within_the_cache": lambda: self._copy_in_graph(12_000_000),
            "gap": self._gap,
        }
        measures |= {precision: lambda p=precision: self._product(side, p) for precision in floors.PRECISIONS}
        found = {}
        for name, measure in measures.items():
            try:
                found[name] = measure()
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"[:300]
            known(lambda: self.backend.xp.get_default_memory_pool().free_all_blocks())
        return found

    def _copy(self, size):
        source = self.backend.xp.ones(size // 4, np.float32)
        target = self.backend.xp.empty_like(source)

        def copy():
            target[...] = source

        return 2 * source.nbytes / self._seconds(copy)  # every byte is read and written

    def _copy_in_graph(self, size):
        """Return the speed of a copy within the level-2 cache. The time includes its launch."""
        count = size // 4
        source = self.backend.xp.ones(count, np.float32)
        target = self.backend.xp.empty_like(source)
        kernel = self.backend.xp.RawModule(code=self.COPY, backend="nvrtc").get_function("copy")
        arguments = source, target, np.int32(count)
        return 2 * source.nbytes / self._seconds_in_graph(lambda: kernel((-(-count // 1024),), (256,), arguments))

    def _gap(self):
        kernel = self.backend.xp.RawModule(code=self.NOTHING, backend="nvrtc").get_function("nothing")
        return self._seconds_in_graph(lambda: kernel((1,), (32,), (np.uint64(0),)))

    def _product(self, side, precision):
        """Return the speed of cuBLAS, called directly because CuPy's product lacks some of the precisions."""
        xp = self.backend.xp
        cublas, runtime = xp.cuda.cublas, xp.cuda.runtime
        handle = xp.cuda.device.get_cublas_handle()
        numbers = np.random.default_rng(0).standard_normal((2, side, side), dtype=np.float32)
        kind, compute = runtime.CUDA_R_32F, cublas.CUBLAS_COMPUTE_32F
        if precision == "tf32":
            compute = cublas.CUBLAS_COMPUTE_32F_FAST_TF32
        elif precision == "bfloat16":
            kind, numbers = getattr(runtime, "CUDA_R_16BF", 14), (numbers.view(np.uint32) >> 16).astype(np.uint16)
        a, b = (self.backend.asarray(half) for half in numbers)
        out = xp.empty_like(a)
        one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)  # on the host, where cuBLAS reads them

        def product():
            arguments = (0, 0, side, side, side, one.ctypes.data, a.data.ptr, kind, side, b.data.ptr, kind, side)
            cublas.gemmEx(handle, *arguments, zero.ctypes.data, out.data.ptr, kind, side, compute, -1)

        return 2 * side**3 / self._seconds(product)

    def _seconds(self, work, least=0.1):
        """Return the seconds of one `work` on the device, from two events around many of them."""
        xp = self.backend.xp
        stream = xp.cuda.get_current_stream()

        def time_of(times):
            begin, end = xp.cuda.Event(), xp.cuda.Event()
            begin.record(stream)
            for _ in range(times):
                work()
            end.record(stream)
            end.synchronize()
            return xp.cuda.get_elapsed_time(begin, end) / 1e3 / times

        time_of(2)
        times = min(1000, max(3, round(least / max(1e-7, time_of(3)))))
        return statistics.median(time_of(times) for _ in range(3))

    def _seconds_in_graph(self, launch, least=0.01):
        """Return the seconds of one launch among many in a CUDA graph, with the gap after it."""
        xp = self.backend.xp
        stream = xp.cuda.Stream()
        with stream:
            launch()  # the driver loads a kernel at its first launch
            begin, end = xp.cuda.Event(), xp.cuda.Event()
            begin.record(stream)
            launch()
            end.record(stream)
            end.synchronize()
            once = max(1e-6, xp.cuda.get_elapsed_time(begin, end) / 1e3)
            times = min(100, max(3, round(least / once)))
            stream.begin_capture()
            try:
                for _ in range(times):
                    launch()
            finally:
                graph = stream.end_capture()

            def replay():
                begin.record(stream)
                graph.launch(stream)
                end.record(stream)
                end.synchronize()
                return xp.cuda.get_elapsed_time(begin, end) / 1e3 / times

            replay()
            return statistics.median(replay() for _ in range(5))

    def kernels(self, batch, precision, depth, limit):
        """Return the time of every kernel of a step on the buffers of a step, a list of dicts.

        Launches of the same size share a row. Raises `ValueError` if the launches differ from those in `floors.py`.
        """
        step = self._make_step(
            batch,
            precision,
            depth=depth,
            limit=limit,
            kernels="launches",
        )

        def begin(done):
            step.begin_epoch(0, done)
            step.totals()  # waits, because the timed launches run on another stream

        begin(0)
        recorded = recorded_launches(step)
        model = floors.launches(step.model_config, batch)
        if [(name, grid) for name, grid, _ in recorded] != [(launch.name, launch.grid) for launch in model]:
            raise ValueError("the launches of the step differ from those in floors.py; update floors.py")
        rows = {}
        for (_, _, launch), expected in zip(recorded, model, strict=True):
            key = (expected.name, expected.grid, expected.bytes, expected.operations)
            if key not in rows:
                begin(1)  # `sum_partials` has counted, and the counter must lead to a batch and a row of the schedule
                rows[key] = {
                    "kernel": expected.name,
                    "what": [],
                    "launches": 0,
                    "blocks": int(np.prod(expected.grid)),
                    "bytes": expected.bytes,
                    "operations": expected.operations,
                    "float32_operations": expected.float32_operations,
                    "seconds": self._seconds_in_graph(launch),
                }
            row = rows[key]
            row["launches"] += 1
            if expected.what not in row["what"]:
                row["what"].append(expected.what)
        return list(rows.values())


def recorded_launches(step):
    """Take a step and return its launches: (name, grid, a function that repeats the launch)."""
    kernels, found = step.kernels, []
    functions = kernels._functions

    def recorder(name):
        def record(grid, block, arguments):
            found.append((name, grid, lambda: functions[name](grid, block, arguments)))
            functions[name](grid, block, arguments)

        return record

    kernels._functions = {name: recorder(name) for name in functions}
    try:
        step()
    finally:
        kernels._functions = functions
    step.totals()
    return found


class TorchSteps:
    """Training steps of PyTorch as its users write them, on normalised batches that are ready on the device.

    mode: "eager"; "compiled", with torch.compile(mode="max-autotune"), which records CUDA graphs of forward and
    backward; or "graph", eager operations of the whole step in one CUDA graph. All three use the fused Adam.
    """

    def __init__(self, mode, device="cuda"):
        import torch

        self.torch, self.mode, self.device = torch, mode, device
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"PyTorch {torch.__version__} for CUDA {torch.version.cuda} finds no GPU")

    def about(self):
        """Return the versions of PyTorch and CUDA and the name of the card, a dict."""
        torch = self.torch
        found = {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
        return found | {"torch_card": known(lambda: torch.cuda.get_device_name(0))}

    def build(self, batch, precision, depth, limit):
        """Build steps of `batch` images and take a few. Return the seconds that this took."""
        torch, device = self.torch, self.device
        self.step = None
        if self.mode == "compiled":
            torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        tf32 = precision == "tf32"
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32  # for the convolution of the patch embedding

        config = ViTConfig(depth=depth)
        model = peers.torch_model(config, initialise(config)).to(device)
        self.batches = self._batches(config, batch, limit)
        autocast = precision == "bfloat16"

        def loss_of(pixels, labels):
            if not autocast:
                return torch.nn.functional.cross_entropy(model(pixels), labels)
            # Every step must cast the weights again. A CUDA graph of the whole step would reuse cached old weights.
            with torch.autocast(device, torch.bfloat16, cache_enabled=False):
                logits = model(pixels)
            return torch.nn.functional.cross_entropy(logits.float(), labels)

        capturable = {"capturable": True} if self.mode == "graph" else {}
        self.optimiser = torch.optim.Adam(model.parameters(), lr=RATE, fused=True, **capturable)
        self.loss_of = torch.compile(loss_of, mode="max-autotune") if self.mode == "compiled" else loss_of
        self.taken = 0
        self.step = self._graph_step() if self.mode == "graph" else self._eager_step
        self.steps(5)  # compiles, warms up and records
        return time.perf_counter() - began

    def _batches(self, config, batch, limit):
        torch = self.torch
        images, labels = images_of(limit)
        chosen = np.random.default_rng(0).permutation(len(images))
        if len(chosen) < batch:
            raise ValueError(f"a batch of {batch} needs at least {batch} images, not {len(chosen)}")
        found = []
        for start in range(0, min(BATCHES * batch, len(chosen) // batch * batch), batch):
            part = chosen[start : start + batch]
            pixels = (images[part].astype(np.float32) / 255 - config.pixel_mean) / config.pixel_deviation
            arrays = pixels.astype(np.float32), labels[part].astype(np.int64)
            found.append([torch.from_numpy(array).to(self.device) for array in arrays])
        return found

    def _eager_step(self, pixels, labels):
        self.optimiser.zero_grad(set_to_none=True)
        if self.mode == "compiled":
            self.torch.compiler.cudagraph_mark_step_begin()
        self.loss = self.loss_of(pixels, labels)
        self.loss.backward()
        self.optimiser.step()

    def _graph_step(self):
        """Record a step and return a function that replays it. PyTorch requires steps on another stream first."""
        torch = self.torch
        pixels, labels = (array.clone() for array in self.batches[0])
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._eager_step(pixels, labels)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self.loss = self.loss_of(pixels, labels)
            self.loss.backward()
            self.optimiser.step()

        def step(new_pixels, new_labels):
            pixels.copy_(new_pixels)
            labels.copy_(new_labels)
            graph.replay()

        return step

    def steps(self, count):
        """Take `count` steps and return the seconds of one."""
        self._wait()
        began = time.perf_counter()
        for _ in range(count):
            self.step(*self.batches[self.taken % len(self.batches)])
            self.taken += 1
        self._wait()
        return (time.perf_counter() - began) / count

    def turn(self, count):
        """Take two uncounted steps, then `count` steps. Return the seconds of one of these and the last loss."""
        self.steps(2)
        return self.steps(count), float(self.loss.detach())

    def _wait(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def megabytes(self):
        """Return the peak memory of PyTorch on the card in this case in megabytes."""
        return self.torch.cuda.max_memory_reserved() / 1e6 if self.device == "cuda" else None
