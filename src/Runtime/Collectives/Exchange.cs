// One meeting of the members of a group: what each of them brought.
using DeepSeekGraph.Runtime.Memory;
using DeepSeekGraph.Runtime.Telemetry;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Collectives;

/// <summary>Copies that one member brought; read by all, written by none. At each place a tensor, a row set, or nothing.</summary>
internal sealed class Parcel(Tensor?[] tensors, RowSet?[] rows) : IDisposable
{
    private int _owners = 1;

    public Tensor?[] Tensors => tensors;

    public RowSet?[] Rows => rows;

    /// <summary>So many more will dispose it; the last one frees the tensors.</summary>
    public Parcel Share(int more)
    {
        Interlocked.Add(ref _owners, more);
        return this;
    }

    /// <summary>Copies the values; a row set is never written, so it is handed over as it is.</summary>
    public static Parcel Of(IReadOnlyList<SlotValue> values)
    {
        var tensors = new Tensor?[values.Count];
        var rows = new RowSet?[values.Count];
        for (var i = 0; i < values.Count; i++)
        {
            if (values[i].HoldsRows)
                rows[i] = values[i].Rows;
            else
                tensors[i] = values[i].Tensor.clone();
        }

        return new Parcel(tensors, rows);
    }

    public void Dispose()
    {
        if (Interlocked.Decrement(ref _owners) > 0)
            return;
        foreach (var tensor in tensors)
            tensor?.Dispose();
    }
}

/// <summary>The parcels of all members; freed when the last reader has left.</summary>
internal sealed class Exchange(int members, int readers) : IDisposable
{
    private readonly ManualResetEventSlim _complete = new(false, 20);
    private readonly Parcel?[] _parcels = new Parcel?[members];
    private readonly Dictionary<int, Tensor> _reduced = [];
    private readonly Lock _lock = new();
    private int _missing = members;
    private int _readers = readers;

    public int Members => _parcels.Length;

    /// <summary>What member i brought; after Wait.</summary>
    public Parcel this[int member] => _parcels[member]!;

    public void Put(int member, Parcel parcel)
    {
        _parcels[member] = parcel;
        if (Interlocked.Decrement(ref _missing) == 0)
        {
            Met = HostTime.Now;
            _complete.Set();
        }
    }

    /// <summary>When the last member had come, as HostTime; after Wait.</summary>
    public long Met { get; private set; }

    public void Wait(CancellationToken stop) => _complete.Wait(stop);

    /// <summary>The sum or maximum of everybody's value i, in member order from member 0, computed once.</summary>
    public Tensor Reduced(int i, bool max)
    {
        lock (_lock)
        {
            if (!_reduced.TryGetValue(i, out var result))
                _reduced[i] = result = Reduction.Of(this, i, max);
            return result;
        }
    }

    /// <summary>A reader is done; true when it was the last one, and everything is freed.</summary>
    public bool Leave()
    {
        if (Interlocked.Decrement(ref _readers) > 0)
            return false;
        Dispose();
        return true;
    }

    public void Dispose()
    {
        foreach (var parcel in _parcels)
            parcel?.Dispose();
        foreach (var tensor in _reduced.Values)
            tensor.Dispose();
        _complete.Dispose();
    }
}

/// <summary>Sums in member order, in fp32 for bf16, so that every member has the same bits.</summary>
internal static class Reduction
{
    public static Tensor Of(Exchange exchange, int i, bool max)
        => Of([.. Enumerable.Range(0, exchange.Members).Select(member => exchange[member].Tensors[i]!)], max);

    /// <summary>The sum or maximum of tensors of one shape.</summary>
    public static Tensor Of(IReadOnlyList<Tensor> parts, bool max)
    {
        var result = parts[0].dtype == ScalarType.BFloat16 ? parts[0].to_type(ScalarType.Float32) : parts[0].clone();
        foreach (var part in parts.Skip(1))
            result = Merged(result, part, max);
        return result;
    }

    /// <summary>The sum of one block of a dim: [block * length, (block + 1) * length).</summary>
    public static Tensor OfBlock(Exchange exchange, int i, int dim, int block, long length)
    {
        Tensor? result = null;
        for (var member = 0; member < exchange.Members; member++)
        {
            using var part = exchange[member].Tensors[i]!.narrow(dim, block * length, length);
            if (result is null)
            {
                result = empty(part.shape, dtype: part.dtype == ScalarType.BFloat16 ? ScalarType.Float32 : part.dtype, device: part.device);
                result.copy_(part).On(result);
            }
            else
                result = Merged(result, part, false);
        }

        return result!;
    }

    private static Tensor Merged(Tensor result, Tensor value, bool max)
    {
        if (!max)
        {
            result.add_(value, Scalars.One).On(result);
            return result;
        }

        using var old = result;
        using var wide = value.dtype == result.dtype ? value.alias() : value.to_type(result.dtype);
        return maximum(old, wide);
    }
}
