// Twins of attention_forward and attention_backward in ops/attention.py, for all heads: one block per image and head.
//
// A head of the note's model has 17 tokens of width 32, so queries, keys and values fit into shared memory together, and
// only the weights and the result go back to global memory. The rows of a table are one number longer than a head is wide,
// so that lanes that read down a column read from different banks (if the width of a head is even).

#include "warp.cuh"

#ifndef TOKENS
#define TOKENS 17
#endif
#ifndef HEAD_WIDTH
#define HEAD_WIDTH 32
#endif

const int WARPS = 4;  // of a block
const int THREADS = 32 * WARPS;
const int ROW = HEAD_WIDTH + 1;
const int KEYS_A_LANE = (TOKENS + 31) / 32;

// One head's part of the tokens of an image, from x (tokens, step) into a table (tokens, ROW).
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
// The queries are all tokens or the class token, which is the first one. scale: 1 / sqrt(K).
// qkv: (B, T, 3, H, K); out: (B, queries, H, K); weights: (B, H, queries, T). grid: (H, B).
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

    float* mine = row_weights + warp * TOKENS;
    for (int s = warp; s < queries; s += WARPS) {  // one warp per query, one lane per key
        float scores[KEYS_A_LANE], largest = LEAST, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < KEYS_A_LANE; i++) {
            int t = lane + 32 * i;
            scores[i] = t < TOKENS ? scale * dot(q + s * ROW, k + t * ROW) : LEAST;
            largest = fmaxf(largest, scores[i]);
        }
        largest = warp_max(largest);
#pragma unroll
        for (int i = 0; i < KEYS_A_LANE; i++) {
            scores[i] = expf(scores[i] - largest);  // exp(LEAST) is 0, the weight beyond the last token
            sum += scores[i];
        }
        sum = warp_sum(sum);
#pragma unroll
        for (int i = 0; i < KEYS_A_LANE; i++) {
            int t = lane + 32 * i;
            if (t < TOKENS) {
                mine[t] = scores[i] / sum;
                weights[((image * heads + head) * queries + s) * TOKENS + t] = mine[t];
            }
        }
        __syncwarp();
        for (int c = lane; c < HEAD_WIDTH; c += 32) {  // one lane per column
            float value = 0.0f;
            for (int t = 0; t < TOKENS; t++) value += mine[t] * v[t * ROW + c];
            out[(image * queries + s) * width + head * HEAD_WIDTH + c] = value;
        }
        __syncwarp();  // before the next query's weights
    }
}

//     dweights = dout @ v.T,  dv = weights.T @ dout
//     dscores = weights * (dweights - sum over t of dweights * weights) / sqrt(K)
//     dq = dscores @ k,  dk = dscores.T @ q
//
// dqkv: (B, T, 3, H, K); dout: (B, queries, H, K). A token that was no query has a dq of zero. grid: (H, B).
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
    __shared__ float dscores[TOKENS * TOKENS];
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
        float dweights[KEYS_A_LANE], along = 0.0f;
#pragma unroll
        for (int i = 0; i < KEYS_A_LANE; i++) {
            int t = lane + 32 * i;
            dweights[i] = t < TOKENS ? dot(dout_table + s * ROW, v + t * ROW) : 0.0f;
            if (t < TOKENS) along += dweights[i] * weight_table[s * TOKENS + t];
        }
        along = warp_sum(along);
#pragma unroll
        for (int i = 0; i < KEYS_A_LANE; i++) {
            int t = lane + 32 * i;
            if (t < TOKENS) dscores[s * TOKENS + t] = (dweights[i] - along) * weight_table[s * TOKENS + t] * scale;
        }
    }
    __syncthreads();

    float* dstart = dqkv + image * TOKENS * 3 * width + head * HEAD_WIDTH;
    for (int i = (int)threadIdx.x; i < TOKENS * HEAD_WIDTH; i += THREADS) {  // one thread per token and column
        int t = i / HEAD_WIDTH, c = i % HEAD_WIDTH;
        float dq = 0.0f, dk = 0.0f, dv = 0.0f;
        if (t < queries) {
            for (int other = 0; other < TOKENS; other++) dq += dscores[t * TOKENS + other] * k[other * ROW + c];
        }
        for (int s = 0; s < queries; s++) {
            dk += dscores[s * TOKENS + t] * q[s * ROW + c];
            dv += weight_table[s * TOKENS + t] * dout_table[s * ROW + c];
        }
        float* place = dstart + t * 3 * width + c;
        place[0] = dq;
        place[width] = dk;
        place[2 * width] = dv;
    }
}
