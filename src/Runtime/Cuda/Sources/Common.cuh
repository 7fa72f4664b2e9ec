// What all our CUDA sources share: bf16 without headers, vectors of 8 elements, sums over warps and blocks.
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

struct bf16 {
    u16 bits;
};

__device__ __forceinline__ float wide(u16 bits) { return __uint_as_float((u32)bits << 16); }

// To nearest even; NaN stays NaN.
__device__ __forceinline__ u16 narrow(float x) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ __forceinline__ float load(const float* p, i64 i) { return p[i]; }
__device__ __forceinline__ float load(const bf16* p, i64 i) { return wide(p[i].bits); }
__device__ __forceinline__ void store(float* p, i64 i, float x) { p[i] = x; }
__device__ __forceinline__ void store(bf16* p, i64 i, float x) { p[i].bits = narrow(x); }

// Element i of a tensor whose type is told at run time.
__device__ __forceinline__ float loadAny(const void* p, int isBf16, i64 i) {
    return isBf16 ? load((const bf16*)p, i) : load((const float*)p, i);
}

__device__ __forceinline__ void storeAny(void* p, int isBf16, i64 i, float x) {
    if (isBf16)
        store((bf16*)p, i, x);
    else
        store((float*)p, i, x);
}

// The value as a type holds it.
__device__ __forceinline__ float rounded(const float*, float x) { return x; }
__device__ __forceinline__ float rounded(const bf16*, float x) { return wide(narrow(x)); }

// Eight neighbours; i is a multiple of 8 and p + i lies at a multiple of 16 bytes.
__device__ __forceinline__ void load8(const float* p, i64 i, float (&x)[8]) {
    float4 a = ((const float4*)(p + i))[0], b = ((const float4*)(p + i))[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

__device__ __forceinline__ void load8(const bf16* p, i64 i, float (&x)[8]) {
    uint4 v = *(const uint4*)(p + i);
    u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
        x[2 * k] = __uint_as_float(w[k] << 16);
        x[2 * k + 1] = __uint_as_float(w[k] & 0xffff0000u);
    }
}

__device__ __forceinline__ void store8(float* p, i64 i, const float (&x)[8]) {
    ((float4*)(p + i))[0] = make_float4(x[0], x[1], x[2], x[3]);
    ((float4*)(p + i))[1] = make_float4(x[4], x[5], x[6], x[7]);
}

__device__ __forceinline__ void store8(bf16* p, i64 i, const float (&x)[8]) {
    u32 w[4];
#pragma unroll
    for (int k = 0; k < 4; k++)
        w[k] = (u32)narrow(x[2 * k]) | ((u32)narrow(x[2 * k + 1]) << 16);
    *(uint4*)(p + i) = make_uint4(w[0], w[1], w[2], w[3]);
}

__device__ __forceinline__ bool aligned(const void* p) { return ((u64)p & 15) == 0; }

__device__ __forceinline__ float warpSum(float x) {
#pragma unroll
    for (int far = 16; far > 0; far >>= 1)
        x += __shfl_xor_sync(0xffffffffu, x, far);
    return x;
}

__device__ __forceinline__ float warpMax(float x) {
#pragma unroll
    for (int far = 16; far > 0; far >>= 1)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, far));
    return x;
}

// The same value in every thread of the block; always in the same order.
__device__ __forceinline__ float blockSum(float x) {
    __shared__ float part[32];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
    x = warpSum(x);
    __syncthreads();
    if (lane == 0)
        part[warp] = x;
    __syncthreads();
    return warpSum(lane < warps ? part[lane] : 0.f);
}

__device__ __forceinline__ float blockMax(float x) {
    __shared__ float part[32];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
    x = warpMax(x);
    __syncthreads();
    if (lane == 0)
        part[warp] = x;
    __syncthreads();
    return warpMax(lane < warps ? part[lane] : -INFINITY);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

#define FOR_EACH(i, n) for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (i64)gridDim.x * blockDim.x)

