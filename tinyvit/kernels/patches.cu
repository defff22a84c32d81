// Bytes to augmented and normalised patches, as data/augment.py and as patch_embedding_forward in reference.py.

// Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3) computes four random
// words from a counter and a key in ten rounds. It has no state, so that every thread can draw its own numbers.
// numpy.random.Philox is the same generator: the CPU and the GPU draw the same numbers.
typedef unsigned long long word64;

struct Words {
    word64 word[4];
};

__device__ __forceinline__ Words philox(word64 counter, word64 key0, word64 key1) {
    Words c = {{counter, 0, 0, 0}};
    for (int round = 0; round < 10; round++) {
        const word64 m0 = 0xD2E7470EE14C6C93ull, m1 = 0xCA5A826395121157ull;
        word64 high0 = __umul64hi(m0, c.word[0]), low0 = m0 * c.word[0];
        word64 high1 = __umul64hi(m1, c.word[2]), low1 = m1 * c.word[2];
        c = {{high1 ^ c.word[1] ^ key0, low1, high0 ^ c.word[3] ^ key1, low0}};
        key0 += 0x9E3779B97F4A7C15ull;
        key1 += 0xBB67AE8584CAA73Bull;
    }
    return c;
}

// Number `index` of the stream, uniform in [-1, 1), equal to that of numpy.random.Generator.uniform(-1, 1).
__device__ __forceinline__ double uniform(word64 index, word64 key0, word64 key1) {
    Words words = philox(index / 4, key0, key1);
    return -1.0 + 2.0 * ((double)(words.word[index % 4] >> 11) * (1.0 / 9007199254740992.0));
}

//     map[:, :2] = rotate(angle) @ shear(lean) @ mirror / zoom
//     map[:, 2] = shift
//
// The parts are random numbers in the ranges of Augmentation.draw. maps: (count, 2, 3).
// key0, key1: the key of Philox. first: the index of the next word of its stream. rotation, shear: radians.
// log_scale: log(1 + scale). shift: pixels. flip: a probability. One thread computes a map. grid: ceil(count / 128).
extern "C" __global__ void __launch_bounds__(128) draw_maps(float* __restrict__ maps, int count, word64 key0, word64 key1,
                                                            word64 first, double rotation, double log_scale, double shear,
                                                            double shift, double flip) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= count) return;
    double drawn[6];
    for (int range = 0; range < 6; range++) {
        drawn[range] = uniform(first + (word64)range * (word64)count + (word64)i, key0, key1);
    }
    double angle = rotation * drawn[0], zoom = exp(log_scale * drawn[1]), lean = tan(shear * drawn[2]);
    double mirror = drawn[5] < 2.0 * flip - 1.0 ? -1.0 : 1.0;
    double c = cos(angle) / zoom, s = sin(angle) / zoom;
    float* map = maps + 6 * i;
    map[0] = (float)c;
    map[1] = (float)((c * lean - s) * mirror);
    map[2] = (float)(shift * drawn[3]);
    map[3] = (float)s;
    map[4] = (float)((s * lean + c) * mirror);
    map[5] = (float)(shift * drawn[4]);
}

// One number of a pixel, from 0 to 255. Pixels outside the image are black.
__device__ __forceinline__ float pixel_at(
    const unsigned char* image, int height, int width, int channels, int row, int column) {
    bool inside = row >= 0 && row < height && column >= 0 && column < width;
    return inside ? (float)image[(row * width + column) * channels] : 0.0f;
}

//     pixels = patches_forward((warp(images[order], maps) - mean) / deviation, P)
//     rows = concatenate([pixels, is_patch, is_class, identity(T)], axis=-1)
//     tokens = rows @ concatenate([w, b, class_token, positions])
//
// The kernel computes `rows` for the next batch. The third line is one product of linear_forward. It is the whole patch
// embedding, and its backward pass is that of the product. w, b, class_token and positions are adjacent in the flat
// array and form one matrix. In TF32 and bfloat16 all of them are rounded.
//
// rows: (batch, T, L + 2 + T), where L = patch_height * patch_width * channels. The class token has no pixels: its part
// is zero. is_patch is 1 for a patch and 0 for the class token, and is_class is 1 - is_patch.
// images: (N, height, width, channels). labels: (N,). order: (N,), the order of the epoch. maps: (N, 2, 3), where
// maps[i] is for image order[i], or null for no augmentation. scales: (channels, 2), the mean and the deviation of each
// channel. counter: (1,), the number of steps taken in this epoch. grid: one block per image of the batch.
extern "C" __global__ void __launch_bounds__(256) gather_patches(
    const unsigned char* __restrict__ images, const int* __restrict__ labels, const int* __restrict__ order,
    const float* __restrict__ maps, const float* __restrict__ scales, const int* __restrict__ counter,
    float* __restrict__ rows, int* __restrict__ batch_labels, int batch_size, int height, int width, int channels,
    int patch_height, int patch_width) {
    int place = counter[0] * batch_size + (int)blockIdx.x;
    int across = width / patch_width, tokens = height / patch_height * across + 1;
    int pixels = patch_height * patch_width * channels, length = pixels + 2 + tokens;
    int chosen = order[place];
    const unsigned char* image = images + (size_t)chosen * (size_t)(height * width * channels);
    float* out = rows + (size_t)blockIdx.x * (size_t)(tokens * length);
    float map[6] = {1.0f, 0.0f, 0.0f, 0.0f, 1.0f, 0.0f};
    if (maps) {
        for (int i = 0; i < 6; i++) map[i] = maps[6 * (size_t)place + i];
    }
    float row_centre = 0.5f * (float)(height - 1), column_centre = 0.5f * (float)(width - 1);
    for (int i = (int)threadIdx.x; i < tokens * length; i += (int)blockDim.x) {
        int token = i / length, j = i % length;
        float value;
        if (j >= pixels) {
            int is_class = token == 0;
            value = j == pixels ? !is_class : j == pixels + 1 ? is_class : j - pixels - 2 == token;
        } else if (token == 0) {
            value = 0.0f;
        } else {
            int pixel = j / channels, channel = j % channels;
            int row = (token - 1) / across * patch_height + pixel / patch_width;
            int column = (token - 1) % across * patch_width + pixel % patch_width;
            float brightness;
            if (maps) {
                // Pixels outside the image are black, so that a position far outside may be moved next to the border.
                float y = (float)row - row_centre, x = (float)column - column_centre;
                float from_row = map[0] * y + map[1] * x + map[2] + row_centre;
                float from_column = map[3] * y + map[4] * x + map[5] + column_centre;
                from_row = fminf(fmaxf(from_row, -1.0f), (float)height);
                from_column = fminf(fmaxf(from_column, -1.0f), (float)width);
                int upper = (int)floorf(from_row), left = (int)floorf(from_column);
                float down = from_row - (float)upper, right = from_column - (float)left;
                const unsigned char* numbers = image + channel;
                float above = pixel_at(numbers, height, width, channels, upper, left);
                float below = pixel_at(numbers, height, width, channels, upper + 1, left);
                above += right * (pixel_at(numbers, height, width, channels, upper, left + 1) - above);
                below += right * (pixel_at(numbers, height, width, channels, upper + 1, left + 1) - below);
                brightness = above + down * (below - above);
            } else {
                brightness = (float)image[(row * width + column) * channels + channel];
            }
            value = (brightness * (1.0f / 255.0f) - scales[2 * channel]) / scales[2 * channel + 1];
        }
        out[i] = value;
    }
    if (threadIdx.x == 0) batch_labels[blockIdx.x] = labels[chosen];
}
