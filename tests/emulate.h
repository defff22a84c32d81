// Runs a CUDA kernel on the CPU: every thread of a block is a fiber, and blocks run one after the other.
//
// A kernel's text is compiled behind this header by a C++ compiler, as it is. What waits for other threads (a barrier,
// a shuffle, a tensor-core product) switches to the next fiber, until all that must arrive have arrived. So the
// threads of a block run in an order that `emulate` is told, and a kernel that lacks a barrier gives another result in
// another order. Shared memory is filled with not-a-number before every block.
//
// Compiled with -fsanitize=thread every CUDA thread is a thread to the sanitizer: two that touch the same place with
// no barrier between them are a race, and so are two blocks, as long as neither touches it atomically. Compiled
// with -fsanitize=address an index out of bounds, of an argument or of a shared array, is caught where it happens.
// `emulate.py` does both. What it does not emulate, a compiler refuses: streams, textures, dynamic shared memory,
// masks that are not full, clusters, asynchronous copies.

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define EMULATED 1
#define __global__
#define __device__ inline
#define __forceinline__
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#if defined(__SANITIZE_THREAD__)
#define __shared__ static thread_local  // and every block in a thread of its own: new memory for the sanitizer
#else
#define __shared__ static __attribute__((section("emulated_shared")))
#endif
extern "C" char __start_emulated_shared[] __attribute__((weak)), __stop_emulated_shared[] __attribute__((weak));

#if defined(__SANITIZE_THREAD__)
#define UNCHECKED __attribute__((no_sanitize("thread"), noinline))
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#else
#define UNCHECKED __attribute__((no_sanitize("address"), noinline))
#endif

struct dim3 {
    unsigned x, y, z;
};

namespace emulated {

enum State { READY, WAITS, DONE };

struct Fiber {
    dim3 index;
    unsigned number;  // in the block
    State state;
    const char* waits_at;  // which barrier; its name
    bool waits_for_block;  // or else for its warp alone
    ucontext_t context;
    char* stack = nullptr;
    void* sanitizer = nullptr;
};

const size_t STACK = 256 * 1024;  // bytes; the sanitizers need a good deal
const int MAP_FRESH = MAP_PRIVATE | MAP_ANONYMOUS;

inline std::vector<Fiber> fibers;
inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline void* scheduler_sanitizer = nullptr;
inline dim3 block_index, block_size, grid_size;
inline std::function<void()> body;
inline std::string failure;
inline char block_barrier, kernel_end;  // addresses that stand for barriers, for the sanitizer
inline char warp_barriers[32];
inline uint64_t exchanged[32][32][8];  // [warp][lane]: what a shuffle or a product gives to the other lanes

UNCHECKED inline dim3 thread_index() { return current->index; }
UNCHECKED inline dim3 the_block_index() { return block_index; }
UNCHECKED inline dim3 the_block_size() { return block_size; }
UNCHECKED inline dim3 the_grid_size() { return grid_size; }
UNCHECKED inline unsigned warp() { return current->number / 32; }
UNCHECKED inline unsigned lane() { return current->number % 32; }

UNCHECKED inline void switch_to_scheduler() {
    Fiber* self = current;
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(scheduler_sanitizer, 1);  // 1: this alone orders nothing
#endif
    swapcontext(&self->context, &scheduler);
}

UNCHECKED inline void wait_for(const char* what, bool for_block) {
    void* barrier = for_block ? &block_barrier : &warp_barriers[warp()];
    (void)barrier;
#if defined(__SANITIZE_THREAD__)
    __tsan_release(barrier);
#endif
    current->state = WAITS;
    current->waits_at = what;
    current->waits_for_block = for_block;
    switch_to_scheduler();
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(barrier);
#endif
}

UNCHECKED inline void fiber_main() {
    body();
#if defined(__SANITIZE_THREAD__)
    __tsan_release(&kernel_end);
#endif
    current->state = DONE;
    while (true) switch_to_scheduler();
}

UNCHECKED inline void fail(const std::string& what) {
    if (failure.empty()) {
        failure = "block (" + std::to_string(block_index.x) + ", " + std::to_string(block_index.y) + ", " +
                  std::to_string(block_index.z) + "): " + what;
    }
}

// Lets those go on who wait for one another and have all arrived; says whether there were any.
UNCHECKED inline bool release_group(size_t first, size_t last, bool for_block) {
    for (size_t i = first; i < last; i++) {
        if (fibers[i].state != WAITS || fibers[i].waits_for_block != for_block) return false;
    }
    for (size_t i = first; i < last; i++) {
        if (strcmp(fibers[i].waits_at, fibers[first].waits_at) != 0) {
            fail(std::string("threads wait at different places: ") + fibers[first].waits_at + " and " +
                 fibers[i].waits_at);
            return false;
        }
    }
    for (size_t i = first; i < last; i++) fibers[i].state = READY;
    return true;
}

UNCHECKED inline void run_block(const std::vector<unsigned>& order) {
    size_t threads = fibers.size();
    for (char* byte = __start_emulated_shared; byte < __stop_emulated_shared; byte++) *byte = char(0xff);
    for (Fiber& fiber : fibers) {
        fiber.state = READY;
        getcontext(&fiber.context);
        if (!fiber.stack) fiber.stack = static_cast<char*>(mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_FRESH, -1, 0));
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, fiber_main, 0);
#if defined(__SANITIZE_THREAD__)
        fiber.sanitizer = __tsan_create_fiber(1);
#endif
    }
    size_t done = 0;
    while (done < threads && failure.empty()) {
        bool progress = false;
        for (unsigned i : order) {
            if (fibers[i].state != READY) continue;
            progress = true;
            current = &fibers[i];
#if defined(__SANITIZE_THREAD__)
            __tsan_switch_to_fiber(fibers[i].sanitizer, 1);
#endif
            swapcontext(&scheduler, &fibers[i].context);
            if (fibers[i].state == DONE) done++;
        }
        for (size_t first = 0; first < threads; first += 32) {
            progress |= release_group(first, std::min(first + 32, threads), false);
        }
        progress |= release_group(0, threads, true);
        if (!progress && done < threads) {
            size_t waiting = std::count_if(fibers.begin(), fibers.end(), [](Fiber& f) { return f.state == WAITS; });
            auto one = std::find_if(fibers.begin(), fibers.end(), [](Fiber& f) { return f.state == WAITS; });
            fail(std::to_string(waiting) + " of " + std::to_string(threads) + " threads wait at " + one->waits_at +
                 ", which the others never reach");
        }
    }
