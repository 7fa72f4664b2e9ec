// The meeting place of all processes of a job, in process 0: who is there, what they hand in, and who is gone.
using System.Diagnostics;
using System.Net;
using System.Net.Sockets;

namespace DeepSeekGraph.Runtime.Launch;

/// <summary>Serves one connection of each process, its own process's too, until all have said good-bye. The first fault goes to all.</summary>
internal sealed class Hub : IDisposable
{
    private readonly Socket _listener;
    private readonly int _size;
    private readonly string _version;
    private readonly byte[] _token;
    private readonly HubConnection?[] _connections;
    private readonly Dictionary<(string Topic, long Number), byte[]?[]> _open = [];
    private readonly Lock _lock = new();
    private readonly CancellationTokenSource _closed = new();
    private readonly ManualResetEventSlim _cancelled = new();
    private readonly long _begin = Stopwatch.GetTimestamp();
    private readonly Thread _watch;
    private int _joined;
    private int _left;
    private Fault? _fault;

    /// <summary>Serves at once. `listener` is open; all processes must be of `version`.</summary>
    public Hub(Socket listener, int size, string version, byte[] token)
    {
        (_listener, _size, _version, _token) = (listener, size, version, token);
        _connections = new HubConnection?[size];
        Sockets.Start("hub", AcceptAll);
        _watch = Sockets.Start("hub watch", Watch);
    }

    /// <summary>Waits until all have left, but not for ever, and closes.</summary>
    public void Dispose()
    {
        var begin = Stopwatch.GetTimestamp();
        while (Volatile.Read(ref _left) < Volatile.Read(ref _joined) && Stopwatch.GetElapsedTime(begin) < Patience.Farewell)
            Thread.Sleep(5);
        _closed.Cancel();
        _listener.Dispose();
        _watch.Join();
        foreach (var connection in _connections)
            connection?.Dispose();
    }

    private void AcceptAll()
    {
        while (!_closed.IsCancellationRequested)
        {
            try
            {
                var socket = _listener.Accept();
                Sockets.Start("hub connection", () => Serve(socket));
            }
            catch (SocketException) when (!_closed.IsCancellationRequested)
            {
                // that one did not stay; the next may
                Thread.Sleep(10);
            }
            catch (Exception e) when (e is SocketException or ObjectDisposedException)
            {
                return;
            }
        }
    }

    /// <summary>One connection from its handshake to its end. A stranger's mistakes end nothing but its own connection.</summary>
    private void Serve(Socket socket)
    {
        HubConnection? connection = null;
        try
        {
            Sockets.Prepare(socket);
            using var stream = new NetworkStream(socket, ownsSocket: true);
            if (Handshake.Accept(stream, _token) is not { Purpose: Purpose.Control, Rank: var rank }
                || Frames.Read(stream) is not (FrameKind.Join, var join))
                return;
            socket.ReceiveTimeout = 0;
            connection = Joined(rank, stream, socket, join);
            while (connection is not null && Frames.Read(stream) is var (kind, bytes))
            {
                connection.Heard();
                if (kind == FrameKind.Bye)
                {
                    connection.SaidBye = true;
                    break;
                }

                Take(connection, kind, bytes);
            }
        }
        catch (Exception e) when (e is IOException or InvalidDataException or SocketException or ObjectDisposedException)
        {
            // what it means is decided below
        }

        if (connection is not null)
            Ended(connection);
    }

    private HubConnection? Joined(int rank, NetworkStream stream, Socket socket, byte[] join)
    {
        var (size, version, port) = Packing.Unpack(join, reader => (reader.ReadInt32(), reader.ReadString(), reader.ReadInt32()));
        var from = ((IPEndPoint)socket.RemoteEndPoint!).Address;
        var connection = new HubConnection(rank, stream, new IPEndPoint(from, port));
        if (rank < 0 || rank >= _size || size != _size)
            Differ(connection, $"rank {rank} says that the job has {size} processes, rank 0 says {_size}", "start all processes with one world size");
        else if (version != _version)
            Differ(connection, $"rank {rank} runs dsg {version}, rank 0 runs dsg {_version}", "use one version of dsg on all nodes");
        else
        {
            lock (_lock)
            {
                if (_connections[rank] is null)
                {
                    _connections[rank] = connection;
                    _joined++;
                    if (_fault is not null)
                        connection.Send(FrameKind.Fault, _fault.ToBytes());
                    else if (_joined == _size)
                        Welcome();
                    return connection;
                }
            }

            Differ(connection, $"two processes say that they are rank {rank}", "give each process a rank of its own");
        }

        return null;
    }

