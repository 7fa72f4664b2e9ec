// One instance of a slot: a tensor or a row set, and the bytes it holds.
using DeepSeekGraph.Runtime.Cuda;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Memory;

/// <summary>A cell that a kernel reads or fills; owned by one rank. Storage is always contiguous.</summary>
public sealed class SlotValue : IDisposable
{
    private readonly MemoryMeter? _meter;
    private readonly Device? _device;
    private Tensor? _tensor;
    private RowSet? _rows;
    private DeviceRows? _deviceRows;
    private long _bytes;
    private bool _zero;
    private System.Action? _arriving;

    /// <summary>`device`: where the storage lies; null: in the memory of the processor.</summary>
    public SlotValue(SlotInfo info, MemoryMeter? meter = null, Device? device = null)
    {
        Info = info;
        _meter = meter;
        _device = device;
        ScalarType = info.DType.ToScalarType();
    }

    /// <summary>True for a value of a microbatch that one step reads and no other: that step may take over its storage.</summary>
    public bool ReadOnce { get; init; }

    /// <summary>The slot this is an instance of.</summary>
    public SlotInfo Info { get; }

    /// <summary>Element type of the slot.</summary>
    public ScalarType ScalarType { get; }

    /// <summary>True once something was written.</summary>
    public bool IsSet => _tensor is not null || _rows is not null || _deviceRows is not null;

    /// <summary>The tensor; an error when the slot was never written.</summary>
    public Tensor Tensor
    {
        get
        {
            var tensor = _tensor ?? throw new InvalidOperationException($"slot {Info.Name} holds no tensor");
            Settle();
            if (_zero)
                tensor.zero_().On(tensor);
            _zero = false;
            return tensor;
        }
    }

    /// <summary>The row set; an error when the slot holds none.</summary>
    public RowSet Rows
        => _rows ?? (_device is null ? _deviceRows?.OnHost() : null) ?? throw new InvalidOperationException($"slot {Info.Name} holds no row set");

    /// <summary>The row set as collectives of GPUs have it; an error when the slot holds none.</summary>
    public DeviceRows DeviceRows
        => _deviceRows ??= _rows is { } rows ? DeviceRows.Of(rows) : throw new InvalidOperationException($"slot {Info.Name} holds no row set of a GPU");

    /// <summary>True when the value is a row set.</summary>
    public bool HoldsRows => _rows is not null || _deviceRows is not null;

    /// <summary>Bytes held now.</summary>
    internal long Bytes => _bytes;

    /// <summary>Where the storage lies.</summary>
    public Device Device => _device ?? CPU;

    /// <summary>
    /// Something still fills the storage: whoever touches it next calls `settle` first, which makes the device wait for it. A parameter
    /// that is gathered at the end of a step arrives while the next one begins.
    /// </summary>
    internal void ArriveBy(System.Action settle)
    {
        Settle();
        _arriving = settle;
    }

    /// <summary>Makes the device wait for what still fills the storage.</summary>
    internal void Settle()
    {
        var settle = _arriving;
        _arriving = null;
        settle?.Invoke();
    }

    /// <summary>Says that the storage is all zero without writing it: whoever reads it next, or adds to it, makes that true.</summary>
    public void SetZero()
    {
        _ = Fill();
        _zero = true;
    }

    /// <summary>The storage to add to. `fresh`: it counts as zero but holds anything, and the first sum must overwrite it whole.</summary>
    public Tensor ToAddTo(out bool fresh)
    {
        fresh = _zero;
        _zero = false;
        return Tensor;
    }

    /// <summary>The storage dim of a logical dim: routed values store (batch, seq, expert) as one.</summary>
    public int StorageDim(int dim) => !Info.Routed ? dim : Math.Max(0, dim - 2);

    /// <summary>The storage to fill, of the slot's extents; `rows` for the first dim of routed values. Contents are undefined.</summary>
    public Tensor Fill(int rows = -1)
    {
        Settle();
        _zero = false;
        if (!Info.Routed && _tensor is { } ready)
            return ready;
        var shape = Shape(rows);
        if (_tensor is { } old && old.shape.AsSpan().SequenceEqual(shape))
            return old;
        Set(empty(shape, dtype: ScalarType, device: _device), null);
        return _tensor!;
    }

    /// <summary>The storage of a slot whose shape is that of `like` (routed values take its rows).</summary>
    public Tensor FillLike(Tensor like) => Fill(Info.Routed ? (int)like.shape[0] : -1);

    /// <summary>
    /// Adds a value to an accumulator that counts as zero by exchanging their storage; false where that cannot be. The value's
    /// slot then holds anything.
    /// </summary>
    public bool TakeFirst(SlotValue value)
    {
        if (!_zero || !value.ReadOnce || value.ScalarType != ScalarType || value._tensor is null || Info.Routed || value.Info.Routed)
            return false;
        Settle();
        value.Settle();
        (_tensor, value._tensor) = (value._tensor, _tensor);
        _zero = false;
        return true;
    }

    /// <summary>Takes over the storage of a value that nobody else reads, which then holds nothing; false where that cannot be.</summary>
    public bool TakeOver(SlotValue value)
    {
        if (!value.ReadOnce || IsPersistent || value.ScalarType != ScalarType || value._tensor is not { } tensor
            || Info.Routed || value.Info.Routed || !value.Info.Extents.SequenceEqual(Info.Extents))
            return false;
        value.Settle();
        value._tensor = null;
        value.Set(null, null);
        Set(tensor, null);
        return true;
    }

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

    /// <summary>Takes over a row set of a GPU.</summary>
    public void Adopt(DeviceRows rows)
    {
        Set(null, null);
        _deviceRows = rows;
        _bytes = rows.Bytes;
        _meter?.Change(Info.Kind, _bytes);
    }

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
        Settle();
        _zero = false;
        _deviceRows?.Dispose();
        _deviceRows = null;
        _tensor?.Dispose();
        _tensor = tensor;
        _rows = rows;
        var bytes = tensor?.ByteCount() ?? rows?.Bytes ?? 0;
        _meter?.Change(Info.Kind, bytes - _bytes);
        _bytes = bytes;
    }
}
