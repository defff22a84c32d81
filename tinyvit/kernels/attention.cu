// Attention in several heads, as attention_forward and attention_backward in reference.py. A block computes one head.
//
// In the default model a head has 17 tokens of width 32, so that its queries, keys and values fit into shared memory
// together. Only the weights and the result are written to global memory. A row of a table in shared memory is one
// number longer than the head is wide. If this width is even, lanes that read a column then read from different banks.

#include "warp.cuh"

#ifndef TOKENS
#define TOKENS 17
#endif
#ifndef HEAD_WIDTH
#define HEAD_WIDTH 32
#endif

const int WARPS = 4;  // per block
const int THREADS = 32 * WARPS;
const int ROW = HEAD_WIDTH + 1;
const int KEYS_PER_LANE = (TOKENS + 31) / 32;

// Copy the columns of one head from x, whose rows are `step` numbers apart, into a table (tokens, ROW).
__device__ __forceinline__ void load_table(const float* x, int tokens, int step, float* table) {
    for (int i = (int)threadIdx.x; i < tokens * HEAD_WIDTH; i += THREADS) {
        table[i / HEAD_WIDTH * ROW + i % HEAD_WIDTH] = x[i / HEAD_WIDTH * step + i % HEAD_WIDTH];
    }
}

__device__ __forceinline__ float dot(const float* a, const float* b) {
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < HEAD_WIDTH; c++) sum += a[c] * b[c];
    return sum;
}

//     scores = q @ k.T / sqrt(K)
//     weights = softmax(scores)
//     out = weights @ v
//
// qkv: (B, T, 3, H, K). out: (B, queries, H, K). weights: (B, H, queries, T). scale: 1 / sqrt(K).
// queries: T for all tokens, or 1 for the class token only, which is the first token. grid: (H, B).
extern "C" __global__ void __launch_bounds__(128) attention_forward(const float* __restrict__ qkv, float* __restrict__ out,
                                                                    float* __restrict__ weights, int heads, int queries,
                                                                    float scale) {
    __shared__ float q[TOKENS * ROW];
    __shared__ float k[TOKENS * ROW];
    __shared__ float v[TOKENS * ROW];
    __shared__ float row_weights[WARPS * TOKENS];
    int head = (int)blockIdx.x, image = (int)blockIdx.y, warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    int width = heads * HEAD_WIDTH;
    const float* start = qkv + image * TOKENS * 3 * width + head * HEAD_WIDTH;
    load_table(start, queries, 3 * width, q);
    load_table(start + width, TOKENS, 3 * width, k);
    load_table(start + 2 * width, TOKENS, 3 * width, v);
    __syncthreads();

    float* own_weights = row_weights + warp * TOKENS;
    for (int s = warp; s < queries; s += WARPS) {  // one warp per query, one lane per key
        float scores[KEYS_PER_LANE], largest = LEAST, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < KEYS_PER_LANE; i++) {
            int t = lane + 32 * i;
            scores[i] = t < TOKENS ? scale * dot(q + s * ROW, k + t * ROW) : LEAST;
            largest = fmaxf(largest, scores[i]);
        }
        largest = warp_max(largest);
#pragma unroll
        for (int i = 0; i < KEYS_PER_LANE; i++) {
            scores[i] = expf(scores[i] - largest);  // exp(LEAST) is 0, the weight after the last token
            sum += scores[i];
        }
        sum = warp_sum(sum);
#pragma unroll
        for (int i = 0; i < KEYS_PER_LANE; i++) {
            int t = lane + 32 * i;
            if (t < TOKENS) {
                own_weights[t] = scores[i] / sum;
                weights[((image * heads + head) * queries + s) * TOKENS + t] = own_weights[t];
            }
        }
        __syncwarp();
        for (int c = lane; c < HEAD_WIDTH; c += 32) {  // one lane per column
            float value = 0.0f;
            for (int t = 0; t < TOKENS; t++) value += own_weights[t] * v[t * ROW + c];
            out[(image * queries + s) * width + head * HEAD_WIDTH + c] = value;
        }
        __syncwarp();  // the next query overwrites these weights
    }
}

//     dweights = dout @ v.T,  dv = weights.T @ dout
//     dscores = weights * (dweights - (dweights * weights).sum(axis=-1)),  dproducts = dscores / sqrt(K)
//     dq = dproducts @ k,  dk = dproducts.T @ q
//
// dout: (B, queries, H, K). dqkv: (B, T, 3, H, K). A token that is not a query gets a dq of zero. grid: (H, B).
extern "C" __global__ void __launch_bounds__(128) attention_backward(const float* __restrict__ dout,
                                                                     const float* __restrict__ qkv,
                                                                     const float* __restrict__ weights,
                                                                     float* __restrict__ dqkv, int heads, int queries,
                                                                     float scale) {
    __shared__ float q[TOKENS * ROW];
    __shared__ float k[TOKENS * ROW];
    __shared__ float v[TOKENS * ROW];
    __shared__ float dout_table[TOKENS * ROW];
    __shared__ float weight_table[TOKENS * TOKENS];
    __shared__ float dproducts[TOKENS * TOKENS];
    int head = (int)blockIdx.x, image = (int)blockIdx.y, warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    int width = heads * HEAD_WIDTH;
    const float* start = qkv + image * TOKENS * 3 * width + head * HEAD_WIDTH;
    load_table(start, queries, 3 * width, q);
    load_table(start + width, TOKENS, 3 * width, k);
    load_table(start + 2 * width, TOKENS, 3 * width, v);
    load_table(dout + image * queries * width + head * HEAD_WIDTH, queries, width, dout_table);
    for (int i = (int)threadIdx.x; i < queries * TOKENS; i += THREADS) {
        weight_table[i] = weights[(image * heads + head) * queries * TOKENS + i];
    }
    __syncthreads();

    for (int s = warp; s < queries; s += WARPS) {
        float dweights[KEYS_PER_LANE], sum = 0.0f;
#pragma unroll
        for (int i = 0; i < KEYS_PER_LANE; i++) {
            int t = lane + 32 * i;
            dweights[i] = t < TOKENS ? dot(dout_table + s * ROW, v + t * ROW) : 0.0f;
            if (t < TOKENS) sum += dweights[i] * weight_table[s * TOKENS + t];
        }
        sum = warp_sum(sum);
#pragma unroll
        for (int i = 0; i < KEYS_PER_LANE; i++) {
            int t = lane + 32 * i;
            if (t < TOKENS) dproducts[s * TOKENS + t] = (dweights[i] - sum) * weight_table[s * TOKENS + t] * scale;
        }
    }
    __syncthreads();

    float* dstart = dqkv + image * TOKENS * 3 * width + head * HEAD_WIDTH;
    for (int i = (int)threadIdx.x; i < TOKENS * HEAD_WIDTH; i += THREADS) {  // one thread per token and column
        int t = i / HEAD_WIDTH, c = i % HEAD_WIDTH;
        float dq = 0.0f, dk = 0.0f, dv = 0.0f;
        if (t < queries) {
            for (int other = 0; other < TOKENS; other++) dq += dproducts[t * TOKENS + other] * k[other * ROW + c];
        }
        for (int s = 0; s < queries; s++) {
            dk += dproducts[s * TOKENS + t] * q[s * ROW + c];
            dv += weight_table[s * TOKENS + t] * dout_table[s * ROW + c];
        }
        float* place = dstart + t * 3 * width + c;
        place[0] = dq;
        place[width] = dk;
        place[2 * width] = dv;
    }
}
