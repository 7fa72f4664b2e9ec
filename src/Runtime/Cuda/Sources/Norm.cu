// Root-mean-square normalisation over the last dim and its gradients, fp32 inside; a block a row of n elements.
template <class T>
__device__ float rate(const T* x, int n, float eps, int vector) {
    float sum = 0.f;
    if (vector) {
        for (int i = threadIdx.x * 8; i < n; i += blockDim.x * 8) {
            float v[8];
            load8(x, i, v);
#pragma unroll
            for (int j = 0; j < 8; j++)
                sum += v[j] * v[j];
        }
    } else {
        for (int i = threadIdx.x; i < n; i += blockDim.x)
            sum += load(x, i) * load(x, i);
    }
    return 1.f / sqrtf(blockSum(sum) / n + eps);
}

// r: added to x first, as stored in `sum`.
template <class T>
__device__ void forward(const T* x, const T* r, const void* w, int wideW, T* sum, T* y, i64 rows, int n, float eps, int vector) {
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        const T* from = x + row * n;
        if (r) {
            T* to = sum + row * n;
            if (vector) {
                for (int i = threadIdx.x * 8; i < n; i += blockDim.x * 8) {
                    float a[8], b[8];
                    load8(from, i, a);
                    load8(r + row * n, i, b);
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        a[j] += b[j];
                    store8(to, i, a);
                }
            } else {
                for (int i = threadIdx.x; i < n; i += blockDim.x)
                    store(to, i, load(from, i) + load(r + row * n, i));
            }
            // each thread reads again what it wrote itself
            from = to;
        }
        float k = rate(from, n, eps, vector);
        if (vector) {
            for (int i = threadIdx.x * 8; i < n; i += blockDim.x * 8) {
                float v[8], g[8];
                load8(from, i, v);
                if (wideW)
                    load8((const float*)w, i, g);
                else
                    load8((const bf16*)w, i, g);
#pragma unroll
                for (int j = 0; j < 8; j++)
                    v[j] = v[j] * k * g[j];
                store8(y + row * n, i, v);
            }
        } else {
            for (int i = threadIdx.x; i < n; i += blockDim.x)
                store(y + row * n, i, load(from, i) * k * loadAny(w, !wideW, i));
        }
    }
}

// dx = rate * (dy w - x rate^2 mean(dy w x)) (+ c)
template <class T>
__device__ void gradX(const T* dy, const T* x, const void* w, int wideW, const T* c, T* dx, i64 rows, int n, float eps, int vector) {
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *px = x + row * n, *pd = dy + row * n;
        float squares = 0.f, dot = 0.f;
        if (vector) {
            for (int i = threadIdx.x * 8; i < n; i += blockDim.x * 8) {
                float v[8], d[8], g[8];
                load8(px, i, v);
                load8(pd, i, d);
                if (wideW)
                    load8((const float*)w, i, g);
                else
                    load8((const bf16*)w, i, g);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    squares += v[j] * v[j];
                    dot += d[j] * g[j] * v[j];
                }
            }
        } else {
            for (int i = threadIdx.x; i < n; i += blockDim.x) {
                float v = load(px, i);
                squares += v * v;
                dot += load(pd, i) * loadAny(w, !wideW, i) * v;
            }
        }
        float k = 1.f / sqrtf(blockSum(squares) / n + eps);
        float back = k * k * blockSum(dot) / n;
        if (vector) {
            for (int i = threadIdx.x * 8; i < n; i += blockDim.x * 8) {
                float v[8], d[8], g[8];
                load8(px, i, v);
                load8(pd, i, d);
                if (wideW)
                    load8((const float*)w, i, g);
                else
                    load8((const bf16*)w, i, g);
#pragma unroll
                for (int j = 0; j < 8; j++)
                    v[j] = k * (d[j] * g[j] - v[j] * back);
                if (c) {
                    load8(c + row * n, i, d);
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        v[j] += d[j];
                }
                store8(dx + row * n, i, v);
            }
        } else {
            for (int i = threadIdx.x; i < n; i += blockDim.x) {
                float own = k * (load(pd, i) * loadAny(w, !wideW, i) - load(px, i) * back);
                store(dx + row * n, i, c ? own + load(c + row * n, i) : own);
            }
        }
    }
}

template <class T>
__device__ void rates(const T* x, float* out, i64 rows, int n, float eps, int vector) {
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        float k = rate(x + row * n, n, eps, vector);
        if (threadIdx.x == 0)
            out[row] = k;
    }
}

// part[chunk][n]: sums of dy x rate over the rows of a chunk; 256 threads are 32 columns by 8 rows.
template <class T>
__device__ void gradW(const T* dy, const T* x, const float* rate, float* part, i64 rows, int n, int chunk) {
    __shared__ float sums[8][32];
    int column = blockIdx.x * 32 + (threadIdx.x & 31), lane = threadIdx.x >> 5;
    i64 first = (i64)blockIdx.y * chunk, last = min(rows, first + chunk);
    float sum = 0.f;
    if (column < n) {
        for (i64 row = first + lane; row < last; row += 8)
            sum += load(dy, row * n + column) * load(x, row * n + column) * rate[row];
    }
    sums[lane][threadIdx.x & 31] = sum;
    __syncthreads();
    if (lane == 0 && column < n) {
        for (int k = 1; k < 8; k++)
            sum += sums[k][threadIdx.x & 31];
        part[(i64)blockIdx.y * n + column] = sum;
    }
}

extern "C" __global__ void columns(const float* part, void* out, int isBf16, int chunks, int n) {
    FOR_EACH(i, n) {
        float sum = 0.f;
        for (int k = 0; k < chunks; k++)
            sum += part[(i64)k * n + i];
        storeAny(out, isBf16, i, sum);
    }
}

#define NORM(T, name)                                                                                                                                   \
    extern "C" __global__ void norm_##name(const T* x, const T* r, const void* w, int wideW, T* sum, T* y, i64 rows, int n, float eps, int vector) {      \
        forward(x, r, w, wideW, sum, y, rows, n, eps, vector);                                                                                           \
    }                                                                                                                                                    \
    extern "C" __global__ void norm_grad_x_##name(const T* dy, const T* x, const void* w, int wideW, const T* c, T* dx, i64 rows, int n, float eps, int vector) { \
        gradX(dy, x, w, wideW, c, dx, rows, n, eps, vector);                                                                                             \
    }                                                                                                                                                    \
    extern "C" __global__ void norm_rates_##name(const T* x, float* out, i64 rows, int n, float eps, int vector) { rates(x, out, rows, n, eps, vector); }  \
    extern "C" __global__ void norm_grad_w_##name(const T* dy, const T* x, const float* rate, float* part, i64 rows, int n, int chunk) {                  \
        gradW(dy, x, rate, part, rows, n, chunk);                                                                                                        \
    }

NORM(float, f32)
NORM(bf16, bf16)
