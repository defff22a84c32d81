// The PTX instructions for tensor cores as functions (PTX ISA 8.0, "mma" and "cvt").
//
// A product c += a @ b has the matrices a (16, 8 words), b (8 words, 8) and c (16, 8), which are distributed over the
// 32 lanes of a warp. With group = lane / 4 and place = lane % 4, a lane holds
//
//     a[0] = a(group,     place)      a[1] = a(group + 8, place)
//     a[2] = a(group,     place + 4)  a[3] = a(group + 8, place + 4)
//     b[0] = b(place,     group)      b[1] = b(place + 4, group)
//     c[0] = c(group,     2 place)    c[1] = c(group,     2 place + 1)
//     c[2] = c(group + 8, 2 place)    c[3] = c(group + 8, 2 place + 1)
//
// A word is one TF32 number or two bfloat16 numbers that are adjacent along the summed axis, so that both precisions
// have the same layout. The sums c are float32.

#pragma once

#ifndef EMULATED

#if PRECISION == 1

// Round to 10 bits of mantissa, to nearest.
__device__ __forceinline__ unsigned int to_tf32(float x) {
    unsigned int word;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(x));
    return word;
}

__device__ __forceinline__ void mma_tf32(float c[4], const unsigned int a[4], const unsigned int b[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#elif PRECISION == 2

// Round two numbers to 7 bits of mantissa, to nearest, and put `low` into the lower half of the word.
__device__ __forceinline__ unsigned int to_bfloat16_pair(float low, float high) {
    unsigned int word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

__device__ __forceinline__ void mma_bfloat16(float c[4], const unsigned int a[4], const unsigned int b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif
#endif  // not EMULATED: tests/support/emulate.h defines these functions for the CPU
