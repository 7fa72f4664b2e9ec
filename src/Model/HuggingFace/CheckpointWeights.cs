// The weights of a checkpoint as parameters of the model: what is wrong with them, all at once, and each parameter whole.

using System.Collections.Concurrent;
using System.Text.RegularExpressions;
using DeepSeekGraph.Runtime.Weights;
using TorchSharp;

namespace DeepSeekGraph.Models.HuggingFace;

/// Reads parameters from the tensors of a folder; fp8 blocks are dequantised to fp32. What was read is kept until Dispose.
public sealed partial class CheckpointWeights : IDisposable
{
    private static readonly string[] Readable = ["F32", "BF16", "F16", "F64"];

    private readonly DeepSeekV3Config _config;
    private readonly SafeTensorsSet _set;
    private readonly int _declaredDepths;
    private readonly ConcurrentDictionary<string, Lazy<torch.Tensor>> _parameters = new(StringComparer.Ordinal);

    /// `declaredDepths`: depths of multi-token prediction in the checkpoint, of which the model may have none.
    internal CheckpointWeights(DeepSeekV3Config config, SafeTensorsSet set, int declaredDepths)
    {
        _config = config;
        _set = set;
        _declaredDepths = declaredDepths;
        Map = WeightMap.Of(config);
    }

    /// The table of the model.
    public WeightMap Map { get; }

    /// A parameter in the model's shape, on the file's own memory where it is one tensor; null for another name. The tensor
    /// belongs to this object. Any thread.
    public torch.Tensor? Parameter(string name)
        => Map.Has(name)
            ? _parameters.GetOrAdd(name, n => new Lazy<torch.Tensor>(() => Assemble(Map[n]))).Value
            : null;

    /// Everything that is wrong, by tensor; reads all of it, or without `values` only names, shapes, types and copies. DSG0704 missing, or of another shape or type; DSG0708 unknown;
    /// DSG0709 no multi-token prediction; DSG0710 not finite; DSG0711 a copy that differs; DSG0826 scales that do not fit.
    public IReadOnlyList<Diagnostic> Check(bool values = true)
    {
        var found = new List<Diagnostic>();
        var expected = Map.Tensors(_config).ToList();
        var depths = expected.GroupBy(tensor => DepthOf(tensor.Name)).Where(depth => depth.Key is not null);
        var absent = depths.Where(depth => !depth.Any(tensor => _set.Contains(tensor.Name))).Select(depth => depth.Key).ToHashSet();
        foreach (var depth in absent)
        {
            found.Add(new Diagnostic(
                Codes.MtpWeightsMissing,
                _set.Path,
                $"config.json declares {_config.NumNextnPredictLayers} layers of multi-token prediction, "
                    + $"the checkpoint has no tensor of model.layers.{depth}",
                "load it without: --no-mtp, or noMtp: true in C#"));
        }

        foreach (var tensor in expected.Where(tensor => !absent.Contains(DepthOf(tensor.Name))))
        {
            if (Unfit(tensor) is { } unfit)
                found.Add(unfit);
            else if (values && !IsFinite(tensor.Name))
                found.Add(NotFinite(tensor.Name));
            else if (tensor.Original is { } original && _set.Contains(original) && !Same(tensor.Name, original))
            {
                found.Add(Wrong(
                    Codes.CopiesDiffer,
                    tensor.Name,
                    $"the tensor is not equal to {original}, of which it is a copy",
                    "models share one table and one head; the checkpoint has two"));
            }
        }

        var names = expected.Select(tensor => tensor.Name).ToHashSet(StringComparer.Ordinal);
        foreach (var name in _set.Names.Where(name => !names.Contains(WeightMap.WeightOfScales(name) ?? name) && !IsIgnored(name)))
            found.Add(Wrong(Codes.WeightsUnknown, name, "the model has no part for this tensor", "give the config.json that belongs to the checkpoint"));
        return found;
    }

    public void Dispose()
    {
        foreach (var parameter in _parameters.Values.Where(parameter => parameter.IsValueCreated))
            parameter.Value.Dispose();
        _parameters.Clear();
    }

    /// What to say of a tensor that is not finite.
    internal Diagnostic NotFinite(string tensor) => Wrong(
        Codes.WeightsNotFinite, tensor, "the tensor holds NaN or infinity", "the checkpoint is damaged: copy or download it again");

