// The processes of a job on this machine, from their start to their end: one that dies ends the others.

using System.Diagnostics;
using System.Globalization;
using System.Net;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using DeepSeekGraph.Runtime.Launch;

namespace DeepSeekGraph.Cli;

internal sealed class LocalJob(int processes, int restarts, string[] command)
{
    private const int Interrupt = 2, Kill = 9, Terminate = 15;

    /// They stop by themselves when one is gone; these are for those that do not.
    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(10), s_afterTerminate = TimeSpan.FromSeconds(5);

    private readonly Lock _output = new();
    private string? _token;
    private Process[] _children = [];
    private int _signal;

    public int Nodes { get; init; } = 1;

    public int Node { get; init; }

    /// Of several nodes, where rank 0 listens.
    public (string Address, int Port)? Master { get; init; }

    /// The exit code of the first process that failed, or of the signal that stopped them.
    public int Run()
    {
        using var interrupted = PosixSignalRegistration.Create(PosixSignal.SIGINT, context => Forward(context, Interrupt));
        using var terminated = PosixSignalRegistration.Create(PosixSignal.SIGTERM, context => Forward(context, Terminate));
        // launchers of several nodes must be given one
        if (Master is null)
            _token = Convert.ToHexStringLower(RandomNumberGenerator.GetBytes(16));
        var folder = Directory.CreateTempSubdirectory("dsg-launch-");
        try
        {
            var record = Path.Combine(folder.FullName, "run.json");
            for (var start = 0; ; start++)
            {
                var (code, failed) = RunOnce(record);
                if (_signal != 0)
                    return 128 + _signal;
                if (code == ExitCode.Ok)
                    return code;
                Console.Error.WriteLine($"launch: {failed}; all {processes} processes have ended");
                if (start == restarts || Launcher.Read(record) is not { } run)
                    return code;
                Console.Error.WriteLine($"launch: starting again ({start + 1} of {restarts}), in {run.Folder}");
            }
        }
        finally
        {
            folder.Delete(recursive: true);
        }
    }

    private (int Code, string Failed) RunOnce(string record)
    {
        var port = Master?.Port ?? FreePort();
        lock (_output)
            _children = [.. Enumerable.Range(0, processes).Select(local => Start(local, port, record))];
        Thread[] pumps =
        [
            .. _children.Select((child, local) => Pump(child.StandardOutput, Console.Out, RankOf(local))),
            .. _children.Select((child, local) => Pump(child.StandardError, Console.Error, RankOf(local))),
        ];
        var ended = WaitForAll();
        foreach (var pump in pumps)
            pump.Join();
        foreach (var child in _children)
            child.Dispose();
        return ended;
    }

    /// The first that fails tells how all ended; the others get time to notice, then signals.
    private (int Code, string Failed) WaitForAll()
    {
        (int Code, string Failed)? first = null;
        var since = 0L;
        var sent = 0;
        while (true)
        {
            var running = 0;
            for (var rank = 0; rank < _children.Length; rank++)
            {
                if (!_children[rank].WaitForExit(0))
                    running++;
                else if (first is null && _children[rank].ExitCode is var code and not ExitCode.Ok)
                    (first, since) = ((code, $"rank {RankOf(rank)} {Words(code)}"), Stopwatch.GetTimestamp());
            }

            if (running == 0)
                return first ?? (ExitCode.Ok, "");
            // told to stop by a signal, the others finish what they save, however long it takes
            if (first is not (null or { Code: ExitCode.Interrupted or ExitCode.Terminated }) && _signal == 0)
            {
                var waited = Stopwatch.GetElapsedTime(since);
                var due = waited > s_patience + s_afterTerminate ? Kill : waited > s_patience ? Terminate : 0;
                if (due != sent)
                    Send(due);
                sent = due;
            }

            Thread.Sleep(20);
        }
    }

    private static string Words(int code) => code > 128 ? $"was ended by signal {code - 128}" : $"ended with exit code {code}";

    private int RankOf(int local) => (Node * processes) + local;

    private Process Start(int local, int port, string record)
    {
        var program = Environment.ProcessPath!;
        // under `dotnet dsg.dll` the program is the host
        string[] host = Path.GetFileNameWithoutExtension(program) == "dotnet" ? [Path.GetFullPath(Environment.GetCommandLineArgs()[0])] : [];
        var info = new ProcessStartInfo(program, [.. host, .. command])
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        foreach (var (name, value) in (ReadOnlySpan<(string, string)>)[
            ("RANK", Text(RankOf(local))),
            ("WORLD_SIZE", Text(Nodes * processes)),
            ("LOCAL_RANK", Text(local)),
            ("LOCAL_WORLD_SIZE", Text(processes)),
            ("MASTER_ADDR", Master?.Address ?? "127.0.0.1"),
            ("MASTER_PORT", Text(port)),
            (Launcher.PidVariable, Text(Environment.ProcessId)),
            (Launcher.RecordVariable, record)])
            info.Environment[name] = value;
        if (_token is not null)
            info.Environment[LaunchEnvironment.TokenVariable] = _token;
        var child = Process.Start(info)!;
        child.StandardInput.Close();
        return child;
    }

    private static string Text(int number) => number.ToString(CultureInfo.InvariantCulture);

    /// Lines go out whole, each behind its rank.
    private Thread Pump(StreamReader from, TextWriter to, int rank)
    {
        var thread = new Thread(() =>
        {
            while (from.ReadLine() is { } line)
            {
                lock (_output)
                    to.WriteLine($"[{rank}] {line}");
            }
        })
        { IsBackground = true };
        thread.Start();
        return thread;
    }

    /// The first signal goes to all processes, which finish what they save; the second kills them.
    private void Forward(PosixSignalContext context, int signal)
    {
        context.Cancel = true;
        Send(Interlocked.CompareExchange(ref _signal, signal, 0) == 0 ? signal : Kill);
    }

    private void Send(int signal)
    {
        lock (_output)
        {
            foreach (var child in _children)
            {
                try
                {
                    if (!child.HasExited)
                        Launcher.Signal(child.Id, signal);
                }
                catch (InvalidOperationException)
                {
                    // it has been disposed meanwhile: it had ended
                }
            }
        }
    }

    private static int FreePort()
    {
        using var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start();
        return ((IPEndPoint)listener.LocalEndpoint).Port;
    }
}
