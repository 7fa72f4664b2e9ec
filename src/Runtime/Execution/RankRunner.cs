// Start here: one rank walks its timetable and has an executor run each program over the slots of a microbatch.
using System.Diagnostics;
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Cuda;
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using DeepSeekGraph.Runtime.Telemetry;

namespace DeepSeekGraph.Runtime.Execution;

/// <summary>Fills an input slot of a rank for one microbatch.</summary>
public interface IInputSource
{
    /// <summary>Writes the rank's shard of input `slot` into its tensor.</summary>
    void Fill(SlotInfo slot, RankContext rank, int microbatch, TorchSharp.torch.Tensor target);
}

/// <summary>Runs a stage's plan at one place of the mesh. Belongs to one thread; shares nothing but collectives.</summary>
public sealed class RankRunner : IDisposable
{
    private readonly StageInstructions _instructions;
    private readonly StageCode _code;
    private readonly Dictionary<(Phase Phase, int Chunk), int> _programs = [];
    private readonly Dictionary<string, int> _places = [];
    private readonly int[] _inputs;
    private readonly SlotValue?[] _shared;
    private readonly bool[] _readOnce;
    private readonly HashSet<SlotValue> _lent = [];
    private readonly SortedDictionary<int, Frame> _frames = [];
    private readonly Dictionary<int, int> _lastEntries = [];
    private readonly Stack<Frame> _spare = [];
    private readonly Frame _stepFrame;
    private long _begin;
    private volatile Running? _running;
    private long _ended;

    /// <summary>
    /// Allocates the slots that outlive a step, zeroed, but for parameters and caches that another plan's rank at the same place
    /// already has: those are used, and stay its own. Without `code` the interpreter runs the programs.
    /// </summary>
    public RankRunner(
        PlanSet plan, StagePlan stage, RankContext rank, ICollectives collectives, CancellationToken stop,
        StageCodeFactory? code = null, RankRunner? sharing = null, RankDevice? device = null)
    {
        Device = device ?? RankDevice.Cpu;
        Plan = plan;
        Stage = stage;
        Rank = rank;
        _instructions = new StageInstructions(stage, plan.Groups, Device.Kernels);
        var site = new StageSite(stage, plan.Groups, rank, collectives, Device.Kernels, stop);
        _code = code is null ? new Interpreter(site, _instructions) : code(site);
        for (var i = 0; i < stage.Slots.Count; i++)
            _places[stage.Slots[i].Name] = i;
        for (var i = 0; i < stage.Programs.Count; i++)
            _programs[(stage.Programs[i].Phase, stage.Programs[i].Chunk)] = i;
        for (var i = 0; i < stage.Timetable.Count; i++)
        {
            var action = stage.Timetable[i];
            if (!action.Phase.IsOnce && _programs.ContainsKey(Key(action)))
                _lastEntries[action.Microbatch] = i;
        }

        _inputs = [.. Enumerable.Range(0, stage.Slots.Count).Where(i => stage.Slots[i].Kind.IsInput)];

        _readOnce = ReadOnce();
        var perStep = PerStep();
        _shared = new SlotValue?[stage.Slots.Count];
        var ofStep = new List<SlotValue>();
        for (var i = 0; i < _shared.Length; i++)
        {
            if (sharing?.Lend(stage.Slots[i]) is { } lent)
            {
                _shared[i] = lent;
                _lent.Add(lent);
                continue;
            }

            var value = new SlotValue(stage.Slots[i], Memory, Device.Torch);
            if (value.IsPersistent)
            {
                var tensor = value.Fill();
                tensor.zero_().On(tensor);
            }
            else if (perStep[i])
                ofStep.Add(value);
            else
                continue;
            _shared[i] = value;
        }

        _stepFrame = NewFrame(ofStep);
    }

    public PlanSet Plan { get; }

    public StagePlan Stage { get; }

    public RankContext Rank { get; }

    /// <summary>Where this rank computes.</summary>
    public RankDevice Device { get; }

    /// <summary>Bytes held, by kind, and their peaks.</summary>
    public MemoryMeter Memory { get; } = new();

    /// <summary>When set, expert choices are recorded or replayed.</summary>
    public RoutingTrace? Trace { get; set; }

    /// <summary>When set, time is counted by kernel.</summary>
    public StepProfile? Profile { get; set; }

    /// <summary>When set, called with -1 before a step and with the index of each entry of the timetable behind it.</summary>
    public System.Action<int>? AtBorder { get; set; }

    /// <summary>The step and instruction that runs, in words; may be asked for on any thread, and then lags a little.</summary>
    public string Whereabouts
    {
        get
        {
            if (_running is not { } running)
                return $"the end of step {_ended}";
            var (steps, current) = (_instructions.Programs[running.Program], _code.Current);
            var at = current >= 0 && current < steps.Length ? steps[current] : null;
            var waits = at is Instruction.Wait wait
                ? _instructions.Programs.SelectMany(p => p).OfType<Instruction.Start>().FirstOrDefault(s => s.Token == wait.Token)
                : null;
            return $"step {running.Step}, {running.Action.Name}: "
                + (waits is not null ? $"wait {waits.Text(Stage.Slots, Plan.Groups)["start ".Length..]}" : at?.Text(Stage.Slots, Plan.Groups) ?? "its begin or end");
        }
    }

