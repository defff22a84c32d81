"""The emulation of CUDA is tested itself: what it must catch is planted, and what is right must pass.

Every mistake stands beside its right form, so that no test passes because everything is refused.
"""

import itertools

import emulate
import numpy as np
import pytest
from emulate import Emulated, EmulationError
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ROUNDED

pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif(emulate.COMPILER is None, reason=emulate.NO_COMPILER),
]

ORDERS = (0, 1, 7)  # threads from first to last, from last to first, and shuffled

KERNELS = r"""
#define FULL 0xffffffffu
extern "C" __global__ void reverse(float* __restrict__ out) {
    __shared__ float table[64];
    table[threadIdx.x] = (float)threadIdx.x;
    __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = table[63 - threadIdx.x];
}
extern "C" __global__ void reverse_without_barrier(float* __restrict__ out) {
    __shared__ float table[64];
    table[threadIdx.x] = (float)threadIdx.x;
    out[blockIdx.x * 64 + threadIdx.x] = table[63 - threadIdx.x];
}
extern "C" __global__ void warp_reverse(float* __restrict__ out) {
    __shared__ float table[64];
    int warp = (int)threadIdx.x / 32 * 32, lane = (int)threadIdx.x % 32;
    table[threadIdx.x] = (float)threadIdx.x;
    __syncwarp();
    out[threadIdx.x] = table[warp + 31 - lane];
}
extern "C" __global__ void reverse_with_a_warps_barrier(float* __restrict__ out) {  // of two warps: it is not enough
    __shared__ float table[64];
    table[threadIdx.x] = (float)threadIdx.x;
    __syncwarp();
    out[threadIdx.x] = table[63 - threadIdx.x];
}
extern "C" __global__ void shuffle_for_a_barrier(float* __restrict__ out) {  // it waits, and orders no memory
    __shared__ float table[32];
    table[threadIdx.x] = (float)threadIdx.x;
    float mine = __shfl_xor_sync(FULL, 0.0f, 1);
    out[threadIdx.x] = mine + table[31 - threadIdx.x];
}
extern "C" __global__ void count_blocks(float* __restrict__ out) {
    if (threadIdx.x == 0) atomicAdd(out, 1.0f);
}
extern "C" __global__ void count_blocks_badly(float* __restrict__ out) {
    if (threadIdx.x == 0) out[0] += 1.0f;
}
extern "C" __global__ void across_a_barrier(float* __restrict__ out) {  // one block's barrier orders no other block
    if (blockIdx.x == 0 && threadIdx.x == 0) out[0] += 1.0f;
    __syncthreads();
    if (blockIdx.x == 1 && threadIdx.x == 0) out[0] += 1.0f;
}
extern "C" __global__ void first_and_last_block(float* __restrict__ out) {
    if (threadIdx.x == 0 && (blockIdx.x == 0 || blockIdx.x == gridDim.x - 1)) out[0] += 1.0f;
}
extern "C" __global__ void atomic_beside_plain(float* __restrict__ out) {
    if (threadIdx.x == 0) atomicAdd(out, 1.0f);
    if (threadIdx.x == 1) out[0] = 5.0f;
}
extern "C" __global__ void write_at(float* __restrict__ out, int place) {
    if (threadIdx.x == 0) out[place] = 1.0f;
}
extern "C" __global__ void share_at(float* __restrict__ out, int place) {
    __shared__ float first[32];
    __shared__ float second[32];
    first[threadIdx.x] = second[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = first[place] + second[threadIdx.x];
}
extern "C" __global__ void local_at(float* __restrict__ out, int place) {
    float mine[4] = {0.0f, 1.0f, 2.0f, 3.0f};
    __syncthreads();  // after it the guards must still be there
    out[threadIdx.x] = mine[place];
}
extern "C" __global__ void some_leave(float* __restrict__ out, int stay) {
    if ((int)threadIdx.x >= stay) return;
    __syncthreads();
    out[threadIdx.x] = 1.0f;
}
extern "C" __global__ void two_barriers(float* __restrict__ out, int divide) {
    if ((int)threadIdx.x < divide) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1.0f;
}
extern "C" __global__ void barrier_and_shuffle(float* __restrict__ out) {
    if (threadIdx.x < 16) __syncwarp();
    out[threadIdx.x] = __shfl_sync(FULL, 1.0f, 0);
}
extern "C" __global__ void shuffles(float* __restrict__ out) {
    float mine = (float)(threadIdx.x * threadIdx.x);
    out[threadIdx.x] = __shfl_xor_sync(FULL, mine, 5);
    out[blockDim.x + threadIdx.x] = __shfl_sync(FULL, mine, (int)(threadIdx.x * 3 + 1) % 32);
    out[2 * blockDim.x + threadIdx.x] = (float)__shfl_sync(FULL, (double)mine, 37);  // lane 5: of 32 there are
}
extern "C" __global__ void half_mask(float* __restrict__ out) { out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 0); }
extern "C" __global__ void partial_warp(float* __restrict__ out, int lane) {
    __syncwarp();
    out[threadIdx.x] = __shfl_sync(FULL, (float)threadIdx.x, lane);
}
extern "C" __global__ void read_what_nobody_wrote(float* __restrict__ out) {
    __shared__ float table[64];
    __shared__ int numbers[64];
    if (threadIdx.x < 63) table[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = table[threadIdx.x];
    out[64 + threadIdx.x] = (float)numbers[threadIdx.x];
    __syncthreads();
    table[63] = 1.0f;  // and the next block must not find it
    numbers[threadIdx.x] = 1;
}
extern "C" __global__ void coordinates(int* __restrict__ out) {
    unsigned int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    unsigned int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] += 1;
}
extern "C" __global__ void much_shared(float* __restrict__ out, int place) {
    __shared__ float table[12 * 1024 + 1];
    out[0] = table[place];
}
extern "C" __global__ void all_that_can_be_shared(float* __restrict__ out, int place) {
    __shared__ float table[12 * 1024];
    out[0] = table[place];
}
extern "C" __global__ void empty(const float* __restrict__ x, unsigned char* __restrict__ bytes, double number) {
    if (x && threadIdx.x == 0) bytes[0] = (unsigned char)(x[0] + number);
}
extern "C" __global__ void from_view_to_view(float* __restrict__ first, float* __restrict__ last, int step) {
    if (threadIdx.x == 0) first[step] = last[0] + 1.0f;
}
"""


