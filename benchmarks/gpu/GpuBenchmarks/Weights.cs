// Initial weights as raw files, one a parameter, for a peer to start from, or from a peer.
using System.Runtime.InteropServices;
using DeepSeekGraph.Runtime.Memory;
using DeepSeekGraph.Runtime.Training;
using Torch = TorchSharp.torch;

namespace DeepSeekGraph.Benchmarks;

internal static class Weights
{
    /// <summary>Writes every parameter in its own element type, row-major, as NAME.bin.</summary>
    public static unsafe void Dump(Trainer trainer, string folder)
    {
        Directory.CreateDirectory(folder);
        foreach (var (name, tensor) in trainer.GatherParameters())
        {
            using var whole = tensor;
            using var file = File.Create(Path.Combine(folder, name + ".bin"));
            var at = (byte*)whole.Pointer();
            var bytes = whole.ByteCount();
            for (long done = 0; done < bytes; done += 1 << 30)
                file.Write(new ReadOnlySpan<byte>(at + done, (int)Math.Min(1 << 30, bytes - done)));
        }
    }

    /// <summary>Reads what Dump wrote.</summary>
    public static Func<string, Torch.Tensor?> From(string folder, PlanSet plan)
    {
        var parameters = plan.Parameters.ToDictionary(p => p.Name);
        return name =>
        {
            var parameter = parameters[name];
            var tensor = Torch.empty([.. parameter.Extents.Select(e => (long)e)], dtype: parameter.DType.ToScalarType());
            Fill(tensor, Path.Combine(folder, name + ".bin"));
            return tensor;
        };
    }

    private static unsafe void Fill(Torch.Tensor tensor, string path)
    {
        using var file = File.OpenRead(path);
        var at = (byte*)tensor.Pointer();
        var bytes = tensor.ByteCount();
        if (file.Length != bytes)
            throw new InvalidDataException($"{path} has {file.Length} bytes, the parameter {bytes}");
        for (long done = 0; done < bytes; done += 1 << 30)
            file.ReadExactly(MemoryMarshal.CreateSpan(ref *(at + done), (int)Math.Min(1 << 30, bytes - done)));
    }
}
