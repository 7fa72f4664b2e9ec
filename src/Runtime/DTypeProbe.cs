// Which element type this machine multiplies faster: a probe of under 0.3 s.
using System.Diagnostics;
using DeepSeekGraph.Runtime.Cuda;
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using DeepSeekGraph.Runtime.Native;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime;

/// <summary>Chooses for `--dtype auto`.</summary>
public static class DTypeProbe
{
    private static readonly Lazy<DType> Chosen = new(Measure);

    /// <summary>bf16 on GPUs, and where its products take less than 0.8 of fp32's time, else fp32; measured once a process.</summary>
    public static DType Faster => Chosen.Value;

    /// <summary>Why.</summary>
    public static string Reason => RankDevice.UsesCuda ? "which GPUs multiply faster" : "by a probe of this machine's matrix products";

    private static DType Measure()
    {
        if (RankDevice.UsesCuda)
            return DType.BFloat16;
        if (!Products.MultipliesBFloat16)
            return DType.Float32;
        LibTorch.Load();
        var result = DType.Float32;
        var thread = new Thread(() =>
        {
            TensorMemory.PrepareThread();
            result = Time(ScalarType.BFloat16) < 0.8 * Time(ScalarType.Float32) ? DType.BFloat16 : DType.Float32;
        });
        thread.Start();
        thread.Join();
        return result;
    }

    /// <summary>Best of up to 5 products of 256 x 512 x 512, within 0.1 s after the first.</summary>
    private static double Time(ScalarType type)
    {
        using var a = ones([256, 512], dtype: type);
        using var b = ones([512, 512], dtype: type);
        var best = double.MaxValue;
        var start = Stopwatch.GetTimestamp();
        for (var i = 0; i < 5 && (i < 2 || Stopwatch.GetElapsedTime(start).TotalSeconds < 0.1); i++)
        {
            var begin = Stopwatch.GetTimestamp();
            a.mm(b).Dispose();
            best = Math.Min(best, Stopwatch.GetElapsedTime(begin).TotalSeconds);
        }

        return best;
    }
}
