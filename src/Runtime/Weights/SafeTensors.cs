// Reads safetensors files by memory map, and trusts nothing in them.

using System.Runtime.InteropServices;
using DeepSeekGraph.Runtime.Memory;
using DeepSeekGraph.Runtime.Native;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Weights;

/// A tensor in a file: element type as the format names it (F32, BF16, ...), shape, and its bytes in the data part.
public sealed record SafeTensorInfo(string Name, string DType, IReadOnlyList<long> Shape, long Begin, long End)
{
    /// Bytes of the tensor.
    public long Bytes => End - Begin;

    /// Product of the shape; 1 for a scalar.
    public long Elements => Bytes / SafeTensorTypes.BytesOf(DType);
}

/// An open file. Any defect of it is a diagnostic: DSG0820 to DSG0823, never a crash. A file that another program
/// makes shorter while it is open is beyond any check: replace files by renaming, as the writer does.
public sealed unsafe class SafeTensorsFile : IDisposable
{
    private readonly Dictionary<string, SafeTensorInfo> _infos;
    private readonly long _dataStart;
    private readonly Mapping _map;
    private byte* _start;

    private SafeTensorsFile(string path, Mapping map, SafeTensorsHeader header)
    {
        Path = path;
        Metadata = header.Metadata;
        Names = header.Tensors.Select(tensor => tensor.Name).Order(StringComparer.Ordinal).ToArray();
        _infos = header.Tensors.ToDictionary(tensor => tensor.Name, StringComparer.Ordinal);
        _dataStart = header.DataStart;
        _map = map;
        _start = map.Start;
    }

    /// Address of the file's first byte, for tests of bounds.
    internal nint Start => (nint)_start;

    /// Bytes of the file.
    public long FileBytes => _map.Length;

    /// As given to Open.
    public string Path { get; }

    /// Tensor names in ordinal order.
    public IReadOnlyList<string> Names { get; }

    /// The file's own notes (`__metadata__`), empty when it has none.
    public IReadOnlyDictionary<string, string> Metadata { get; }

