// The option that says where ranks compute.

using System.CommandLine;
using System.Globalization;
using DeepSeekGraph.Runtime.Cuda;

namespace DeepSeekGraph.Cli;

internal sealed class DeviceOption
{
    private readonly Option<string?> _device = new("--device")
    {
        HelpName = "cpu|cuda[:N]",
        Description = "Where ranks compute: on the processor (the default), or on NVIDIA GPUs: all ranks of a process on number N, else 0; a process of several on the one of its own place",
    };

    public void AddTo(Command command) => command.Add(_device);

    /// Loads LibTorch with CUDA where that is chosen, so call it before anything else needs LibTorch.
    public RankDevice Read(ParseResult parse, Launched? launched = null)
    {
        var name = parse.GetValue(_device);
        if (name is null or "cpu")
            return RankDevice.Cpu;
        if (name == "cuda")
            return RankDevice.Cuda(launched?.Launch.LocalRank ?? 0);
        if (name.StartsWith("cuda:", StringComparison.Ordinal)
            && int.TryParse(name.AsSpan("cuda:".Length), NumberStyles.None, CultureInfo.InvariantCulture, out var index))
            return RankDevice.Cuda(index);
        throw DiagnosticException.Of(Codes.OptionValue, "--device", $"there is no device '{name}'", Nearest.Help(name, ["cpu", "cuda", "cuda:0"]));
    }

    /// What is said of ranks that have to share a device; null where there is nothing to say.
    public static string? Remark(RankDevice device, int ranks)
        => !device.IsCuda ? null
            : ranks == 1 ? $"device: {device.Name}"
            : $"device: {device.Name}, shared by {ranks} ranks: they take turns, and nothing is gained but memory that each sees less of";
}
