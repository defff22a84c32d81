// Runs a CUDA kernel on the CPU: every thread of a block is a fiber, and blocks run one after the other.
//
// A kernel's text is compiled behind this header by a C++ compiler, as it is. What waits for other threads (a barrier,
// a shuffle, a tensor-core product) switches to the next fiber, until all that must arrive have arrived. So the
// threads of a block run in an order that `emulate` is told, and a kernel that lacks a barrier gives another result in
// another order. Shared memory is filled with not-a-number before every block.
//
// Compiled with -fsanitize=thread every CUDA thread is a thread to the sanitizer: two that touch the same place with
// no barrier between them are a race, and so are two blocks, as long as neither touches it atomically. A shuffle is no
// barrier there, as it is none on a GPU: it orders no memory. Compiled with -fsanitize=address an index out of bounds,
// of an argument or of a shared array, is caught where it happens. `emulate.py` does both. What it does not emulate, a
// compiler refuses: streams, textures, dynamic shared memory, clusters, asynchronous copies; and masks that are not
// full end the launch.

#pragma once

#include <math.h>
#include <setjmp.h>
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

#if defined(__has_feature)  // clang's way to say what g++ says in a macro
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1
#elif __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif

// What `emulate.py` writes for __shared__ in a kernel: all that the kernel shares lies in one section, whose size and
// place the linker tells. Under the thread sanitizer every block has a thread of its own: new memory for each.
#if defined(__SANITIZE_THREAD__)
#define EMULATED_SHARED(kernel) static thread_local
#elif defined(__SANITIZE_ADDRESS__) && defined(__clang__)  // which guards no array in a section of its own
#define EMULATED_SHARED(kernel) static
#else
#define EMULATED_SHARED(kernel) static __attribute__((section("emulated_shared_" #kernel)))
#endif
#define EMULATED_SECTION(kernel)                                                  \
    extern "C" char __start_emulated_shared_##kernel[] __attribute__((weak)); \
    extern "C" char __stop_emulated_shared_##kernel[] __attribute__((weak));
#define EMULATED_KERNEL(kernel)                                               \
    {                                                                         \
        #kernel, {                                                            \
            emulated::unpacked(kernel), __start_emulated_shared_##kernel,     \
                __stop_emulated_shared_##kernel                               \
        }                                                                     \
    }

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

using Launcher = std::function<void(void**)>;

struct Kernel {
    Launcher call;              // with pointers to its arguments
    char *shared, *shared_end;  // its shared memory; both null if it has none
};

struct Fiber {
    dim3 index;
    unsigned number;  // in the block
    State state;
    const char* waits_at;  // which barrier: its name
    int line;              // and the kernel's line
    bool waits_for_block;  // or else for its warp alone
    bool begun;            // whether it has run at all
    ucontext_t context;    // how it begins
    jmp_buf jump;          // and how it goes on
    char* stack = nullptr;
    void* sanitizer = nullptr;
};

const size_t STACK = 256 * 1024;  // bytes; the sanitizers need a good deal
const int MAP_FRESH = MAP_PRIVATE | MAP_ANONYMOUS;

inline std::vector<Fiber> fibers;
inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline jmp_buf scheduler_jump;
inline void* scheduler_sanitizer = nullptr;
// Fibers of blocks that are over. The sanitizer would give the number of one that is destroyed to a new one, and take
// what the two did for one thread's work.
inline std::vector<void*> ended;
inline dim3 block_index, block_size, grid_size;
inline std::function<void()> body;
inline std::string failure;
inline char kernel_end;              // addresses that stand for barriers, for the sanitizer: one for the whole launch,
inline std::vector<char> barriers;  // and for every block one of its own and one a warp, that order no other block
inline size_t block_number;
inline uint64_t exchanged[32][32][8];  // [warp][lane]: what a shuffle or a product gives to the other lanes

UNCHECKED inline dim3 thread_index() { return current->index; }
UNCHECKED inline dim3 the_block_index() { return block_index; }
UNCHECKED inline dim3 the_block_size() { return block_size; }
UNCHECKED inline dim3 the_grid_size() { return grid_size; }
UNCHECKED inline unsigned warp() { return current->number / 32; }
UNCHECKED inline unsigned lane() { return current->number % 32; }