@pytest.fixture(scope="module")
def kernels():
    return Emulated(KERNELS)


def zeros(count):
    return np.zeros(count, np.float32)


# ---- races ----


def test_a_race_in_shared_memory_is_caught(kernels, sanitizers):
    out = zeros(128)
    kernels.launch_checked("reverse", 2, 64, [out], "thread")
    np.testing.assert_array_equal(out, np.tile(np.arange(64)[::-1], 2))
    with pytest.raises(EmulationError, match="data race"):
        kernels.launch_checked("reverse_without_barrier", 1, 64, [zeros(64)], "thread")


def test_a_warps_barrier_orders_that_warp_alone(kernels, sanitizers):
    out = zeros(64)
    kernels.launch_checked("warp_reverse", 1, 64, [out], "thread")
    np.testing.assert_array_equal(out, [*range(31, -1, -1), *range(63, 31, -1)])
    with pytest.raises(EmulationError, match="data race"):
        kernels.launch_checked("reverse_with_a_warps_barrier", 1, 64, [zeros(64)], "thread")


def test_a_shuffle_is_no_barrier_for_memory(kernels, sanitizers):
    with pytest.raises(EmulationError, match="data race"):
        kernels.launch_checked("shuffle_for_a_barrier", 1, 32, [zeros(32)], "thread")


def test_a_race_between_blocks_is_caught_and_an_atomic_is_none(kernels, sanitizers):
    out = zeros(1)
    kernels.launch_checked("count_blocks", 3, 32, [out], "thread")
    assert out[0] == 3
    for name in ("count_blocks_badly", "across_a_barrier"):
        kernels.launch(name, 2, 32, [zeros(1)])  # one after the other, as it happens, all is well
        for blocks, threads, order in ((2, 1, 0), (2, 128, 1), (5, 64, 7), (4, 256, 0)):
            with pytest.raises(EmulationError, match="data race"):
                kernels.launch_checked(name, blocks, threads, [zeros(1)], "thread", order)
        kernels.launch_checked(name, 1, 32, [zeros(1)], "thread")  # one block has no race
    with pytest.raises(EmulationError, match="8,000 threads at most"):
        kernels.launch_checked("count_blocks", 8, 1024, [zeros(1)], "thread")
    with pytest.raises(EmulationError, match="data race"):
        kernels.launch_checked("first_and_last_block", 8, 128, [zeros(1)], "thread")


