// Connections between processes of a job, with a time limit on everything that waits.
using System.Net;
using System.Net.Sockets;

namespace DeepSeekGraph.Runtime.Launch;

/// <summary>How long a process waits for others.</summary>
internal static class Patience
{
    /// <summary>Environment variable with the seconds that processes have to find each other.</summary>
    public const string RendezvousVariable = "DSG_RENDEZVOUS_SECONDS";

    /// <summary>Of a handshake.</summary>
    public static readonly TimeSpan Handshake = TimeSpan.FromSeconds(10);

    /// <summary>Between two signs of life.</summary>
    public static readonly TimeSpan Beat = TimeSpan.FromSeconds(1);

    /// <summary>Without a sign of life from a process, it is gone.</summary>
    public static readonly TimeSpan Silence = TimeSpan.FromSeconds(25);

    /// <summary>For what is on the way when the job ends.</summary>
    public static readonly TimeSpan Farewell = TimeSpan.FromSeconds(10);

    /// <summary>Until all processes have come.</summary>
    public static TimeSpan Rendezvous
        => TimeSpan.FromSeconds(
            int.TryParse(Environment.GetEnvironmentVariable(RendezvousVariable), out var seconds) && seconds > 0 ? seconds : 120);
}

internal static class Sockets
{
    /// <summary>Listens where the others can come from: on this machine only, where they are all on it.</summary>
    public static Socket Listen(IPAddress from, int port, int backlog)
    {
        var socket = new Socket(from.AddressFamily, SocketType.Stream, ProtocolType.Tcp);
        try
        {
            // the port of a job that has just ended may be used again
            socket.SetSocketOption(SocketOptionLevel.Socket, SocketOptionName.ReuseAddress, true);
            socket.Bind(new IPEndPoint(from, port));
            socket.Listen(backlog);
            return socket;
        }
        catch
        {
            socket.Dispose();
            throw;
        }
    }

    /// <summary>The address to listen on for others that come by `address`.</summary>
    public static IPAddress Inside(IPAddress address)
        => IPAddress.IsLoopback(address) ? address : address.AddressFamily == AddressFamily.InterNetworkV6 ? IPAddress.IPv6Any : IPAddress.Any;

    /// <summary>Connects, or throws SocketException; waits no longer than a handshake may take.</summary>
    public static Socket Connect(IPEndPoint to)
    {
        var socket = new Socket(to.AddressFamily, SocketType.Stream, ProtocolType.Tcp);
        try
        {
            using var late = new CancellationTokenSource(Patience.Handshake);
            socket.ConnectAsync(to, late.Token).AsTask().GetAwaiter().GetResult();
            Prepare(socket);
            return socket;
        }
        catch (OperationCanceledException)
        {
            socket.Dispose();
            throw new SocketException((int)SocketError.TimedOut);
        }
        catch
        {
            socket.Dispose();
            throw;
        }
    }

    /// <summary>Until the handshake is over, nothing waits longer than it may take.</summary>
    public static void Prepare(Socket socket)
    {
        socket.NoDelay = true;
        socket.ReceiveTimeout = socket.SendTimeout = (int)Patience.Handshake.TotalMilliseconds;
    }

    /// <summary>A thread that does not keep the process alive.</summary>
    public static Thread Start(string name, ThreadStart work)
    {
        var thread = new Thread(work, 1 << 18) { IsBackground = true, Name = name };
        thread.Start();
        return thread;
    }
}