// A switch by swapcontext asks the kernel for the signal mask, which takes longer than all else in most emulated
// kernels; _longjmp does not. The sanitizers want the former.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
UNCHECKED inline void switch_to_scheduler() {
    Fiber* self = current;
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(scheduler_sanitizer, 1);  // 1: this alone orders nothing
#endif
    swapcontext(&self->context, &scheduler);
}

UNCHECKED inline void resume(Fiber& fiber) {
    current = &fiber;
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(fiber.sanitizer, 1);
#endif
    swapcontext(&scheduler, &fiber.context);
}
#else
__attribute__((noinline)) inline void switch_to_scheduler() {
    if (_setjmp(current->jump) == 0) _longjmp(scheduler_jump, 1);
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
    current = &fiber;
    if (_setjmp(scheduler_jump) != 0) return;
    if (fiber.begun) _longjmp(fiber.jump, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
}
#endif

// orders_memory: what was written before the wait may be read after it. A barrier does that; a shuffle does not.
UNCHECKED inline void wait_for(const char* what, int line, bool for_block, bool orders_memory) {
#if defined(__SANITIZE_THREAD__)
    void* barrier = &barriers[block_number * 33 + (for_block ? 32 : warp())];
    if (orders_memory) __tsan_release(barrier);
#else
    (void)orders_memory;
#endif
    current->state = WAITS;
    current->waits_at = what;
    current->line = line;
    current->waits_for_block = for_block;
    switch_to_scheduler();
#if defined(__SANITIZE_THREAD__)
    if (orders_memory) __tsan_acquire(barrier);
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

inline std::string place(const Fiber& fiber) {
    return std::string(fiber.waits_at) + " in line " + std::to_string(fiber.line);
}

// Lets those go on who wait for one another and have all arrived; says whether there were any.
UNCHECKED inline bool release_group(size_t first, size_t last, bool for_block) {
    for (size_t i = first; i < last; i++) {
        if (fibers[i].state != WAITS || fibers[i].waits_for_block != for_block) return false;
    }
    for (size_t i = first; i < last; i++) {
        if (fibers[i].line != fibers[first].line || strcmp(fibers[i].waits_at, fibers[first].waits_at) != 0) {
            fail("threads wait at different places: " + place(fibers[first]) + " and " + place(fibers[i]));
            return false;
        }
    }
    for (size_t i = first; i < last; i++) fibers[i].state = READY;
    return true;
}

UNCHECKED inline void run_block(const Kernel& kernel, const std::vector<unsigned>& order) {
    size_t threads = fibers.size();
    for (char* byte = kernel.shared; byte < kernel.shared_end; byte++) *byte = char(0xff);
    for (Fiber& fiber : fibers) {
        fiber.state = READY;
        fiber.begun = false;
        getcontext(&fiber.context);
        if (!fiber.stack) fiber.stack = static_cast<char*>(mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_FRESH, -1, 0));
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, fiber_main, 0);
        // the address sanitizer would forget, at every switch, where the arrays end on a stack that it knows
        fiber.context.uc_stack.ss_size = 0;
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
            resume(fibers[i]);
            if (fibers[i].state == DONE) done++;
        }
        for (size_t first = 0; first < threads; first += 32) {
            progress |= release_group(first, std::min(first + 32, threads), false);
        }
        progress |= release_group(0, threads, true);
        if (!progress && done < threads) {
            size_t waiting = std::count_if(fibers.begin(), fibers.end(), [](Fiber& f) { return f.state == WAITS; });
            auto one = std::find_if(fibers.begin(), fibers.end(), [](Fiber& f) { return f.state == WAITS; });
            fail(std::to_string(waiting) + " of " + std::to_string(threads) + " threads wait at " + place(*one) +
                 ", which the others never reach");
        }
    }
#if defined(__SANITIZE_THREAD__)
    for (Fiber& fiber : fibers) {  // the next block's threads are others, and so are their stacks
        ended.push_back(fiber.sanitizer);
        munmap(fiber.stack, STACK);
        fiber.stack = nullptr;
    }
#endif
}

