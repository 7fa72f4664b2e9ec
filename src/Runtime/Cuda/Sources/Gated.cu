// SwiGLU: x holds gate then up; y = silu(gate) * up (* p), fp32 inside. A block walks rows; f features a row.
template <class T>
__device__ void forward(const T* x, const float* p, T* y, i64 rows, int f, int vector) {
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *gate = x + row * 2 * f, *up = gate + f;
        T* to = y + row * f;
        float weight = p ? p[row] : 1.f;
        if (vector) {
            for (int i = threadIdx.x * 8; i < f; i += blockDim.x * 8) {
                float g[8], u[8];
                load8(gate, i, g);
                load8(up, i, u);
#pragma unroll
                for (int j = 0; j < 8; j++)
                    g[j] = g[j] * sigmoid(g[j]) * u[j] * weight;
                store8(to, i, g);
            }
        } else {
            for (int i = threadIdx.x; i < f; i += blockDim.x) {
                float g = load(gate, i);
                store(to, i, g * sigmoid(g) * load(up, i) * weight);
            }
        }
    }
}

template <class T>
__device__ void backward(const T* dy, const T* x, const float* p, T* dx, float* dp, i64 rows, int f, int vector) {
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *gate = x + row * 2 * f, *up = gate + f, *from = dy + row * f;
        T *dGate = dx + row * 2 * f, *dUp = dGate + f;
        float weight = p ? p[row] : 1.f, share = 0.f;
        if (vector) {
            for (int i = threadIdx.x * 8; i < f; i += blockDim.x * 8) {
                float g[8], u[8], d[8];
                load8(gate, i, g);
                load8(up, i, u);
                load8(from, i, d);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    float s = sigmoid(g[j]), silu = g[j] * s, w = d[j] * weight;
                    share += d[j] * silu * u[j];
                    g[j] = w * u[j] * s * (1.f + g[j] * (1.f - s));
                    u[j] = w * silu;
                }
                store8(dGate, i, g);
                store8(dUp, i, u);
            }
        } else {
            for (int i = threadIdx.x; i < f; i += blockDim.x) {
                float g = load(gate, i), u = load(up, i), d = load(from, i), s = sigmoid(g), silu = g * s, w = d * weight;
                share += d * silu * u;
                store(dGate, i, w * u * s * (1.f + g * (1.f - s)));
                store(dUp, i, w * silu);
            }
        }
        if (p) {
            share = blockSum(share);
            if (threadIdx.x == 0)
                dp[row] = share;
        }
    }
}

extern "C" __global__ void swiglu_f32(const float* x, const float* p, float* y, i64 rows, int f, int vector) { forward(x, p, y, rows, f, vector); }
extern "C" __global__ void swiglu_bf16(const bf16* x, const float* p, bf16* y, i64 rows, int f, int vector) { forward(x, p, y, rows, f, vector); }

extern "C" __global__ void swiglu_grad_f32(const float* dy, const float* x, const float* p, float* dx, float* dp, i64 rows, int f, int vector) {
    backward(dy, x, p, dx, dp, rows, f, vector);
}

extern "C" __global__ void swiglu_grad_bf16(const bf16* dy, const bf16* x, const float* p, bf16* dx, float* dp, i64 rows, int f, int vector) {
    backward(dy, x, p, dx, dp, rows, f, vector);
}
