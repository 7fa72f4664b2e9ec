// Look-ups in a slice of the vocabulary, and cross-entropy over rows of logits. ids are global, `vocab` the slice's own ids, consecutive.

// ids[tokens], w[v h] -> y[tokens h], zero for absent ids; h in units of 16 or 2 bytes. A block a token.
template <class V>
__device__ void look(const i64* ids, const V* w, const i64* vocab, V* y, i64 tokens, i64 rows, int h, V zero) {
    i64 first = rows ? vocab[0] : 0;
    for (i64 t = blockIdx.x; t < tokens; t += gridDim.x) {
        i64 row = ids[t] - first;
        bool here = row >= 0 && row < rows;
        for (int i = threadIdx.x; i < h; i += blockDim.x)
            y[t * h + i] = here ? w[row * h + i] : zero;
    }
}

extern "C" __global__ void embedding16(const i64* ids, const uint4* w, const i64* vocab, uint4* y, i64 tokens, i64 rows, int h) {
    look(ids, w, vocab, y, tokens, rows, h, make_uint4(0, 0, 0, 0));
}

extern "C" __global__ void embedding2(const i64* ids, const u16* w, const i64* vocab, u16* y, i64 tokens, i64 rows, int h) {
    look(ids, w, vocab, y, tokens, rows, h, (u16)0);
}

// sorted[tokens]: ids ascending, equal ones by token; order[i]: the token of sorted[i]. dw is zeroed before. A block a run of equal ids.
extern "C" __global__ void embedding_grad(const i64* sorted, const i64* order, const void* dy, int dyBf16, const i64* vocab, void* dw, int dwBf16, i64 tokens, i64 rows, int h) {
    i64 first = rows ? vocab[0] : 0;
    for (i64 i = blockIdx.x; i < tokens; i += gridDim.x) {
        i64 row = sorted[i] - first;
        if (row < 0 || row >= rows || (i > 0 && sorted[i - 1] == sorted[i]))
            continue;
        for (int c = threadIdx.x; c < h; c += blockDim.x) {
            float sum = 0.f;
            for (i64 k = i; k < tokens && sorted[k] == sorted[i]; k++)
                sum += loadAny(dy, dyBf16, order[k] * h + c);
            storeAny(dw, dwBf16, row * h + c, sum);
        }
    }
}

extern "C" __global__ void pick(const void* z, int zBf16, const i64* labels, const i64* vocab, void* y, int yBf16, i64 tokens, i64 v) {
    FOR_EACH(t, tokens) {
        i64 at = labels[t] - vocab[0];
        storeAny(y, yBf16, t, at >= 0 && at < v ? loadAny(z, zBf16, t * v + at) : 0.f);
    }
}

// dz is zeroed before.
extern "C" __global__ void pick_grad(const void* dy, int dyBf16, const i64* labels, const i64* vocab, void* dz, int dzBf16, i64 tokens, i64 v) {
    FOR_EACH(t, tokens) {
        i64 at = labels[t] - vocab[0];
        if (at >= 0 && at < v)
            storeAny(dz, dzBf16, t * v + at, loadAny(dy, dyBf16, t));
    }
}

// z[tokens v] fp32, labels of these tokens -> loss[tokens] = log-sum-exp less the label's logit (0 when absent);
// dz (may be null): (softmax - label) * dloss. A block a token.
extern "C" __global__ void cross_entropy(const float* z, const i64* labels, const i64* vocab, const float* dloss, float* loss, void* dz, int dzBf16, i64 tokens, int v) {
    for (i64 t = blockIdx.x; t < tokens; t += gridDim.x) {
        const float* row = z + t * v;
        bool vector = v % 4 == 0;
        float most = -INFINITY, sum = 0.f;
        // one pass: a maximum and a sum of each thread, then of the block
        if (vector) {
            for (int i = threadIdx.x; i < v / 4; i += blockDim.x) {
                float4 x = ((const float4*)row)[i];
                float m = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
                if (m > most) {
                    sum *= expf(most - m);
                    most = m;
                }
                sum += expf(x.x - most) + expf(x.y - most) + expf(x.z - most) + expf(x.w - most);
            }
        } else {
            for (int i = threadIdx.x; i < v; i += blockDim.x) {
                if (row[i] > most) {
                    sum *= expf(most - row[i]);
                    most = row[i];
                }
                sum += expf(row[i] - most);
            }
        }
        float all = blockMax(most);
        sum = blockSum(most == -INFINITY ? 0.f : sum * expf(most - all));
        i64 label = labels[t] - vocab[0];
        bool here = label >= 0 && label < v;
        if (threadIdx.x == 0)
            loss[t] = all + logf(sum) - (here ? row[label] : 0.f);
        if (!dz)
            continue;
        float d = dloss[t], scale = d / sum;
        if (vector && dzBf16) {
            for (int i = threadIdx.x; i < v / 4; i += blockDim.x) {
                float4 x = ((const float4*)row)[i];
                float g[4] = {expf(x.x - all) * scale, expf(x.y - all) * scale, expf(x.z - all) * scale, expf(x.w - all) * scale};
                if (here && label / 4 == i)
                    g[label % 4] -= d;
                u32 low = narrow(g[0]) | ((u32)narrow(g[1]) << 16), high = narrow(g[2]) | ((u32)narrow(g[3]) << 16);
                ((uint2*)((bf16*)dz + t * v))[i] = make_uint2(low, high);
            }
        } else {
            for (int i = threadIdx.x; i < v; i += blockDim.x)
                storeAny(dz, dzBf16, t * v + i, expf(row[i] - all) * scale - (here && label == i ? d : 0.f));
        }
    }
}

// z[tokens v] fp32 -> lse[tokens c], c = v / block; at[tokens]: the label's logit, zero when absent. A block a (token, part).
extern "C" __global__ void log_sum_exp(const float* z, const i64* labels, const i64* vocab, float* lse, float* at, i64 tokens, int v, int block) {
    int parts = v / block;
    for (i64 i = blockIdx.x; i < tokens * parts; i += gridDim.x) {
        i64 t = i / parts;
        const float* row = z + t * v + i % parts * block;
        float most = -INFINITY, sum = 0.f;
        for (int k = threadIdx.x; k < block; k += blockDim.x)
            most = fmaxf(most, row[k]);
        most = blockMax(most);
        for (int k = threadIdx.x; k < block; k += blockDim.x)
            sum += expf(row[k] - most);
        sum = blockSum(sum);
        if (threadIdx.x == 0) {
            lse[i] = most + logf(sum);
            if (i % parts == 0) {
                i64 label = labels[t] - vocab[0];
                at[t] = label >= 0 && label < v ? z[t * v + label] : 0.f;
            }
        }
    }
}

// z, labels, lse, dlse[tokens c], dat[tokens] -> dz: exp(z - lse) dlse, plus dat at the label.
extern "C" __global__ void log_sum_exp_grad(const float* z, const i64* labels, const i64* vocab, const float* lse, const float* dlse, const float* dat, void* dz,
                                            int dzBf16, i64 tokens, int v, int block) {
    int parts = v / block;
    for (i64 t = blockIdx.x; t < tokens; t += gridDim.x) {
        i64 label = labels[t] - vocab[0];
        for (int k = threadIdx.x; k < v; k += blockDim.x) {
            i64 c = t * parts + k / block;
            storeAny(dz, dzBf16, t * v + k, expf(z[t * v + k] - lse[c]) * dlse[c] + (k == label ? dat[t] : 0.f));
        }
    }
}