// order: 0 runs the threads from first to last, 1 from last to first, and any other number shuffles them and the blocks.
UNCHECKED inline const char* launch(const Kernel& kernel, void** arguments, dim3 grid, dim3 block, unsigned order) {
    size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
    failure.clear();
    if (threads < 1 || threads > 1024 || blocks < 1 || blocks > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
        failure = "no GPU launches " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads";
        return failure.c_str();
    }
#if !defined(__SANITIZE_ADDRESS__)  // whose guards would count too
    if (kernel.shared_end - kernel.shared > 48 * 1024) {
        failure = "a block has 48 KiB of shared memory, and this kernel wants " +
                  std::to_string(kernel.shared_end - kernel.shared) + " bytes";
        return failure.c_str();
    }
#endif
    body = [&kernel, arguments] { kernel.call(arguments); };
    barriers.assign(blocks * 33, 0);
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
#if defined(__SANITIZE_THREAD__)
    if (threads * blocks > 8000) {
        failure = "the thread sanitizer knows 8,000 threads at most: launch fewer blocks";
        return failure.c_str();
    }
#endif
    for (unsigned place : places) {
        if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
        block_number = place;
        block_index = {place % grid.x, place / grid.x % grid.y, place / (grid.x * grid.y)};
#if defined(__SANITIZE_THREAD__)
        std::thread([&] {
            scheduler_sanitizer = __tsan_get_current_fiber();
            run_block(kernel, turns);
        }).join();
#else
        run_block(kernel, turns);
#endif
        if (!failure.empty()) return failure.c_str();
    }
#if defined(__SANITIZE_THREAD__)
    for (void* fiber : ended) __tsan_destroy_fiber(fiber);
    ended.clear();
    __tsan_acquire(&kernel_end);
#endif
    return nullptr;
}

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
UNCHECKED inline uint64_t take(unsigned of_lane, unsigned slot) {
    if (warp() * 32 + of_lane % 32 >= fibers.size()) {
        fail("lane " + std::to_string(of_lane % 32) + " is asked for its value, but the block's last warp ends before it");
    }
    return exchanged[warp()][of_lane % 32][slot];
}

template <class T>
T exchange(T value, unsigned source_lane, const char* what, int line) {
    static_assert(sizeof(T) <= 8, "a shuffle takes up to eight bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    give(0, bits);
    wait_for(what, line, false, false);
    bits = take(source_lane, 0);
    memcpy(&value, &bits, sizeof(T));
    wait_for(what, line, false, false);  // nobody writes the next value before all have read this one
    return value;
}

inline void full_mask(unsigned mask) {
    if (mask != 0xffffffffu) fail("only the full mask is emulated");
}

}  // namespace emulated

#define threadIdx (emulated::thread_index())
#define blockIdx (emulated::the_block_index())
#define blockDim (emulated::the_block_size())
#define gridDim (emulated::the_grid_size())

// Each takes the line where it stands: threads that wait together must wait at the same one.
#define LINE int line = __builtin_LINE()
inline void __syncthreads(LINE) { emulated::wait_for("__syncthreads", line, true, true); }
inline void __syncwarp(unsigned mask = 0xffffffffu, LINE) {
    emulated::full_mask(mask);
    emulated::wait_for("__syncwarp", line, false, true);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes, LINE) {
    emulated::full_mask(mask);
    return emulated::exchange(value, emulated::lane() ^ lanes, "__shfl_xor_sync", line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, unsigned lane, LINE) {
    emulated::full_mask(mask);
    return emulated::exchange(value, lane, "__shfl_sync", line);
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
void mma_emulated(float c[4], const uint32_t a[4], const uint32_t b[2], Product product, const char* what, int line) {
    unsigned group = emulated::lane() / 4, place = emulated::lane() % 4;
    for (unsigned i = 0; i < 4; i++) emulated::give(i, a[i]);
    for (unsigned i = 0; i < 2; i++) emulated::give(4 + i, b[i]);
    emulated::wait_for(what, line, false, false);
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
    emulated::wait_for(what, line, false, false);
}

inline void mma_tf32(float c[4], const uint32_t a[4], const uint32_t b[2], LINE) {
    auto product = [](uint32_t x, uint32_t y) { return __uint_as_float(x) * __uint_as_float(y); };
    mma_emulated(c, a, b, product, "mma_tf32", line);
}

inline void mma_bfloat16(float c[4], const uint32_t a[4], const uint32_t b[2], LINE) {
    auto product = [](uint32_t x, uint32_t y) {
        return __uint_as_float(x << 16) * __uint_as_float(y << 16) +
               __uint_as_float(x & 0xffff0000u) * __uint_as_float(y & 0xffff0000u);
    };
    mma_emulated(c, a, b, product, "mma_bfloat16", line);
}
#undef LINE
