// One collective of a rank as it is put together: what is copied, what goes into one group of NCCL's calls, and what is done behind it.
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>Filled by the layouts of dense values and of rows; tensors named here stay alive until the collective is over.</summary>
internal sealed class NcclLaunch : IDisposable
{
    private readonly List<Tensor> _held = [];
    private readonly List<(RowMoves Moves, MovedRows Before, MovedRows Behind)> _moved = [];

    /// <summary>Calls that need no group, before it: copies to the rank itself, and to staging memory.</summary>
    public List<System.Action<nint>> Copies { get; } = [];

    /// <summary>Calls of NCCL, all in one group.</summary>
    public List<System.Action<nint>> Group { get; } = [];

    /// <summary>Calls of a second group behind the first; of a receiver, once its host has read what the first brought.</summary>
    public List<System.Action<nint>> Second { get; } = [];

    /// <summary>Fills the second group from what came to the host; null where nothing depends on that.</summary>
    public System.Action? Rest { get; set; }

    /// <summary>Work behind the groups on the collective's own stream: rows that came together to their places.</summary>
    public List<System.Action<nint>> Behind { get; } = [];

    /// <summary>Copies to the processor behind the group; the host waits for the collective when there is one.</summary>
    public List<System.Action<nint>> ToHost { get; } = [];

    /// <summary>Work on stream 0 once it has waited.</summary>
    public List<System.Action> After { get; } = [];

    /// <summary>Was something copied together for it on stream 0?</summary>
    public bool IsPacked { get; set; }

    /// <summary>Bytes that the rank brings.</summary>
    public long Bytes { get; private set; }

    /// <summary>The address of a value of a slot, whose memory may be given back before the collective is over.</summary>
    public nint Read(Tensor value)
    {
        Bytes += value.ByteCount();
        return Own(value.alias());
    }

    /// <summary>The address of a tensor that is nobody else's.</summary>
    public nint Own(Tensor value)
    {
        _held.Add(value);
        return Address(value);
    }

    /// <summary>Rows that are moved before the group and behind it; a bundle's, if they go alike, by one kernel.</summary>
    public void Move(RowMoves moves, MovedRows before, MovedRows behind) => _moved.Add((moves, before, behind));

    /// <summary>Once everything was put together: queues what moves rows.</summary>
    public void QueueMoves(INcclCalls nccl)
    {
        foreach (var alike in _moved.Where(moved => moved.Moves.Tables is not null).GroupBy(moved => moved.Moves))
        {
            var (moves, tables) = (alike.Key, Own(alike.Key.Tables!.alias()));
            foreach (var some in alike.Chunk(MovedRows.AtOnce))
            {
                MovedRows[] before = [.. some.Select(moved => moved.Before)], behind = [.. some.Select(moved => moved.Behind)];
                if (moves.Before.Rows > 0)
                    Copies.Add(stream => nccl.Rows.Move(tables, moves.Before, before, nccl.Where(stream)));
                if (moves.Behind.Rows > 0)
                    Behind.Add(stream => nccl.Then(stream, on => nccl.Rows.Move(tables, moves.Behind, behind, on)));
            }
        }

        _moved.Clear();
    }

    /// <summary>The address of what a slot holds until the end.</summary>
    public static unsafe nint Address(Tensor value) => (nint)value.Pointer();

    public void Dispose()
    {
        foreach (var tensor in _held)
            tensor.Dispose();
        _held.Clear();
    }
}
