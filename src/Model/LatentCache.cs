// What attention keeps of the tokens seen: the latent of keys and values and the rotated key that all heads share.
// B batch, S seq (new tokens), C places, L kv_lora, R rope, W = L + R.

namespace DeepSeekGraph.Models;

/// A pass of generation: where its tokens stand (below zero: padding), how many a sequence may have, and whether they follow
/// others (decoding) or begin (prefill).
public sealed record LatentCache(Tensor Positions_BS, int Places, bool IsDecoding)
{
    /// Features of a kept row: 576 in DeepSeek-V3.
    internal const string Axis = "kv_cache";

    /// Keeps the new tokens' rows; the cache with them [batch, cache, kv_cache].
    internal Tensor Write(ModelScope m, Tensor latent_BSL, Tensor kPe_BSR)
    {
        var rows_BSW = Tensor.Concat(Axis, latent_BSL.Rename("kv_lora", Axis), kPe_BSR.Rename("rope", Axis));
        var cache_BCW = m.Cache(
            Axis, ("batch", rows_BSW.Extent("batch")), ("cache", Places), (Axis, rows_BSW.Extent(Axis)));
        var written = cache_BCW.Apply(Op.CacheWrite, rows_BSW, Positions_BS);
        m.Output($"cache:{m.Path}.{Axis}", written);
        return written;
    }
}
