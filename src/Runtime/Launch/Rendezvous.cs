// Where the processes of a job meet: the address of rank 0, the token they know each other by, and rank 0's open port.
using System.Buffers.Binary;
using System.Net;
using System.Net.Sockets;
using System.Security.Cryptography;
using System.Text;

namespace DeepSeekGraph.Runtime.Launch;

/// <summary>`Listener` is rank 0's; null elsewhere.</summary>
internal sealed record Rendezvous(IPEndPoint Master, byte[] Token, Socket? Listener)
{
    private const int TokenBytes = 32, AddressBytes = 256;

    /// <summary>As MASTER_ADDR and MASTER_PORT, or what stands for them, say. DSG0864.</summary>
    public static Rendezvous Of(LaunchEnvironment launch)
    {
        var master = new IPEndPoint(AddressOf(launch), launch.MasterPort);
        return new Rendezvous(master, launch.Token, launch.Rank == 0 ? ListenAt(master) : null);
    }

    /// <summary>MPI is there already: rank 0 tells the others an address, a free port and a token that nobody else knows.</summary>
    public static Rendezvous Of(LaunchEnvironment launch, MpiLibrary mpi)
    {
        var told = new byte[TokenBytes + sizeof(int) + AddressBytes];
        Socket? listener = null;
        if (launch.Rank == 0)
        {
            var name = launch.MasterAddress.Length > 0 ? launch.MasterAddress
                : launch.LocalSize == launch.WorldSize ? "127.0.0.1"
                : Dns.GetHostName();
            listener = ListenAt(new IPEndPoint(AddressOf(launch with { MasterAddress = name }), launch.MasterPort));
            RandomNumberGenerator.Fill(told.AsSpan(0, TokenBytes));
            BinaryPrimitives.WriteInt32LittleEndian(told.AsSpan(TokenBytes), ((IPEndPoint)listener.LocalEndPoint!).Port);
            Encoding.UTF8.GetBytes(name, told.AsSpan(TokenBytes + sizeof(int)));
        }

        mpi.Broadcast(told);
        var address = Encoding.UTF8.GetString(told.AsSpan(TokenBytes + sizeof(int))).TrimEnd('\0');
        var port = BinaryPrimitives.ReadInt32LittleEndian(told.AsSpan(TokenBytes));
        return new Rendezvous(new IPEndPoint(AddressOf(launch with { MasterAddress = address }), port), told[..TokenBytes], listener);
    }

    private static Socket ListenAt(IPEndPoint master)
    {
        try
        {
            return Sockets.Listen(Sockets.Inside(master.Address), master.Port, 1024);
        }
        catch (SocketException e)
        {
            throw DiagnosticException.Of(
                Codes.Rendezvous, $"{master}", $"rank 0 cannot listen there: {e.Message}", "choose another MASTER_PORT, one that is free on its node");
        }
    }

    private static IPAddress AddressOf(LaunchEnvironment launch)
    {
        var name = launch.MasterAddress;
        try
        {
            return LookUp(name) ?? (launch.Form == LaunchForm.Slurm && SlurmNodes.AddressOf(name) is { } known ? LookUp(known) : null)
                ?? throw new SocketException((int)SocketError.HostNotFound);
        }
        catch (SocketException e)
        {
            throw DiagnosticException.Of(
                Codes.Rendezvous,
                $"MASTER_ADDR {name}",
                $"the address of rank 0's node is not known here: {e.Message}",
                "give a name that every node can look up, or an IP address, in MASTER_ADDR");
        }
    }

    private static IPAddress? LookUp(string name)
    {
        try
        {
            var found = Dns.GetHostAddresses(name);
            return found.FirstOrDefault(a => a.AddressFamily == AddressFamily.InterNetwork) ?? found.FirstOrDefault();
        }
        catch (Exception e) when (e is SocketException or ArgumentException)
        {
            return null;
        }
    }
}