def test_an_atomic_beside_a_plain_write_is_a_race(kernels, sanitizers):
    with pytest.raises(EmulationError, match="data race"):
        kernels.launch_checked("atomic_beside_plain", 1, 32, [zeros(1)], "thread")


# ---- places out of bounds ----


@pytest.mark.parametrize(
    ("name", "right", "wrong", "what"),
    [
        ("write_at", [0, 31], [-1, 32], "heap-buffer-overflow"),
        ("share_at", [0, 31], [-1, 32], "global-buffer-overflow"),
        ("local_at", [0, 3], [-1, 4], "stack-buffer-(over|under)flow"),
    ],
    ids=["an argument", "shared memory", "a thread's own"],
)
def test_a_place_out_of_bounds_is_caught(kernels, name, right, wrong, what, sanitizers):
    for place in right:
        kernels.launch_checked(name, 1, 32, [zeros(32), np.int32(place)], "address")
    for place in wrong:
        with pytest.raises(EmulationError, match=what):
            kernels.launch_checked(name, 1, 32, [zeros(32), np.int32(place)], "address")


def test_views_of_one_array_lie_in_one_memory(kernels, sanitizers):
    memory = zeros((3, 8))
    memory[0, 2] = 5
    kernels.launch_checked("from_view_to_view", 1, 32, [memory[0, 4:], memory[0, 2:], np.int32(8)], "address")
    assert memory[1, 4] == 6
    assert memory.sum() == 11
    with pytest.raises(EmulationError, match="heap-buffer-overflow"):
        kernels.launch_checked("from_view_to_view", 1, 32, [memory[0, 4:], memory[0, 2:], np.int32(20)], "address")


# ---- barriers and shuffles ----


def test_a_barrier_that_not_all_threads_reach_is_caught(kernels):
    kernels.launch("some_leave", 1, 64, [zeros(64), np.int32(64)])
    with pytest.raises(EmulationError, match=r"40 of 64 threads wait at __syncthreads in line \d+, which"):
        kernels.launch("some_leave", 1, 64, [zeros(64), np.int32(40)])


def test_threads_must_wait_at_the_same_barrier(kernels):
    for divide in (0, 64):  # all of them at the one or the other
        kernels.launch("two_barriers", 1, 64, [zeros(64), np.int32(divide)])
    with pytest.raises(EmulationError, match=r"different places: __syncthreads in line \d+ and __syncthreads"):
        kernels.launch("two_barriers", 1, 64, [zeros(64), np.int32(32)])
    with pytest.raises(EmulationError, match=r"different places: __syncwarp in line \d+ and __shfl_sync"):
        kernels.launch("barrier_and_shuffle", 1, 32, [zeros(32)])


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_give_what_the_other_lanes_have(kernels, order):
    out = zeros((3, 64))
    kernels.launch("shuffles", 1, 64, [out], order)
    lanes = np.arange(64) % 32
    warps = np.arange(64) - lanes
    np.testing.assert_array_equal(out[0], (warps + (lanes ^ 5)) ** 2)
    np.testing.assert_array_equal(out[1], (warps + (np.arange(64) * 3 + 1) % 32) ** 2)
    np.testing.assert_array_equal(out[2], (warps + 5) ** 2)


def test_a_mask_that_is_not_full_is_refused(kernels):
    with pytest.raises(EmulationError, match="only the full mask"):
        kernels.launch("half_mask", 1, 32, [zeros(32)])


def test_a_warp_may_be_partial_and_has_no_more_lanes_than_threads(kernels):
    out = zeros(40)
    kernels.launch("partial_warp", 1, 40, [out, np.int32(7)])
    np.testing.assert_array_equal(out, [7] * 32 + [39] * 8)
    with pytest.raises(EmulationError, match="lane 8 is asked"):
        kernels.launch("partial_warp", 1, 40, [out, np.int32(8)])


