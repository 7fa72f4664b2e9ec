// Rotary position embedding (arXiv 2104.09864): pairs (x0, x1), (x2, x3), ... are turned and stay in place.
// table[positions][rope]: cos of rope / 2 frequencies, then sin. Token t stands at position t % positions of the table.

extern "C" __global__ void rotary_table(const i64* positions, const float* frequencies, float* table, i64 count, int half, double scale) {
    FOR_EACH(i, count * half) {
        i64 s = i / half;
        int k = (int)(i % half);
        // exact in fp64, as float times integer is
        double angle = (double)positions[s] * (double)frequencies[k], sine, cosine;
        sincos(angle, &sine, &cosine);
        table[s * 2 * half + k] = (float)(cosine * scale);
        table[s * 2 * half + half + k] = (float)(sine * scale);
    }
}

// x[tokens heads d] -> y, the last `rope` features of each head turned (inverse: back). A block is a token.
template <class T>
__device__ void rotateLast(const T* x, const float* table, T* y, i64 tokens, int heads, int d, int rope, i64 positions, int inverse, int inPlace) {
    int keep = d - rope;
    for (i64 t = blockIdx.x; t < tokens; t += gridDim.x) {
        const float* angles = table + t % positions * rope;
        i64 base = t * heads * d;
        for (int i = threadIdx.x; !inPlace && i < heads * keep; i += blockDim.x) {
            i64 at = base + i / keep * d + i % keep;
            store(y, at, load(x, at));
        }
        for (int i = threadIdx.x; i < heads * rope / 2; i += blockDim.x) {
            int k = i % (rope / 2);
            i64 at = base + i / (rope / 2) * d + keep + 2 * k;
            float a = load(x, at), b = load(x, at + 1), c = angles[k], s = inverse ? -angles[rope / 2 + k] : angles[rope / 2 + k];
            store(y, at, a * c - b * s);
            store(y, at + 1, b * c + a * s);
        }
    }
}

// The same, 8 features a thread: d and rope are multiples of 8. In place only the last `rope` features are touched.
template <class T>
__device__ void rotateLast8(const T* x, const float* table, T* y, i64 tokens, int heads, int d, int rope, i64 positions, int inverse, int inPlace) {
    int keep = d - rope, width = inPlace ? rope : d, skip = d - width;
    for (i64 t = blockIdx.x; t < tokens; t += gridDim.x) {
        const float* angles = table + t % positions * rope;
        i64 base = t * heads * d;
        for (int i = threadIdx.x * 8; i < heads * width; i += blockDim.x * 8) {
            int place = skip + i % width;
            i64 at = base + (i64)(i / width) * d + place;
            float v[8];
            load8(x, at, v);
            if (place >= keep) {
                int k = (place - keep) / 2;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float c = angles[k + j], s = inverse ? -angles[rope / 2 + k + j] : angles[rope / 2 + k + j], a = v[2 * j], b = v[2 * j + 1];
                    v[2 * j] = a * c - b * s;
                    v[2 * j + 1] = b * c + a * s;
                }
            }
            store8(y, at, v);
        }
    }
}

// kv[tokens heads nope+value], kPe[tokens rope] -> k[tokens heads nope+rope], v[tokens heads value]
template <class T>
__device__ void joinKv(const T* kv, const T* kPe, const float* table, T* k, T* v, i64 tokens, int heads, int nope, int rope, int value, i64 positions, int vector) {
    extern __shared__ float turned[];
    for (i64 t = blockIdx.x; t < tokens; t += gridDim.x) {
        const float* angles = table + t % positions * rope;
        __syncthreads();
        for (int i = threadIdx.x; i < rope / 2; i += blockDim.x) {
            float a = load(kPe, t * rope + 2 * i), b = load(kPe, t * rope + 2 * i + 1), c = angles[i], s = angles[rope / 2 + i];
            turned[2 * i] = a * c - b * s;
            turned[2 * i + 1] = b * c + a * s;
        }
        __syncthreads();
        int all = nope + rope + value;
        if (vector) {
            for (int i = threadIdx.x * 8; i < heads * all; i += blockDim.x * 8) {
                int h = i / all, at = i % all;
                i64 head = t * heads + h;
                float x[8];
                if (at < nope) {
                    load8(kv, head * (nope + value) + at, x);
                    store8(k, head * (nope + rope) + at, x);
                } else if (at < nope + rope) {
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        x[j] = turned[at - nope + j];
                    store8(k, head * (nope + rope) + at, x);
                } else {
                    load8(kv, head * (nope + value) + at - rope, x);
                    store8(v, head * value + at - nope - rope, x);
                }
            }
            continue;
        }
        for (int i = threadIdx.x; i < heads * all; i += blockDim.x) {
            int h = i / all, at = i % all;
            i64 head = t * heads + h;
            if (at < nope)
                store(k, head * (nope + rope) + at, load(kv, head * (nope + value) + at));
            else if (at < nope + rope)
                store(k, head * (nope + rope) + at, turned[at - nope]);
            else
                store(v, head * value + at - nope - rope, load(kv, head * (nope + value) + at - rope));
        }
    }
}