    /// <summary>Of one who is not let in: told, and all others too.</summary>
    private void Differ(HubConnection connection, string message, string help)
    {
        var fault = new Fault(0, [new Diagnostic(Codes.RanksDiffer, "rendezvous", message, help)], "");
        connection.Send(FrameKind.Fault, fault.ToBytes());
        End(fault);
    }

    private void Welcome()
    {
        var addresses = Packing.Pack(writer =>
        {
            writer.Write(_size);
            foreach (var connection in _connections)
            {
                writer.Write(connection!.Messages.Address.ToString());
                writer.Write(connection.Messages.Port);
            }
        });
        Tell(FrameKind.Welcome, addresses);
    }

    private void Take(HubConnection from, FrameKind kind, byte[] bytes)
    {
        switch (kind)
        {
            case FrameKind.Beat:
                (from.Where, from.WaitingFor) = Packing.Unpack(bytes, reader => (reader.ReadString(), reader.ReadInt32()));
                break;
            case FrameKind.Give:
                Give(from.Rank, bytes);
                break;
            case FrameKind.Answer when from.Rank == 0:
                Tell(FrameKind.Answer, bytes);
                break;
            case FrameKind.Fault:
                End(Fault.Read(bytes));
                break;
            default:
                throw new InvalidDataException($"a frame {kind} from rank {from.Rank}");
        }
    }

    private void Give(int rank, byte[] bytes)
    {
        var (topic, number, given) = Packing.Unpack(bytes, reader => (reader.ReadString(), reader.ReadInt64(), reader.ReadBlob()));
        lock (_lock)
        {
            if (!_open.TryGetValue((topic, number), out var all))
                _open[(topic, number)] = all = new byte[_size][];
            all[rank] = given;
            if (Array.TrueForAll(all, one => one is not null))
            {
                _open.Remove((topic, number));
                _connections[0]!.Send(FrameKind.Gathered, Packing.Pack(writer =>
                {
                    writer.Write(topic);
                    writer.Write(number);
                    writer.Write(all.Length);
                    foreach (var one in all)
                        writer.WriteBlob(one!);
                }));
            }
            else
                BreakHopeless();
        }
    }

    /// <summary>Meetings that lack one who has left never will be whole.</summary>
    private void BreakHopeless()
    {
        foreach (var (key, all) in _open.ToArray())
        {
            if (!_connections.Any(connection => connection is { HasLeft: true } && all[connection.Rank] is null))
                continue;
            _open.Remove(key);
            Tell(FrameKind.Broken, Packing.Pack(writer =>
            {
                writer.Write(key.Topic);
                writer.Write(key.Number);
            }));
        }
    }

    /// <summary>After a good-bye nothing is wrong; without, the process is gone, and all hear why before meetings without it end.</summary>
    private void Ended(HubConnection connection)
    {
        if (!connection.SaidBye && _fault is null && !_closed.IsCancellationRequested)
        {
            // until those that miss it have said so, unless its launcher is ending them already
            _cancelled.Wait(Patience.Beat + (Patience.Beat / 4));
            Gone(connection, "its process ended without a word");
        }

        lock (_lock)
            Leave(connection);
    }

    /// <summary>Nothing more is expected of it; the caller holds the lock.</summary>
    private void Leave(HubConnection connection)
    {
        if (connection.HasLeft)
            return;
        connection.HasLeft = true;
        _left++;
        BreakHopeless();
    }