# ---- the order of the threads ----


def test_another_order_shows_a_missing_barrier(kernels):
    def results(name):
        outs = []
        for order in ORDERS:
            out = zeros(192)
            kernels.launch(name, 3, 64, [out], order)
            outs.append(out.tobytes())
        return set(outs)

    assert len(results("reverse")) == 1
    assert len(results("reverse_without_barrier")) == 3


def test_shared_memory_that_nobody_wrote_is_not_a_number(kernels):
    out = zeros(128)
    kernels.launch("read_what_nobody_wrote", 2, 64, [out])
    assert np.isnan(out[63])
    np.testing.assert_array_equal(out[:63], 1)
    np.testing.assert_array_equal(out[64:], -1)


def test_every_thread_of_every_block_runs_once(kernels):
    for grid, block in ((5, 33), ((2, 3), (4, 5)), ((2, 3, 4), (5, 2, 3)), (1, 1024), (1, 1)):
        out = np.zeros((np.prod(grid), np.prod(block)), np.int32)
        for order in ORDERS:
            kernels.launch("coordinates", grid, block, [out], order)
        assert (out == 3).all()


# ---- what no GPU launches ----


@pytest.mark.parametrize(
    ("grid", "block"), [(1, 1025), (1, (32, 33)), (0, 32), (1, 0), ((1, 65536), 1), ((1, 1, 65536), 1)]
)
def test_sizes_that_no_gpu_has_are_refused(kernels, grid, block):
    with pytest.raises(EmulationError, match="no GPU launches"):
        kernels.launch("coordinates", grid, block, [np.zeros(1, np.int32)])


def test_more_shared_memory_than_a_block_has_is_refused(kernels):
    kernels.launch("all_that_can_be_shared", 1, 32, [zeros(1), np.int32(0)])
    with pytest.raises(EmulationError, match=r"48 KiB of shared memory, and this kernel wants 49156 bytes"):
        kernels.launch("much_shared", 1, 32, [zeros(1), np.int32(0)])


def test_arguments_must_be_those_of_the_signature(kernels, sanitizers):
    x, target = np.array([3], np.float32), np.zeros(1, np.uint8)
    kernels.launch("empty", 1, 32, [x, target, np.float64(2)])
    assert target[0] == 5
    kernels.launch("empty", 1, 32, [np.uint64(0), target, np.float64(2)])  # a null pointer
    cube = np.zeros((2, 2, 2), np.float32)
    for bad in (
        *([x, target], [x, target, np.float64(2), np.int32(0)], []),
        *([x, target, 2.0], [x, target, 2], [x, target, np.float32(2)], [x, target, np.int64(2)]),
        *([x.astype(np.float64), target, np.float64(2)], [x, target.astype(np.int8), np.float64(2)]),
        *([np.float32(3), target, np.float64(2)], [[3.0], target, np.float64(2)], [None, target, np.float64(2)]),
        *([x, target, target], [np.uint64(8), target, np.float64(2)], [cube.T, target, np.float64(2)]),
    ):
        with pytest.raises(TypeError, match="empty"):
            kernels.launch("empty", 1, 32, bad)
        with pytest.raises(TypeError, match="empty"):
            kernels.launch_checked("empty", 1, 32, bad, "address")
    with pytest.raises(EmulationError, match="no kernel 'fill'"):
        kernels.launch("fill", 1, 32, [])


@pytest.mark.parametrize(
    "text",
    [
        'extern "C" __global__ void f(float* __restrict__ out) { out[0] = missing; }',
        'extern "C" __global__ void f(float* __restrict__ out) { int unused = 3; }',  # a warning is an error
        'extern "C" __global__ void f(float* __restrict__ out) { cudaMalloc(out, 3); }',
        '__shared__ float table[3];\nextern "C" __global__ void f(float* __restrict__ out) { out[0] = table[0]; }',
    ],
    ids=["unknown name", "warning", "not emulated", "shared memory outside a kernel"],
)
def test_what_does_not_compile_is_told_with_the_compilers_words(text):
    with pytest.raises(RuntimeError, match=r"(?s)do not compile.*kernel.cu:[12]"):
        Emulated(text).launch("f", 1, 32, [zeros(1)])


