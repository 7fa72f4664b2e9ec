// Routed rows: which token and expert each row belongs to, tokens to rows and back. Rows lie by expert, then by token.
// flat[row] = token * experts + expert, -1 where a row fills up or is behind the last; rowOf[token][width]: its rows, experts ascending, then -1.

// mask[tokens experts] -> place[token experts]: how many tokens before chose the expert; counts[experts]. A block an expert.
extern "C" __global__ void route_places(const unsigned char* mask, int* place, int* counts, int tokens, int experts) {
    __shared__ int sums[32];
    int e = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, before = 0;
    for (int first = 0; first < tokens; first += blockDim.x) {
        int t = first + threadIdx.x;
        int chosen = t < tokens && mask[(i64)t * experts + e];
        u32 votes = __ballot_sync(0xffffffffu, chosen);
        if (lane == 0)
            sums[warp] = __popc(votes);
        __syncthreads();
        int at = before, all = 0;
        for (int k = 0; k < warps; k++) {
            if (k < warp)
                at += sums[k];
            all += sums[k];
        }
        if (chosen)
            place[(i64)t * experts + e] = at + __popc(votes & ((1u << lane) - 1));
        before += all;
        __syncthreads();
    }
    if (threadIdx.x == 0)
        counts[e] = before;
}

// counts -> offsets[experts + 1], blocks being multiples of `padding`; one thread.
extern "C" __global__ void route_offsets(const int* counts, int* offsets, int experts, int padding) {
    int at = 0;
    for (int e = 0; e < experts; e++) {
        offsets[e] = at;
        at += (counts[e] + padding - 1) / padding * padding;
    }
    offsets[experts] = at;
}

// A thread a token; flat is filled with -1 before.
extern "C" __global__ void route_rows(const unsigned char* mask, const int* place, const int* offsets, int* flat, int* rowOf, int tokens, int experts, int width) {
    FOR_EACH(t, tokens) {
        int found = 0;
        for (int e = 0; e < experts; e++) {
            if (mask[t * experts + e]) {
                int row = offsets[e] + place[t * experts + e];
                flat[row] = (int)(t * experts + e);
                rowOf[t * width + found++] = row;
            }
        }
        for (; found < width; found++)
            rowOf[t * width + found] = -1;
    }
}

// x[tokens h] -> rows[rows h]; zero in rows that fill up. A block a row; h in units of 16 bytes, or of bytes.
template <class V>
__device__ void gather(const V* x, const int* flat, V* rows, i64 count, int h, int experts, V zero) {
    for (i64 row = blockIdx.x; row < count; row += gridDim.x) {
        int at = flat[row];
        const V* from = x + (i64)(at < 0 ? 0 : at / experts) * h;
        // four loads of a thread are under way at once
        for (int i = threadIdx.x; i < h; i += blockDim.x * 4) {
            V v[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                v[j] = at < 0 || i + j * blockDim.x >= h ? zero : from[i + j * blockDim.x];
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (i + j * blockDim.x < h)
                    rows[row * h + i + j * blockDim.x] = v[j];
        }
    }
}

extern "C" __global__ void permute16(const uint4* x, const int* flat, uint4* rows, i64 count, int h, int experts) {
    gather(x, flat, rows, count, h, experts, make_uint4(0, 0, 0, 0));
}

extern "C" __global__ void permute2(const u16* x, const int* flat, u16* rows, i64 count, int h, int experts) { gather(x, flat, rows, count, h, experts, (u16)0); }

// rows[rows h] -> y[tokens h]: a token's rows summed in expert order, in fp32, rounded once. A block a token.
template <class T>
__device__ void combine(const T* rows, const int* rowOf, T* y, i64 tokens, int h, int width, int vector) {
    for (i64 t = blockIdx.x; t < tokens; t += gridDim.x) {
        const int* mine = rowOf + t * width;
        if (vector) {
            for (int i = threadIdx.x * 8; i < h; i += blockDim.x * 8) {
                float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0}, x[8];
                for (int k = 0; k < width && mine[k] >= 0; k++) {
                    load8(rows, (i64)mine[k] * h + i, x);
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        sum[j] += x[j];
                }
                store8(y, t * h + i, sum);
            }
        } else {
            for (int i = threadIdx.x; i < h; i += blockDim.x) {
                float sum = 0.f;
                for (int k = 0; k < width && mine[k] >= 0; k++)
                    sum += load(rows, (i64)mine[k] * h + i);
                store(y, t * h + i, sum);
            }
        }
    }
}

extern "C" __global__ void unpermute_f32(const float* rows, const int* rowOf, float* y, i64 tokens, int h, int width, int vector) {
    combine(rows, rowOf, y, tokens, h, width, vector);
}

extern "C" __global__ void unpermute_bf16(const bf16* rows, const int* rowOf, bf16* y, i64 tokens, int h, int width, int vector) {
    combine(rows, rowOf, y, tokens, h, width, vector);
}

// p[tokens experts] -> r[rows], zero in rows that fill up.
extern "C" __global__ void route_probs(const float* p, const int* flat, float* r, i64 rows) {
    FOR_EACH(row, rows) r[row] = flat[row] < 0 ? 0.f : p[flat[row]];
}

// r[rows] -> p[tokens experts], zeroed before.
extern "C" __global__ void unroute_probs(const float* r, const int* flat, float* p, i64 rows) {
    FOR_EACH(row, rows) if (flat[row] >= 0) p[flat[row]] = r[row];
}
