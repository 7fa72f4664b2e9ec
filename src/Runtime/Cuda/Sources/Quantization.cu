// E4M3 (arXiv 2209.05433) and back: per block scale = max|a| / 448 in fp32, out = e4m3(a / scale) * scale, to nearest even.
// A block of zeros stays; one that holds NaN or infinity becomes NaN. A thread block a quantisation block of up to four dims.

__device__ float e4m3(float value) {
    float magnitude = fabsf(value);
    if (isnan(value))
        return value;
    if (magnitude >= 448.f)
        return copysignf(448.f, value);
    // the distance between neighbours: 2^-9 below 2^-6, else 2^(exponent - 3)
    int exponent = max(-6, ((__float_as_int(magnitude) >> 23) & 255) - 127);
    float unit = exp2f((float)(exponent - 3));
    return copysignf(fminf(rintf(magnitude / unit) * unit, 448.f), value);
}

template <class T>
__device__ void quantize(const T* from, T* to, int e0, int e1, int e2, int e3, int b0, int b1, int b2, int b3) {
    int g1 = (e1 + b1 - 1) / b1, g2 = (e2 + b2 - 1) / b2, g3 = (e3 + b3 - 1) / b3;
    i64 blocks = (i64)((e0 + b0 - 1) / b0) * g1 * g2 * g3;
    for (i64 block = blockIdx.x; block < blocks; block += gridDim.x) {
        int f3 = (int)(block % g3) * b3, f2 = (int)(block / g3 % g2) * b2, f1 = (int)(block / g3 / g2 % g1) * b1, f0 = (int)(block / g3 / g2 / g1) * b0;
        int n = b0 * b1 * b2 * b3;
        float most = 0.f;
        int broken = 0;
        for (int pass = 0; pass < 2; pass++) {
            float scale = 0.f;
            if (pass == 1) {
                most = blockMax(most);
                broken = __syncthreads_or(broken);
                scale = broken ? __int_as_float(0x7fc00000) : most / 448.f;
            }
            for (int i = threadIdx.x; i < n; i += blockDim.x) {
                int i3 = f3 + i % b3, i2 = f2 + i / b3 % b2, i1 = f1 + i / b3 / b2 % b1, i0 = f0 + i / b3 / b2 / b1;
                if (i3 >= e3 || i2 >= e2 || i1 >= e1 || i0 >= e0)
                    continue;
                i64 at = (((i64)i0 * e1 + i1) * e2 + i2) * e3 + i3;
                float x = load(from, at);
                if (pass == 0) {
                    most = fmaxf(most, fabsf(x));
                    broken |= !isfinite(x);
                } else
                    store(to, at, scale == 0.f ? 0.f * x : e4m3(x / scale) * scale);
            }
        }
        __syncthreads();
    }
}

extern "C" __global__ void fp8_f32(const float* from, float* to, int e0, int e1, int e2, int e3, int b0, int b1, int b2, int b3) {
    quantize(from, to, e0, e1, e2, e3, b0, b1, b2, b3);
}

extern "C" __global__ void fp8_bf16(const bf16* from, bf16* to, int e0, int e1, int e2, int e3, int b0, int b1, int b2, int b3) {
    quantize(from, to, e0, e1, e2, e3, b0, b1, b2, b3);
}
