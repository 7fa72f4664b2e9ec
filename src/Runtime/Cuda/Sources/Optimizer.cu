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
