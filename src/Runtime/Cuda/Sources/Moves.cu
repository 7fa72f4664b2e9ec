// Ranges of routed rows from place to place: a rank's own, and those that go through staging memory on their way from or to other ranks.
// A segment is {first, from, to, how}: the rows of a table from `first` on, up to the next segment's, lie together from row `from` on and go to
// rows `to` on. how: 1: they come from staging memory, 2: they go there, 4: nothing comes, and `to` is filled.

// Four rows in units of V, h of them a row; how < 0: no row. The four loads of a thread are under way at once.
template <class V>
__device__ __forceinline__ void moveUnits(const V* rows, V* staging, V* out, V fill, i64 h, const i64 (&from)[4], const i64 (&to)[4], const int (&how)[4]) {
    for (i64 i = threadIdx.x; i < h; i += blockDim.x) {
        V v[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            v[j] = fill;
            if (how[j] >= 0 && (how[j] & 4) == 0)
                v[j] = ((how[j] & 1) ? (const V*)staging : rows)[from[j] * h + i];
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (how[j] >= 0)
                ((how[j] & 2) ? staging : out)[to[j] * h + i] = v[j];
    }
}

// In the widest units that the width of a row and all addresses allow. `fill` is 0, or -1: all bits of all units.
__device__ __forceinline__ void moveValue(const void* rows, void* staging, void* out, i64 width, int fill, const i64 (&from)[4], const i64 (&to)[4],
                                          const int (&how)[4]) {
    u64 any = (u64)rows | (u64)staging | (u64)out | (u64)width;
    u32 bits = (u32)fill;
    if ((any & 15) == 0)
        moveUnits((const uint4*)rows, (uint4*)staging, (uint4*)out, make_uint4(bits, bits, bits, bits), width / 16, from, to, how);
    else if ((any & 3) == 0)
        moveUnits((const u32*)rows, (u32*)staging, (u32*)out, bits, width / 4, from, to, how);
    else
        moveUnits((const unsigned char*)rows, (unsigned char*)staging, (unsigned char*)out, (unsigned char)bits, width, from, to, how);
}

// The `rows` rows of `count` segments, of one value or, where widthB > 0, of two that go alike. A block four rows at a time.
extern "C" __global__ void move_rows(const int4* segments, int count, int rows, const void* rowsA, void* stagingA, void* outA, i64 widthA, int fillA,
                                     const void* rowsB, void* stagingB, void* outB, i64 widthB, int fillB) {
    for (i64 first = (i64)blockIdx.x * 4; first < rows; first += (i64)gridDim.x * 4) {
        // the last segment that begins at `first` or before it: the first one begins at 0
        int at = 0, end = count;
        while (end - at > 1) {
            int middle = (at + end) / 2;
            if (segments[middle].x <= first)
                at = middle;
            else
                end = middle;
        }
        i64 from[4], to[4];
        int how[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            i64 row = first + j;
            // segments have rows: a block's four may be of as many
            if (at + 1 < count && segments[at + 1].x <= row)
                at++;
            int4 s = segments[at];
            from[j] = s.y + (row - s.x);
            to[j] = s.z + (row - s.x);
            how[j] = row < rows ? s.w : -1;
        }
        moveValue(rowsA, stagingA, outA, widthA, fillA, from, to, how);
        if (widthB > 0)
            moveValue(rowsB, stagingB, outB, widthB, fillB, from, to, how);
    }
}