    /// <summary>Every instance of a slot that holds a value now and does not outlive the step.</summary>
    public IEnumerable<SlotValue> Live => _frames.Values.Append(_stepFrame).SelectMany(frame => frame.Live);

    /// <summary>Every slot that outlives a step, in plan order.</summary>
    public IEnumerable<SlotValue> Persistent => _shared.OfType<SlotValue>().Where(v => v.IsPersistent);

    /// <summary>A slot that outlives a step, by name; null when this stage has none.</summary>
    public SlotValue? Find(string name)
        => _places.TryGetValue(name, out var place) && _shared[place] is { IsPersistent: true } value ? value : null;

    /// <summary>One step: all entries of the timetable, or all but the epilogue and what begins for it. `observe` sees each written slot before it is freed.</summary>
    public void RunStep(long step, IInputSource inputs, bool epilogue = true, System.Action<SlotValue, int>? observe = null)
    {
        var watched = observe is not null || Trace is not null || Profile is not null;
        if (Profile is not null)
            Profile.Steps++;
        try
        {
            AtBorder?.Invoke(-1);
            for (var entry = 0; entry < Stage.Timetable.Count; entry++)
            {
                var action = Stage.Timetable[entry];
                if (((action.Phase.IsEpilogue || action.Phase.IsR) && !epilogue) || !_programs.TryGetValue(Key(action), out var program))
                    continue;
                var frame = FrameOf(action, inputs);
                _code.Watch = watched ? at => Watch(_instructions.Programs[program][at], frame, action.Microbatch, step, observe) : null;
                _code.Recorder?.Enter(program, action, frame);
                Run(program, frame, action, step);
                if (!action.Phase.IsOnce && _lastEntries[action.Microbatch] == entry)
                    Release(action.Microbatch, frame, step);
                AtBorder?.Invoke(entry);
            }

            if (epilogue || _stepFrame.LeftPending > 0)
                CheckNothingLeft("the step", _stepFrame, step);
        }
        finally
        {
            foreach (var frame in _frames.Values)
                frame.Dispose();
            _frames.Clear();
            _stepFrame.Dispose();
            _ended = step;
            _running = null;
        }
    }

    /// <summary>
    /// Waits for the device and begins to record, so that the step before the traced one is known too: what that leaves under way is part
    /// of the traced one's time.
    /// </summary>
    public void BeginTrace()
    {
        var marks = Stage.Timetable.Sum(action => _programs.TryGetValue(Key(action), out var program) ? _instructions.Programs[program].Sum(StepRecorder.Marks) : 0);
        Device.Finish();
        _code.Recorder = new StepRecorder(_instructions, Plan.Groups, Device.IsCuda ? new CudaClock((2 * marks) + 2) : new HostClock());
    }

    /// <summary>One whole step, and when what ran. The device is waited for behind it, never in it.</summary>
    public StepTrace RunTraced(long step, IInputSource inputs)
    {
        if (_code.Recorder is null)
            BeginTrace();
        using var recorder = _code.Recorder!;
        recorder.BeginStep();
        try
        {
            RunStep(step, inputs);
            recorder.EndStep();
            Device.Finish();
        }
        finally
        {
            _code.Recorder = null;
        }

        return recorder.ToTrace(Rank.Rank, step, Device.Name);
    }

    public void Dispose()
    {
        _code.Recorder?.Dispose();
        foreach (var value in Persistent.Where(v => !_lent.Contains(v)))
            value.Dispose();
    }

    /// <summary>The parameter or cache that another plan's slot is too; null where there is none of the name.</summary>
    private SlotValue? Lend(SlotInfo slot)
    {
        if (!(slot.Kind.IsParameter || slot.Kind.IsCache) || Find(slot.Name) is not { } mine)
            return null;
        return mine.Info.DType == slot.DType && mine.Info.Extents.SequenceEqual(slot.Extents) && mine.Info.Layout.SequenceEqual(slot.Layout)
            ? mine
            : throw new InvalidOperationException($"slot {slot.Name} is another one in the plan that lends it; this is a bug in dsg");
    }

    private static (Phase Phase, int Chunk) Key(Action action) => (action.Phase, action.Chunk);

    /// <summary>Which slots prologue, R and epilogue write: those live for the step, all others for a microbatch.</summary>
    private bool[] PerStep()
    {
        var perStep = new bool[Stage.Slots.Count];
        for (var i = 0; i < Stage.Programs.Count; i++)
        {
            foreach (var instruction in Stage.Programs[i].Phase.IsOnce ? _instructions.Programs[i] : [])
            {
                foreach (var output in Outputs(instruction))
                    perStep[output] = true;
            }
        }

        return perStep;
    }

