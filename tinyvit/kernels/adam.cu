// Adam with clipping and weight averaging on flat arrays, as adam_step in reference.py and the classes of optim.py.

#include "warp.cuh"

const int THREADS = 256;
const int WARPS = THREADS / 32;
const int EACH = 4;  // numbers per thread

// The sum of `value` over the threads of a block. Every thread gets it. parts: one number per warp in shared memory.
__device__ __forceinline__ float block_sum(float value, float* parts) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < WARPS; warp++) sum += parts[warp];
    return sum;
}

//     gradient = partial_gradients.sum(axis=0)
//     squares[block] = sum of gradient**2 over the numbers of the block
//     counter += 1
//
// partial_gradients: `partials` arrays of `count` numbers, which begin partial_step numbers apart.
// gradient: (count,). squares: (blocks,). counter: (1,), the number of steps taken in this epoch.
// grid: ceil(count / 1024).
extern "C" __global__ void __launch_bounds__(256) sum_partials(const float* __restrict__ partial_gradients,
                                                             float* __restrict__ gradient, float* __restrict__ squares,
                                                             int* __restrict__ counter, int count, int partials,
                                                             int partial_step) {
    __shared__ float parts[WARPS];
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int place = ((int)blockIdx.x * EACH + i) * THREADS + (int)threadIdx.x;
        if (place < count) {
            float sum = 0.0f;
            for (int partial = 0; partial < partials; partial++) {
                sum += partial_gradients[(size_t)partial * (size_t)partial_step + (size_t)place];
            }
            gradient[place] = sum;
            square += sum * sum;
        }
    }
    square = block_sum(square, parts);
    if (threadIdx.x == 0) squares[blockIdx.x] = square;
    if (blockIdx.x == 0 && threadIdx.x == 0) counter[0] += 1;
}

//     m = beta1 * m + (1 - beta1) * g,  v = beta2 * v + (1 - beta2) * g**2
//     weights -= learning_rate * weight_decay * weights * decayed
//     weights -= learning_rate * m_hat / (sqrt(v_hat) + epsilon),  average += (weights - average) * average_share
//
// g: gradient * min(1, clip / norm(gradient)), or the gradient itself if clip is 0. squares: from sum_partials.
// schedule: (steps, 4), one row per step of the epoch: learning_rate, learning_rate / (1 - beta1**t),
// 1 / sqrt(1 - beta2**t) and average_share, for step t. Row counter[0] - 1 applies.
// rest1, rest2: 1 - beta1 and 1 - beta2, computed in float64, because the difference of two float32 is inaccurate.
// decayed: (count,) ones and zeros, or null if all weights decay. average: (count,), or null.
// grid: ceil(count / 1024), as for sum_partials.
extern "C" __global__ void __launch_bounds__(256) adam_step(float* __restrict__ weights, const float* __restrict__ gradient,
                                                            float* __restrict__ first_moment,
                                                            float* __restrict__ second_moment,
                                                            const float* __restrict__ decayed, float* __restrict__ average,
                                                            const float* __restrict__ squares,
                                                            const float* __restrict__ schedule,
                                                            const int* __restrict__ counter, int count, float clip,
                                                            float beta1, float rest1, float beta2, float rest2,
                                                            float epsilon, float weight_decay) {
    __shared__ float parts[WARPS];
    float square = 0.0f, scale = 1.0f;
    if (clip > 0.0f) {
        for (int i = (int)threadIdx.x; i < (int)gridDim.x; i += THREADS) square += squares[i];
        float norm = sqrtf(block_sum(square, parts));
        scale = fminf(1.0f, clip / fmaxf(norm, 1e-12f));
        // An infinite norm would scale every g to zero, and fmaxf ignores NaN. Here both make the weights NaN, so that
        // the loss of the next step is NaN too.
        if (!(norm <= LARGEST)) scale = nanf("");
    }
    const float* row = schedule + 4 * (counter[0] - 1);
    float rate = row[0], step_size = row[1], v_correction = row[2], average_share = row[3];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int place = ((int)blockIdx.x * EACH + i) * THREADS + (int)threadIdx.x;
        if (place >= count) continue;
        float g = gradient[place] * scale;
        float m = first_moment[place] * beta1 + g * rest1;
        float v = second_moment[place] * beta2 + g * g * rest2;
        first_moment[place] = m;
        second_moment[place] = v;
        float weight = weights[place];
        if (weight_decay > 0.0f) weight -= weight * (rate * weight_decay * (decayed ? decayed[place] : 1.0f));
        weight -= m / (sqrtf(v) * v_correction + epsilon) * step_size;
        weights[place] = weight;
        if (average && average_share > 0.0f) average[place] += (weight - average[place]) * average_share;
    }
}
