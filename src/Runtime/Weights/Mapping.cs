// A file mapped into memory, and tensors on it: unmapped when its owner and the last of its tensors are gone.

using System.IO.MemoryMappedFiles;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using DeepSeekGraph.Runtime.Native;
using TorchSharp;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Weights;

/// LibTorch tells by address that a tensor's memory is no longer used, from whatever thread drops it.
internal sealed unsafe partial class Mapping : IDisposable
{
    private static readonly Lock s_lock = new();

    /// Mappings that have tensors, by address; this list is also what keeps them from the garbage collector.
    private static readonly SortedList<nint, Mapping> s_live = [];

    private readonly MemoryMappedFile _map;
    private readonly MemoryMappedViewAccessor _view;
    private int _tensors;
    private bool _disposed;

    private Mapping(MemoryMappedFile map, MemoryMappedViewAccessor view, long length)
    {
        (_map, _view, Length) = (map, view, length);
        byte* start = null;
        view.SafeMemoryMappedViewHandle.AcquirePointer(ref start);
        Start = start + view.PointerOffset;
    }

    /// The first byte of the file.
    public byte* Start { get; }

    /// Bytes of the file.
    public long Length { get; }

    /// Tensors that were handed out and still exist.
    public int Tensors
    {
        get
        {
            lock (s_lock)
                return _tensors;
        }
    }

    /// Maps the first `length` bytes of an open file, which is closed with the mapping. Privately: what is written
    /// to the memory never reaches the file; shared: it does.
    public static Mapping Open(FileStream file, long length, bool shared)
    {
        MemoryMappedFile? map = null;
        try
        {
            var access = shared ? MemoryMappedFileAccess.ReadWrite : MemoryMappedFileAccess.Read;
            map = MemoryMappedFile.CreateFromFile(file, null, 0, access, HandleInheritability.None, leaveOpen: false);
            var view = map.CreateViewAccessor(
                0, length, shared ? MemoryMappedFileAccess.ReadWrite : MemoryMappedFileAccess.CopyOnWrite);
            return new Mapping(map, view, length);
        }
        catch
        {
            map?.Dispose();
            file.Dispose();
            throw;
        }
    }

    /// A tensor on the bytes from `offset` on, which must lie inside and hold at least one element.
    public Tensor Tensor(long offset, IReadOnlyList<long> shape, ScalarType type)
    {
        LibTorch.Load();
        var data = Start + offset;
        lock (s_lock)
        {
            ObjectDisposedException.ThrowIf(_disposed, this);
            if (_tensors++ == 0)
                s_live.Add((nint)Start, this);
        }

        delegate* unmanaged[Cdecl]<void*, void> release = &Release;
        fixed (long* sizes = shape.ToArray())
        {
            var handle = THSTensor_new(
                (nint)data, (nint)release, sizes, shape.Count, (sbyte)type, (sbyte)type, 0, -1, 0);

            // Whether a call that failed has already released the memory cannot be told: then it stays mapped.
            return handle != 0
                ? torch.Tensor.UnsafeCreateTensor(handle)
                : throw new InvalidOperationException("LibTorch made no tensor on mapped memory");
        }
    }

    /// Writes what a shared mapping holds to its file.
    public void Flush() => _view.Flush();

    /// Ends the owner's use of it; tensors keep the memory as long as they need it.
    public void Dispose()
    {
        lock (s_lock)
        {
            if (_disposed)
                return;
            _disposed = true;
            if (_tensors > 0)
                return;
        }

        Unmap();
    }

    [UnmanagedCallersOnly(CallConvs = [typeof(CallConvCdecl)])]
    private static void Release(void* data)
    {
        Mapping mapping;
        lock (s_lock)
        {
            mapping = At((nint)data);
            if (--mapping._tensors > 0)
                return;
            s_live.Remove((nint)mapping.Start);
            if (!mapping._disposed)
                return;
        }

        mapping.Unmap();
    }

    /// The mapping that begins last before `data`. No tensor lies at the very beginning of a file.
    private static Mapping At(nint data)
    {
        var starts = s_live.Keys;
        var (low, high) = (0, starts.Count - 1);
        while (low < high)
        {
            var middle = (low + high + 1) / 2;
            if (starts[middle] < data)
                low = middle;
            else
                high = middle - 1;
        }

        return s_live.Values[low];
    }

    private void Unmap()
    {
        _view.SafeMemoryMappedViewHandle.ReleasePointer();
        _view.Dispose();
        _map.Dispose();
    }

    [LibraryImport("LibTorchSharp")]
    private static partial nint THSTensor_new(
        nint data, nint deleter, long* sizes, int dims, sbyte type, sbyte asType, int device, int deviceIndex, byte gradient);
}
