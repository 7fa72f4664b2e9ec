// Choice of experts on a GPU; CUDA C++ in Router.cu.
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

internal static class CudaRouter
{
    private const int Warps = 4;

    /// <summary>Tokens whose balance one warp sums up.</summary>
    private const int Run = 32;

    /// <summary>scores[b s e] fp32 -> mask[b s e].</summary>
    public static void GroupTopK(in KernelCall call)
    {
        using var scores = Gpu.Float(call.In(0));
        var experts = (int)scores.shape[^1];
        var tokens = experts == 0 ? 0 : scores.numel() / experts;
        var groups = Math.Max(1, call.Int(1));
        Gpu.LaunchGrid(
            "Router", "group_top_k", Blocks(tokens), 1, 32 * Warps, Shared(experts, groups), scores, call.Out().Fill(), tokens, experts, call.Int(0), groups,
            call.Int(2), call.Int(3), call.Int(4));
    }

    /// <summary>logits[b s e], bias[e] -> p[b s e], mask[b s e], counts[e].</summary>
    public static void Router(in KernelCall call) => Weigh(call, false);

    /// <summary>p and counts of a mask that is there already.</summary>
    public static void Weigh(in KernelCall call) => Weigh(call, true);

    /// <summary>dp[b s e], logits, mask -> dlogits.</summary>
    public static void RouterGrad(in KernelCall call)
    {
        using var dp = Gpu.Float(call.In(0));
        using var logits = Gpu.Float(call.In(1));
        using var dx = new Target(call.Out(), ScalarType.Float32);
        var experts = (int)logits.shape[^1];
        var tokens = logits.numel() / experts;
        var groups = Math.Max(1, call.Int(1));
        Gpu.LaunchGrid(
            "Router", "router_grad", Blocks(tokens), 1, 32 * Warps, Shared(experts, groups), dp, logits, call.In(2), dx.Tensor, tokens, experts, groups,
            call.Int(5), (float)call.Float(6), (float)call.Float(7), call.Int(8));
    }

    /// <summary>logits[b s e], w[b s] -> counts[b e], shares[b e]: summed over runs of tokens, then over runs in fp64.</summary>
    public static void Balance(in KernelCall call)
    {
        using var logits = Gpu.Float(call.In(0));
        using var w = Gpu.Float(call.In(1));
        using var counts = new Target(call.Out(0), ScalarType.Float32);
        using var shares = new Target(call.Out(1), ScalarType.Float32);
        int batch = (int)logits.shape[0], seq = (int)logits.shape[1], experts = (int)logits.shape[2];
        var runs = (seq + Run - 1) / Run;
        using var part = Gpu.Empty(logits, ScalarType.Float32, batch, runs, 2, experts);
        Gpu.LaunchGrid(
            "Router", "balance", runs, batch, 32, Shared(experts, 1) / Warps + (2 * experts * sizeof(float)), logits, w, part, seq, experts, call.Int(0),
            (float)call.Float(1), Run);
        Gpu.Launch("Router", "balance_sum", Gpu.Blocks((long)batch * experts), 256, part, counts.Tensor, shares.Tensor, batch, runs, experts);
    }

    /// <summary>dshares[b e], logits, w -> dlogits.</summary>
    public static void BalanceGrad(in KernelCall call)
    {
        using var d = Gpu.Float(call.In(0));
        using var logits = Gpu.Float(call.In(1));
        using var w = Gpu.Float(call.In(2));
        using var dx = new Target(call.Out(), ScalarType.Float32);
        int seq = (int)logits.shape[1], experts = (int)logits.shape[2];
        var tokens = w.numel();
        Gpu.LaunchGrid(
            "Router", "balance_grad", Blocks(tokens), 1, 32 * Warps, Shared(experts, 1), d, logits, w, dx.Tensor, tokens, seq, experts, (float)call.Float(0));
    }

    private static void Weigh(in KernelCall call, bool given)
    {
        using var logits = Gpu.Float(call.In(0));
        using var bias = Gpu.Float(call.In(1));
        using var p = new Target(call.Out(0), ScalarType.Float32);
        var mask = given ? call.Out(1).Tensor : call.Out(1).Fill();
        var counts = call.Out(2).Fill();
        counts.zero_().On(counts);
        var experts = (int)logits.shape[^1];
        var tokens = logits.numel() / experts;
        var groups = Math.Max(1, call.Int(1));
        Gpu.LaunchGrid(
            "Router", "router", Blocks(tokens), 1, 32 * Warps, Shared(experts, groups), logits, bias, p.Tensor, mask, counts, tokens, experts, call.Int(0), groups,
            call.Int(2), call.Int(3), call.Int(4), call.Int(5), (float)call.Float(6), (float)call.Float(7), call.Int(8), given);
    }

    private static long Blocks(long tokens) => (tokens + Warps - 1) / Warps;

    /// <summary>Bytes that the warps of a block need, as `space` of Router.cu lays them out.</summary>
    private static int Shared(int experts, int groups) => Warps * sizeof(float) * ((3 * experts) + groups + ((experts + groups + 3) / 4));
}