    private void Gone(HubConnection lost, string how)
    {
        string[] waiting = [.. _connections.OfType<HubConnection>()
            .Where(c => c.WaitingFor == lost.Rank && c != lost)
            .Take(3)
            .Select(c => $"rank {c.Rank} waits for it at {c.Where}")];
        if (waiting.Length == 0 && _connections[0] is { Where.Length: > 0 } first && first != lost)
            waiting = [$"rank 0 was at {first.Where}"];
        End(new Fault(0, [new Diagnostic(
            Codes.RankGone,
            $"rank {lost.Rank}{(lost.Where.Length > 0 ? $", {lost.Where}" : "")}",
            string.Join("; ", waiting.Prepend($"rank {lost.Rank} is gone: {how}")),
            "look at that rank's own output and its machine's log (out of memory, a signal); --resume goes on from the last checkpoint")], ""));
    }

    /// <summary>The first fault goes to everybody; a rank that is gone behind a stop by signal is no news.</summary>
    private void End(Fault fault)
    {
        lock (_lock)
        {
            if (_fault is not null && (!_fault.IsCancellation || fault.IsCancellation))
                return;
            _fault = fault;
            if (fault.IsCancellation)
                _cancelled.Set();
        }

        Tell(FrameKind.Fault, fault.ToBytes());
    }

    private void Tell(FrameKind kind, byte[] bytes)
    {
        foreach (var connection in _connections)
            connection?.Send(kind, bytes);
    }

    /// <summary>A sign of life to all every second; whoever gives none for long is gone, and who does not come in time is missed.</summary>
    private void Watch()
    {
        while (!_closed.Token.WaitHandle.WaitOne(Patience.Beat))
        {
            Tell(FrameKind.Beat, []);
            if (_joined < _size && Stopwatch.GetElapsedTime(_begin) > Patience.Rendezvous && _fault is null)
            {
                var missing = string.Join(", ", Enumerable.Range(0, _size).Where(rank => _connections[rank] is null).Take(20));
                End(new Fault(0, [new Diagnostic(
                    Codes.Rendezvous,
                    "rendezvous",
                    $"{_joined} of {_size} processes came within {Patience.Rendezvous.TotalSeconds} s; missing are ranks {missing}",
                    $"start all processes; {Patience.RendezvousVariable} gives slow ones more time")], ""));
            }

            foreach (var connection in _connections)
            {
                if (connection is not { HasLeft: false } || connection.Silence < Patience.Silence)
                    continue;
                if (_fault is null)
                    Gone(connection, $"nothing was heard of it for {Patience.Silence.TotalSeconds} s");
                lock (_lock)
                    Leave(connection);
            }
        }
    }
}

/// <summary>The hub's end of one process.</summary>
internal sealed class HubConnection(int rank, NetworkStream stream, IPEndPoint messages) : IDisposable
{
    private readonly Lock _sending = new();
    private long _heard = Stopwatch.GetTimestamp();

    public int Rank => rank;

    /// <summary>Where the process takes messages.</summary>
    public IPEndPoint Messages => messages;

    /// <summary>What the process was doing when it last said so.</summary>
    public string Where { get; set; } = "";

    /// <summary>The rank it then waited for; -1 for none.</summary>
    public int WaitingFor { get; set; } = -1;

    public bool SaidBye { get; set; }

    public bool HasLeft { get; set; }

    public TimeSpan Silence => Stopwatch.GetElapsedTime(Volatile.Read(ref _heard));

    public void Heard() => Volatile.Write(ref _heard, Stopwatch.GetTimestamp());

    /// <summary>Who cannot be told is gone, which its own reader finds.</summary>
    public void Send(FrameKind kind, byte[] bytes)
    {
        lock (_sending)
        {
            try
            {
                Frames.Write(stream, kind, bytes);
            }
            catch (Exception e) when (e is IOException or ObjectDisposedException)
            {
                stream.Socket.Dispose();
            }
        }
    }

    public void Dispose() => stream.Dispose();
}
