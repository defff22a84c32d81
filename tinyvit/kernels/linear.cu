// The linear layer and the GELU or the addition that follows it, as linear_forward and gelu_forward in reference.py.
//
// Every matrix is float32 and row-major. A block computes a tile of 32 x 32 numbers of a product.

#include "matmul.cuh"

__device__ __forceinline__ void forward_tile(const float* x, const float* w, int rows, int inputs, int outputs,
                                             Word* a_slab, Word* b_slab, float sums[TILE_SUMS]) {
    Operand a = {x, 1, inputs, rows};      // a(m, k) = x[m, k]
    Operand b = {w, outputs, 1, outputs};  // b(k, n) = w[k, n]
    tile_product(a, b, 0, inputs, (int)blockIdx.y * TILE, (int)blockIdx.x * TILE, a_slab, b_slab, sums);
}

//     out = x @ w + b + residual
//
// x: (rows, inputs). w: (inputs, outputs). b: (outputs,) or null. out: (rows, outputs).
// residual: null, or (rows, outputs) with rows that begin residual_step numbers apart.
// grid: (ceil(outputs / 32), ceil(rows / 32)).
extern "C" __global__ void __launch_bounds__(128) linear_forward(const float* __restrict__ x, const float* __restrict__ w,
                                                                 const float* __restrict__ b,
                                                                 const float* __restrict__ residual, float* __restrict__ out,
                                                                 int rows, int inputs, int outputs, int residual_step) {
    __shared__ __align__(16) Word a_slab[SLAB];
    __shared__ __align__(16) Word b_slab[SLAB];
    float sums[TILE_SUMS];
    forward_tile(x, w, rows, inputs, outputs, a_slab, b_slab, sums);
#pragma unroll
    for (int i = 0; i < TILE_SUMS; i++) {
        int row = (int)blockIdx.y * TILE + tile_row(i), column = (int)blockIdx.x * TILE + tile_column(i);
        if (row < rows && column < outputs) {
            float value = sums[i];
            if (b) value += b[column];
            if (residual) value += residual[row * residual_step + column];
            out[row * outputs + column] = value;
        }
    }
}

//     h = x @ w + b
//     out = h * cdf(h)
//     derivative = cdf(h) + h * density(h)
//
// derivative: (rows, outputs), the factor of gelu_backward. Other shapes and grid: as for linear_forward.
// With the macro GELU_TANH it computes gelu_tanh_forward of ops/gelu.py instead.
extern "C" __global__ void __launch_bounds__(128) linear_gelu_forward(const float* __restrict__ x,
                                                                      const float* __restrict__ w,
                                                                      const float* __restrict__ b, float* __restrict__ out,
                                                                      float* __restrict__ derivative, int rows, int inputs,
                                                                      int outputs) {
    __shared__ __align__(16) Word a_slab[SLAB];
    __shared__ __align__(16) Word b_slab[SLAB];
    float sums[TILE_SUMS];
    forward_tile(x, w, rows, inputs, outputs, a_slab, b_slab, sums);
#pragma unroll
    for (int i = 0; i < TILE_SUMS; i++) {
        int row = (int)blockIdx.y * TILE + tile_row(i), column = (int)blockIdx.x * TILE + tile_column(i);
        if (row < rows && column < outputs) {
            float h = sums[i] + b[column];
#ifdef GELU_TANH
            const float scale = 0.7978845608f;  // sqrt(2 / pi)
            float tanh_u = tanhf(scale * (h + 0.044715f * h * h * h));
            float slope = scale * (1.0f + 3.0f * 0.044715f * h * h);
            float value = 0.5f * h * (1.0f + tanh_u);
            float change = 0.5f * (1.0f + tanh_u) + 0.5f * h * (1.0f - tanh_u * tanh_u) * slope;
#else
            float cdf = 0.5f * (1.0f + erff(h * 0.7071067812f));
            float value = h * cdf;
            float change = cdf + h * 0.3989422804f * expf(-0.5f * h * h);  // cdf + h * density(h)
#endif
            out[row * outputs + column] = value;
            derivative[row * outputs + column] = change;
        }
    }
}

