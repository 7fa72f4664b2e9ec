// Messages over TCP: a connection from each sender to each receiver, made when the first message goes that way.
using System.Buffers.Binary;
using System.Collections.Concurrent;
using System.Net;
using System.Net.Sockets;
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Memory;
using DeepSeekGraph.Runtime.Native;

namespace DeepSeekGraph.Runtime.Launch;

/// <summary>A thread sends to each peer, another one takes what comes from it, so that Send never waits for the receiver.</summary>
internal sealed unsafe class TcpMessages : IMessages
{
    private const int Part = 1 << 20;

    private readonly int _rank;
    private readonly byte[] _token;
    private readonly Socket _listener;
    private readonly IPEndPoint[] _addresses;
    private readonly System.Action<int, Exception> _broken;
    private readonly Inbox _inbox = new();
    private readonly Dictionary<int, Outgoing> _outgoing = [];
    private readonly ConcurrentBag<Socket> _incoming = [];
    private volatile bool _closed;
    private volatile int _waitingFor = -1;

    /// <summary>Takes the open listener over. `broken` is told of a peer whose connection fails; it may be called on any thread.</summary>
    public TcpMessages(int rank, byte[] token, Socket listener, IPEndPoint[] addresses, System.Action<int, Exception> broken)
    {
        (_rank, _token, _listener, _addresses, _broken) = (rank, token, listener, addresses, broken);
        LibTorch.Load();
        Sockets.Start("messages", AcceptAll);
    }

    public int WaitingFor => _waitingFor;

    public void Send(int to, MessageKey key, Parcel parcel)
    {
        if (!_outgoing.TryGetValue(to, out var outgoing))
            _outgoing[to] = outgoing = new Outgoing(this, to);
        outgoing.Queue.Add((key, parcel));
    }

    public Parcel Receive(int from, MessageKey key, CancellationToken stop)
    {
        if (_inbox.TryTake(from, key) is { } there)
            return there;
        _waitingFor = from;
        var parcel = _inbox.Take(from, key, stop);
        _waitingFor = -1;
        return parcel;
    }

    /// <summary>What was sent goes out first, where the peers still take it.</summary>
    public void Dispose()
    {
        foreach (var outgoing in _outgoing.Values)
            outgoing.Queue.CompleteAdding();
        foreach (var outgoing in _outgoing.Values)
            outgoing.Thread.Join(Patience.Farewell);
        _closed = true;
        _listener.Dispose();
        foreach (var socket in _incoming)
            socket.Dispose();
        _inbox.Dispose();
    }

    private void AcceptAll()
    {
        while (!_closed)
        {
            try
            {
                var socket = _listener.Accept();
                _incoming.Add(socket);
                Sockets.Start("receiver", () => ReceiveAll(socket));
            }
            catch (SocketException) when (!_closed)
            {
                Thread.Sleep(10);
            }
            catch (Exception e) when (e is SocketException or ObjectDisposedException)
            {
                return;
            }
        }
    }

    private void ReceiveAll(Socket socket)
    {
        var from = -1;
        try
        {
            Sockets.Prepare(socket);
            using var stream = new NetworkStream(socket, ownsSocket: true);
            if (Handshake.Accept(stream, _token) is not { Purpose: Purpose.Messages, Rank: var rank } || rank < 0 || rank >= _addresses.Length)
                return;
            from = rank;
            socket.ReceiveTimeout = 0;
            var head = new byte[sizeof(int)];
            while (stream.ReadAtLeast(head, head.Length, throwOnEndOfStream: false) is var got and > 0)
            {
                var length = BinaryPrimitives.ReadInt32LittleEndian(head);
                if (got < head.Length || length is < 0 or > ParcelBytes.MostHeader)
                    throw new InvalidDataException($"a message with a header of {length} bytes");
                var header = new byte[length];
                stream.ReadExactly(header);
                var (key, parcel) = ParcelBytes.Read(header);
                ReadElements(stream, parcel);
                _inbox.Put(from, key, parcel);
            }
        }
        catch (Exception e) when (e is IOException or InvalidDataException or SocketException or ObjectDisposedException or OutOfMemoryException)
        {
            // a stranger, or one who is gone before it says who it is, is nobody's fault
            if (from >= 0 && !_closed)
                _broken(from, e);
        }
    }

    private static void ReadElements(NetworkStream stream, Parcel parcel)
    {
        try
        {
            foreach (var tensor in parcel.Tensors)
            {
                var (start, bytes) = tensor is null ? (0, 0) : ((nint)tensor.Pointer(), tensor.ByteCount());
                for (long at = 0; at < bytes; at += Part)
                    stream.ReadExactly(new Span<byte>((byte*)start + at, (int)Math.Min(Part, bytes - at)));
            }
        }
        catch
        {
            parcel.Dispose();
            throw;
        }
    }

    /// <summary>What goes to one peer, and the thread that sends it.</summary>
    private sealed class Outgoing
    {
        private readonly TcpMessages _messages;
        private readonly int _to;

        public Outgoing(TcpMessages messages, int to)
        {
            (_messages, _to) = (messages, to);
            Thread = Sockets.Start($"sender to {to}", SendAll);
        }

        public BlockingCollection<(MessageKey Key, Parcel Parcel)> Queue { get; } = [];

        public Thread Thread { get; }

        private void SendAll()
        {
            try
            {
                using var socket = Sockets.Connect(_messages._addresses[_to]);
                using var stream = new NetworkStream(socket);
                if (!Handshake.Present(stream, _messages._token, Purpose.Messages, _messages._rank))
                    throw new IOException("the connection is refused");
                socket.SendTimeout = 0;
                var head = new byte[sizeof(int)];
                foreach (var (key, parcel) in Queue.GetConsumingEnumerable())
                {
                    using (parcel)
                    {
                        var header = ParcelBytes.Header(key, parcel);
                        BinaryPrimitives.WriteInt32LittleEndian(head, header.Length);
                        stream.Write([.. head, .. header]);
                        foreach (var tensor in parcel.Tensors)
                        {
                            var (start, bytes) = tensor is null ? (0, 0) : ((nint)tensor.Pointer(), tensor.ByteCount());
                            for (long at = 0; at < bytes; at += Part)
                                stream.Write(new ReadOnlySpan<byte>((byte*)start + at, (int)Math.Min(Part, bytes - at)));
                        }
                    }
                }
            }
            catch (Exception e) when (e is IOException or SocketException or ObjectDisposedException)
            {
                if (!_messages._closed)
                    _messages._broken(_to, e);
                foreach (var (_, parcel) in Queue.GetConsumingEnumerable())
                    parcel.Dispose();
            }
        }
    }
}
