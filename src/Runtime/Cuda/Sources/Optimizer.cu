// Once a step: sums of squares, the clip, AdamW in one pass, the router's bias. All orders are fixed by sizes.

// part[blockIdx.x] = sum of squares of a run, fp64.
extern "C" __global__ void squares(const void* g, int isBf16, i64 n, double* part, int vector) {
    __shared__ double sums[256];
    double sum = 0;
    if (vector) {
        FOR_EACH(v, n / 8) {
            float x[8];
            if (isBf16)
                load8((const bf16*)g, v * 8, x);
            else
                load8((const float*)g, v * 8, x);
            float s = 0.f;
#pragma unroll
            for (int j = 0; j < 8; j++)
                s += x[j] * x[j];
            sum += s;
        }
    } else {
        FOR_EACH(i, n) {
            double x = loadAny(g, isBf16, i);
            sum += x * x;
        }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int far = 128; far > 0; far >>= 1) {
        if (threadIdx.x < far)
            sums[threadIdx.x] += sums[threadIdx.x + far];
        __syncthreads();
    }
    if (threadIdx.x == 0)
        part[blockIdx.x] = sums[0];
}

extern "C" __global__ void squares_total(const double* part, i64 n, float* out) {
    __shared__ double sums[256];
    double sum = 0;
    for (i64 i = threadIdx.x; i < n; i += 256)
        sum += part[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int far = 128; far > 0; far >>= 1) {
        if (threadIdx.x < far)
            sums[threadIdx.x] += sums[threadIdx.x + far];
        __syncthreads();
    }
    if (threadIdx.x == 0)
        out[0] = (float)sums[0];
}

extern "C" __global__ void clip_scale(const float* squares, float* norm, float* scale, double most) {
    double n = sqrt((double)squares[0]);
    norm[0] = (float)n;
    scale[0] = (float)fmin(1.0, most / (n + 1e-6));
}

struct Step {
    float b1, b2, c1, c2, clip, keep, rate, root, eps;
};

__device__ __forceinline__ Step stepOf(const float* clip, const float* lr, const float* step, double beta1, double beta2, double eps, double decay) {
    Step s;
    double rate = lr[0], count = step[0];
    s.b1 = (float)beta1, s.b2 = (float)beta2, s.c1 = (float)(1 - beta1), s.c2 = (float)(1 - beta2), s.clip = clip[0];
    s.keep = (float)(1 - rate * decay);
    s.rate = (float)(rate / (1 - pow(beta1, count)));
    s.root = (float)(1 / sqrt(1 - pow(beta2, count)));
    s.eps = (float)eps;
    return s;
}

__device__ __forceinline__ float update(const Step& s, float g, float& m, float& v, float p) {
    g *= s.clip;
    m = m * s.b1 + g * s.c1;
    v = v * s.b2 + g * g * s.c2;
    return p * s.keep - m * s.rate / (sqrtf(v) * s.root + s.eps);
}

// fp32 master; moments and parameter of their own types, rounded to nearest even.
template <class G, class M, class V, class P>
__device__ void adam(const G* g, float* master, M* m, V* v, P* p, const Step& s, i64 n, int vector) {
    if (vector) {
        FOR_EACH(k, n / 8) {
            float x[8], m8[8], v8[8], w[8];
            load8(g, k * 8, x);
            load8(m, k * 8, m8);
            load8(v, k * 8, v8);
            load8(master, k * 8, w);
#pragma unroll
            for (int j = 0; j < 8; j++)
                w[j] = update(s, x[j], m8[j], v8[j], w[j]);
            store8(m, k * 8, m8);
            store8(v, k * 8, v8);
            store8(master, k * 8, w);
            if ((const void*)p != (const void*)master)
                store8(p, k * 8, w);
        }
        return;
    }
    FOR_EACH(i, n) {
        float m1 = load(m, i), v1 = load(v, i), w = update(s, load(g, i), m1, v1, master[i]);
        store(m, i, m1);
        store(v, i, v1);
        master[i] = w;
        store(p, i, w);
    }
}

#define ADAM(G, M, V, P, name)                                                                                                                       \
    extern "C" __global__ void adam_##name(const G* g, float* master, M* m, V* v, P* p, const float* clip, const float* lr, const float* step,        \
                                           double beta1, double beta2, double eps, double decay, i64 n, int vector) {                                \
        adam(g, master, m, v, p, stepOf(clip, lr, step, beta1, beta2, eps, decay), n, vector);                                                       \
    }

