// Runs of elements of mapped tensors, converted, looked at for NaN and infinity, and appended to a file.

using System.Runtime.InteropServices;
using System.Runtime.Intrinsics;
using DeepSeekGraph.Runtime.Weights;

namespace DeepSeekGraph.Runtime.Checkpoints;

/// A tensor in memory. `Scales` and `Columns` (of a row) are for fp8 blocks.
internal readonly unsafe struct RunSource(string name, string dtype, byte* elements, float* scales, long columns)
{
    public readonly string Name = name;
    public readonly string DType = dtype;
    public readonly byte* Elements = elements;
    public readonly float* Scales = scales;
    public readonly long Columns = columns;
}

/// Long runs that need no conversion go straight from the map, which stays until the file is finished; others through one megabyte of memory.
internal sealed unsafe class RunStream(RankFile file, System.Action<string> notFinite, System.Action<long>? progress) : IDisposable
{
    private const int BufferBytes = 1 << 20;
    private const int Straight = 1 << 16;
    private const int MappedBytes = 1 << 21;

    private readonly byte* _buffer = (byte*)NativeMemory.AlignedAlloc(BufferBytes, 64);
    private RunSource _source;
    private string _dtype = "";
    private int _width;
    private int _filled;
    private bool _told;

    /// The runs that follow are of this tensor, to be stored as `dtype`.
    public void Begin(RunSource source, string dtype)
        => (_source, _dtype, _width, _told) = (source, dtype, SafeTensorTypes.BytesOf(dtype), false);

    /// The next `n` elements, from place `from` of the tensor on.
    public void Add(long from, long n)
    {
        if (_source.DType == _dtype && n * _width >= Straight)
        {
            Flush();
            SendMapped(_source.Elements + (from * _width), n * _width);
            return;
        }

        while (n > 0)
        {
            var part = Math.Min(n, (BufferBytes - _filled) / _width);
            if (part == 0)
            {
                Flush();
                continue;
            }

            if (_source.Scales != null)
                Fp8Blocks.DequantizeRun(_source.Elements, _source.Scales, _source.Columns, from, part, _buffer + _filled, _dtype == "BF16");
            else
                Elements.Copy(_source.DType, _source.Elements, from, _dtype, _buffer + _filled, 0, part);
            _filled += (int)part * _width;
            (from, n) = (from + part, n - part);
        }
    }

    /// The tensor's last run was added.
    public void End() => Flush();

    public void Dispose() => NativeMemory.AlignedFree(_buffer);

    private void Flush()
    {
        if (_filled == 0)
            return;
        Look(_buffer, _filled);
        file.Append(new ReadOnlySpan<byte>(_buffer, _filled));
        progress?.Invoke(_filled);
        _filled = 0;
    }

    /// A part at a time, so that what is looked at is still in the cache when it is hashed.
    private void SendMapped(byte* bytes, long length)
    {
        for (long at = 0; at < length; at += MappedBytes)
        {
            var part = (int)Math.Min(MappedBytes, length - at);
            for (var i = 0; i < part; i += BufferBytes)
                Look(bytes + at + i, Math.Min(BufferBytes, part - i));
            file.AppendStable(bytes + at, part);
            progress?.Invoke(part);
        }
    }

    private void Look(byte* bytes, int length)
    {
        if (_told || IsFinite(bytes, length))
            return;
        _told = true;
        notFinite(_source.Name);
    }

    private bool IsFinite(byte* bytes, int length)
        => _dtype == "F32" ? AreFinite((uint*)bytes, length / 4, 0x7F800000u) : AreFinite((ushort*)bytes, length / 2, (ushort)0x7F80);

    /// Is an exponent of all ones nowhere?
    private static bool AreFinite<T>(T* bits, int n, T exponent)
        where T : unmanaged, System.Numerics.IBinaryInteger<T>
    {
        var i = 0;
        var ones = Vector256.Create(exponent);
        var found = Vector256<T>.Zero;
        for (; i <= n - Vector256<T>.Count; i += Vector256<T>.Count)
            found |= Vector256.Equals(Vector256.Load(bits + i) & ones, ones);
        var all = found == Vector256<T>.Zero;
        for (; i < n; i++)
            all &= (bits[i] & exponent) != exponent;
        return all;
    }
}
