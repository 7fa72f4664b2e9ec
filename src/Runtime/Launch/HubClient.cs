// A process's end of the hub: joins, meets the others, hears of what ends the job, and says every second that it is still here.
using System.Diagnostics;
using System.Net;
using System.Net.Sockets;

namespace DeepSeekGraph.Runtime.Launch;

/// <summary>One for each process. `faulted` is called once for every fault that the hub tells, on a thread of its own.</summary>
internal sealed class HubClient : IDisposable
{
    private readonly int _rank;
    private readonly IPEndPoint _hub;
    private readonly NetworkStream _stream;
    private readonly System.Action<Fault> _faulted;
    private readonly Dictionary<(string Topic, long Number), Meeting> _meetings = [];
    private readonly Dictionary<string, long> _next = new(StringComparer.Ordinal);
    private readonly Lock _sending = new();
    private readonly object _changed = new();
    private readonly CancellationTokenSource _closed = new();
    private readonly Thread _beats;
    private IPEndPoint[]? _addresses;
    private Fault? _end;
    private bool _toldFault;
    private long _heard = Stopwatch.GetTimestamp();

    private HubClient(int rank, IPEndPoint hub, NetworkStream stream, System.Action<Fault> faulted)
    {
        (_rank, _hub, _stream, _faulted) = (rank, hub, stream, faulted);
        Sockets.Start("control", Read);
        _beats = Sockets.Start("heartbeat", Beat);
    }

    /// <summary>What this process does and for which rank it waits, for the beats.</summary>
    public Func<(string Where, int WaitingFor)> Whereabouts { get; set; } = static () => ("", -1);

    /// <summary>Was the job's fault told by the hub, so that process 0 knows it?</summary>
    public bool HubKnowsFault
    {
        get
        {
            lock (_changed)
                return _toldFault;
        }
    }

    /// <summary>Connects until the hub is there, joins and waits for everybody; then the addresses for messages are known.</summary>
    /// <exception cref="DiagnosticException">DSG0864 where the hub does not come or refuses; any fault of the job before it began.</exception>
    public static HubClient Join(
        int rank, int size, string version, byte[] token, IPEndPoint hub, int port, System.Action<Fault> faulted)
    {
        var begin = Stopwatch.GetTimestamp();
        while (true)
        {
            try
            {
                var socket = Sockets.Connect(hub);
                var stream = new NetworkStream(socket, ownsSocket: true);
                if (!Handshake.Present(stream, token, Purpose.Control, rank))
                {
                    stream.Dispose();
                    throw Failed(
                        hub, "it refused this process: what it proved of the job's token is wrong",
                        "another job listens there: choose another MASTER_PORT, or give all processes one DSG_JOB_TOKEN");
                }

                socket.ReceiveTimeout = 0;
                Frames.Write(stream, FrameKind.Join, Packing.Pack(writer =>
                {
                    writer.Write(size);
                    writer.Write(version);
                    writer.Write(port);
                }));
                return new HubClient(rank, hub, stream, faulted);
            }
            catch (Exception e) when (e is SocketException or IOException)
            {
                if (Stopwatch.GetElapsedTime(begin) > Patience.Rendezvous)
                {
                    throw Failed(
                        hub, $"rank 0 did not answer within {Patience.Rendezvous.TotalSeconds} s: {e.Message}",
                        $"start rank 0, and see that MASTER_ADDR and MASTER_PORT lead to it; {Patience.RendezvousVariable} waits longer");
                }

                Thread.Sleep(50);
            }
        }
    }

    /// <summary>Where every rank takes messages, once all have joined; StoppedException where the job ends before.</summary>
    public IPEndPoint[] Addresses()
    {
        lock (_changed)
        {
            while (_addresses is null)
            {
                if (_end is not null)
                    throw new Collectives.StoppedException("the job ended before it began");
                Monitor.Wait(_changed);
            }

            return _addresses;
        }
    }

    /// <summary>IWorld.Meet.</summary>
    public byte[] Meet(string topic, byte[] mine, Func<IReadOnlyList<byte[]>, byte[]> decide, CancellationToken stop)
    {
        var meeting = new Meeting();
        (string, long) key;
        lock (_changed)
        {
            var number = _next.GetValueOrDefault(topic);
            _next[topic] = number + 1;
            key = (topic, number);
            _meetings[key] = meeting;
        }

        Send(FrameKind.Give, Packing.Pack(writer =>
        {
            Write(writer, key);
            writer.WriteBlob(mine);
        }));
        using var woken = stop.UnsafeRegister(static client => ((HubClient)client!).Wake(), this);
        try
        {
            if (_rank != 0)
                return WaitFor(meeting, static m => m.Answer, stop);
            var answer = decide(WaitFor(meeting, static m => m.Gathered, stop));
            Send(FrameKind.Answer, Packing.Pack(writer =>
            {
                Write(writer, key);
                writer.WriteBlob(answer);
            }));
            return answer;
        }
        finally
        {
            lock (_changed)
                _meetings.Remove(key);
        }
    }

    /// <summary>Tells the hub what ends the job, and waits a moment for it to know.</summary>
    public void Tell(Fault fault)
    {
        Send(FrameKind.Fault, fault.ToBytes());
        var begin = Stopwatch.GetTimestamp();
        lock (_changed)
        {
            while (!_toldFault && _end is null && Stopwatch.GetElapsedTime(begin) < Patience.Farewell)
                Monitor.Wait(_changed, Patience.Beat);
        }
    }

    public void Dispose()
    {
        if (_closed.IsCancellationRequested)
            return;
        Send(FrameKind.Bye, []);
        Drop();
    }