def test_a_text_without_a_kernel_is_refused():
    with pytest.raises(RuntimeError, match="no kernel"):
        Emulated("__device__ int three() { return 3; }")


def test_a_type_that_the_table_lacks_is_told():
    with pytest.raises(KeyError, match="half"):
        Emulated('extern "C" __global__ void f(half* __restrict__ out) {}')


# ---- the tensor cores' twins ----

TENSOR_CORES = r"""
extern "C" __global__ void round_numbers(const float* __restrict__ x, float* __restrict__ tf32,
                                         float* __restrict__ bfloat16, int pairs) {
    for (int i = (int)threadIdx.x; i < pairs; i += (int)blockDim.x) {
        unsigned int word = to_bfloat16_pair(x[2 * i], x[2 * i + 1]);
        bfloat16[2 * i] = __uint_as_float(word << 16);
        bfloat16[2 * i + 1] = __uint_as_float(word & 0xffff0000u);
        tf32[2 * i] = __uint_as_float(to_tf32(x[2 * i]));
        tf32[2 * i + 1] = __uint_as_float(to_tf32(x[2 * i + 1]));
    }
}
extern "C" __global__ void product_tf32(const float* __restrict__ a, const float* __restrict__ b,
                                        float* __restrict__ c) {
    int group = (int)threadIdx.x % 32 / 4, place = (int)threadIdx.x % 4;
    auto a_word = [&](int row, int column) { return to_tf32(a[row * 8 + column]); };
    auto b_word = [&](int row, int column) { return to_tf32(b[row * 8 + column]); };
    unsigned int a_fragment[4] = {a_word(group, place), a_word(group + 8, place), a_word(group, place + 4),
                                  a_word(group + 8, place + 4)};
    unsigned int b_fragment[2] = {b_word(place, group), b_word(place + 4, group)};
    float* mine = c + (int)threadIdx.x / 32 * 128 + group * 8 + 2 * place;
    float sums[4] = {mine[0], mine[1], mine[64], mine[65]};
    mma_tf32(sums, a_fragment, b_fragment);
    mine[0] = sums[0];
    mine[1] = sums[1];
    mine[64] = sums[2];
    mine[65] = sums[3];
}
extern "C" __global__ void product_bfloat16(const float* __restrict__ a, const float* __restrict__ b,
                                            float* __restrict__ c) {
    int group = (int)threadIdx.x % 32 / 4, place = (int)threadIdx.x % 4;
    auto a_word = [&](int row, int word) {
        return to_bfloat16_pair(a[row * 16 + 2 * word], a[row * 16 + 2 * word + 1]);
    };
    auto b_word = [&](int word, int column) {
        return to_bfloat16_pair(b[2 * word * 8 + column], b[(2 * word + 1) * 8 + column]);
    };
    unsigned int a_fragment[4] = {a_word(group, place), a_word(group + 8, place), a_word(group, place + 4),
                                  a_word(group + 8, place + 4)};
    unsigned int b_fragment[2] = {b_word(place, group), b_word(place + 4, group)};
    float* mine = c + (int)threadIdx.x / 32 * 128 + group * 8 + 2 * place;
    float sums[4] = {mine[0], mine[1], mine[64], mine[65]};
    mma_bfloat16(sums, a_fragment, b_fragment);
    mine[0] = sums[0];
    mine[1] = sums[1];
    mine[64] = sums[2];
    mine[65] = sums[3];
}
"""


@pytest.fixture(scope="module")
def tensor_cores():
    return Emulated(TENSOR_CORES)


