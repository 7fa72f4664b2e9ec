// One instance of a slot: a tensor or a row set, and the bytes it holds.
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Memory;

/// <summary>A cell that a kernel reads or fills; owned by one rank. Storage is always contiguous.</summary>
public sealed class SlotValue : IDisposable
{
    private readonly MemoryMeter? _meter;
    private Tensor? _tensor;
    private RowSet? _rows;
    private long _bytes;

    public SlotValue(SlotInfo info, MemoryMeter? meter = null)
    {
        Info = info;
        _meter = meter;
        ScalarType = info.DType.ToScalarType();
    }

    /// <summary>The slot this is an instance of.</summary>
    public SlotInfo Info { get; }

    /// <summary>Element type of the slot.</summary>
    public ScalarType ScalarType { get; }

    /// <summary>True once something was written.</summary>
    public bool IsSet => _tensor is not null || _rows is not null;

    /// <summary>The tensor; an error when the slot was never written.</summary>
    public Tensor Tensor => _tensor ?? throw new InvalidOperationException($"slot {Info.Name} holds no tensor");

    /// <summary>The row set; an error when the slot holds none.</summary>
    public RowSet Rows => _rows ?? throw new InvalidOperationException($"slot {Info.Name} holds no row set");

    /// <summary>True when the value is a row set.</summary>
    public bool HoldsRows => _rows is not null;

    /// <summary>The storage dim of a logical dim: routed values store (batch, seq, expert) as one.</summary>
    public int StorageDim(int dim) => !Info.Routed ? dim : Math.Max(0, dim - 2);

    /// <summary>The storage to fill, of the slot's extents; `rows` for the first dim of routed values. Contents are undefined.</summary>
    public Tensor Fill(int rows = -1)
    {
        if (!Info.Routed && _tensor is { } ready)
            return ready;
        var shape = Shape(rows);
        if (_tensor is { } old && old.shape.AsSpan().SequenceEqual(shape))
            return old;
        Set(empty(shape, dtype: ScalarType), null);
        return _tensor!;
    }

    /// <summary>The storage of a slot whose shape is that of `like` (routed values take its rows).</summary>
    public Tensor FillLike(Tensor like) => Fill(Info.Routed ? (int)like.shape[0] : -1);

    /// <summary>Takes over a result that shares memory with nothing; cast and made contiguous where need be.</summary>
    public void Adopt(Tensor result)
    {
        if (result.dtype != ScalarType || !result.is_contiguous() || (IsPersistent && _tensor is not null))
        {
            AdoptCopy(result);
            result.Dispose();
        }
        else
            Set(result, null);
    }

    /// <summary>Copies (and casts) a value that may share memory with another; the caller keeps it.</summary>
    public void AdoptCopy(Tensor view)
    {
        var target = FillLike(view);
        target.copy_(view).On(target);
    }

    /// <summary>Stores a row set.</summary>
    public void Adopt(RowSet rows) => Set(null, rows);

    /// <summary>Gives the memory back.</summary>
    public void Dispose() => Set(null, null);

    /// <summary>True for slots that live as long as the plan; their storage never moves.</summary>
    public bool IsPersistent => Info.Kind.Tag is SlotKind.Tags.Parameter or SlotKind.Tags.Optimizer
        or SlotKind.Tags.Gradient or SlotKind.Tags.Counter or SlotKind.Tags.Scalar or SlotKind.Tags.Cache;

    private long[] Shape(int rows)
    {
        var extents = Info.Extents;
        if (!Info.Routed)
        {
            var shape = new long[extents.Count];
            for (var i = 0; i < shape.Length; i++)
                shape[i] = extents[i];
            return shape;
        }

        if (rows < 0)
            throw new InvalidOperationException($"slot {Info.Name} is routed; its rows are not known");
        var routed = new long[extents.Count - 2];
        routed[0] = rows;
        for (var i = 3; i < extents.Count; i++)
            routed[i - 2] = extents[i];
        return routed;
    }

    private void Set(Tensor? tensor, RowSet? rows)
    {
        if (ReferenceEquals(tensor, _tensor) && tensor is not null)
            return;
        _tensor?.Dispose();
        _tensor = tensor;
        _rows = rows;
        var bytes = tensor?.ByteCount() ?? rows?.Bytes ?? 0;
        _meter?.Change(Info.Kind, bytes - _bytes);
        _bytes = bytes;
    }
}
