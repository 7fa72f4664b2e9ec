// Watches a rank's communicators: faults and collectives that do not end stop the job, and a stopped job ends what the GPU waits for.
using System.Globalization;
using DeepSeekGraph.Runtime.Launch;
using TorchSharp;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>What collectives know of their job.</summary>
internal sealed record NcclJob(int Ranks, CancellationToken Stop)
{
    /// <summary>Environment variable with the seconds after which a collective counts as one that does not end.</summary>
    public const string TimeoutVariable = "DSG_NCCL_TIMEOUT";

    /// <summary>May there be fused dispatches? Then each exchange of counts says how many tokens go where.</summary>
    public bool Dispatches { get; init; } = true;

    /// <summary>Where this rank's tensors are; null: the processor's memory.</summary>
    public torch.Device? Device { get; init; }

    /// <summary>Stops the job with an error.</summary>
    public Action<Exception> Abort { get; init; } = static _ => { };

    /// <summary>What stopped it.</summary>
    public Func<Exception?> FirstError { get; init; } = static () => null;

    /// <summary>What the rank does, for messages.</summary>
    public Func<string> Whereabouts { get; init; } = static () => "";

    /// <summary>Where the flight record goes when the job fails.</summary>
    public Action<string> Tell { get; init; } = Console.Error.WriteLine;

    /// <summary>So long others have to say better what happened.</summary>
    public TimeSpan Grace { get; init; } = 3 * Patience.Beat;

    public TimeSpan Timeout { get; init; } = TimeoutOf(Environment.GetEnvironmentVariable(TimeoutVariable));

    /// <summary>600 seconds where nothing is said; DSG0902 for what is no number of seconds.</summary>
    public static TimeSpan TimeoutOf(string? text)
        => string.IsNullOrEmpty(text) ? TimeSpan.FromSeconds(600)
            : int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out var seconds) && seconds > 0 ? TimeSpan.FromSeconds(seconds)
                : throw DiagnosticException.Of(
                    Codes.OptionValue, TimeoutVariable, $"'{text}' is no number of seconds", $"set {TimeoutVariable} to 1 or more, or leave it out for 600");
}

/// <summary>A thread that looks twice a second; Dispose ends the communicators.</summary>
internal sealed class NcclWatch : IDisposable
{
    private static readonly TimeSpan s_interval = TimeSpan.FromSeconds(0.5);

    private readonly INcclCalls _nccl;
    private readonly int _rank;
    private readonly NcclJob _job;
    private readonly FlightRecord _record;
    private readonly Func<IEnumerable<Flight>> _unfinished;
    private readonly Lock _calls;
    private readonly ManualResetEventSlim _ended = new();
    private readonly ManualResetEventSlim _aborted = new();
    private readonly CancellationTokenRegistration _onStop;
    private volatile IReadOnlyList<nint> _communicators = [];
    private int _isAborting;
    private Thread? _thread;

    /// <summary>`unfinished` is asked under the lock `calls`, which whoever calls NCCL holds.</summary>
    public NcclWatch(INcclCalls nccl, int rank, NcclJob job, FlightRecord record, Func<IEnumerable<Flight>> unfinished, Lock calls)
    {
        (_nccl, _rank, _job, _record, _unfinished, _calls) = (nccl, rank, job, record, unfinished, calls);
        _onStop = job.Stop.Register(BeginAbort);
    }

    /// <summary>Begins to watch.</summary>
    public void Over(IReadOnlyList<nint> communicators)
    {
        _communicators = [.. communicators];
        _thread = Sockets.Start("nccl watch", Watch);
    }