#if defined(__SANITIZE_THREAD__)
    for (Fiber& fiber : fibers) {  // the next block's threads are others, and so are their stacks
        __tsan_destroy_fiber(fiber.sanitizer);
        munmap(fiber.stack, STACK);
        fiber.stack = nullptr;
    }
#endif
}

// order: 0 runs the threads from first to last, 1 from last to first, and any other number shuffles them and the blocks.
UNCHECKED inline const char* launch(std::function<void()> kernel, dim3 grid, dim3 block, unsigned order) {
    size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
    failure.clear();
    if (threads < 1 || threads > 1024 || blocks < 1 || blocks > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
        failure = "no GPU launches " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads";
        return failure.c_str();
    }
    if (__stop_emulated_shared - __start_emulated_shared > 48 * 1024) {
        failure = "more than 48 KiB of shared memory in this file";
        return failure.c_str();
    }
    body = kernel;
    block_size = block;
    grid_size = grid;
    while (fibers.size() > threads) {
        if (fibers.back().stack) munmap(fibers.back().stack, STACK);
        fibers.pop_back();
    }
    fibers.resize(threads);
    for (unsigned i = 0; i < threads; i++) {
        fibers[i].number = i;
        fibers[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    }
    std::vector<unsigned> turns(threads), places(blocks);
    for (unsigned i = 0; i < threads; i++) turns[i] = order == 1 ? unsigned(threads) - 1 - i : i;
    for (unsigned i = 0; i < blocks; i++) places[i] = order == 1 ? unsigned(blocks) - 1 - i : i;
    std::mt19937 random(order);
    if (order > 1) std::shuffle(places.begin(), places.end(), random);
    for (unsigned place : places) {
        if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
        block_index = {place % grid.x, place / grid.x % grid.y, place / (grid.x * grid.y)};
#if defined(__SANITIZE_THREAD__)
        std::thread([&] {
            scheduler_sanitizer = __tsan_get_current_fiber();
            run_block(turns);
        }).join();
#else
        run_block(turns);
#endif
        if (!failure.empty()) return failure.c_str();
    }
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(&kernel_end);
#endif
    return nullptr;
}

using Launcher = std::function<void(void**)>;

template <class... Arguments, size_t... I>
Launcher unpacked(void (*kernel)(Arguments...), std::index_sequence<I...>) {
    return [kernel](void** arguments) { kernel(*static_cast<Arguments*>(arguments[I])...); };
}

// Makes a kernel callable with an array of pointers to its arguments, as the CUDA driver calls it.
template <class... Arguments>
Launcher unpacked(void (*kernel)(Arguments...)) {
    return unpacked(kernel, std::index_sequence_for<Arguments...>());
}

// What goes from lane to lane is not the kernel's memory: the sanitizer need not see it.
UNCHECKED inline void give(unsigned slot, uint64_t value) { exchanged[warp()][lane()][slot] = value; }
UNCHECKED inline uint64_t take(unsigned of_lane, unsigned slot) { return exchanged[warp()][of_lane % 32][slot]; }

template <class T>
T exchange(T value, unsigned source_lane, const char* what) {
    static_assert(sizeof(T) <= 8, "a shuffle takes up to eight bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    give(0, bits);
    wait_for(what, false);
    bits = take(source_lane, 0);
    memcpy(&value, &bits, sizeof(T));
    wait_for(what, false);  // nobody writes the next value before all have read this one
    return value;
}

inline void full_mask(unsigned mask) {
    if (mask != 0xffffffffu) {
        fprintf(stderr, "emulate.h: only the full mask is emulated\n");
        abort();
    }
}

}  // namespace emulated

#define threadIdx (emulated::thread_index())
#define blockIdx (emulated::the_block_index())
#define blockDim (emulated::the_block_size())
#define gridDim (emulated::the_grid_size())

inline void __syncthreads() { emulated::wait_for("__syncthreads", true); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emulated::full_mask(mask);
    emulated::wait_for("__syncwarp", false);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes) {
    emulated::full_mask(mask);
    return emulated::exchange(value, emulated::lane() ^ lanes, "__shfl_xor_sync");
}
template <class T>
T __shfl_sync(unsigned mask, T value, unsigned lane) {
    emulated::full_mask(mask);
    return emulated::exchange(value, lane, "__shfl_sync");
}
template <class T>
T atomicAdd(T* address, T value) {
    T before, after;
    __atomic_load(address, &before, __ATOMIC_RELAXED);
    do {
        after = before + value;
    } while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return before;
}

struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)(a)*b >> 64); }
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}

