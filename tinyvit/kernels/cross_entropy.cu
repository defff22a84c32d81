// Twin of cross_entropy_forward and cross_entropy_backward in ops/cross_entropy.py, in one.

#include "warp.cuh"

const int WARPS = 8;

// dlogits (batch, classes) of the mean loss, and the epoch's totals: totals[0] += sum of the losses, totals[1] += how many
// images were classified rightly, both float64, as an epoch has many images.
//
// logits: (batch, classes); labels: (batch,), in 0..classes-1: another one makes the loss and that row of dlogits
// not-a-number, as in the plain operation, and training finds it out; smoothing: that share of the target goes to all
// classes evenly. A warp to an image, a lane to every 32nd class. grid: one block, so that the sums are taken in one
// order always.
extern "C" __global__ void __launch_bounds__(256) cross_entropy(const float* __restrict__ logits,
                                                                const int* __restrict__ labels, float* __restrict__ dlogits,
                                                                double* __restrict__ totals, int batch, int classes,
                                                                float smoothing) {
    __shared__ double losses[WARPS];
    __shared__ int rights[WARPS];
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    double loss_sum = 0.0;
    int right = 0;
    for (int image = warp; image < batch; image += WARPS) {
        const float* row = logits + image * classes;
        int label = labels[image];
        float largest = LEAST, sum = 0.0f, total = 0.0f;
        for (int c = lane; c < classes; c += 32) largest = fmaxf(largest, row[c]);
        largest = warp_max(largest);
        int first = classes;  // the first class with the largest logit, as argmax says
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
        // log softmax(z)[c] = z[c] - largest - log(sum), and the loss is minus its mean under the target
        float log_sum = logf(sum);
        bool known = label >= 0 && label < classes;
        float at_label = known ? row[label] - largest - log_sum : nanf(""), at_all = total - classes * log_sum;
        loss_sum -= (double)((1.0f - smoothing) * at_label + smoothing / classes * at_all);
        right += first == label;
        for (int c = lane; c < classes; c += 32) {
            float target = (c == label ? 1.0f - smoothing : 0.0f) + smoothing / classes;
            dlogits[image * classes + c] = known ? (expf(row[c] - largest) / sum - target) / batch : nanf("");
        }
    }
    if (lane == 0) {
        losses[warp] = loss_sum;
        rights[warp] = right;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int other = 1; other < WARPS; other++) {
            loss_sum += losses[other];
            right += rights[other];
        }
        totals[0] += loss_sum;
        totals[1] += right;
    }
}
