// The world of a process that runs one rank of a plan: the hub for agreement, messages for collectives, and an end for all when one fails.
using System.Net;
using System.Net.Sockets;
using System.Reflection;
using System.Runtime.ExceptionServices;
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Cuda;
using DeepSeekGraph.Runtime.Kernels;

namespace DeepSeekGraph.Runtime.Launch;

/// <summary>Made by Join, once a process. Dispose says good-bye to the others.</summary>
public sealed class ProcessWorld : IWorld
{
    private readonly CancellationTokenSource _stop = new();
    private readonly Lock _lock = new();
    private readonly Hub? _hub;
    private readonly HubClient _client;
    private readonly IMessages _messages;
    private readonly (MpiLibrary Library, MpiMessages Messages)? _mpi;
    private readonly List<NcclCollectives> _nccl = [];
    private Func<string> _where = static () => "";
    private Exception? _firstError;
    private bool _disposed;

    private ProcessWorld(LaunchEnvironment launch, Rendezvous meeting, string version, MpiLibrary? mpi)
    {
        (Process, Processes, Stop) = (launch.Rank, launch.WorldSize, _stop.Token);
        Socket? listener = null;
        try
        {
            if (meeting.Listener is not null)
                _hub = new Hub(meeting.Listener, Processes, version, meeting.Token);
            listener = Sockets.Listen(Sockets.Inside(meeting.Master.Address), 0, Processes);
            var port = ((IPEndPoint)listener.LocalEndPoint!).Port;
            _client = HubClient.Join(Process, Processes, version, meeting.Token, meeting.Master, port, Faulted);
            _client.Whereabouts = () => (_where(), _messages?.WaitingFor ?? -1);
            var addresses = _client.Addresses();
            if (mpi is null)
                _messages = new TcpMessages(Process, meeting.Token, listener, addresses, Broken);
            else
            {
                listener.Dispose();
                _mpi = (mpi, new MpiMessages(mpi, Abort) { EndedWell = () => FirstError is null });
                _messages = _mpi.Value.Messages;
            }
        }
        catch (Exception e)
        {
            listener?.Dispose();
            var known = Process == 0 || _client is { HubKnowsFault: true };
            _client?.Dispose();
            _hub?.Dispose();
            _disposed = true;
            if (e is StoppedException && _firstError is { } first)
                throw new JobEndedException(first, known);
            throw;
        }
    }

    public int Processes { get; }

    public int Process { get; }

    public CancellationToken Stop { get; }

    public Exception? FirstError => _firstError;

    /// <summary>Is what ended the job known to process 0, so that it says so?</summary>
    public bool IsKnownToAll => Process == 0 || _client.HubKnowsFault;

    public Func<string>? Whereabouts
    {
        set => _where = value ?? (static () => "");
    }

    /// <summary>Finds the others as `launch` says, and waits for them. DSG0864, DSG0862; under mpirun also DSG0867.</summary>
    public static ProcessWorld Join(LaunchEnvironment launch) => Join(launch, VersionOfDsg);

    internal static ProcessWorld Join(LaunchEnvironment launch, string version)
    {
        if (launch.Form != LaunchForm.Mpi)
            return new ProcessWorld(launch, Rendezvous.Of(launch), version, null);
        var mpi = MpiLibrary.Loaded;
        return new ProcessWorld(launch, Rendezvous.Of(launch, mpi), version, mpi);
    }

    /// <summary>An error of a rank as others are told it: a diagnostic names the rank.</summary>
    public static Exception Told(int rank, Exception error) => Fault.Of(rank, error).ToException();

    public bool Owns(int rank) => rank == Process;

    /// <summary>What the host waited for GPUs to tell how many rows of routed tokens come, in all; null without NCCL.</summary>
    public TimeSpan? HostWait => _nccl.Count == 0 ? null : _nccl.Aggregate(TimeSpan.Zero, static (sum, one) => sum + one.HostWait);

    public ICollectives For(RankContext rank, JobShape job, RankDevice? device = null)
        => device is { IsCuda: true } ? Nccl(rank, job, device) : OnHost(rank, job.Groups);

    private NcclCollectives Nccl(RankContext rank, JobShape shape, RankDevice device)
    {
        var job = new NcclJob(Processes, Stop)
        {
            Dispatches = shape.Dispatches,
            Device = device.Torch,
            Abort = Abort,
            FirstError = () => FirstError,
            Whereabouts = () => _where(),
        };
        var made = new NcclCollectives(new NcclCalls(device.Index), rank, shape.Groups, id => Meet("nccl", id, static all => all[0], Stop), job);
        _nccl.Add(made);
        return made;
    }

    private ICollectives OnHost(RankContext rank, IReadOnlyList<Group> groups)
        => _mpi is var (library, messages)
            ? new MpiCollectives(library, messages, rank, groups, Stop)
            : new MessageCollectives(_messages, rank, Stop);

    public byte[] Meet(string topic, byte[] mine, Func<IReadOnlyList<byte[]>, byte[]> decide, CancellationToken stop)
    {
        try
        {
            return _client.Meet(topic, mine, decide, stop);
        }
        catch (StoppedException) when (FirstError is { } first)
        {
            ExceptionDispatchInfo.Throw(first);
            throw;
        }
        catch (Exception e) when (e is not StoppedException)
        {
            Abort(e);
            throw;
        }
    }

    public void Abort(Exception error)
    {
        if (Keep(error))
            _client.Tell(Fault.Of(Process, error));
    }

    public void Dispose()
    {
        lock (_lock)
        {
            if (_disposed)
                return;
            _disposed = true;
        }

        foreach (var one in _nccl)
            one.Dispose();
        _messages.Dispose();
        _client.Dispose();
        _hub?.Dispose();
        _stop.Dispose();
    }

    /// <summary>The version that all processes must have.</summary>
    internal static string VersionOfDsg { get; } =
        typeof(ProcessWorld).Assembly.GetCustomAttribute<AssemblyInformationalVersionAttribute>()?.InformationalVersion ?? "unknown";

    /// <summary>True where it is the first; a rank that is gone says more than the stop by signal that its launcher made of it.</summary>
    private bool Keep(Exception error)
    {
        lock (_lock)
        {
            if (_disposed || (_firstError is not null && (_firstError is not OperationCanceledException || error is OperationCanceledException)))
                return false;
            _firstError = error;
            if (error is not OperationCanceledException)
                EndInTime();
        }

        _stop.Cancel();
        return true;
    }

    private void Faulted(Fault fault)
    {
        lock (_lock)
        {
            if (_disposed)
                return;
        }

        Keep(fault.ToException());
    }

    /// <summary>A peer's connection fails: nearly always since it is gone, which the hub says better, if a little later.</summary>
    private void Broken(int peer, Exception error)
    {
        if (Stop.WaitHandle.WaitOne(3 * Patience.Beat))
            return;
        Abort(DiagnosticException.Of(
            Codes.Rendezvous,
            $"rank {Process}, messages of rank {peer}",
            $"the connection broke while both processes are there: {error.Message.Split('\n')[0]}",
            "look at the network between the two nodes"));
    }

    /// <summary>A process whose job has ended and that does not end is killed, so that it holds nobody up.</summary>
    private void EndInTime()
        => Sockets.Start("end", () =>
        {
            Thread.Sleep(2 * Patience.Farewell);
            lock (_lock)
            {
                if (_disposed)
                    return;
            }

            Console.Error.WriteLine($"rank {Process}: did not stop within {2 * Patience.Farewell.TotalSeconds} s after the job had ended; killed");
            using var self = System.Diagnostics.Process.GetCurrentProcess();
            self.Kill();
        });
}
