// Start here: one rank walks its timetable, step by step, over its slots (the interpreter).
using System.Diagnostics;
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;

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
    private readonly ICollectives _collectives;
    private readonly CancellationToken _stop;
    private readonly Dictionary<(int Phase, int Chunk), Instruction[]> _programs = [];
    private readonly Dictionary<string, int> _places = [];
    private readonly bool[] _perStep;
    private readonly SlotValue?[] _persistent;
    private readonly SortedDictionary<int, Frame> _frames = [];
    private Frame? _stepFrame;
    private long _step;

    public RankRunner(PlanSet plan, StagePlan stage, RankContext rank, ICollectives collectives, CancellationToken stop)
    {
        Plan = plan;
        Stage = stage;
        Rank = rank;
        _collectives = collectives;
        _stop = stop;
        var ids = new Dictionary<int, int>();
        for (var i = 0; i < stage.Slots.Count; i++)
        {
            ids[stage.Slots[i].Id] = i;
            _places[stage.Slots[i].Name] = i;
        }

        var groups = plan.Groups.ToDictionary(g => g.Id);
        _perStep = new bool[stage.Slots.Count];
        foreach (var program in stage.Programs)
        {
            Instruction[] code = [.. program.Steps.Select(s => Instruction.Of(s, ids, groups, KernelTable.Cpu))];
            _programs[(program.Phase.Tag, program.Chunk)] = code;
            if (program.Phase.IsPrologue || program.Phase.IsEpilogue)
                MarkPerStep(code);
        }

        _persistent = new SlotValue?[stage.Slots.Count];
        for (var i = 0; i < _persistent.Length; i++)
        {
            var value = new SlotValue(stage.Slots[i], Memory);
            if (!value.IsPersistent)
                continue;
            _persistent[i] = value;
            var tensor = value.Fill();
            tensor.zero_().On(tensor);
        }
    }

    public PlanSet Plan { get; }

    public StagePlan Stage { get; }

    public RankContext Rank { get; }

    /// <summary>Bytes held, by kind, and their peaks.</summary>
    public MemoryMeter Memory { get; } = new();

    /// <summary>When set, expert choices are recorded or replayed.</summary>
    public RoutingTrace? Trace { get; set; }

    /// <summary>When set, time is counted by kernel.</summary>
    public StepProfile? Profile { get; set; }

    /// <summary>Every slot that outlives a step, in plan order.</summary>
    public IEnumerable<SlotValue> Persistent => _persistent.OfType<SlotValue>();

    /// <summary>A slot that outlives a step, by name; null when this stage has none.</summary>
    public SlotValue? Find(string name) => _places.TryGetValue(name, out var place) ? _persistent[place] : null;

    /// <summary>One step: all entries of the timetable, or all but the epilogue. `observe` sees each written slot before it is freed.</summary>
    public void RunStep(long step, IInputSource inputs, bool epilogue = true, System.Action<SlotValue, int>? observe = null)
    {
        _step = step;
        try
        {
            foreach (var action in Stage.Timetable)
            {
                if (action.Phase.IsEpilogue && !epilogue)
                    continue;
                if (!_programs.TryGetValue((action.Phase.Tag, action.Chunk), out var code))
                    continue;
                Run(code, FrameOf(action, inputs), action, step, observe);
            }

            CheckNothingLeft(step, epilogue);
        }
        finally
        {
            foreach (var frame in _frames.Values)
                frame.Dispose();
            _frames.Clear();
            _stepFrame?.Dispose();
            _stepFrame = null;
        }
    }

    public void Dispose()
    {
        foreach (var value in Persistent)
            value.Dispose();
    }

    private void MarkPerStep(Instruction[] code)
    {
        foreach (var instruction in code)
        {
            var outputs = instruction switch
            {
                Instruction.Launch launch => launch.Outputs,
                Instruction.Start start => start.Outputs,
                _ => [],
            };
            foreach (var output in outputs)
                _perStep[output] = true;
        }
    }

    private Frame FrameOf(Action action, IInputSource inputs)
    {
        _stepFrame ??= new Frame(Stage.Slots.Count);
        if (action.Phase.IsPrologue || action.Phase.IsEpilogue)
            return _stepFrame;
        if (_frames.TryGetValue(action.Microbatch, out var frame))
            return frame;
        _frames[action.Microbatch] = frame = new Frame(Stage.Slots.Count);
        for (var i = 0; i < Stage.Slots.Count; i++)
        {
            if (Stage.Slots[i].Kind.IsInput)
            {
                var value = ValueAt(i, frame);
                inputs.Fill(Stage.Slots[i], Rank, action.Microbatch, value.Fill());
            }
        }

        return frame;
    }

    private SlotValue ValueAt(int place, Frame frame)
        => _persistent[place] ?? ((_perStep[place] ? _stepFrame! : frame).Values[place] ??= new SlotValue(Stage.Slots[place], Memory));

    private void Run(Instruction[] code, Frame frame, Action action, long step, System.Action<SlotValue, int>? observe)
    {
        Instruction? current = null;
        try
        {
            foreach (var instruction in code)
            {
                current = instruction;
                if (_stop.IsCancellationRequested)
                    throw new StoppedException("the job was stopped");
                var begin = Profile is null ? 0 : Stopwatch.GetTimestamp();
                Run(instruction, frame, action.Microbatch, observe);
                if (Profile is not null && instruction is not Instruction.Free)
                    Profile.Add(instruction is Instruction.Launch launch ? launch.Id.ToString() : instruction.GetType().Name, begin);
            }
        }
        catch (Exception e) when (e is not StoppedException and not RuntimeException)
        {
            throw new RuntimeException(
                current is Instruction.Launch ? Codes.KernelFailed : Codes.CollectiveFailed,
                e.Message.Split('\n')[0],
                e)
            {
                Rank = Rank.Rank,
                Step = step,
                Instruction = $"{action.Name}: {current!.Text(Stage.Slots)}",
                Path = current.Path,
            };
        }
    }

    private void Run(Instruction instruction, Frame frame, int microbatch, System.Action<SlotValue, int>? observe)
    {
        switch (instruction)
        {
            case Instruction.Launch launch:
                Launch(launch, frame, microbatch);
                Observe(launch.Outputs, frame, microbatch, observe);
                break;
            case Instruction.Start start:
                frame.Pending.Add(start.Token, (_collectives.Start(new CollectiveCall(
                    start.Kind, start.Group, Values(start.Inputs, frame), Values(start.Outputs, frame))), start));
                break;
            case Instruction.Wait wait:
                if (!frame.Pending.Remove(wait.Token, out var pending))
                    throw new InvalidOperationException($"nothing to wait for under token {wait.Token}");
                pending.Pending.Wait();
                Observe(pending.Start.Outputs, frame, microbatch, observe);
                break;
            case Instruction.Free free:
                ValueAt(free.Slot, frame).Dispose();
                break;
            default:
                throw new UnreachableException($"no handler for {instruction}");
        }
    }

    private void Launch(Instruction.Launch launch, Frame frame, int microbatch)
    {
        var values = new SlotValue[launch.Inputs.Length + launch.Outputs.Length];
        for (var i = 0; i < launch.Inputs.Length; i++)
            values[i] = ValueAt(launch.Inputs[i], frame);
        for (var i = 0; i < launch.Outputs.Length; i++)
            values[launch.Inputs.Length + i] = ValueAt(launch.Outputs[i], frame);
        launch.Run(new KernelCall(launch.Attributes, values.AsSpan(0, launch.Inputs.Length), values.AsSpan(launch.Inputs.Length), Rank));
        if (launch.Id == KernelId.GroupTopK)
            Trace?.Visit(Rank, _step, launch.Path, microbatch, values[^1]);
    }

    private SlotValue[] Values(int[] places, Frame frame) => [.. places.Select(p => ValueAt(p, frame))];

    private void Observe(int[] outputs, Frame frame, int microbatch, System.Action<SlotValue, int>? observe)
    {
        if (observe is null)
            return;
        foreach (var output in outputs)
            observe(ValueAt(output, frame), microbatch);
    }

    private void CheckNothingLeft(long step, bool epilogue)
    {
        foreach (var (name, frame) in _frames.Select(f => ($"microbatch {f.Key}", f.Value)).Append(("the step", _stepFrame!)))
        {
            var left = frame.Values.FirstOrDefault(v => v is { IsSet: true } && !v.Info.Kind.IsInput);
            if (left is null && frame.Pending.Count == 0)
                continue;
            if (frame == _stepFrame && !epilogue && frame.Pending.Count == 0)
                continue;
            throw new RuntimeException(
                Codes.StepIncomplete,
                left is null
                    ? $"{frame.Pending.Count} collectives of {name} were never waited for; this is a bug in dsg"
                    : $"slot {left.Info.Name} of {name} was never freed; this is a bug in dsg")
            {
                Rank = Rank.Rank,
                Step = step,
            };
        }
    }

    /// <summary>The instances of slots that one microbatch (or the step) has in flight.</summary>
    private sealed class Frame(int slots) : IDisposable
    {
        public SlotValue?[] Values { get; } = new SlotValue?[slots];

        public Dictionary<int, (IPending Pending, Instruction.Start Start)> Pending { get; } = [];

        public void Dispose()
        {
            foreach (var value in Values)
                value?.Dispose();
        }
    }
}
