// Steps of a plan, looked up once: slot places instead of ids, kernels instead of names.
using System.Diagnostics;
using DeepSeekGraph.Runtime.Kernels;

namespace DeepSeekGraph.Runtime.Execution;

/// <summary>One step of a program, ready to run. Slots and groups are given by their places in the plan, tokens by their numbers.</summary>
internal abstract record Instruction(string Path)
{
    /// <summary>A kernel over slots.</summary>
    public sealed record Launch(KernelId Id, Kernel Run, Attribute[] Attributes, int[] Inputs, int[] Outputs, string Path) : Instruction(Path);

    /// <summary>The begin of a collective.</summary>
    public sealed record Start(int Token, Collective Kind, int Group, int[] Inputs, int[] Outputs, string Path) : Instruction(Path);

    /// <summary>The end of a collective; `Name` is the plan's token.</summary>
    public sealed record Wait(int Token, int Name) : Instruction("");

    /// <summary>The end of a slot's instance.</summary>
    public sealed record Free(int Slot) : Instruction("");

    /// <summary>As shown in messages.</summary>
    public string Text(IReadOnlyList<SlotInfo> slots, IReadOnlyList<Group> groups)
    {
        string Names(int[] places) => string.Join(", ", places.Select(p => slots[p].Name));
        return this switch
        {
            Launch s => $"{s.Id}({Names(s.Inputs)}) -> {Names(s.Outputs)}",
            Start s => $"start {s.Kind} on {groups[s.Group].Name}({Names(s.Inputs)}) -> {Names(s.Outputs)}",
            Wait s => $"wait {s.Name}",
            Free s => $"free {slots[s.Slot].Name}",
            _ => throw new UnreachableException($"no text for {GetType().Name}"),
        };
    }
}

/// <summary>The programs of a stage as instructions. An unknown slot, group or kernel is a bug of the plan.</summary>
internal sealed class StageInstructions
{
    private readonly Dictionary<int, int> _slots = [];
    private readonly Dictionary<int, int> _groups = [];
    private readonly Dictionary<int, int> _tokens = [];

    public StageInstructions(StagePlan stage, IReadOnlyList<Group> groups, IReadOnlyDictionary<KernelId, KernelEntry> kernels)
    {
        for (var i = 0; i < stage.Slots.Count; i++)
            _slots[stage.Slots[i].Id] = i;
        for (var i = 0; i < groups.Count; i++)
            _groups[groups[i].Id] = i;
        Programs = [.. stage.Programs.Select(p => (Instruction[])[.. p.Steps.Select(s => Of(s, kernels))])];
    }

    /// <summary>By place in StagePlan.Programs.</summary>
    public Instruction[][] Programs { get; }

    /// <summary>Distinct tokens; they are numbered from 0 in the order in which programs name them.</summary>
    public int Tokens => _tokens.Count;

    private Instruction Of(Step step, IReadOnlyDictionary<KernelId, KernelEntry> kernels)
    {
        int[] Places(IReadOnlyList<int> ids) => [.. ids.Select(id => _slots[id])];
        return step switch
        {
            Step.Launch s => new Instruction.Launch(
                s.Kernel, kernels[s.Kernel].Run, [.. s.Attributes], Places(s.Inputs), Places(s.Outputs), s.Path),
            Step.Start s => new Instruction.Start(
                Token(s.Token), s.Collective, _groups[s.Group], Places(s.Inputs), Places(s.Outputs), s.Path),
            Step.Wait s => new Instruction.Wait(Token(s.Token), s.Token),
            Step.Free s => new Instruction.Free(_slots[s.Slot]),
            _ => throw new UnreachableException($"no handler for {step}"),
        };
    }

    private int Token(int name)
    {
        if (!_tokens.TryGetValue(name, out var number))
            _tokens[name] = number = _tokens.Count;
        return number;
    }
}