    public void Dispose()
    {
        _onStop.Dispose();
        _ended.Set();
        _thread?.Join();
        if (_job.Stop.IsCancellationRequested)
        {
            // it may be stopping just now, and this registration gone before its turn came
            BeginAbort();
            _aborted.Wait(Patience.Farewell);
            return;
        }

        // splits before the world that they are of; a peer that died meanwhile must not hold this process up
        var close = Begin("nccl close", () =>
        {
            try
            {
                _nccl.Enter();
                foreach (var communicator in _communicators)
                    _nccl.Close(communicator);
            }
            catch (InvalidOperationException e)
            {
                _job.Tell($"rank {_rank}: {e.Message}");
            }
        });
        close.Join(Patience.Farewell);
    }

    private void Watch()
    {
        try
        {
            _nccl.Enter();
            while (!_ended.Wait(s_interval) && !_job.Stop.IsCancellationRequested)
            {
                if (Look() is { } error && !_job.Stop.WaitHandle.WaitOne(_job.Grace))
                    _job.Abort(error);
            }
        }
        catch (InvalidOperationException e)
        {
            if (!_job.Stop.WaitHandle.WaitOne(_job.Grace))
                _job.Abort(Fault(e.Message));
        }
    }

    /// <summary>What is wrong now; null: nothing.</summary>
    private DiagnosticException? Look()
    {
        // a call that connects ranks holds the lock until they are there: then only the job's stop helps
        if (!_calls.TryEnter(s_interval))
            return null;
        try
        {
            if (_job.Stop.IsCancellationRequested)
                return null;
            foreach (var communicator in _communicators)
            {
                if (_nccl.Fault(communicator) is { } fault)
                    return Fault(fault);
            }

            return _unfinished().FirstOrDefault(flight => flight.Age > _job.Timeout) is { } late
                ? DiagnosticException.Of(
                    Codes.NcclTimeout,
                    Place,
                    $"{late.What}, number {late.Number} of this rank, has not ended for {_job.Timeout.TotalSeconds} s",
                    $"see in the records of all ranks which of them did not come; {NcclJob.TimeoutVariable} waits longer")
                : null;
        }
        finally
        {
            _calls.Exit();
        }
    }

    private DiagnosticException Fault(string what)
        => DiagnosticException.Of(
            Codes.NcclFault, Place, what, "look at the GPUs and links of this node and its peers (nvidia-smi, dmesg); NCCL_DEBUG=INFO says more");

    private string Place => _job.Whereabouts() is { Length: > 0 } where ? $"rank {_rank}, {where}" : $"rank {_rank}";

    /// <summary>A thread with the stack that NCCL expects.</summary>
    private static Thread Begin(string name, ThreadStart work)
    {
        var thread = new Thread(work, 8 << 20) { IsBackground = true, Name = name };
        thread.Start();
        return thread;
    }

    /// <summary>Once, on a thread of its own: the one who stops the job has others to tell.</summary>
    private void BeginAbort()
    {
        if (Interlocked.Exchange(ref _isAborting, 1) == 0)
            Sockets.Start("nccl abort", AbortAll);
    }

    /// <summary>
    /// Frees the GPU from what will never come, so that the rank's thread comes back from waiting for it. Each communicator on a thread of
    /// its own: one may wait for another's work.
    /// </summary>
    private void AbortAll()
    {
        try
        {
            if (_job.FirstError() is not (null or OperationCanceledException))
                _job.Tell(_record.Text(_rank));
            // whoever is inside NCCL is let out by the abort, where he does not come out by himself
            var held = _calls.TryEnter(Patience.Beat);
            try
            {
                Thread[] aborts = [.. _communicators.Select(communicator => Begin("nccl abort", () =>
                {
                    try
                    {
                        _nccl.Enter();
                        _nccl.Abort(communicator);
                    }
                    catch (InvalidOperationException e)
                    {
                        _job.Tell($"rank {_rank}: {e.Message}");
                    }
                }))];
                foreach (var abort in aborts)
                    abort.Join(Patience.Farewell / aborts.Length);
            }
            finally
            {
                if (held)
                    _calls.Exit();
            }
        }
        finally
        {
            _aborted.Set();
        }
    }
}
