// Grouped products with exact fp32 arithmetic, for types and sizes that the library has no kernel for. Tiles of 32 x 32, 256 threads.
// x[rows k] times w[E] of rows' experts: out[row n] = sum over k of x[row k] w[e][n k] (transposed: w[e][k n]).
template <class T>
__device__ void product(const T* x, const T* w, const int* offsets, void* out, int outBf16, int experts, int n, int k, int transposed) {
    __shared__ float a[32][33], b[32][33];
    int tx = threadIdx.x & 31, ty = threadIdx.x >> 5, column = blockIdx.x * 32;
    for (int e = 0; e < experts; e++) {
        int first = offsets[e], last = offsets[e + 1];
        for (int row = first + blockIdx.y * 32; row < last; row += gridDim.y * 32) {
            float sum[4] = {0, 0, 0, 0};
            for (int at = 0; at < k; at += 32) {
                for (int j = 0; j < 4; j++) {
                    int r = row + ty + 8 * j, c = column + ty + 8 * j;
                    a[ty + 8 * j][tx] = r < last && at + tx < k ? load(x, (i64)r * k + at + tx) : 0.f;
                    if (!transposed)
                        b[ty + 8 * j][tx] = c < n && at + tx < k ? load(w, ((i64)e * n + c) * k + at + tx) : 0.f;
                    else
                        b[tx][ty + 8 * j] = column + tx < n && at + ty + 8 * j < k ? load(w, ((i64)e * k + at + ty + 8 * j) * n + column + tx) : 0.f;
                }
                __syncthreads();
                for (int i = 0; i < 32; i++)
                    for (int j = 0; j < 4; j++)
                        sum[j] += a[ty + 8 * j][i] * b[tx][i];
                __syncthreads();
            }
            for (int j = 0; j < 4; j++)
                if (row + ty + 8 * j < last && column + tx < n)
                    storeAny(out, outBf16, (i64)(row + ty + 8 * j) * n + column + tx, sum[j]);
        }
    }
}

// dy[rows n], x[rows k] -> dw[E n k]: zero for experts without rows; `add`: added to what is there.
template <class T>
__device__ void weightGrad(const T* dy, const T* x, const int* offsets, void* dw, int outBf16, int n, int k, int add) {
    __shared__ float a[32][33], b[32][33];
    int tx = threadIdx.x & 31, ty = threadIdx.x >> 5, tiles = (k + 31) / 32, row = blockIdx.x / tiles * 32, column = blockIdx.x % tiles * 32, e = blockIdx.y;
    int first = offsets[e], last = offsets[e + 1];
    float sum[4] = {0, 0, 0, 0};
    for (int at = first; at < last; at += 32) {
        for (int j = 0; j < 4; j++) {
            int r = at + ty + 8 * j;
            a[ty + 8 * j][tx] = r < last && row + tx < n ? load(dy, (i64)r * n + row + tx) : 0.f;
            b[ty + 8 * j][tx] = r < last && column + tx < k ? load(x, (i64)r * k + column + tx) : 0.f;
        }
        __syncthreads();
        for (int i = 0; i < 32; i++)
            for (int j = 0; j < 4; j++)
                sum[j] += a[i][ty + 8 * j] * b[i][tx];
        __syncthreads();
    }
    for (int j = 0; j < 4; j++) {
        if (row + ty + 8 * j < n && column + tx < k) {
            i64 to = ((i64)e * n + row + ty + 8 * j) * k + column + tx;
            storeAny(dw, outBf16, to, add ? loadAny(dw, outBf16, to) + sum[j] : sum[j]);
        }
    }
}

extern "C" __global__ void grouped_f32(const float* x, const float* w, const int* offsets, void* out, int outBf16, int experts, int n, int k, int transposed) {
    product(x, w, offsets, out, outBf16, experts, n, k, transposed);
}

extern "C" __global__ void grouped_bf16(const bf16* x, const bf16* w, const int* offsets, void* out, int outBf16, int experts, int n, int k, int transposed) {
    product(x, w, offsets, out, outBf16, experts, n, k, transposed);
}

extern "C" __global__ void grouped_grad_f32(const float* dy, const float* x, const int* offsets, void* dw, int outBf16, int n, int k, int add) {
    weightGrad(dy, x, offsets, dw, outBf16, n, k, add);
}

extern "C" __global__ void grouped_grad_bf16(const bf16* dy, const bf16* x, const int* offsets, void* dw, int outBf16, int n, int k, int add) {
    weightGrad(dy, x, offsets, dw, outBf16, n, k, add);
}

// Zeros in rows that fill up an expert's block. A block an expert.
extern "C" __global__ void clear_padding(unsigned char* rows, const int* counts, const int* offsets, i64 width) {
    i64 first = (offsets[blockIdx.x] + counts[blockIdx.x]) * width, last = offsets[blockIdx.x + 1] * width;
    for (i64 i = first + threadIdx.x; i < last; i += blockDim.x)
        rows[i] = 0;
}
