// Choice of experts: a warp a token. Group-limited top-k (arXiv 2412.19437, 2.1.2; 2405.04434, 2.2.2); ties: lowest index; a NaN is the least.
struct Rules {
    int experts, topK, groups, keep, zeroMasked, byBest;
};

__device__ __forceinline__ int key(float x) {
    int bits = __float_as_int(x + 0.f);
    return isnan(x) ? (int)0x80000000 : bits ^ ((bits >> 31) & 0x7fffffff);
}

// The lane's best (key, index) -> the warp's: the larger key, at equal keys the lower index.
__device__ __forceinline__ void warpBest(int& k, int& at) {
#pragma unroll
    for (int far = 16; far > 0; far >>= 1) {
        int other = __shfl_xor_sync(0xffffffffu, k, far), place = __shfl_xor_sync(0xffffffffu, at, far);
        if (other > k || (other == k && place < at)) {
            k = other;
            at = place;
        }
    }
}

// keys[n] -> ones in taken[n] for the `count` largest; all lanes of the warp take part.
__device__ void top(const int* keys, unsigned char* taken, int n, int count) {
    int lane = threadIdx.x & 31;
    for (int i = lane; i < n; i += 32)
        taken[i] = 0;
    __syncwarp();
    for (int round = 0; round < min(count, n); round++) {
        int k = (int)0x80000000, at = n;
        for (int i = lane; i < n; i += 32) {
            if (!taken[i] && (keys[i] > k || at == n)) {
                k = keys[i];
                at = i;
            }
        }
        warpBest(k, at);
        if (lane == 0)
            taken[at] = 1;
        __syncwarp();
    }
}

// scores[experts] (shared) -> taken[experts]; keys, groupKeys and kept are space in shared memory.
__device__ void choose(const float* scores, int* keys, int* groupKeys, unsigned char* kept, unsigned char* taken, Rules r) {
    int lane = threadIdx.x & 31, size = r.experts / r.groups;
    for (int i = lane; i < r.experts; i += 32)
        keys[i] = key(scores[i]);
    __syncwarp();
    if (r.keep < r.groups) {
        for (int g = lane; g < r.groups; g += 32) {
            float first = -INFINITY, second = -INFINITY;
            for (int i = g * size; i < (g + 1) * size; i++) {
                float x = scores[i];
                if (x > first) {
                    second = first;
                    first = x;
                } else if (x > second)
                    second = x;
            }
            groupKeys[g] = key(r.byBest || size == 1 ? first : first + second);
        }
        __syncwarp();
        top(groupKeys, kept, r.groups, r.keep);
        int lost = key(r.zeroMasked ? 0.f : -INFINITY);
        for (int i = lane; i < r.groups * size; i += 32)
            if (!kept[i / size])
                keys[i] = lost;
        __syncwarp();
    }
    top(keys, taken, r.experts, r.topK);
}

// Shared memory of a warp: scores, plain scores, keys, group keys, kept, taken.
struct Space {
    float *scores, *plain;
    int *keys, *groupKeys;
    unsigned char *kept, *taken;
};

__device__ __forceinline__ Space space(int experts, int groups) {
    extern __shared__ float memory[];
    int warp = threadIdx.x >> 5, words = 3 * experts + groups + (experts + groups + 3) / 4;
    Space s;
    s.scores = memory + (i64)warp * words;
    s.plain = s.scores + experts;
    s.keys = (int*)(s.plain + experts);
    s.groupKeys = s.keys + experts;
    s.kept = (unsigned char*)(s.groupKeys + groups);
    s.taken = s.kept + groups;
    return s;
}

// logits -> plain: their sigmoid, or their softmax.
__device__ void score(const float* logits, float* plain, int experts, int softmax) {
    int lane = threadIdx.x & 31;
    if (!softmax) {
        for (int i = lane; i < experts; i += 32)
            plain[i] = sigmoid(logits[i]);
        __syncwarp();
        return;
    }
    float most = -INFINITY, sum = 0.f;
    for (int i = lane; i < experts; i += 32)
        most = fmaxf(most, logits[i]);
    most = warpMax(most);
    for (int i = lane; i < experts; i += 32)
        sum += plain[i] = expf(logits[i] - most);
    sum = warpSum(sum);
    for (int i = lane; i < experts; i += 32)
        plain[i] /= sum;
    __syncwarp();
}

#define WARPS (blockDim.x >> 5)
#define EACH_TOKEN(t, tokens) for (i64 t = (i64)blockIdx.x * WARPS + (threadIdx.x >> 5); t < (tokens); t += (i64)gridDim.x * WARPS)

extern "C" __global__ void group_top_k(const float* scores, unsigned char* mask, i64 tokens, int experts, int topK, int groups, int keep, int zeroMasked, int byBest) {
    Rules r = {experts, topK, groups, keep, zeroMasked, byBest};
    Space s = space(experts, groups);
    int lane = threadIdx.x & 31;
    EACH_TOKEN(t, tokens) {
        for (int i = lane; i < experts; i += 32)
            s.scores[i] = scores[t * experts + i];
        __syncwarp();
        choose(s.scores, s.keys, s.groupKeys, s.kept, s.taken, r);
        for (int i = lane; i < experts; i += 32)
            mask[t * experts + i] = s.taken[i];
        __syncwarp();
    }
}

