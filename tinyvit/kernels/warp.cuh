// The sum and the maximum over the 32 lanes of a warp. Every lane gets the result.

#pragma once

#define LARGEST 3.402823466e+38f  // the largest float32
#define LEAST (-LARGEST)          // replaces minus infinity, for which NVRTC has no macro

__device__ __forceinline__ float warp_sum(float value) {
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
    for (int distance = 16; distance > 0; distance /= 2) {
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    return value;
}