    /// <summary>Which slots one launch reads, once, and nothing else does.</summary>
    private bool[] ReadOnce()
    {
        var read = new int[Stage.Slots.Count];
        foreach (var instruction in _instructions.Programs.SelectMany(p => p))
        {
            foreach (var input in Inputs(instruction))
                read[input] += instruction is Instruction.Launch ? 1 : 2;
        }

        return [.. read.Select(static n => n == 1)];
    }

    private static int[] Inputs(Instruction instruction)
        => instruction switch
        {
            Instruction.Launch launch => launch.Inputs,
            Instruction.Start start => start.Inputs,
            _ => [],
        };

    private static int[] Outputs(Instruction instruction)
        => instruction switch
        {
            Instruction.Launch launch => launch.Outputs,
            Instruction.Start start => start.Outputs,
            _ => [],
        };

    private Frame NewFrame(List<SlotValue> own)
    {
        var slots = new SlotValue[_shared.Length];
        for (var i = 0; i < slots.Length; i++)
        {
            if (_shared[i] is { } shared)
                slots[i] = shared;
            else
                own.Add(slots[i] = new SlotValue(Stage.Slots[i], Memory, Device.Torch) { ReadOnce = _readOnce[i] });
        }

        return new Frame(slots, [.. own], _instructions.Tokens);
    }

    private Frame FrameOf(Action action, IInputSource inputs)
    {
        if (action.Phase.IsOnce)
            return _stepFrame;
        if (_frames.TryGetValue(action.Microbatch, out var frame))
            return frame;
        _frames[action.Microbatch] = frame = _spare.TryPop(out var spare) ? spare : NewFrame([]);
        foreach (var input in _inputs)
            inputs.Fill(Stage.Slots[input], Rank, action.Microbatch, frame.Slots[input].Fill());
        return frame;
    }

    /// <summary>After the last program of a microbatch.</summary>
    private void Release(int microbatch, Frame frame, long step)
    {
        CheckNothingLeft($"microbatch {microbatch}", frame, step);
        frame.Dispose();
        _frames.Remove(microbatch);
        _spare.Push(frame);
    }

    private void Run(int program, Frame frame, Action action, long step)
    {
        _begin = Stopwatch.GetTimestamp();
        _running = new Running(program, action, step);
        try
        {
            _code.RunProgram(program, frame);
        }
        catch (Exception e) when (e is not StoppedException and not RuntimeException && _code.Current >= 0)
        {
            var current = _instructions.Programs[program][_code.Current];
            throw new RuntimeException(
                current is Instruction.Launch ? Codes.KernelFailed : Codes.CollectiveFailed,
                e.Message.Split('\n')[0],
                e)
            {
                Rank = Rank.Rank,
                Step = step,
                Instruction = $"{action.Name}: {current.Text(Stage.Slots, Plan.Groups)}",
                Path = current.Path,
            };
        }
    }

    /// <summary>After a step of a program, for those who look on.</summary>
    private void Watch(Instruction done, Frame frame, int microbatch, long step, System.Action<SlotValue, int>? observe)
    {
        if (Profile is not null)
            Device.Finish();
        Profile?.Add(done is Instruction.Launch { Id: var id } ? id.ToString() : done.GetType().Name, _begin);
        int[] written = [];
        switch (done)
        {
            case Instruction.Launch launch:
                written = launch.Outputs;
                if (launch.Id == KernelId.GroupTopK)
                    Trace?.Visit(Rank, step, launch.Path, microbatch, frame.Slots[written[^1]]);
                else if (launch.Id == KernelId.Router && Trace is not null)
                {
                    Trace.Visit(Rank, step, launch.Path, microbatch, frame.Slots[written[1]]);
                    if (Trace.Replay)
                        Weigh(new KernelCall(launch.Attributes, Slots(launch.Inputs), Slots(written), Rank));
                }

                break;
            case Instruction.Start start:
                frame.Started[start.Token] = start.Outputs;
                break;
            case Instruction.Wait wait:
                written = frame.Started[wait.Token];
                break;
            case Instruction.Free:
                break;
        }

        if (observe is not null)
        {
            foreach (var place in written)
                observe(frame.Slots[place], microbatch);
        }

        _begin = Stopwatch.GetTimestamp();

        void Weigh(in KernelCall call)
        {
            if (Device.IsCuda)
                CudaRouter.Weigh(call);
            else
                RouterKernels.Weigh(call);
        }

        SlotValue[] Slots(int[] places) => [.. places.Select(place => frame.Slots[place])];
    }

    private sealed record Running(int Program, Action Action, long Step);

    private void CheckNothingLeft(string of, Frame frame, long step)
    {
        var (left, pending) = (frame.Left, frame.LeftPending);
        if (left is null && pending == 0)
            return;
        throw new RuntimeException(
            Codes.StepIncomplete,
            left is null
                ? $"{pending} collectives of {of} were never waited for; this is a bug in dsg"
                : $"slot {left.Info.Name} of {of} was never freed; this is a bug in dsg")
        {
            Rank = Rank.Rank,
            Step = step,
        };
    }
}
