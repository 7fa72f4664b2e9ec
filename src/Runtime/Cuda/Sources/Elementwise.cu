// n operands of one type are summed in fp32, in operand order, and rounded once; iota; one value into many.

// The number of operands is known to the compiler, so that all loads of a vector are under way at once.
template <class T, int Count>
__device__ void sumOf(T* out, i64 n, const T* const (&p)[8], int vector) {
    if (vector) {
        FOR_EACH(v, n / 8) {
            float x[Count][8];
#pragma unroll
            for (int k = 0; k < Count; k++)
                load8(p[k], v * 8, x[k]);
#pragma unroll
            for (int k = 1; k < Count; k++)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    x[0][j] += x[k][j];
            store8(out, v * 8, x[0]);
        }
        return;
    }
    FOR_EACH(i, n) {
        float s = load(p[0], i);
#pragma unroll
        for (int k = 1; k < Count; k++)
            s += load(p[k], i);
        store(out, i, s);
    }
}

template <class T>
__device__ void sum(T* out, i64 n, int count, const T* const (&p)[8], int vector) {
    switch (count) {
    case 2: sumOf<T, 2>(out, n, p, vector); break;
    case 3: sumOf<T, 3>(out, n, p, vector); break;
    case 4: sumOf<T, 4>(out, n, p, vector); break;
    case 5: sumOf<T, 5>(out, n, p, vector); break;
    case 6: sumOf<T, 6>(out, n, p, vector); break;
    case 7: sumOf<T, 7>(out, n, p, vector); break;
    case 8: sumOf<T, 8>(out, n, p, vector); break;
    }
}

extern "C" __global__ void add_f32(float* out, i64 n, int count, int vector, const float* a, const float* b, const float* c, const float* d, const float* e, const float* f,
                                   const float* g, const float* h) {
    const float* const p[8] = {a, b, c, d, e, f, g, h};
    sum(out, n, count, p, vector);
}

extern "C" __global__ void add_bf16(bf16* out, i64 n, int count, int vector, const bf16* a, const bf16* b, const bf16* c, const bf16* d, const bf16* e, const bf16* f,
                                   const bf16* g, const bf16* h) {
    const bf16* const p[8] = {a, b, c, d, e, f, g, h};
    sum(out, n, count, p, vector);
}

extern "C" __global__ void iota(i64* out, i64 n, i64 first) {
    FOR_EACH(i, n) out[i] = first + i;
}

// out += a in fp32, rounded to out's type; fresh: out = a.
template <class From, class To>
__device__ void accumulate(const From* a, To* out, i64 n, int fresh, int vector) {
    if (vector) {
        FOR_EACH(v, n / 8) {
            float x[8], y[8];
            load8(a, v * 8, x);
            if (!fresh) {
                load8(out, v * 8, y);
#pragma unroll
                for (int j = 0; j < 8; j++)
                    x[j] += y[j];
            }
            store8(out, v * 8, x);
        }
        return;
    }
    FOR_EACH(i, n) store(out, i, fresh ? load(a, i) : load(out, i) + load(a, i));
}

extern "C" __global__ void accumulate_f32_f32(const float* a, float* out, i64 n, int fresh, int vector) { accumulate(a, out, n, fresh, vector); }
extern "C" __global__ void accumulate_f32_bf16(const float* a, bf16* out, i64 n, int fresh, int vector) { accumulate(a, out, n, fresh, vector); }
extern "C" __global__ void accumulate_bf16_f32(const bf16* a, float* out, i64 n, int fresh, int vector) { accumulate(a, out, n, fresh, vector); }
extern "C" __global__ void accumulate_bf16_bf16(const bf16* a, bf16* out, i64 n, int fresh, int vector) { accumulate(a, out, n, fresh, vector); }
