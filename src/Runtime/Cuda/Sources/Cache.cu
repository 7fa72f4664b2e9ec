// Rows of a cache by position; positions outside it are not written. A block a token; w in units of 2 bytes.
extern "C" __global__ void cache_write(const u16* rows, const i64* positions, u16* cache, i64 tokens, i64 perSequence, i64 places, int w) {
    for (i64 t = blockIdx.x; t < tokens; t += gridDim.x) {
        i64 place = positions[t];
        if (place < 0 || place >= places)
            continue;
        for (int i = threadIdx.x; i < w; i += blockDim.x)
            cache[(t / perSequence * places + place) * w + i] = rows[t * w + i];
    }
}