def check_rounding(tensor_cores, x):
    x = np.concatenate([x, np.zeros(len(x) % 2, np.float32)])
    tf32, bfloat16 = np.empty_like(x), np.empty_like(x)
    tensor_cores.launch("round_numbers", 1, 32, [x, tf32, bfloat16, np.int32(len(x) // 2)])
    np.testing.assert_array_equal(tf32, ROUNDED["tf32"](x))
    np.testing.assert_array_equal(bfloat16, ROUNDED["bfloat16"](x))
    for result in (tf32, bfloat16):  # signs of zeros too
        np.testing.assert_array_equal(np.signbit(result), np.signbit(x))


def test_rounding_of_ties_infinities_and_what_is_near_them(tensor_cores):
    one = np.float32(1)
    edges = []
    for bits in (11, 8):
        unit = 2.0 ** (1 - bits)
        for steps, part in itertools.product(range(6), (0.5, 0.49999, 0.50001, 0.0, 1.0)):
            edges.append(np.float32(1 + unit * (steps + part)))
    edges += [np.nextafter(edge, one * way) for edge in edges for way in (0, 4)]
    largest, least = np.finfo(np.float32).max, np.float32(2.0**-149)
    subnormal = (np.arange(1, 2**17, 97).astype(np.float32)) * least
    edges += [np.inf, largest, np.nextafter(largest, one), np.float32(largest * (1 - 2.0**-9)), 0.0, least]
    edges += [2.0**-126, np.nextafter(np.float32(2.0**-126), np.float32(0)), *subnormal]
    edges = np.array(edges, np.float32)
    check_rounding(tensor_cores, np.concatenate([edges, -edges]))
    assert ROUNDED["bfloat16"](np.array([largest]))[0] == np.inf  # the reference carries over as well
    assert ROUNDED["bfloat16"](np.float32([1 + 2**-8, 1 + 3 * 2**-8])).tolist() == [1, 1 + 2**-6]
    assert ROUNDED["tf32"](np.float32([1 + 2**-11, 1 + 3 * 2**-11])).tolist() == [1 + 2**-10, 1 + 2**-9]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=300))
def test_rounding_of_any_bits(tensor_cores, patterns):
    x = np.array(patterns, np.uint32).view(np.float32)
    check_rounding(tensor_cores, x[~np.isnan(x)])


def test_not_a_number_stays_none(tensor_cores):
    patterns = [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x7F801000, 0x7F80FFFF, 0x7F810000]
    x = np.array([*patterns, *(pattern | 0x80000000 for pattern in patterns)], np.uint32).view(np.float32)
    tf32, bfloat16 = np.zeros_like(x), np.zeros_like(x)
    tensor_cores.launch("round_numbers", 1, 32, [x, tf32, bfloat16, np.int32(len(x) // 2)])
    assert np.isnan(tf32).all()
    assert np.isnan(bfloat16).all()


def distinct(shape, seed):
    """Whole numbers, each place another, that even bfloat16 holds; and none the other of its neighbours."""
    count = int(np.prod(shape))
    return np.random.default_rng(seed).permutation(np.arange(1, count + 1)).reshape(shape).astype(np.float32)


PRODUCTS = {"product_tf32": 8, "product_bfloat16": 16}


def product(kernels, name, kernel=None, order=0):
    """The product of two warps, one below the other in c, and what NumPy has for it: exact, as all sums fit."""
    depth = PRODUCTS[name]
    a, b, c = distinct((16, depth), 1), distinct((depth, 8), 2), distinct((2, 16, 8), 3)
    expected = c + a @ b
    kernels.launch(kernel or name, 1, 64, [a, b, c], order)
    return c, expected


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_numpys(tensor_cores, name, order):
    np.testing.assert_array_equal(*product(tensor_cores, name, order=order))


def test_a_swapped_place_of_a_fragment_shows():
    corners = ["(group, place)", "(group + 8, place)", "(group, place + 4)", "(group + 8, place + 4)"]
    fragments = [
        [f"a_word{corner}" for corner in corners],
        ["b_word(place, group)", "b_word(place + 4, group)"],
        [f"= sums[{i}]" for i in range(4)],
    ]
    texts = []
    for places in fragments:
        for one, other in itertools.combinations(places, 2):
            texts.append(TENSOR_CORES.replace(one, "@").replace(other, one).replace("@", other))
    batch, kernels = emulate.variants([TENSOR_CORES, *texts])
    for i, names in enumerate(kernels):
        for name in PRODUCTS:
            got, expected = product(batch, name, names[name])
            assert (got == expected).all() == (i == 0), i
    assert len(kernels) == 1 + 6 + 1 + 6


def test_a_product_that_not_all_lanes_reach_is_caught():
    text = TENSOR_CORES.replace("mma_tf32(sums", "if (threadIdx.x > 3) mma_tf32(sums")
    with pytest.raises(EmulationError, match="28 of 64 threads wait at mma_tf32"):
        product(Emulated(text), "product_tf32")