    /// Why a tensor cannot be read as the model's; null where it can.
    internal Diagnostic? Unfit(CheckpointTensor tensor)
    {
        if (!_set.Contains(tensor.Name))
            return Wrong(Codes.WeightsMismatch, tensor.Name, "the checkpoint has no such tensor", "copy or download the checkpoint again");

        var info = _set.Info(tensor.Name);
        if (!info.Shape.SequenceEqual(tensor.Shape.Select(extent => (long)extent)))
        {
            return Wrong(
                Codes.WeightsMismatch,
                tensor.Name,
                $"the checkpoint's tensor is [{string.Join(", ", info.Shape)}], the model's [{string.Join(", ", tensor.Shape)}]",
                "give the config.json that belongs to the checkpoint");
        }

        if (Readable.Contains(info.DType))
            return null;
        if (info.DType != "F8_E4M3" || info.Shape is not [var rows, var columns])
        {
            return Wrong(
                Codes.WeightsMismatch,
                tensor.Name,
                $"the element type is {info.DType}",
                $"supported are {string.Join(" ", Readable)}, and F8_E4M3 for matrices with scales");
        }

        var (scales, grid) = (WeightMap.ScalesOf(tensor.Name), Fp8Blocks.Grid(rows, columns));
        return _set.Contains(scales) && _set.Info(scales) is { DType: "F32", Shape: [var r, var c] } && (r, c) == grid
            ? null
            : Wrong(
                Codes.Fp8Blocks,
                tensor.Name,
                $"the weight is fp8 [{rows}, {columns}], its scales are {(_set.Contains(scales) ? Shown(_set.Info(scales)) : "not there")}",
                $"blocks of {Fp8Blocks.Extent} x {Fp8Blocks.Extent} need {scales} of F32 [{grid.Rows}, {grid.Columns}]");
    }

    private bool IsFinite(string name)
    {
        if (_set.Info(name).DType == "F8_E4M3")
        {
            // E4M3 has two NaNs and no infinity
            if (_set.FileOf(name).Bytes(name).IndexOfAny((byte)0x7F, (byte)0xFF) >= 0)
                return false;
            name = WeightMap.ScalesOf(name);
        }

        using var values = _set.Tensor(name);
        using var finite = values.isfinite();
        using var all = finite.all();
        return all.item<bool>();
    }

    private bool Same(string copy, string original)
        => _set.Info(copy).DType == _set.Info(original).DType
            && _set.FileOf(copy).Bytes(copy).SequenceEqual(_set.FileOf(original).Bytes(original));

    private torch.Tensor Assemble(WeightEntry entry)
    {
        long[] shape = [.. entry.Shape];
        if (entry.Pieces is [var only])
        {
            using var whole = Values(only.Tensor);
            return whole.reshape(shape);
        }

        var types = entry.Pieces.Select(piece => _set.Info(piece.Tensor).DType).Distinct().ToArray();
        var type = types is [not "F8_E4M3"] ? SafeTensorTypes.ScalarTypeOf(types[0]) : torch.ScalarType.Float32;
        var bank = torch.empty(shape, dtype: type);
        using var flat = bank.view(-1);
        foreach (var piece in entry.Pieces)
        {
            using var values = Values(piece.Tensor);
            using var line = values.reshape(-1);
            using var part = flat.narrow(0, piece.Offset, piece.Elements);
            part.copy_(line);
        }

        return bank;
    }

    private torch.Tensor Values(string name)
    {
        var stored = _set.Tensor(name);
        if (_set.Info(name).DType != "F8_E4M3")
            return stored;
        using (stored)
        {
            using var scales = _set.Tensor(WeightMap.ScalesOf(name));
            return Fp8Blocks.Dequantize(stored, scales, torch.ScalarType.Float32, name);
        }
    }

    /// The layer of a tensor of multi-token prediction; null for the main model's.
    private int? DepthOf(string name)
        => Layer().Match(name) is { Success: true } match
            && int.TryParse(match.Groups[1].ValueSpan, out var layer)
            && layer >= _config.NumHiddenLayers
                ? layer
                : null;

    /// Parts that the model goes without: multi-token prediction where it is not asked for, and tables of the rotation, which
    /// old files have and config.json determines.
    private bool IsIgnored(string name)
        => name.EndsWith(".rotary_emb.inv_freq", StringComparison.Ordinal)
            || (DepthOf(name) is { } layer
                && layer >= _config.NumHiddenLayers + _config.NumNextnPredictLayers
                && layer < _config.NumHiddenLayers + _declaredDepths);

    private Diagnostic Wrong(string code, string tensor, string message, string help)
        => new(code, $"{_set.Path}, {tensor}", message, help);

    private static string Shown(SafeTensorInfo info) => $"{info.DType} [{string.Join(", ", info.Shape)}]";

    [GeneratedRegex(@"^model\.layers\.(\d+)\.")]
    private static partial Regex Layer();
}
