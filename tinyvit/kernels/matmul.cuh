// A tile of 32 x 32 numbers of a matrix product, computed by the 128 threads of a block.
//
//     sums(m, n) = sum over k of a(m, k) * b(k, n)
//
// A slab is 32 steps of k of one operand. The block copies a slab of both operands from global into shared memory,
// where each number is used 32 times. While it multiplies two slabs, it loads the next two into registers. In shared
// memory the slabs have the axes [k][m] and [k][n], and their rows begin 40 words apart, so that the lanes of a warp
// read from different banks. They also write to different banks, except for an operand whose k is its last axis, where
// two lanes share a bank.
//
// PRECISION 0 is float32 on the ordinary units. PRECISION 1 is TF32 and 2 is bfloat16, both on tensor cores, which need
// compute capability 8.0. Operands are float32 in global memory and are rounded when they are written to shared memory.
// The sums are float32 in every precision.

#pragma once

#ifndef PRECISION
#define PRECISION 0
#endif

#include "tensor_cores.cuh"

#if !defined(EMULATED) && PRECISION > 0 && defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "TF32 and bfloat16 need a GPU of compute capability 8.0 or above"
#endif

const int TILE = 32;           // rows and columns of a tile
const int DEPTH = 32;          // steps of k in a slab
const int TILE_THREADS = 128;  // threads of a block, which are four warps
const int TILE_SUMS = 8;       // sums per thread: 128 threads have 32 x 32

#if PRECISION == 2
const int WORD = 2;  // numbers in a word
#else
const int WORD = 1;
#endif
#if PRECISION == 0
typedef float Word;
#else
typedef unsigned int Word;
#endif
const int PITCH = TILE + 8;                               // words from one row of a slab to the next
const int SLAB = DEPTH / WORD * PITCH;                    // words of a slab
const int LOADS = DEPTH * TILE / (WORD * TILE_THREADS);   // words of a slab that one thread copies

// An operand of the product. The number at position k of the summed axis and at position j of the other axis is
// numbers[k * k_step + j * j_step].
struct Operand {
    const float* numbers;
    int k_step, j_step;
    int j_count;  // length of the other axis; numbers after it count as zero
};

// Set k and j to the position of the word that this thread copies in round i. Neighbouring lanes copy numbers that are
// adjacent in global memory.
__device__ __forceinline__ void carried(const Operand& operand, int i, int& k, int& j) {
    int e = i * TILE_THREADS + (int)threadIdx.x;
    if (operand.j_step != 1) {  // k is the last axis: lanes copy eight adjacent numbers for each of several j
        const int lanes = 8 / WORD;
        j = e / lanes % TILE;
        k = (e % lanes + e / (lanes * TILE) * lanes) * WORD;
    } else {
        j = e % TILE;
        k = e / TILE * WORD;
    }
}

// Load this thread's numbers of a slab from global memory into registers.
__device__ __forceinline__ void fetch(const Operand& operand, int first_k, int end_k, int first_j,
                                      float carry[LOADS * WORD]) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        int k, j;
        carried(operand, i, k, j);
        k += first_k;
        j += first_j;
#pragma unroll
        for (int half = 0; half < WORD; half++) {
            bool inside = j < operand.j_count && k + half < end_k;
            carry[i * WORD + half] = inside ? operand.numbers[(k + half) * operand.k_step + j * operand.j_step] : 0.0f;
        }
    }
}

// Round this thread's numbers to words and write them to shared memory.
__device__ __forceinline__ void store_slab(const Operand& operand, const float carry[LOADS * WORD], Word* slab) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        int k, j;
        carried(operand, i, k, j);
#if PRECISION == 0
        Word word = carry[i];
#elif PRECISION == 1
        Word word = to_tf32(carry[i]);
#else
        Word word = to_bfloat16_pair(carry[2 * i], carry[2 * i + 1]);
#endif
        slab[k / WORD * PITCH + j] = word;
    }
}