    /// <summary>Closes the connection without a word, as the system does for a process that is killed.</summary>
    public void Drop()
    {
        _closed.Cancel();
        _stream.Dispose();
        _beats.Join();
    }

    private static void Write(BinaryWriter writer, (string Topic, long Number) key)
    {
        writer.Write(key.Topic);
        writer.Write(key.Number);
    }

    private static DiagnosticException Failed(IPEndPoint hub, string what, string help)
        => DiagnosticException.Of(Codes.Rendezvous, $"{hub}", what, help);

    private T WaitFor<T>(Meeting meeting, Func<Meeting, T?> of, CancellationToken stop)
        where T : class
    {
        lock (_changed)
        {
            while (true)
            {
                if (of(meeting) is { } there)
                    return there;
                if (meeting.Broken || stop.IsCancellationRequested || _end is { IsCancellation: false })
                    throw new Collectives.StoppedException("another rank stopped the job");
                Monitor.Wait(_changed);
            }
        }
    }

    private void Wake()
    {
        lock (_changed)
            Monitor.PulseAll(_changed);
    }

    /// <summary>Who cannot be reached is found gone by the reader.</summary>
    private void Send(FrameKind kind, byte[] bytes)
    {
        lock (_sending)
        {
            try
            {
                Frames.Write(_stream, kind, bytes);
            }
            catch (Exception e) when (e is IOException or ObjectDisposedException)
            {
            }
        }
    }

    private void Read()
    {
        string how;
        try
        {
            while (Frames.Read(_stream) is var (kind, bytes))
            {
                Volatile.Write(ref _heard, Stopwatch.GetTimestamp());
                Take(kind, bytes);
            }

            how = "its process ended without a word";
        }
        catch (Exception e) when (e is IOException or InvalidDataException or ObjectDisposedException)
        {
            how = e.Message;
        }

        Lost(how);
    }

    private void Take(FrameKind kind, byte[] bytes)
    {
        switch (kind)
        {
            case FrameKind.Welcome:
                var addresses = Packing.Unpack(bytes, reader =>
                {
                    var all = new IPEndPoint[reader.ReadCount()];
                    for (var i = 0; i < all.Length; i++)
                        all[i] = new IPEndPoint(IPAddress.Parse(reader.ReadString()), reader.ReadInt32());
                    return all;
                });
                lock (_changed)
                {
                    _addresses = addresses;
                    Monitor.PulseAll(_changed);
                }

                break;
            case FrameKind.Gathered:
                Packing.Unpack(bytes, reader =>
                {
                    var key = (reader.ReadString(), reader.ReadInt64());
                    var all = new byte[reader.ReadCount()][];
                    for (var i = 0; i < all.Length; i++)
                        all[i] = reader.ReadBlob();
                    return Change(key, meeting => meeting.Gathered = all);
                });
                break;
            case FrameKind.Answer:
                Packing.Unpack(bytes, reader =>
                {
                    var key = (reader.ReadString(), reader.ReadInt64());
                    var answer = reader.ReadBlob();
                    return Change(key, meeting => meeting.Answer = answer);
                });
                break;
            case FrameKind.Broken:
                Packing.Unpack(bytes, reader => Change((reader.ReadString(), reader.ReadInt64()), meeting => meeting.Broken = true));
                break;
            case FrameKind.Fault:
                End(Fault.Read(bytes), true);
                break;
            case FrameKind.Beat:
                break;
            default:
                throw new InvalidDataException($"a frame {kind} from the hub");
        }
    }

    private bool Change((string, long) key, System.Action<Meeting> change)
    {
        lock (_changed)
        {
            if (_meetings.TryGetValue(key, out var meeting))
                change(meeting);
            Monitor.PulseAll(_changed);
        }

        return true;
    }

    /// <summary>The world knows the fault before anybody who waits here is woken, so that the error they end with is it.</summary>
    private void End(Fault fault, bool told)
    {
        lock (_changed)
            _toldFault |= told;
        _faulted(fault);
        lock (_changed)
        {
            if (_end is null or { IsCancellation: true })
                _end = fault;
            Monitor.PulseAll(_changed);
        }
    }

    /// <summary>Without its hub a job cannot go on.</summary>
    private void Lost(string how)
    {
        lock (_changed)
        {
            if (_closed.IsCancellationRequested || _end is { IsCancellation: false })
                return;
        }

        var (where, waiting) = Whereabouts();
        var at = where.Length == 0 ? "" : $"; rank {_rank} was at {where}" + (waiting >= 0 ? $", waiting for rank {waiting}" : "");
        End(
            new Fault(0, [new Diagnostic(
                Codes.RankGone,
                $"rank 0 at {_hub}",
                $"rank 0 is gone: {how}{at}",
                "look at that rank's own output and its machine's log (out of memory, a signal); --resume goes on from the last checkpoint")], ""),
            false);
    }

    private void Beat()
    {
        while (!_closed.Token.WaitHandle.WaitOne(Patience.Beat))
        {
            var (where, waiting) = Whereabouts();
            Send(FrameKind.Beat, Packing.Pack(writer =>
            {
                writer.Write(where);
                writer.Write(waiting);
            }));
            if (Stopwatch.GetElapsedTime(Volatile.Read(ref _heard)) > Patience.Silence)
                Lost($"nothing was heard of it for {Patience.Silence.TotalSeconds} s");
        }
    }

    private sealed class Meeting
    {
        public IReadOnlyList<byte[]>? Gathered { get; set; }

        public byte[]? Answer { get; set; }

        public bool Broken { get; set; }
    }
}
