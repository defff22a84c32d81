// Layer normalisation over the last axis, as layer_norm_forward and layer_norm_backward in reference.py.

#include "warp.cuh"

#ifndef WIDTH
#define WIDTH 128
#endif

const int PER_LANE = (WIDTH + 31) / 32;  // numbers of a row that a lane keeps in registers
const int WARPS = 8;                     // per block

//     deviation = sqrt(var(x) + epsilon)
//     normalised = (x - mean(x)) / deviation
//     out = normalised * w + b
//
// x, out, normalised: (rows, WIDTH). w, b: (WIDTH,). inverse_deviation: (rows,), 1 / deviation.
// One warp computes a row. grid: ceil(rows / 8).
extern "C" __global__ void __launch_bounds__(256) layer_norm_forward(const float* __restrict__ x, const float* __restrict__ w,
                                                                     const float* __restrict__ b, float* __restrict__ out,
                                                                     float* __restrict__ normalised,
                                                                     float* __restrict__ inverse_deviation, int rows,
                                                                     float epsilon) {
    int row = (int)blockIdx.x * WARPS + (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    if (row >= rows) return;  // all lanes of a warp have the same row, so that they return together
    float kept[PER_LANE], sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int column = lane + 32 * i;
        kept[i] = column < WIDTH ? x[row * WIDTH + column] : 0.0f;
        sum += kept[i];
    }
    float mean = warp_sum(sum) / WIDTH;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        kept[i] -= mean;
        if (lane + 32 * i < WIDTH) squares += kept[i] * kept[i];
    }
    float variance = warp_sum(squares) / WIDTH;
    float inverse = 1.0f / sqrtf(variance + epsilon) + (variance - variance);  // NaN for an infinite variance
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int column = lane + 32 * i;
        if (column < WIDTH) {
            float value = kept[i] * inverse;
            normalised[row * WIDTH + column] = value;
            out[row * WIDTH + column] = value * w[column] + b[column];
        }
    }
    if (lane == 0) inverse_deviation[row] = inverse;
}

//     dw = (dout * normalised).sum(axis=0),  db = dout.sum(axis=0),  dnormalised = dout * w
//     through_mean = mean(dnormalised),  through_deviation = normalised * mean(dnormalised * normalised)
//     dx = (dnormalised - through_mean - through_deviation) / deviation + residual
//
// dout, normalised, dx: (rows, WIDTH). w: (WIDTH,). inverse_deviation: (rows,). dw, db: (WIDTH,), partial gradients as
// in linear.cu. residual: null, or the gradient that reaches x through the residual branch, whose row i is added to row
// i * residual_every of dx. residual_every: 1 for all tokens, or T for the class tokens only.
// grid: ceil(rows / 8) blocks for dx, then ceil(WIDTH / 32) blocks for each partial gradient.
extern "C" __global__ void __launch_bounds__(256) layer_norm_backward(
    const float* __restrict__ dout, const float* __restrict__ normalised, const float* __restrict__ inverse_deviation,
    const float* __restrict__ w, const float* __restrict__ residual, float* __restrict__ dx, float* __restrict__ dw,
    float* __restrict__ db, int rows, int residual_every, int partial_rows, int partial_step) {
    __shared__ float dw_parts[WARPS * 32];
    __shared__ float db_parts[WARPS * 32];
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    int row_blocks = (rows + WARPS - 1) / WARPS;

    if ((int)blockIdx.x < row_blocks) {
        int row = (int)blockIdx.x * WARPS + warp;
        if (row >= rows) return;
        float dnormalised[PER_LANE], own_normalised[PER_LANE], through_mean = 0.0f, through_deviation = 0.0f;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            int column = lane + 32 * i;
            dnormalised[i] = column < WIDTH ? dout[row * WIDTH + column] * w[column] : 0.0f;
            own_normalised[i] = column < WIDTH ? normalised[row * WIDTH + column] : 0.0f;
            through_mean += dnormalised[i];
            through_deviation += dnormalised[i] * own_normalised[i];
        }
        through_mean = warp_sum(through_mean) / WIDTH;
        through_deviation = warp_sum(through_deviation) / WIDTH;
        float inverse = inverse_deviation[row];
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            int column = lane + 32 * i;
            if (column < WIDTH) {
                float value = (dnormalised[i] - through_mean - own_normalised[i] * through_deviation) * inverse;
                if (residual && row % residual_every == 0) value += residual[row / residual_every * WIDTH + column];
                dx[row * WIDTH + column] = value;
            }
        }
        return;
    }

    int block = (int)blockIdx.x - row_blocks;
    const int column_groups = (WIDTH + 31) / 32;
    int partial = block / column_groups, column = block % column_groups * 32 + lane;
    int first_row = min(rows, partial * partial_rows), end_row = min(rows, first_row + partial_rows);
    float dw_sum = 0.0f, db_sum = 0.0f;
    if (column < WIDTH) {
        for (int row = first_row + warp; row < end_row; row += WARPS) {
            float change = dout[row * WIDTH + column];
            dw_sum += change * normalised[row * WIDTH + column];
            db_sum += change;
        }
    }
    dw_parts[threadIdx.x] = dw_sum;
    db_parts[threadIdx.x] = db_sum;
    __syncthreads();
    if (warp == 0 && column < WIDTH) {
        for (int other = 1; other < WARPS; other++) {
            dw_sum += dw_parts[other * 32 + lane];
            db_sum += db_parts[other * 32 + lane];
        }
        size_t place = (size_t)partial * (size_t)partial_step + (size_t)column;
        dw[place] = dw_sum;
        db[place] = db_sum;
    }
}