// dk[tokens heads nope+rope], dv[tokens heads value] -> dkv[tokens heads nope+value], dkPe[tokens rope]: summed over heads in order
template <class T>
__device__ void splitKv(const T* dk, const T* dv, const float* table, T* dkv, T* dkPe, i64 tokens, int heads, int nope, int rope, int value, i64 positions, int vector) {
    extern __shared__ float sums[];
    for (i64 t = blockIdx.x; t < tokens; t += gridDim.x) {
        const float* angles = table + t % positions * rope;
        int all = nope + value;
        if (vector) {
            for (int i = threadIdx.x * 8; i < heads * all; i += blockDim.x * 8) {
                int h = i / all, at = i % all;
                i64 head = t * heads + h;
                float x[8];
                if (at < nope)
                    load8(dk, head * (nope + rope) + at, x);
                else
                    load8(dv, head * value + at - nope, x);
                store8(dkv, head * all + at, x);
            }
        } else {
            for (int i = threadIdx.x; i < heads * all; i += blockDim.x) {
                int h = i / all, at = i % all;
                i64 head = t * heads + h;
                store(dkv, head * all + at, at < nope ? load(dk, head * (nope + rope) + at) : load(dv, head * value + at - nope));
            }
        }
        __syncthreads();
        // a few threads share a feature, each a run of heads
        int parts = max(1, (int)blockDim.x / rope), run = (heads + parts - 1) / parts;
        for (int i = threadIdx.x; i < rope * parts; i += blockDim.x) {
            int feature = i % rope, part = i / rope;
            float sum = 0.f;
            for (int h = part * run; h < min(heads, (part + 1) * run); h++)
                sum += load(dk, (t * heads + h) * (nope + rope) + nope + feature);
            sums[part * rope + feature] = sum;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < rope / 2; i += blockDim.x) {
            float a = 0.f, b = 0.f;
            for (int part = 0; part < parts; part++) {
                a += sums[part * rope + 2 * i];
                b += sums[part * rope + 2 * i + 1];
            }
            float c = angles[i], s = -angles[rope / 2 + i];
            store(dkPe, t * rope + 2 * i, a * c - b * s);
            store(dkPe, t * rope + 2 * i + 1, b * c + a * s);
        }
    }
}

#define ROTARY(T, name)                                                                                                                             \
    extern "C" __global__ void rope_last_##name(const T* x, const float* table, T* y, i64 tokens, int heads, int d, int rope, i64 positions, int inverse, int inPlace, int vector) { \
        if (vector)                                                                                                                                  \
            rotateLast8(x, table, y, tokens, heads, d, rope, positions, inverse, inPlace);                                                                    \
        else                                                                                                                                         \
            rotateLast(x, table, y, tokens, heads, d, rope, positions, inverse, inPlace);                                                                     \
    }                                                                                                                                                \
    extern "C" __global__ void rope_kv_##name(const T* kv, const T* kPe, const float* table, T* k, T* v, i64 tokens, int heads, int nope, int rope,    \
                                              int value, i64 positions, int vector) {                                                                \
        joinKv(kv, kPe, table, k, v, tokens, heads, nope, rope, value, positions, vector);                                                           \
    }                                                                                                                                                \
    extern "C" __global__ void rope_kv_grad_##name(const T* dk, const T* dv, const float* table, T* dkv, T* dkPe, i64 tokens, int heads, int nope,     \
                                                   int rope, int value, i64 positions, int vector) {                                                 \
        splitKv(dk, dv, table, dkv, dkPe, tokens, heads, nope, rope, value, positions, vector);                                                      \
    }

ROTARY(float, f32)
ROTARY(bf16, bf16)
