// Records a traced step of a rank: when each launch ran, and from when to when each collective was under way.
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Telemetry;

namespace DeepSeekGraph.Runtime.Execution;

/// <summary>
/// Told by the executor of every instruction. A collective that works on streams says itself when it did; of others, the lane is taken
/// from the begin of Start to the end of Wait, but not the time between the meeting of all members and the begin of Wait.
/// </summary>
internal sealed class StepRecorder(StageInstructions code, IReadOnlyList<Group> groups, IStepClock clock) : IDisposable
{
    private DateTime _begin;
    private long _hostBegin;
    private long _first;
    private long _last;
    private readonly List<Noted> _noted = [];
    private readonly Dictionary<(Frame Frame, int Token), Flight> _flying = [];
    private Instruction[] _steps = [];
    private Action _action;
    private Frame? _frame;
    private long _mark;
    private long _host;

    /// <summary>Marks that an instruction takes at most.</summary>
    public static int Marks(Instruction instruction)
        => instruction switch
        {
            Instruction.Launch => 2,
            Instruction.Start => 6,
            _ => 1,
        };

    /// <summary>Of the collective that starts.</summary>
    public CollectiveTimes? Times { get; private set; }

    /// <summary>The traced step begins; what was noted before counts as far as it is still under way.</summary>
    public void BeginStep() => (_begin, _hostBegin, _first) = (DateTime.UtcNow, HostTime.Now, clock.Mark(0));

    /// <summary>The traced step is over, on a GPU once it has come here. What is under way then is the next one's.</summary>
    public void EndStep() => _last = clock.Mark(0);

    public void Dispose() => clock.Dispose();

    /// <summary>A program begins.</summary>
    public void Enter(int program, Action action, Frame frame) => (_steps, _action, _frame) = (code.Programs[program], action, frame);

    /// <summary>A step of the program begins.</summary>
    public void Begin(int step)
    {
        switch (_steps[step])
        {
            case Instruction.Launch launch:
                // what it waits for is no part of it
                foreach (var input in launch.Inputs)
                    _frame!.Slots[input].Settle();
                _mark = clock.Mark(0);
                break;
            case Instruction.Start:
                Times = new CollectiveTimes(clock, clock.Mark(0));
                break;
            case Instruction.Wait:
                _host = HostTime.Now;
                break;
        }
    }

    /// <summary>A step of the program is over: launched, on a GPU.</summary>
    public void End(int step)
    {
        switch (_steps[step])
        {
            case Instruction.Launch launch:
                Add(new Noted(TraceLane.Compute, launch.Id, _mark, clock.Mark(0), _action, launch.Path)
                {
                    Bytes = Bytes(launch.Inputs) + Bytes(launch.Outputs),
                });
                break;
            case Instruction.Start start:
                {
                    var flight = new Flight(start, _action, Times!, Bytes(start.Inputs));
                    Times = null;
                    if (start.Kind.IsSend && flight.Times.Begun is null)
                        Add(flight, _action, TraceLane.Communication, "", flight.Times.Before, clock.Mark(0));
                    _flying[(_frame!, start.Token)] = flight;
                    break;
                }

            case Instruction.Wait wait:
                if (_flying.Remove((_frame!, wait.Token), out var done))
                    Waited(done);
                break;
        }
    }

    /// <summary>All of it, once the device has finished.</summary>
    public StepTrace ToTrace(int rank, long step, string device)
    {
        var from = clock.Since(_first);
        var length = clock.Since(_last) - from;
        var events = new List<TraceEvent>(_noted.Count);
        var words = new Dictionary<object, string>();
        foreach (var one in _noted)
        {
            var isHost = one.Lane == TraceLane.Host && !clock.IsHost;
            var begin = isHost ? HostTime.Nanoseconds(_hostBegin, one.Begin) : clock.Since(one.Begin) - from;
            var end = isHost ? HostTime.Nanoseconds(_hostBegin, one.End) : clock.Since(one.End) - from;

            // of the step before, or of nothing but the next
            if (end <= 0 || begin >= length)
                continue;
            (begin, end) = (Math.Max(0, begin), Math.Min(length, end));
            if (!words.TryGetValue(one.Kind, out var kind))
                words[one.Kind] = kind = Word(one.Kind);
            events.Add(new TraceEvent(one.Lane, kind + one.Part, begin, Math.Max(begin, end))
            {
                Kind = kind,
                Path = one.Path,
                Program = one.Action.Name,
                Microbatch = one.Action.Phase.IsOnce ? null : one.Action.Microbatch,
                Bytes = one.Bytes,
                Group = one.Group,
            });
        }

        // of two events that begin at once, the one noted first comes first
        return new StepTrace(rank, step, device, _begin, length, [.. events.OrderBy(e => e.Begin)]);
    }

    private void Waited(Flight flight)
    {
        var times = flight.Times;
        if (times is { Begun: { } begun, Ended: { } ended })
        {
            if (times.Packed is { } packed)
                Add(flight, flight.Action, TraceLane.Compute, " (pack)", times.Before, packed);
            Add(flight, flight.Action, TraceLane.Communication, "", begun, ended);
            foreach (var (begin, end) in times.HostWaits)
                Add(flight, _action, TraceLane.Host, " (wait)", begin, end);
            if (times.Join is var (joins, joined))
                Add(flight, _action, TraceLane.Compute, " (join)", joins, joined);
            return;
        }

        if (flight.Start.Kind.IsSend)
            return;
        Add(flight, _action, TraceLane.Host, " (wait)", _host, HostTime.Now);
        var over = clock.Mark(0);
        if (clock.IsHost && times.Met is { } met && met < _host)
        {
            Add(flight, flight.Action, TraceLane.Communication, "", times.Before, Math.Max(met, times.Before));
            Add(flight, _action, TraceLane.Communication, " (finish)", _host, over);
        }
        else
            Add(flight, flight.Action, TraceLane.Communication, "", times.Before, over);
    }

    private void Add(Flight flight, Action action, TraceLane lane, string part, long begin, long end)
        => Add(new Noted(lane, flight.Start.Kind, begin, end, action, flight.Start.Path)
        {
            Part = part,
            Bytes = flight.Bytes,
            Group = groups[flight.Start.Group].Name,
        });

    private void Add(Noted noted) => _noted.Add(noted);

    private long Bytes(int[] places) => places.Sum(place => _frame!.Slots[place].Bytes);

    /// <summary>A kernel, or a collective without its dims or stage; F# takes more than 100 us for the text of one, which is not to be in the step.</summary>
    private static string Word(object kind) => kind.ToString()!.Split(' ')[0];

    private sealed record Flight(Instruction.Start Start, Action Action, CollectiveTimes Times, long Bytes);

    /// <summary>Marks of the clock; HostTime for the lane Host. `Kind`: a kernel or a collective.</summary>
    private sealed record Noted(TraceLane Lane, object Kind, long Begin, long End, Action Action, string Path)
    {
        public string Part { get; init; } = "";

        public long Bytes { get; init; }

        public string Group { get; init; } = "";
    }
}
