// Records which experts each token chose, or makes tokens choose what an earlier run did, whatever the layout of either.
using System.Collections.Concurrent;
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using DeepSeekGraph.Runtime.Parameters;

namespace DeepSeekGraph.Runtime.Execution;

/// <summary>Masks of GroupTopK and Router by step, module path and sequence of the global batch; for comparing runs whose sums differ in the last bit.</summary>
public sealed class RoutingTrace
{
    // one byte a position and expert: [sequence length, experts]
    private readonly ConcurrentDictionary<(long Step, string Path, int Row), byte[]> _masks = new();
    private readonly ConcurrentDictionary<string, int> _experts = new();
    private long _tokens;
    private long _differing;

    /// <summary>True: masks are replaced by the recorded ones and compared. False: they are recorded.</summary>
    public bool Replay { get; set; }

    /// <summary>Tokens compared while replaying, once per MoE layer.</summary>
    public long Tokens => _tokens;

    /// <summary>Tokens whose set of experts differed from the recorded one.</summary>
    public long Differing => _differing;

    /// <summary>Experts that a token of a sequence of the global batch chose, ascending; `position` in natural order.</summary>
    public IReadOnlyList<int> Chosen(long step, string path, int row, int position)
    {
        if (!_masks.TryGetValue((step, path, row), out var whole))
            throw new InvalidOperationException($"no routing was recorded for step {step}, {path}, sequence {row}");
        var experts = _experts.GetValueOrDefault(path);
        var mask = whole.AsSpan(position * experts, experts);
        var chosen = new List<int>();
        for (var e = 0; e < experts; e++)
        {
            if (mask[e] != 0)
                chosen.Add(e);
        }

        return chosen;
    }

    /// <summary>Sets what the tokens of a sequence choose when replayed: one byte a position and expert, [sequence length, experts].</summary>
    public void Set(long step, string path, int row, int experts, ReadOnlySpan<byte> mask)
    {
        if (experts < 1 || mask.Length % experts != 0)
            throw new ArgumentException($"a mask of {mask.Length} bytes is not one of {experts} experts", nameof(mask));
        _experts[path] = experts;
        _masks[(step, path, row)] = mask.ToArray();
    }

    /// <summary>Called after GroupTopK and Router: `mask` is [batch, seq, experts], experts whole.</summary>
    internal unsafe void Visit(RankContext rank, long step, string path, int microbatch, SlotValue mask)
    {
        var global = Shard.GlobalExtents(mask.Info.Extents, mask.Info.Layout, rank.Axes);
        var shard = Shard.Of(global, mask.Info.Layout, rank);
        int rows = shard.Extents[0], positions = shard.Extents[1], experts = shard.Extents[2];
        _experts[path] = experts;
        var counts = Shard.IsFirstHolder(mask.Info.Layout, rank);
        using var host = mask.Tensor.OnHost();
        var mine = new Span<byte>((byte*)host.Pointer(), rows * positions * experts);
        long differing = 0;
        for (var b = 0; b < rows; b++)
        {
            var key = (step, path, (microbatch * global[0]) + shard.Start[0] + b);
            var whole = Replay
                ? _masks.GetValueOrDefault(key) ?? throw new InvalidOperationException($"no routing was recorded for step {step}, {path}, sequence {key.Item3}")
                : _masks.GetOrAdd(key, _ => new byte[global[1] * experts]);
            for (var s = 0; s < positions; s++)
            {
                var now = mine.Slice(((b * positions) + s) * experts, experts);
                var recorded = whole.AsSpan(ZigzagOrder.natural(rank.Context, global[1], shard.Start[1] + s) * experts, experts);
                if (!Replay)
                {
                    now.CopyTo(recorded);
                    continue;
                }

                if (!now.SequenceEqual(recorded))
                    differing++;
                recorded.CopyTo(now);
            }
        }

        if (Replay && mask.Tensor.device_type != TorchSharp.DeviceType.CPU)
            mask.Tensor.copy_(host).On(mask.Tensor);
        if (Replay && counts)
        {
            Interlocked.Add(ref _tokens, (long)rows * positions);
            Interlocked.Add(ref _differing, differing);
        }
    }
}