// logits, bias -> p, mask, counts (zeroed before): p = factor s mask, if normalize over (its sum + eps). `given`: the mask is an input.
extern "C" __global__ void router(const float* logits, const float* bias, float* p, unsigned char* mask, u64* counts, i64 tokens, int experts, int topK, int groups,
                                  int keep, int zeroMasked, int byBest, int normalize, float eps, float factor, int softmax, int given) {
    Rules r = {experts, topK, groups, keep, zeroMasked, byBest};
    Space s = space(experts, groups);
    int lane = threadIdx.x & 31;
    EACH_TOKEN(t, tokens) {
        score(logits + t * experts, s.plain, experts, softmax);
        if (given) {
            for (int i = lane; i < experts; i += 32)
                s.taken[i] = mask[t * experts + i];
            __syncwarp();
        } else {
            for (int i = lane; i < experts; i += 32)
                s.scores[i] = s.plain[i] + bias[i];
            __syncwarp();
            choose(s.scores, s.keys, s.groupKeys, s.kept, s.taken, r);
        }
        float total = 0.f;
        for (int i = lane; i < experts; i += 32)
            total += s.taken[i] ? s.plain[i] : 0.f;
        total = warpSum(total);
        for (int i = lane; i < experts; i += 32) {
            int taken = s.taken[i];
            mask[t * experts + i] = taken;
            p[t * experts + i] = !taken ? 0.f : normalize ? s.plain[i] / (total + eps) * factor : s.plain[i] * factor;
            if (taken)
                atomicAdd(counts + i, 1ull);
        }
        __syncwarp();
    }
}

// dp, logits, mask -> dlogits: only scores of chosen experts have a gradient.
extern "C" __global__ void router_grad(const float* dp, const float* logits, const unsigned char* mask, float* dx, i64 tokens, int experts, int groups, int normalize,
                                       float eps, float factor, int softmax) {
    Space s = space(experts, groups);
    int lane = threadIdx.x & 31;
    EACH_TOKEN(t, tokens) {
        score(logits + t * experts, s.plain, experts, softmax);
        float total = 0.f, dot = 0.f;
        for (int i = lane; i < experts; i += 32) {
            if (mask[t * experts + i]) {
                total += s.plain[i];
                dot += dp[t * experts + i] * s.plain[i];
            }
        }
        total = warpSum(total);
        dot = warpSum(dot);
        float whole = normalize ? total + eps : 1.f, shared = normalize ? dot / whole : 0.f, drawn = 0.f;
        for (int i = lane; i < experts; i += 32) {
            float slope = mask[t * experts + i] ? factor * (dp[t * experts + i] - shared) / whole : 0.f;
            s.scores[i] = slope;
            drawn += slope * s.plain[i];
        }
        drawn = warpSum(drawn);
        for (int i = lane; i < experts; i += 32)
            dx[t * experts + i] = softmax ? s.plain[i] * (s.scores[i] - drawn) : s.scores[i] * s.plain[i] * (1.f - s.plain[i]);
        __syncwarp();
    }
}

// logits[b s e], w[b s] -> part[block][2][e]: weights of the chosen, and shares, summed over a run of one sequence's tokens by one warp.
extern "C" __global__ void balance(const float* logits, const float* w, float* part, int seq, int experts, int topK, float eps, int run) {
    Rules r = {experts, topK, 1, 1, 0, 0};
    Space s = space(experts, 1);
    extern __shared__ float memory[];
    int words = 3 * experts + 1 + (experts + 1 + 3) / 4, lane = threadIdx.x & 31;
    float* sums = memory + words;
    for (int i = lane; i < 2 * experts; i += 32)
        sums[i] = 0.f;
    i64 first = (i64)blockIdx.y * seq + (i64)blockIdx.x * run, last = min(first + run, (i64)(blockIdx.y + 1) * seq);
    for (i64 t = first; t < last; t++) {
        score(logits + t * experts, s.plain, experts, 0);
        float total = 0.f;
        for (int i = lane; i < experts; i += 32)
            total += s.plain[i];
        total = warpSum(total);
        choose(s.plain, s.keys, s.groupKeys, s.kept, s.taken, r);
        float share = w[t] / (total + eps);
        for (int i = lane; i < experts; i += 32) {
            sums[i] += s.taken[i] ? w[t] : 0.f;
            sums[experts + i] += share * s.plain[i];
        }
        __syncwarp();
    }
    float* to = part + ((i64)blockIdx.y * gridDim.x + blockIdx.x) * 2 * experts;
    for (int i = lane; i < 2 * experts; i += 32)
        to[i] = sums[i];
}

extern "C" __global__ void balance_sum(const float* part, float* counts, float* shares, int batch, int runs, int experts) {
    FOR_EACH(i, (i64)batch * experts) {
        i64 b = i / experts, e = i % experts;
        double count = 0, share = 0;
        for (int k = 0; k < runs; k++) {
            const float* from = part + (b * runs + k) * 2 * experts;
            count += from[e];
            share += from[experts + e];
        }
        counts[i] = (float)count;
        shares[i] = (float)share;
    }
}

// dshares[b e], logits, w -> dlogits
extern "C" __global__ void balance_grad(const float* d, const float* logits, const float* w, float* dx, i64 tokens, int seq, int experts, float eps) {
    Space s = space(experts, 1);
    int lane = threadIdx.x & 31;
    EACH_TOKEN(t, tokens) {
        const float* mine = d + t / seq * experts;
        score(logits + t * experts, s.plain, experts, 0);
        float total = 0.f, dot = 0.f;
        for (int i = lane; i < experts; i += 32) {
            total += s.plain[i];
            dot += s.plain[i] * mine[i];
        }
        total = warpSum(total) + eps;
        float shared = warpSum(dot) / total, part = w[t] / total;
        for (int i = lane; i < experts; i += 32)
            dx[t * experts + i] = part * (mine[i] - shared) * s.plain[i] * (1.f - s.plain[i]);
        __syncwarp();
    }
}
