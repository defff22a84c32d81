// Softmax cross-entropy, forward and backward in one kernel, as cross_entropy_forward and _backward in reference.py.

#include "warp.cuh"

const int WARPS = 8;

//     losses = -(target * log_softmax).sum(axis=1), with log_softmax = log(softmax(logits))
//     dlogits = (softmax(logits) - target) / batch
//     totals += (losses.sum(), number of images classified correctly)
//
// target: smoothing / classes for every class, plus 1 - smoothing for the label.
// logits, dlogits: (batch, classes). totals: (2,) float64, because an epoch adds up many images.
// labels: (batch,), from 0 to classes - 1. Any other label makes its loss and its row of dlogits NaN.
// One warp computes an image, and each of its lanes every 32nd class.
// grid: one block, so that the order of the sums is always the same.
extern "C" __global__ void __launch_bounds__(256) cross_entropy(const float* __restrict__ logits,
                                                                const int* __restrict__ labels, float* __restrict__ dlogits,
                                                                double* __restrict__ totals, int batch, int classes,
                                                                float smoothing) {
    __shared__ double losses[WARPS];
    __shared__ int corrects[WARPS];
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    double loss_sum = 0.0;
    int correct = 0;
    for (int image = warp; image < batch; image += WARPS) {
        const float* row = logits + image * classes;
        int label = labels[image];
        float largest = LEAST, sum = 0.0f, total = 0.0f;
        for (int c = lane; c < classes; c += 32) largest = fmaxf(largest, row[c]);
        largest = warp_max(largest);
        int first = classes;  // the first class with the largest logit, as argmax returns it
        for (int c = lane; c < classes; c += 32) {
            sum += expf(row[c] - largest);
            total += row[c] - largest;
            if (row[c] == largest && c < first) first = c;
        }
        sum = warp_sum(sum);
        total = warp_sum(total);
        for (int distance = 16; distance > 0; distance /= 2) {
            first = min(first, __shfl_xor_sync(0xffffffffu, first, distance));
        }
        // log_softmax[c] = logits[c] - largest - log(sum)
        float log_sum = logf(sum);
        bool known = label >= 0 && label < classes;
        float at_label = known ? row[label] - largest - log_sum : nanf(""), at_all = total - classes * log_sum;
        float smoothed = smoothing > 0.0f ? smoothing / classes * at_all : 0.0f;  // 0 * -inf would be NaN
        loss_sum -= (double)((1.0f - smoothing) * at_label + smoothed);
        correct += first == label;
        for (int c = lane; c < classes; c += 32) {
            float target = (c == label ? 1.0f - smoothing : 0.0f) + smoothing / classes;
            dlogits[image * classes + c] = known ? (expf(row[c] - largest) / sum - target) / batch : nanf("");
        }
    }
    if (lane == 0) {
        losses[warp] = loss_sum;
        corrects[warp] = correct;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int other = 1; other < WARPS; other++) {
            loss_sum += losses[other];
            correct += corrects[other];
        }
        totals[0] += loss_sum;
        totals[1] += correct;
    }
}