// The row and the column of the tile to which sum i of this thread belongs.
__device__ __forceinline__ int tile_row(int i) {
#if PRECISION == 0
    return (int)threadIdx.x / 8 * 2 + i / 4;
#else
    return (int)threadIdx.x / 64 * 16 + (int)threadIdx.x % 32 / 4 + i % 4 / 2 * 8;
#endif
}

__device__ __forceinline__ int tile_column(int i) {
#if PRECISION == 0
    return (int)threadIdx.x % 8 * 4 + i % 4;
#else
    return (int)threadIdx.x / 32 % 2 * 16 + i / 4 * 8 + (int)threadIdx.x % 4 * 2 + i % 2;
#endif
}

// Add the product of two slabs to the sums.
__device__ __forceinline__ void multiply(const Word* a_slab, const Word* b_slab, float sums[TILE_SUMS]) {
#if PRECISION == 0
    const Word* a = a_slab + tile_row(0);
    const Word* b = b_slab + tile_column(0);
#pragma unroll
    for (int k = 0; k < DEPTH; k++) {
        float2 two = *(const float2*)(a + k * PITCH);
        float4 four = *(const float4*)(b + k * PITCH);
        sums[0] += two.x * four.x;
        sums[1] += two.x * four.y;
        sums[2] += two.x * four.z;
        sums[3] += two.x * four.w;
        sums[4] += two.y * four.x;
        sums[5] += two.y * four.y;
        sums[6] += two.y * four.z;
        sums[7] += two.y * four.w;
    }
#else
    // A warp computes 16 rows and 16 columns, as two fragments of 16 x 8.
    int group = (int)threadIdx.x % 32 / 4, place = (int)threadIdx.x % 4;
    const Word* a = a_slab + (int)threadIdx.x / 64 * 16 + group;
    const Word* b = b_slab + (int)threadIdx.x / 32 % 2 * 16 + group;
#pragma unroll
    for (int k = 0; k < DEPTH / WORD; k += 8) {
        const Word* near = a + (k + place) * PITCH;
        const Word* far = near + 4 * PITCH;
        Word a_fragment[4] = {near[0], near[8], far[0], far[8]};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const Word* column = b + (k + place) * PITCH + 8 * half;
            Word b_fragment[2] = {column[0], column[4 * PITCH]};
#if PRECISION == 1
            mma_tf32(sums + 4 * half, a_fragment, b_fragment);
#else
            mma_bfloat16(sums + 4 * half, a_fragment, b_fragment);
#endif
        }
    }
#endif
}

// Compute the sums of one tile over k from first_k to end_k - 1, for rows from first_m and columns from first_n. All
// threads of the block must call it together. Return the sum of the numbers of b that this thread copied, before
// rounding. If the columns are the last axis of b, these numbers belong to column threadIdx.x % 32 of the tile.
__device__ __forceinline__ float tile_product(const Operand& a, const Operand& b, int first_k, int end_k, int first_m,
                                              int first_n, Word* a_slab, Word* b_slab, float sums[TILE_SUMS]) {
    float a_carry[LOADS * WORD], b_carry[LOADS * WORD], carried_sum = 0.0f;
#pragma unroll
    for (int i = 0; i < TILE_SUMS; i++) sums[i] = 0.0f;
    fetch(a, first_k, end_k, first_m, a_carry);
    fetch(b, first_k, end_k, first_n, b_carry);
    for (int k = first_k; k < end_k; k += DEPTH) {
        __syncthreads();  // every thread has read the previous slab
        store_slab(a, a_carry, a_slab);
        store_slab(b, b_carry, b_slab);
#pragma unroll
        for (int i = 0; i < LOADS * WORD; i++) carried_sum += b_carry[i];
        __syncthreads();
        if (k + DEPTH < end_k) {
            fetch(a, k + DEPTH, end_k, first_m, a_carry);
            fetch(b, k + DEPTH, end_k, first_n, b_carry);
        }
        multiply(a_slab, b_slab, sums);
    }
    return carried_sum;
}
