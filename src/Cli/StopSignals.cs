// Ctrl-C and SIGTERM: the first one ends the run with its results, the second one kills.

using System.Diagnostics;
using System.Runtime.InteropServices;

namespace DeepSeekGraph.Cli;

/// Before Arm a signal ends the process at once, since nothing is written yet.
internal sealed class StopSignals : IDisposable
{
    private readonly CancellationTokenSource _stop = new();
    private readonly PosixSignalRegistration[] _registrations;
    private int _exitCode;
    private volatile bool _armed;

    public StopSignals() => _registrations =
    [
        PosixSignalRegistration.Create(PosixSignal.SIGINT, context => Handle(context, ExitCode.Interrupted)),
        PosixSignalRegistration.Create(PosixSignal.SIGTERM, context => Handle(context, ExitCode.Terminated)),
    ];

    public CancellationToken Token => _stop.Token;

    /// That of the signal; 0 when there was none.
    public int ExitCodeOfSignal => Volatile.Read(ref _exitCode);

    /// From now on there are results to save.
    public void Arm() => _armed = true;

    public void Dispose()
    {
        foreach (var registration in _registrations)
            registration.Dispose();
        _stop.Dispose();
    }

    private void Handle(PosixSignalContext context, int exitCode)
    {
        context.Cancel = true;
        if (!_armed)
        {
            Console.Error.WriteLine("\nstopped before the first step; nothing was written");
            Environment.Exit(exitCode);
        }

        if (Interlocked.CompareExchange(ref _exitCode, exitCode, 0) != 0)
        {
            using var self = Process.GetCurrentProcess();
            self.Kill();
        }

        // not here: the cancelled work would run on the thread that waits for the second signal
        ThreadPool.UnsafeQueueUserWorkItem(static stop => stop.Cancel(), _stop, preferLocal: false);
    }
}
