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

// Rows of tokens -> reach[tokens ranks]: does a rank have experts of the token? Experts are split over ranks in equal runs.
extern "C" __global__ void reach(const int* rowOf, const int* flat, unsigned char* reach, i64 tokens, int width, int experts, int ranks) {
    int local = experts / ranks;
    FOR_EACH(t, tokens) {
        for (int r = 0; r < ranks; r++)
            reach[t * ranks + r] = 0;
        for (int k = 0; k < width && rowOf[t * width + k] >= 0; k++)
            reach[t * ranks + flat[rowOf[t * width + k]] % experts / local] = 1;
    }
}

// Where a row's token lies at the rank of its expert, and the how manieth of its rows there it is. sentRowOf[tokens sentWidth]: the token as
// rows of ranks, ranks ascending, as experts are.
extern "C" __global__ void places(const int* rowOf, const int* flat, const int* sentRowOf, const int* shift, int* places, i64 tokens, int width, int experts,
                                  int sentWidth, int ranks, int per) {
    int local = experts / ranks;
    FOR_EACH(t, tokens) {
        int last = -1, sent = -1, ordinal = 0;
        for (int k = 0; k < width && rowOf[t * width + k] >= 0; k++) {
            int row = rowOf[t * width + k], rank = flat[row] % experts / local;
            if (rank != last) {
                last = rank;
                sent++;
                ordinal = 0;
            }
            places[row] = (sentRowOf[t * sentWidth + sent] + shift[rank]) * per + ordinal++;
        }
    }
}

// flat[row] = token * width + ordinal -> rowOf[token width], filled with -1 before.
extern "C" __global__ void row_of(const int* flat, int* rowOf, i64 rows) {
    FOR_EACH(row, rows) if (flat[row] >= 0) rowOf[flat[row]] = (int)row;
}

// rows[rows h], which came from ranks, -> y[tokens h]: added inside each node in fp32, rounded, then over nodes. A block a token.
template <class T>
__device__ void combineNodes(const T* rows, const int* rowOf, const int* flat, const int* nodeOf, T* y, i64 tokens, int h, int width, int ranks) {
    for (i64 t = blockIdx.x; t < tokens; t += gridDim.x) {
        const int* mine = rowOf + t * width;
        for (int i = threadIdx.x; i < h; i += blockDim.x) {
            float total = 0.f;
            for (int k = 0; k < width && mine[k] >= 0;) {
                int node = nodeOf[flat[mine[k]] % ranks];
                float sum = 0.f;
                for (; k < width && mine[k] >= 0 && nodeOf[flat[mine[k]] % ranks] == node; k++)
                    sum += load(rows, (i64)mine[k] * h + i);
                T rounded;
                store(&rounded, 0, sum);
                total += load(&rounded, 0);
            }
            store(y, t * h + i, total);
        }
    }
}

extern "C" __global__ void unpermute_nodes_f32(const float* rows, const int* rowOf, const int* flat, const int* nodeOf, float* y, i64 tokens, int h, int width,
                                               int ranks) {
    combineNodes(rows, rowOf, flat, nodeOf, y, tokens, h, width, ranks);
}

extern "C" __global__ void unpermute_nodes_bf16(const bf16* rows, const int* rowOf, const int* flat, const int* nodeOf, bf16* y, i64 tokens, int h, int width,
                                                int ranks) {
    combineNodes(rows, rowOf, flat, nodeOf, y, tokens, h, width, ranks);
}

// flat -> mask[tokens count] of experts [first, first + count), zeroed before.
extern "C" __global__ void mask_of(const int* flat, unsigned char* mask, i64 rows, int experts, int first, int count) {
    FOR_EACH(row, rows) {
        int e = flat[row] % experts - first;
        if (flat[row] >= 0 && e >= 0 && e < count)
            mask[(i64)(flat[row] / experts) * count + e] = 1;
    }
}

// Rows of some experts, whose counts and blocks begin at `counts` and `offsets`, -> target, whose blocks are `into`. A column of blocks an expert.
template <class V>
__device__ void slice(const V* rows, const int* counts, const int* offsets, const int* into, V* target, int h, V zero) {
    int e = blockIdx.x, size = into[e + 1] - into[e];
    for (int row = blockIdx.y; row < size; row += gridDim.y)
        for (int i = threadIdx.x; i < h; i += blockDim.x)
            target[(i64)(into[e] + row) * h + i] = row < counts[e] ? rows[(i64)(offsets[e] + row) * h + i] : zero;
}

extern "C" __global__ void slice16(const uint4* rows, const int* counts, const int* offsets, const int* into, uint4* target, int h) {
    slice(rows, counts, offsets, into, target, h, make_uint4(0, 0, 0, 0));
}

extern "C" __global__ void slice2(const u16* rows, const int* counts, const int* offsets, const int* into, u16* target, int h) {
    slice(rows, counts, offsets, into, target, h, (u16)0);
}
