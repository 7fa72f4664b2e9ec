// What collectives on GPUs are made of: calls of NCCL, streams, events and copies. Tests put memory of the processor in their place.
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>
/// Calls of one rank on its device. Communicators, streams and events are handles; stream 0 is the one that LibTorch and our kernels
/// work on. What is given to a stream happens there in order, and no call but Join, Split and Close waits for other ranks, except the
/// first one that connects two of them.
/// </summary>
internal interface INcclCalls
{
    /// <summary>Makes the rank's device the calling thread's own.</summary>
    void Enter();

    /// <summary>What all ranks of a communicator must have to find each other.</summary>
    byte[] NewId();

    /// <summary>The communicator of `ranks` ranks that have one id; waits for all of them.</summary>
    nint Join(byte[] id, int ranks, int rank);

    /// <summary>The part of a communicator whose ranks gave one color, in the order of their keys; color -1: none, 0. All its ranks call it.</summary>
    nint Split(nint communicator, int color, int key);

    /// <summary>Ends a communicator after its work; all its ranks call it.</summary>
    void Close(nint communicator);

    /// <summary>Ends a communicator and what it is doing, whatever other ranks do; on any thread.</summary>
    void Abort(nint communicator);

    /// <summary>What went wrong in a communicator since; null: nothing. On any thread.</summary>
    string? Fault(nint communicator);

    /// <summary>The calls up to End are one: their order does not matter to each other.</summary>
    void Begin();

    void End();

    /// <summary>Sum or maximum of `count` elements of everybody; `to` may be `from`.</summary>
    void AllReduce(nint communicator, nint from, nint to, long count, ScalarType type, bool max, nint stream);

    /// <summary>The sum of everybody's block `rank`, of `count` elements.</summary>
    void ReduceScatter(nint communicator, nint from, nint to, long count, ScalarType type, nint stream);

    /// <summary>Everybody's `bytes` bytes, one behind the other.</summary>
    void AllGather(nint communicator, nint from, nint to, long bytes, nint stream);

    /// <summary>To the rank `peer` of the communicator, which calls Receive; the calls between two ranks pair up in order.</summary>
    void Send(nint communicator, nint from, long bytes, int peer, nint stream);

    void Receive(nint communicator, nint to, long bytes, int peer, nint stream);

    /// <summary>Bytes of this device's memory to another place in it.</summary>
    void Copy(nint from, nint to, long bytes, nint stream);

    /// <summary>Bytes of this device's memory to memory of the processor that Pinned gave.</summary>
    void ToHost(nint from, nint to, long bytes, nint stream);

    /// <summary>Work of our own behind what a stream was given; `work` gets the stream on which the device does it.</summary>
    void Then(nint stream, System.Action<nint> work);

    /// <summary>Work on rows of tokens.</summary>
    IRowWork Rows { get; }

    /// <summary>Memory of the processor that ToHost writes to; it is never given back.</summary>
    nint Pinned(long bytes);

    /// <summary>A stream that works beside stream 0.</summary>
    nint NewStream();

    /// <summary>Where the device does what is queued on a stream: itself, or 0 where ranks take turns on stream 0.</summary>
    nint Where(nint stream);

    nint NewEvent();

    /// <summary>Puts an event behind what a stream was given.</summary>
    void Record(nint @event, nint stream);

    /// <summary>What a stream is given from now on waits for an event as it was recorded last.</summary>
    void Follow(nint stream, nint @event);

    /// <summary>Has everything before an event happened? On any thread that has entered the device.</summary>
    bool IsDone(nint @event);
}
