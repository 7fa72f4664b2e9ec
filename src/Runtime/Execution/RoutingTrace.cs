// Records which experts each token chose, or makes tokens choose what an earlier run did.
using System.Collections.Concurrent;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Execution;

/// <summary>Masks of GroupTopK by rank, module path and microbatch; for comparing runs whose sums differ in the last bit.</summary>
public sealed class RoutingTrace : IDisposable
{
    private readonly ConcurrentDictionary<(int Rank, string Path, int Microbatch), Tensor> _masks = new();
    private long _tokens;
    private long _differing;

    /// <summary>True: masks are replaced by the recorded ones and compared. False: they are recorded.</summary>
    public bool Replay { get; set; }

    /// <summary>Tokens compared while replaying.</summary>
    public long Tokens => _tokens;

    /// <summary>Tokens whose set of experts differed from the recorded one.</summary>
    public long Differing => _differing;

    /// <summary>Puts a mask [tokens, experts] (or [b s e]) of a rank, as if it had been recorded; it is copied.</summary>
    public void Add(int rank, string path, int microbatch, Tensor mask)
    {
        if (_masks.Remove((rank, path, microbatch), out var old))
            old.Dispose();
        _masks[(rank, path, microbatch)] = mask.clone();
    }

    public void Dispose()
    {
        foreach (var mask in _masks.Values)
            mask.Dispose();
        _masks.Clear();
    }

    /// <summary>Called after GroupTopK.</summary>
    internal unsafe void Visit(int rank, string path, int microbatch, Tensor mask)
    {
        if (!Replay || !_masks.TryGetValue((rank, path, microbatch), out var recorded))
        {
            if (!Replay)
                Add(rank, path, microbatch, mask);
            return;
        }

        var experts = (int)mask.shape[^1];
        var tokens = mask.numel() / experts;
        byte* mine = (byte*)mask.Pointer(), theirs = (byte*)recorded.Pointer();
        var differing = 0;
        for (long t = 0; t < tokens; t++)
        {
            var old = new ReadOnlySpan<byte>(theirs + (t * experts), experts);
            var now = new Span<byte>(mine + (t * experts), experts);
            if (!now.SequenceEqual(old))
                differing++;
            old.CopyTo(now);
        }

        Interlocked.Add(ref _tokens, tokens);
        Interlocked.Add(ref _differing, differing);
    }
}
