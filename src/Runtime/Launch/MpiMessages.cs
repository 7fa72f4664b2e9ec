// Messages over MPI: a header, then the elements of its tensors, each a message of its own; nothing blocks.
using System.Runtime.InteropServices;
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Memory;

namespace DeepSeekGraph.Runtime.Launch;

/// <summary>
/// MPI moves data while it is called: a rank that waits calls it all the time, and a thread once a millisecond, so that a rank that computes
/// holds nobody up.
/// </summary>
internal sealed unsafe partial class MpiMessages : IMessages
{
    private const int HeaderTag = 1, ElementsTag = 2, AnySource = -1;
    private const int Most = 1 << 30;

    /// <summary>Fruitless looks before a rank that waits gives its core away.</summary>
    private const int Looks = 100;
    private const uint NapMicroseconds = 50;

    private readonly MpiLibrary _mpi;
    private readonly Inbox _inbox = new();
    private readonly List<Outgoing> _outgoing = [];
    private readonly List<Incoming> _incoming = [];
    private readonly CancellationTokenSource _closed = new();
    private readonly Thread _thread;
    private readonly System.Action<Exception> _broken;
    private volatile int _waitingFor = -1;

    /// <summary>`broken` is told where MPI fails behind the rank's back.</summary>
    public MpiMessages(MpiLibrary mpi, System.Action<Exception> broken)
    {
        (_mpi, _broken) = (mpi, broken);
        _thread = Sockets.Start("mpi", Progress);
    }

    /// <summary>Did the job end well, so that MPI can be closed down together?</summary>
    public Func<bool> EndedWell { get; init; } = static () => true;

    public int WaitingFor => _waitingFor;

    public void Send(int to, MessageKey key, Parcel parcel)
    {
        var header = ParcelBytes.Header(key, parcel);
        var memory = (byte*)NativeMemory.Alloc((nuint)header.Length);
        header.CopyTo(new Span<byte>(memory, header.Length));
        var outgoing = new Outgoing((nint)memory, parcel);
        lock (_mpi.Lock)
        {
            Post(memory, header.Length, HeaderTag);
            foreach (var tensor in parcel.Tensors)
            {
                var bytes = tensor?.ByteCount() ?? 0;
                for (long at = 0; at < bytes; at += Most)
                    Post((byte*)tensor!.Pointer() + at, (int)Math.Min(Most, bytes - at), ElementsTag);
            }

            _outgoing.Add(outgoing);
        }

        void Post(byte* data, int length, int tag)
        {
            nint request;
            MpiLibrary.Require(MpiLibrary.MPI_Isend(data, length, _mpi.Byte, to, tag, _mpi.World, &request));
            outgoing.Requests.Add(request);
        }
    }

    public Parcel Receive(int from, MessageKey key, CancellationToken stop)
    {
        Parcel? parcel = null;
        _waitingFor = from;
        Until(() => (parcel = _inbox.TryTake(from, key)) is not null, stop);
        _waitingFor = -1;
        return parcel!;
    }

    /// <summary>Moves messages until something holds; StoppedException when the job stops before.</summary>
    public void Until(Func<bool> holds, CancellationToken stop)
    {
        for (var looks = 0; !holds(); looks++)
        {
            if (stop.IsCancellationRequested)
                throw new StoppedException("another rank stopped the job");
            lock (_mpi.Lock)
                Move();
            if (looks < Looks)
                Thread.Yield();
            else
                _ = usleep(NapMicroseconds);
        }
    }

    /// <summary>What was sent goes out first; then all ranks close MPI down together, unless the job broke off.</summary>
    public void Dispose()
    {
        var begin = System.Diagnostics.Stopwatch.GetTimestamp();
        while (EndedWell() && _outgoing.Count > 0 && System.Diagnostics.Stopwatch.GetElapsedTime(begin) < Patience.Farewell)
        {
            lock (_mpi.Lock)
                Move();
            Thread.Yield();
        }

        _closed.Cancel();
        _thread.Join();
        _inbox.Dispose();
        if (EndedWell())
            MpiLibrary.Require(MpiLibrary.MPI_Finalize());
    }

    private void Progress()
    {
        try
        {
            while (!_closed.Token.WaitHandle.WaitOne(1))
            {
                lock (_mpi.Lock)
                    Move();
            }
        }
        catch (Exception e) when (e is DiagnosticException or InvalidDataException)
        {
            _broken(e);
        }
    }

    /// <summary>Ends what is done and begins what has come; the caller holds the lock.</summary>
    private void Move()
    {
        _outgoing.RemoveAll(static outgoing =>
        {
            if (!AreDone(outgoing.Requests))
                return false;
            NativeMemory.Free((void*)outgoing.Header);
            outgoing.Parcel.Dispose();
            return true;
        });
        while (Accept())
        {
        }

        // in the order in which they came; two of one sender may end out of order
        _incoming.RemoveAll(incoming =>
        {
            if (!AreDone(incoming.Requests))
                return false;
            _inbox.Put(incoming.From, incoming.Key, incoming.Parcel);
            return true;
        });
    }

    /// <summary>Takes a header, if one has come, and makes room for what follows it.</summary>
    private bool Accept()
    {
        int there, length;
        MpiLibrary.Status status;
        MpiLibrary.Require(MpiLibrary.MPI_Iprobe(AnySource, HeaderTag, _mpi.World, &there, &status));
        if (there == 0)
            return false;
        MpiLibrary.Require(MpiLibrary.MPI_Get_count(&status, _mpi.Byte, &length));
        var header = new byte[length];
        fixed (byte* data = header)
            MpiLibrary.Require(MpiLibrary.MPI_Recv(data, length, _mpi.Byte, status.Source, HeaderTag, _mpi.World, null));
        var (key, parcel) = ParcelBytes.Read(header);
        var incoming = new Incoming(status.Source, key, parcel);
        foreach (var tensor in parcel.Tensors)
        {
            var bytes = tensor?.ByteCount() ?? 0;
            for (long at = 0; at < bytes; at += Most)
            {
                nint request;
                MpiLibrary.Require(MpiLibrary.MPI_Irecv(
                    (byte*)tensor!.Pointer() + at, (int)Math.Min(Most, bytes - at), _mpi.Byte, status.Source, ElementsTag, _mpi.World, &request));
                incoming.Requests.Add(request);
            }
        }

        _incoming.Add(incoming);
        return true;
    }

    private static bool AreDone(List<nint> requests)
    {
        for (var i = requests.Count - 1; i >= 0; i--)
        {
            var request = requests[i];
            if (!MpiLibrary.IsDone(ref request))
                return false;
            requests.RemoveAt(i);
        }

        return true;
    }

    [LibraryImport("libc")]
    private static partial int usleep(uint microseconds);

    private sealed record Outgoing(nint Header, Parcel Parcel)
    {
        public List<nint> Requests { get; } = [];
    }

    private sealed record Incoming(int From, MessageKey Key, Parcel Parcel)
    {
        public List<nint> Requests { get; } = [];
    }
}