    /// Maps the file after checking its header whole; DSG0820, DSG0821.
    public static SafeTensorsFile Open(string path)
    {
        FileStream? file = null;
        try
        {
            // A pipe would wait for its other end.
            if (FileCalls.IsSpecial(path))
                throw new IOException("it is no regular file");
            file = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read);
            var header = SafeTensorsHeader.Read(file, path);
            return new SafeTensorsFile(path, Mapping.Open(file, header.FileBytes, shared: false), header);
        }
        catch (Exception e)
        {
            file?.Dispose();
            if (e is IOException or UnauthorizedAccessException or ArgumentException or NotSupportedException)
            {
                throw DiagnosticException.Of(
                    Codes.SafeTensorsUnreadable,
                    path,
                    $"the safetensors file cannot be opened: {e.Message}",
                    "check the path and its permissions");
            }

            throw;
        }
    }

    /// True when the file has a tensor of this name.
    public bool Contains(string name) => _infos.ContainsKey(name);

    /// Type, shape and place of a tensor; DSG0822 when the file has none of this name.
    public SafeTensorInfo Info(string name)
        => _infos.TryGetValue(name, out var info)
            ? info
            : throw DiagnosticException.Of(
                Codes.SafeTensorsNoTensor,
                Path,
                $"the file has no tensor '{name}' among its {Names.Count}",
                Names.Count == 0 ? "" : $"tensors begin with {string.Join(", ", Names.Take(3))}");

    /// The mapped bytes, little-endian, valid until Dispose; at most 2 GB.
    public ReadOnlySpan<byte> Bytes(string name)
    {
        ObjectDisposedException.ThrowIf(_start == null, this);
        var info = Info(name);
        return info.Bytes <= int.MaxValue
            ? new ReadOnlySpan<byte>(_start + _dataStart + info.Begin, (int)info.Bytes)
            : throw TypeMistake(info, $"has {info.Bytes} bytes, more than one span holds", "use Pointer");
    }

    /// Address of the first mapped byte, valid until Dispose; for tensors of any size.
    public nint Pointer(string name)
    {
        ObjectDisposedException.ThrowIf(_start == null, this);
        return (nint)(_start + _dataStart + Info(name).Begin);
    }

    /// The tensor itself on the mapped bytes, nothing copied; it may outlive this object, and what is written to it never
    /// reaches the file. Copied only where the file does not align it to its element type. DSG0823 for a shape that no
    /// tensor can have.
    public Tensor Tensor(string name)
    {
        ObjectDisposedException.ThrowIf(_start == null, this);
        LibTorch.Load();
        var info = Info(name);
        var type = SafeTensorTypes.ScalarTypeOf(info.DType);
        if (info.Bytes == 0)
            return Empty(info, type);
        var at = _dataStart + info.Begin;
        if (at % SafeTensorTypes.BytesOf(info.DType) == 0)
            return _map.Tensor(at, info.Shape, type);
        var copy = empty([.. info.Shape], dtype: type);
        Buffer.MemoryCopy(_start + at, copy.Pointer(), info.Bytes, info.Bytes);
        return copy;
    }

    /// F32, BF16, F16 or F64 elements as float, row-major; DSG0823 for other types.
    public float[] ReadFloat32(string name)
    {
        var info = Info(name);
        var bytes = Bytes(name);
        return info.DType switch
        {
            "F32" => MemoryMarshal.Cast<byte, float>(bytes).ToArray(),
            "BF16" => Widen<ushort, float>(bytes, bits => BitConverter.UInt32BitsToSingle((uint)bits << 16)),
            "F16" => Widen<Half, float>(bytes, half => (float)half),
            "F64" => Widen<double, float>(bytes, wide => (float)wide),
            _ => throw TypeMistake(info, "cannot be read as float", "give a tensor of F32, BF16, F16 or F64"),
        };
    }

    /// I64, I32, U8 or BOOL elements as long, row-major; DSG0823 for other types.
    public long[] ReadInt64(string name)
    {
        var info = Info(name);
        var bytes = Bytes(name);
        return info.DType switch
        {
            "I64" => MemoryMarshal.Cast<byte, long>(bytes).ToArray(),
            "I32" => Widen<int, long>(bytes, value => value),
            "U8" or "BOOL" => Widen<byte, long>(bytes, value => value),
            _ => throw TypeMistake(info, "cannot be read as integers", "give a tensor of I64, I32, U8 or BOOL"),
        };
    }

    public void Dispose()
    {
        if (_start != null)
        {
            _start = null;
            _map.Dispose();
        }
    }

    /// A tensor without elements, whose strides must still be numbers.
    private Tensor Empty(SafeTensorInfo info, ScalarType type)
    {
        var spread = 1.0;
        foreach (var extent in info.Shape)
            spread *= Math.Max(extent, 1);
        return spread < long.MaxValue / 8.0
            ? empty([.. info.Shape], dtype: type)
            : throw TypeMistake(info, "has a shape that no tensor can have", "write it again with a smaller shape");
    }

    private static TTo[] Widen<TFrom, TTo>(ReadOnlySpan<byte> bytes, Func<TFrom, TTo> convert)
        where TFrom : unmanaged
    {
        var from = MemoryMarshal.Cast<byte, TFrom>(bytes);
        var to = new TTo[from.Length];
        for (var i = 0; i < to.Length; i++)
        {
            to[i] = convert(from[i]);
        }

        return to;
    }

    private DiagnosticException TypeMistake(SafeTensorInfo info, string what, string help)
        => DiagnosticException.Of(
            Codes.SafeTensorsType,
            Path,
            $"the tensor '{info.Name}' of {info.DType} [{string.Join(", ", info.Shape)}] {what}",
            help);
}
