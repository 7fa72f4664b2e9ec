// Reads safetensors files by memory map, and trusts nothing in them.

using System.IO.MemoryMappedFiles;
using System.Runtime.InteropServices;

namespace DeepSeekGraph.Runtime.Weights;

/// A tensor in a file: element type as the format names it (F32, BF16, ...), shape, and its bytes in the data part.
public sealed record SafeTensorInfo(string Name, string DType, IReadOnlyList<long> Shape, long Begin, long End)
{
    /// Bytes of the tensor.
    public long Bytes => End - Begin;

    /// Product of the shape; 1 for a scalar.
    public long Elements => Bytes / SafeTensorTypes.BytesOf(DType);
}

/// The format's element types that fill whole bytes.
public static class SafeTensorTypes
{
    /// Bytes of one element; 0 for a type that is not known.
    public static int BytesOf(string dtype) => dtype switch
    {
        "BOOL" or "U8" or "I8" or "F8_E4M3" or "F8_E5M2" or "F8_E8M0" => 1,
        "F16" or "BF16" or "I16" or "U16" => 2,
        "F32" or "I32" or "U32" => 4,
        "F64" or "I64" or "U64" => 8,
        _ => 0,
    };
}

/// An open file. Any defect of it is a diagnostic: DSG0820 to DSG0823, never a crash.
public sealed unsafe class SafeTensorsFile : IDisposable
{
    private readonly Dictionary<string, SafeTensorInfo> _infos;
    private readonly long _dataStart;
    private readonly MemoryMappedFile _map;
    private readonly MemoryMappedViewAccessor _view;
    private byte* _start;

    private SafeTensorsFile(string path, MemoryMappedFile map, SafeTensorsHeader header)
    {
        Path = path;
        Metadata = header.Metadata;
        Names = header.Tensors.Select(tensor => tensor.Name).Order(StringComparer.Ordinal).ToArray();
        _infos = header.Tensors.ToDictionary(tensor => tensor.Name, StringComparer.Ordinal);
        _dataStart = header.DataStart;
        _map = map;
        _view = map.CreateViewAccessor(0, 0, MemoryMappedFileAccess.Read);
        _view.SafeMemoryMappedViewHandle.AcquirePointer(ref _start);
        _start += _view.PointerOffset;
    }

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
        MemoryMappedFile? map = null;
        try
        {
            file = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read);
            var header = SafeTensorsHeader.Read(file, path);
            map = MemoryMappedFile.CreateFromFile(
                file, null, 0, MemoryMappedFileAccess.Read, HandleInheritability.None, leaveOpen: false);
            return new SafeTensorsFile(path, map, header);
        }
        catch (Exception e)
        {
            map?.Dispose();
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
            _view.SafeMemoryMappedViewHandle.ReleasePointer();
            _view.Dispose();
            _map.Dispose();
        }
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