//     dx = dout @ w.T * derivative
//     dw = x.T @ dout
//     db = dout.sum(axis=0)
//
// dout: (rows, outputs). w: (inputs, outputs). derivative: (rows, inputs), or null for a factor of 1.
// x, dx: (rows, inputs). dw: (inputs, outputs). db: (outputs,). A null dx or db is not computed.
// dw and db are partial gradients, so that no block has to sum over all rows. Partial gradient i covers partial_rows
// rows from row i * partial_rows and is at dw + i * partial_step and db + i * partial_step. sum_partials adds them up.
// grid: tiles of dx + tiles of dw * number of partial gradients.
extern "C" __global__ void __launch_bounds__(128) linear_backward(const float* __restrict__ dout, const float* __restrict__ x,
                                                                  const float* __restrict__ w,
                                                                  const float* __restrict__ derivative,
                                                                  float* __restrict__ dx, float* __restrict__ dw,
                                                                  float* __restrict__ db, int rows, int inputs, int outputs,
                                                                  int partial_rows, int partial_step) {
    __shared__ __align__(16) Word a_slab[SLAB];
    __shared__ __align__(16) Word b_slab[SLAB];
    __shared__ float column_sums[TILE_THREADS];
    float sums[TILE_SUMS];
    int input_tiles = (inputs + TILE - 1) / TILE, output_tiles = (outputs + TILE - 1) / TILE;
    int dx_tiles = dx ? (rows + TILE - 1) / TILE * input_tiles : 0;

    if ((int)blockIdx.x < dx_tiles) {
        int first_row = (int)blockIdx.x / input_tiles * TILE, first_input = (int)blockIdx.x % input_tiles * TILE;
        Operand a = {dout, 1, outputs, rows};  // a(m, k) = dout[m, k]
        Operand b = {w, 1, outputs, inputs};   // b(k, n) = w[n, k]
        tile_product(a, b, 0, outputs, first_row, first_input, a_slab, b_slab, sums);
#pragma unroll
        for (int i = 0; i < TILE_SUMS; i++) {
            int row = first_row + tile_row(i), input = first_input + tile_column(i);
            if (row < rows && input < inputs) {
                int place = row * inputs + input;
                dx[place] = derivative ? sums[i] * derivative[place] : sums[i];
            }
        }
        return;
    }

    int tile = (int)blockIdx.x - dx_tiles;
    int partial = tile / (input_tiles * output_tiles);
    int first_input = tile / output_tiles % input_tiles * TILE, first_output = tile % output_tiles * TILE;
    int first_row = min(rows, partial * partial_rows), end_row = min(rows, first_row + partial_rows);
    Operand a = {x, inputs, 1, inputs};       // a(m, k) = x[k, m]
    Operand b = {dout, outputs, 1, outputs};  // b(k, n) = dout[k, n]
    float part = tile_product(a, b, first_row, end_row, first_input, first_output, a_slab, b_slab, sums);
    size_t partial_start = (size_t)partial * (size_t)partial_step;
#pragma unroll
    for (int i = 0; i < TILE_SUMS; i++) {
        int input = first_input + tile_row(i), output = first_output + tile_column(i);
        if (input < inputs && output < outputs) dw[partial_start + (size_t)(input * outputs + output)] = sums[i];
    }
    if (db && first_input == 0) {  // every tile with these outputs has their sums, and one writes them
        column_sums[threadIdx.x] = part;
        __syncthreads();
        int output = first_output + (int)threadIdx.x;
        if ((int)threadIdx.x < TILE && output < outputs) {
            const float* four = column_sums + threadIdx.x;
            db[partial_start + (size_t)output] = four[0] + four[TILE] + four[2 * TILE] + four[3 * TILE];
        }
    }
}