ADAM(float, float, float, float, ffff)
ADAM(float, float, float, bf16, fffb)
ADAM(float, float, bf16, float, ffbf)
ADAM(float, float, bf16, bf16, ffbb)
ADAM(float, bf16, float, float, fbff)
ADAM(float, bf16, float, bf16, fbfb)
ADAM(float, bf16, bf16, float, fbbf)
ADAM(float, bf16, bf16, bf16, fbbb)
ADAM(bf16, float, float, float, bfff)
ADAM(bf16, float, float, bf16, bffb)
ADAM(bf16, float, bf16, float, bfbf)
ADAM(bf16, float, bf16, bf16, bfbb)
ADAM(bf16, bf16, float, float, bbff)
ADAM(bf16, bf16, float, bf16, bbfb)
ADAM(bf16, bf16, bf16, float, bbbf)
ADAM(bf16, bf16, bf16, bf16, bbbb)

// A bf16 weight and an i16 remainder: (weight << 16) + remainder are the master's bits; ties go away from zero; a NaN is 7FC0 and 0.
__device__ __forceinline__ float join(u32 high, u32 low) { return __uint_as_float((high << 16) + (u32)(int)(short)low); }

__device__ __forceinline__ u32 highHalf(float x) { return isnan(x) ? 0x7fc0u : (__float_as_uint(x) + 0x8000u) >> 16; }

__device__ __forceinline__ u32 lowHalf(float x) { return isnan(x) ? 0u : __float_as_uint(x) & 0xffffu; }

template <class G, class M, class V>
__device__ void adamHalves(const G* g, u16* remainder, M* m, V* v, const u16* weight, u16* p, const Step& s, i64 n, int vector) {
    if (vector) {
        FOR_EACH(k, n / 8) {
            float x[8], m8[8], v8[8];
            load8(g, k * 8, x);
            load8(m, k * 8, m8);
            load8(v, k * 8, v8);
            uint4 h = ((const uint4*)weight)[k], l = ((const uint4*)remainder)[k];
            u32 high[4] = {h.x, h.y, h.z, h.w}, low[4] = {l.x, l.y, l.z, l.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float a = update(s, x[2 * j], m8[2 * j], v8[2 * j], join(high[j] & 0xffffu, low[j] & 0xffffu));
                float b = update(s, x[2 * j + 1], m8[2 * j + 1], v8[2 * j + 1], join(high[j] >> 16, low[j] >> 16));
                high[j] = highHalf(a) | (highHalf(b) << 16);
                low[j] = lowHalf(a) | (lowHalf(b) << 16);
            }
            store8(m, k * 8, m8);
            store8(v, k * 8, v8);
            ((uint4*)p)[k] = make_uint4(high[0], high[1], high[2], high[3]);
            ((uint4*)remainder)[k] = make_uint4(low[0], low[1], low[2], low[3]);
        }
        return;
    }
    FOR_EACH(i, n) {
        float m1 = load(m, i), v1 = load(v, i), w = update(s, load(g, i), m1, v1, join(weight[i], remainder[i]));
        store(m, i, m1);
        store(v, i, v1);
        p[i] = (u16)highHalf(w);
        remainder[i] = (u16)lowHalf(w);
    }
}

#define HALVES(G, M, V, name)                                                                                                                        \
    extern "C" __global__ void adam_##name##h(const G* g, u16* remainder, M* m, V* v, const u16* weight, u16* p, const float* clip, const float* lr,  \
                                              const float* step, double beta1, double beta2, double eps, double decay, i64 n, int vector) {          \
        adamHalves(g, remainder, m, v, weight, p, stepOf(clip, lr, step, beta1, beta2, eps, decay), n, vector);                                      \
    }

HALVES(float, float, float, fff)
HALVES(float, float, bf16, ffb)
HALVES(float, bf16, float, fbf)
HALVES(float, bf16, bf16, fbb)
HALVES(bf16, float, float, bff)
HALVES(bf16, float, bf16, bfb)
HALVES(bf16, bf16, float, bbf)
HALVES(bf16, bf16, bf16, bbb)

// counts[e] -> bias[e] += rate * sign(mean(counts) - counts); one thread an expert, sums are exact.
extern "C" __global__ void router_bias(const i64* counts, float* bias, int experts, float rate) {
    i64 total = 0;
    for (int e = 0; e < experts; e++)
        total += counts[e];
    FOR_EACH(e, experts) {
        i64 mine = counts[e] * experts;
        bias[e] += rate * (float)((total > mine) - (total < mine));
    }
}