// ---- tensor cores: the twins of what tensor_cores.cuh has as PTX ----

// The 10 mantissa bits that TF32 keeps, rounded to nearest, ties away from zero (PTX ISA, cvt.rna.tf32.f32).
inline uint32_t to_tf32(float x) {
    uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return bits;  // infinity and not-a-number
    return (bits + 0x1000u) & 0xffffe000u;
}

inline uint32_t to_bfloat16(float x) {  // rounded to nearest, ties to even (PTX ISA, cvt.rn.bf16x2.f32)
    uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

inline uint32_t to_bfloat16_pair(float low, float high) { return to_bfloat16(low) | to_bfloat16(high) << 16; }

// c (16, 8) += a (16, 8 words) b (8 words, 8); what a word is, one TF32 or two bfloat16, `product` knows.
// Which lane holds what: PTX ISA, "Matrix Fragments for mma.m16n8k8" and "... mma.m16n8k16".
template <class Product>
void mma_emulated(float c[4], const uint32_t a[4], const uint32_t b[2], Product product, const char* what) {
    unsigned group = emulated::lane() / 4, place = emulated::lane() % 4;
    for (unsigned i = 0; i < 4; i++) emulated::give(i, a[i]);
    for (unsigned i = 0; i < 2; i++) emulated::give(4 + i, b[i]);
    emulated::wait_for(what, false);
    auto a_word = [&](unsigned row, unsigned word) {
        return uint32_t(emulated::take(row % 8 * 4 + word % 4, row / 8 + 2 * (word / 4)));
    };
    auto b_word = [&](unsigned word, unsigned column) {
        return uint32_t(emulated::take(column * 4 + word % 4, 4 + word / 4));
    };
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = group + 8 * (i / 2), column = 2 * place + i % 2;
        float sum = c[i];
        for (unsigned word = 0; word < 8; word++) sum += product(a_word(row, word), b_word(word, column));
        c[i] = sum;
    }
    emulated::wait_for(what, false);
}

inline void mma_tf32(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    auto product = [](uint32_t x, uint32_t y) { return __uint_as_float(x) * __uint_as_float(y); };
    mma_emulated(c, a, b, product, "mma_tf32");
}

inline void mma_bfloat16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    auto product = [](uint32_t x, uint32_t y) {
        return __uint_as_float(x << 16) * __uint_as_float(y << 16) +
               __uint_as_float(x & 0xffff0000u) * __uint_as_float(y & 0xffff0000u);
    };
    mma_emulated(c, a, b, product, "mma_bfloat16");
}
