"""Sharing out changes nothing: the gradient of the whole batch, the same bits every time, BLAS threads given back."""

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from tinyvit.backend import use_loops
from tinyvit.data.augment import Augmentation, warp
from tinyvit.model import ViTConfig, initialise, loss_and_gradient
from tinyvit.training import ParallelGradient, WorkerError, available_cores, workers
from tinyvit.training.workers import CHUNK_TOKENS, split

pytestmark = pytest.mark.extended

CONFIG = ViTConfig(image_size=8, patch_size=4, width=8, depth=2, heads=2, mlp_width=12, classes=5)
RNG = np.random.default_rng(0)
IMAGES = RNG.random((100, 8, 8))
LABELS = RNG.integers(0, 5, 100)


def batch(start=0, stop=64):
    return IMAGES[start:stop], LABELS[start:stop]


def parameters(dtype=np.float64):
    result = initialise(CONFIG, dtype=dtype)
    result.flat += 0.1 * np.random.default_rng(1).standard_normal(result.flat.shape).astype(dtype)
    return result


def whole(start, stop, smoothing=0.1):
    return loss_and_gradient(*batch(start, stop), parameters(), CONFIG, smoothing)


@pytest.mark.parametrize(("workers", "chunk_size"), [(1, None), (1, 7), (2, None), (2, 7), (3, 20), (7, 3)])
def test_shares_give_the_loss_and_gradient_of_the_whole(workers, chunk_size):
    with ParallelGradient(CONFIG, workers, smoothing=0.1, chunk_size=chunk_size) as parallel:
        for start, stop in [(3, 68), (10, 12), (0, 100), (99, 100), (0, 100)]:  # more and fewer than the last time
            loss, correct, gradient = parallel(parameters(), *batch(start, stop))
            expected_loss, expected_correct, expected = whole(start, stop)
            np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
            assert correct == expected_correct
            np.testing.assert_allclose(gradient.flat, expected.flat, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("count", [1, 2])
def test_every_process_keeps_the_choice_of_loops(count):
    """The bits of each share are those of the choice at the entry, whatever the choice is at the call."""
    pytest.importorskip("numba", reason='needs the extra: pip install -e ".[fast]"')
    weights, (images, labels) = parameters(np.float32), batch(0, 64)
    found = {}
    for choice in ("on", "off"):
        with use_loops(choice):
            parallel = ParallelGradient(CONFIG, count).__enter__()
            shares = [
                loss_and_gradient(images[a:b], labels[a:b], weights, CONFIG, weight=(b - a) / 64)[2].flat
                for a, b in split(64, count)
            ]
        with contextlib.ExitStack() as stack:
            stack.push(parallel.__exit__)
            found[choice] = parallel(weights, images, labels)[2].flat.tobytes()
        assert found[choice] == sum(shares[1:], start=shares[0]).tobytes()
    assert found["on"] != found["off"]


def test_every_call_uses_the_weights_images_and_types_it_is_given():
    with ParallelGradient(CONFIG, 2) as parallel, ParallelGradient(CONFIG, 1) as alone:
        cases = [(np.float32, np.float64, 1), (np.float64, np.uint8, 255), (np.float32, np.uint8, 200)]
        for dtype, kind, scale in cases:
            weights, images = parameters(dtype), (IMAGES * scale).astype(kind)
            weights.flat *= scale / 255

            labels = LABELS.astype(np.uint8)
            got, expected = (gradient(weights, images[:50], labels[:50]) for gradient in (parallel, alone))
            assert got[0].dtype == got[2].flat.dtype == dtype
            np.testing.assert_allclose(got[2].flat, expected[2].flat, rtol=1e-3, atol=1e-6)


def test_helpers_use_the_weights_of_each_call():
    """All arrays keep their shapes, so that only the values in the shared memory change."""
    with ParallelGradient(CONFIG, 2) as parallel:
        for seed in range(3):
            weights = initialise(CONFIG, seed=seed, dtype=np.float64)
            images, labels = batch(10 * seed, 10 * seed + 64)
            loss, _, gradient = parallel(weights, images, labels)
            expected_loss, _, expected = loss_and_gradient(images, labels, weights, CONFIG)
            np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
            np.testing.assert_allclose(gradient.flat, expected.flat, rtol=1e-9, atol=1e-13)


@pytest.mark.skipif(not hasattr(os, "getsid"), reason="needs sessions")
def test_helpers_are_in_a_session_that_ctrl_c_does_not_reach():
    with ParallelGradient(CONFIG, 3) as parallel:
        pids = [helper._process.pid for helper in parallel._helpers]
        assert [os.getsid(pid) for pid in pids] == pids


@pytest.mark.parametrize("workers", [2, 5])
def test_the_same_bits_whatever_the_timing(workers):
    rng, weights = np.random.default_rng(0), parameters(np.float32)
    with ParallelGradient(CONFIG, workers, chunk_size=8) as parallel:
        first = parallel(weights, *batch(0, 100))[2].flat.copy()
        for _ in range(20):
            late = rng.choice(parallel._helpers)._process  # it has its share done long after the others
            late.send_signal(signal.SIGSTOP)
            threading.Timer(rng.uniform(0, 0.02), late.send_signal, [signal.SIGCONT]).start()
            np.testing.assert_array_equal(parallel(weights, *batch(0, 100))[2].flat, first)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_each_worker_changes_the_images_of_its_share(workers):
    weights, images = parameters(np.float32), (255 * IMAGES).astype(np.uint8)
    maps = Augmentation(rotation=20, scale=0.2, shift=2, flip=0.5).draw(np.random.default_rng(2), 100)
    expected = loss_and_gradient(warp(images, maps), LABELS, weights, CONFIG)
    with ParallelGradient(CONFIG, workers, chunk_size=16) as parallel:
        for _ in range(2):
            loss, correct, gradient = parallel(weights, images, LABELS, maps)
            np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
            assert correct == expected[1]
            np.testing.assert_allclose(gradient.flat, expected[2].flat, rtol=1e-3, atol=1e-6)
            plain = loss_and_gradient(images, LABELS, weights, CONFIG)  # and none if there are no maps
            np.testing.assert_allclose(parallel(weights, images, LABELS)[0], plain[0], rtol=1e-6)


def test_one_worker_and_two_give_the_same_bits_for_a_batch_of_two_chunks():
    weights = parameters(np.float32)
    results = []
    for count in (1, 2):
        with ParallelGradient(CONFIG, count, chunk_size=32) as parallel:
            loss, correct, gradient = parallel(weights, *batch())
            results.append((loss.tobytes(), int(correct), gradient.flat.tobytes()))
    assert results[0] == results[1]


def test_weights_are_only_read():
    weights = parameters()
    before = weights.flat.copy()
    with ParallelGradient(CONFIG, 2) as parallel:
        parallel(weights, *batch())
    np.testing.assert_array_equal(weights.flat, before)


def test_a_chunk_has_about_so_many_tokens():
    assert ParallelGradient(ViTConfig(), 1).chunk_size == CHUNK_TOKENS // 17 == 64
    assert ParallelGradient(ViTConfig(patch_size=1), 1).chunk_size == 1
    assert ParallelGradient(ViTConfig(), 1, chunk_size=9).chunk_size == 9


def test_blas_has_one_thread_inside_and_its_own_after():
    def threads():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    with threadpool_limits(limits=2, user_api="blas"):
        before = threads()
        with ParallelGradient(CONFIG, 2):
            assert set(threads()) == {1}
        assert threads() == before

        first, second = ParallelGradient(CONFIG, 1), ParallelGradient(CONFIG, 1)
        with contextlib.ExitStack() as one, contextlib.ExitStack() as other:  # left in the order they were entered
            one.enter_context(first)
            other.enter_context(second)
            one.close()
            assert set(threads()) == {1}
        assert threads() == before


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_a_helper_has_one_thread():
    with ParallelGradient(CONFIG, 2) as parallel:
        parallel(parameters(), *batch())
        pid = parallel._helpers[0]._process.pid
        assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1


# ---- what goes wrong ----


def test_an_error_while_the_others_are_at_work_reaches_the_caller_and_the_next_call_is_right():
    wrong = LABELS.copy()
    wrong[0] = 77  # in the share of this process
    with ParallelGradient(CONFIG, 3) as parallel:
        for _ in range(3):
            with pytest.raises(ValueError, match="a label is 77"):
                parallel(parameters(), IMAGES[:64], wrong[:64])
        _, _, gradient = parallel(parameters(), *batch(3, 68))
        np.testing.assert_allclose(gradient.flat, whole(3, 68, 0.0)[2].flat, rtol=1e-9, atol=1e-13)


def test_images_that_do_not_fit_the_model_are_an_error_and_the_next_call_is_right():
    with ParallelGradient(CONFIG, 2) as parallel:
        with pytest.raises(ValueError, match=r"images must have the shape \(B, 8, 8\)"):
            parallel(parameters(), np.zeros((64, 7, 7)), LABELS[:64])
        _, _, gradient = parallel(parameters(), *batch(3, 68))
        np.testing.assert_allclose(gradient.flat, whole(3, 68, 0.0)[2].flat, rtol=1e-9, atol=1e-13)


def test_an_error_in_another_process_is_told(monkeypatch):
    with ParallelGradient(CONFIG, 2) as parallel:
        right = parallel(parameters(), *batch())
        monkeypatch.setattr(workers, "gradient_of_share", lambda *_, **__: right)  # the error is not found here
        expected = r"worker 2 of 2 failed:\n(.|\n)*images must have the shape \(B, 8, 8\)"
        with pytest.raises(WorkerError, match=expected):
            parallel(parameters(), np.zeros((64, 7, 7)), LABELS[:64])


def test_a_worker_that_was_killed_ends_the_step_and_not_the_program():
    with ParallelGradient(CONFIG, 3) as parallel:
        expected = parallel(parameters(), *batch())[2].flat.copy()
        for _ in range(2):
            parallel._helpers[1]._process.send_signal(signal.SIGKILL)
            with pytest.raises(WorkerError, match=r"worker 3 of 3 was killed by signal 9: .* fewer workers"):
                parallel(parameters(), *batch())
            np.testing.assert_array_equal(parallel(parameters(), *batch())[2].flat, expected)  # with new ones


def test_a_worker_that_is_killed_while_it_is_waited_for_is_no_endless_wait():
    with ParallelGradient(CONFIG, 2) as parallel:
        parallel(parameters(), *batch(0, 100))
        began = time.monotonic()
        process = parallel._helpers[0]._process
        process.send_signal(signal.SIGSTOP)
        threading.Timer(0.3, process.send_signal, [signal.SIGKILL]).start()
        with pytest.raises(WorkerError, match="killed by signal 9"):
            parallel(parameters(), *batch(0, 100))
    assert time.monotonic() - began < 10


def open_files():
    return sorted(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else []


@pytest.mark.parametrize(
    ("executable", "expected"),
    [
        ("/bin/false", r"worker 2 of 3 ended with status 1"),
        ("/bin/true", r"worker 2 of 3 ended with status 0"),
        ("", "there is no Python interpreter: train with one worker"),
        (None, "there is no Python interpreter: train with one worker"),
    ],
)
def test_a_worker_that_does_not_start_is_told(monkeypatch, executable, expected):
    before = open_files()
    monkeypatch.setattr(sys, "executable", executable)
    parallel = ParallelGradient(CONFIG, 3)
    with pytest.raises(WorkerError, match=expected):
        parallel.__enter__()
    assert parallel._helpers == []
    assert open_files() == before


def test_a_worker_that_hangs_at_its_start_is_told(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(workers, "START_SECONDS", 0.3)
    with pytest.raises(WorkerError, match="killed by signal 9"):
        ParallelGradient(CONFIG, 2).__enter__()


def test_a_worker_that_closes_its_output_without_ending_is_killed(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec >&-\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    began = time.monotonic()
    with pytest.raises(WorkerError, match="killed by signal 9"):
        ParallelGradient(CONFIG, 2).__enter__()
    assert time.monotonic() - began < 30


def test_a_helper_without_memory_is_an_error_about_memory():
    with ParallelGradient(CONFIG, 2) as parallel:
        helper = parallel._helpers[0]
        helper._answers.close()
        helper._answers = io.BytesIO(workers._ANSWER + b'{"no_memory": "Unable to allocate 1 TiB"}\n')
        with pytest.raises(MemoryError, match="worker 2 of 2: Unable to allocate 1 TiB"):
            helper.receive()


def test_a_program_that_cannot_be_read_by_python_is_told(monkeypatch):
    config = ViTConfig(image_size=8, patch_size=4, width=8, depth=1, heads=2, mlp_width=12, classes=5)
    monkeypatch.setattr(ViTConfig, "as_dict", lambda self: {"width": -1})  # so that only the helper fails
    with pytest.raises(WorkerError, match=r"worker 2 of 2 failed:\n(.|\n)*width must be an integer"):
        ParallelGradient(config, 2).__enter__()


def test_what_a_library_prints_is_no_answer(tmp_path, monkeypatch, capfd):
    (tmp_path / "sitecustomize.py").write_text("import os; os.write(1, b'printed\\n{}\\ntinyvit is not JSON')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with ParallelGradient(CONFIG, 2) as parallel:
        _, _, gradient = parallel(parameters(), *batch(3, 68))
    np.testing.assert_allclose(gradient.flat, whole(3, 68, 0.0)[2].flat, rtol=1e-9, atol=1e-13)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python loses one within a __del__
def test_an_interrupt_at_any_moment_leaves_no_wrong_answer_behind():
    weights = parameters()
    expected = whole(3, 68, 0.0)[2].flat
    with ParallelGradient(CONFIG, 2) as parallel:
        for delay in np.linspace(0, 0.01, 8):
            interrupt = threading.Timer(delay, signal.raise_signal, [signal.SIGINT])
            with contextlib.suppress(KeyboardInterrupt):
                interrupt.start()
                while interrupt.is_alive():
                    parallel(weights, *batch(0, 100))
                time.sleep(0.1)
            _, _, gradient = parallel(weights, *batch(3, 68))
            np.testing.assert_allclose(gradient.flat, expected, rtol=1e-9, atol=1e-13)


def test_opposite_infinities_are_no_warning():
    weights = parameters(np.float32)
    weights.flat *= 1e30
    with ParallelGradient(CONFIG, 2) as parallel, ParallelGradient(CONFIG, 1) as alone:
        for gradient_of in (parallel, alone):
            loss, _, _ = gradient_of(weights, *batch())
            assert not np.isfinite(loss)


def test_two_threads_are_refused(monkeypatch):
    compute = workers.gradient_of_share
    with ParallelGradient(CONFIG, 1) as parallel:

        def within(*arguments, **keywords):
            with pytest.raises(RuntimeError, match="only one thread of one process"):
                parallel(parameters(), *batch(0, 10))
            return compute(*arguments, **keywords)

        monkeypatch.setattr(workers, "gradient_of_share", within)
        parallel(parameters(), *batch(0, 10))


def test_no_room_to_share_is_told(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    said = r"not enough room for the 0 MB .* train with one worker"
    with ParallelGradient(CONFIG, 2) as parallel, pytest.raises(OSError, match=said):
        parallel(parameters(), *batch())


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="other systems use the folder for temporary files")
def test_shared_memory_with_room_for_half_is_left_alone(monkeypatch):
    """A later batch may be larger, and other programs use the same memory."""
    for free, folder in ((2001, "/dev/shm"), (1999, tempfile.gettempdir())):
        monkeypatch.setattr(workers.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with workers._SharedMemory(1000) as memory:
            assert memory._folder == folder


CLOSED = """
    import os, sys
    for descriptor in {closed}:
        os.close(descriptor)
    import numpy as np
    from tinyvit.model import ViTConfig, initialise
    from tinyvit.training import ParallelGradient

    config = ViTConfig(image_size=8, patch_size=4, width=8, depth=1, heads=2, mlp_width=12, classes=5)
    with ParallelGradient(config, 2) as parallel:
        numbers = [parallel._memory.address, parallel._helpers[0]._process.stdin.fileno()]
        for _ in range(2):
            loss, _, _ = parallel(initialise(config), np.zeros((64, 8, 8)), np.zeros(64, int))
            parallel._stop_helpers()  # the next call starts others
    with open(sys.argv[1], "w") as file:
        file.write(f"{{min(numbers)}} {{loss:.3f}}")
"""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_closed_standard_descriptors_are_never_those_of_files_and_pipes(tmp_path, closed):
    program = textwrap.dedent(CLOSED).format(closed=closed)
    command = [sys.executable, "-c", program, str(tmp_path / "result")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lowest, loss = (tmp_path / "result").read_text().split()
    assert int(lowest) > 2
    assert 0 < float(loss) < 5


def test_nothing_is_left_behind():
    folders = {Path("/dev/shm"), Path(tempfile.gettempdir())}
    before = {folder: set(os.listdir(folder)) for folder in folders if folder.is_dir()}
    descriptors = open_files()
    with ParallelGradient(CONFIG, 3) as parallel:
        parallel(parameters(), *batch())
        assert parallel._memory.address in parallel._memory.descriptors  # a number: a kill would leave no name behind
        processes = [helper._process for helper in parallel._helpers]
        assert all(process.poll() is None for process in processes)
    assert all(process.poll() is not None for process in processes)
    assert open_files() == descriptors
    named = {name for folder in before for name in set(os.listdir(folder)) - before[folder] if "tinyvit" in name}
    assert not named


PROGRAM = """
    import numpy as np
    from tinyvit.model import ViTConfig, initialise
    from tinyvit.training import ParallelGradient, available_cores

    config = ViTConfig(image_size=8, patch_size=4, width=8, depth=1, heads=2, mlp_width=12, classes=5)
    START
    print(parallel._helpers[0]._process.pid, flush=True)
    images, labels = np.zeros((64, 8, 8)), np.zeros(64, int)
    loss, _, _ = parallel(initialise(config), images, labels)
    print(loss, flush=True)
    input()
"""


IN_THE_MAIN_THREAD = "parallel = ParallelGradient(config, 2).__enter__()"
IN_A_THREAD = """parallel = ParallelGradient(config, 2)
    import threading
    thread = threading.Thread(target=parallel.__enter__)
    thread.start()
    thread.join()
"""


@pytest.fixture
def program(tmp_path, request):
    """A plain script with no `if __name__ == "__main__"`, as a learner writes it, that is at work."""
    path = tmp_path / "plain.py"
    start = getattr(request, "param", IN_THE_MAIN_THREAD)
    path.write_text(textwrap.dedent(PROGRAM.replace("START", start)))
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(path)], **options) as process:
        yield process
        process.kill()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid, seconds=60):
    deadline = time.monotonic() + seconds  # tests run side by side, and a program takes its time to end
    while alive(pid):
        assert time.monotonic() < deadline, "the worker outlived the program"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("how", ["killed", "interrupted", "ends"])
def test_workers_end_with_the_program_however_it_ends(program, how):
    pid = int(program.stdout.readline())
    assert float(program.stdout.readline()) > 0
    assert alive(pid)
    if how == "ends":
        program.stdin.write("\n")
        program.stdin.close()
    elif how == "killed":
        program.kill()
    else:
        program.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(5)
        program.send_signal(signal.SIGINT)  # Python loses an interrupt that falls into a __del__: one presses again
    wait_until_gone(pid)
    program.wait(60)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a stopped process with its parent")
@pytest.mark.parametrize("program", [IN_THE_MAIN_THREAD, IN_A_THREAD], indirect=True, ids=["main", "thread"])
def test_a_stopped_helper_ends_with_a_killed_program(program):
    pid = int(program.stdout.readline())
    assert float(program.stdout.readline()) > 0
    os.kill(pid, signal.SIGSTOP)
    program.kill()
    program.wait(60)
    try:
        wait_until_gone(pid, 10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_helpers_outlive_the_thread_that_started_them():
    parallel = ParallelGradient(CONFIG, 2)
    thread = threading.Thread(target=parallel.__enter__)
    thread.start()
    thread.join()
    time.sleep(0.2)
    with contextlib.ExitStack() as stack:
        stack.push(parallel.__exit__)
        assert np.isfinite(parallel(parameters(), *batch())[0])


def test_settings_that_make_no_sense_are_refused():
    for number in (0, -1, 1.5, True, "2", 2**31):
        with pytest.raises(ValueError, match="workers must be an integer from 1 to 1,024, not "):
            ParallelGradient(CONFIG, number)
    for size in (0, 1.5, "2"):
        with pytest.raises(ValueError, match=r"chunk_size must be an integer from 1, not "):
            ParallelGradient(CONFIG, 1, chunk_size=size)
    for smoothing in (-0.1, 1, np.nan, "x"):
        with pytest.raises(ValueError, match="smoothing must be a number from 0 to below 1, not "):
            ParallelGradient(CONFIG, 1, smoothing=smoothing)
    with ParallelGradient(CONFIG, 1) as parallel:
        for images, labels in ((IMAGES[:0], LABELS[:0]), (IMAGES[:5], LABELS[:4])):
            with pytest.raises(ValueError, match="give images and one label each"):
                parallel(parameters(), images, labels)


def test_it_works_as_a_context_only_and_one_at_a_time():
    parallel = ParallelGradient(CONFIG, 2)
    with pytest.raises(RuntimeError, match="as a context manager"):
        parallel(parameters(), *batch(0, 10))
    with parallel, pytest.raises(RuntimeError, match="already in use"), parallel:
        pass
    with pytest.raises(RuntimeError, match="as a context manager"):
        parallel(parameters(), *batch(0, 10))


# ---- how it is cut, and for how many ----


def test_split_covers_every_place_once_in_even_parts():
    for count in range(1, 200):
        for parts in (1, 2, 3, 8):
            edges = split(count, parts)
            assert len(edges) == parts
            assert [p for start, stop in edges for p in range(start, stop)] == list(range(count))
            sizes = [stop - start for start, stop in edges]
            assert max(sizes) - min(sizes) <= 1


def test_as_many_workers_as_cores_that_may_be_used():
    assert ParallelGradient(CONFIG).workers == available_cores() >= 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs an affinity that can be set")
def test_one_core_allowed_is_one_worker():
    program = """
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from tinyvit.model import ViTConfig
        from tinyvit.training import ParallelGradient
        print(ParallelGradient(ViTConfig()).workers)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
