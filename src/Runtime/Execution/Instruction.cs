// Steps of a plan, looked up once: slot numbers instead of ids, kernels instead of names.
using System.Diagnostics;
using DeepSeekGraph.Runtime.Kernels;

namespace DeepSeekGraph.Runtime.Execution;

/// <summary>One step of a program, ready to run.</summary>
internal abstract record Instruction(string Path)
{
    /// <summary>A kernel over slots.</summary>
    public sealed record Launch(KernelId Id, Kernel Run, IReadOnlyList<Attribute> Attributes, int[] Inputs, int[] Outputs, string Path) : Instruction(Path);

    /// <summary>The begin of a collective.</summary>
    public sealed record Start(int Token, Collective Kind, Group Group, int[] Inputs, int[] Outputs, string Path) : Instruction(Path);

    /// <summary>The end of a collective.</summary>
    public sealed record Wait(int Token) : Instruction("");

    /// <summary>The end of a slot's instance.</summary>
    public sealed record Free(int Slot) : Instruction("");

    /// <summary>Looks everything up; an unknown slot, group or kernel is a bug of the plan.</summary>
    public static Instruction Of(
        Step step, IReadOnlyDictionary<int, int> slots, IReadOnlyDictionary<int, Group> groups, IReadOnlyDictionary<KernelId, KernelEntry> kernels)
    {
        int[] Places(IReadOnlyList<int> ids) => [.. ids.Select(id => slots[id])];
        return step switch
        {
            Step.Launch s => new Launch(s.Kernel, kernels[s.Kernel].Run, s.Attributes, Places(s.Inputs), Places(s.Outputs), s.Path),
            Step.Start s => new Start(s.Token, s.Collective, groups[s.Group], Places(s.Inputs), Places(s.Outputs), s.Path),
            Step.Wait s => new Wait(s.Token),
            Step.Free s => new Free(slots[s.Slot]),
            _ => throw new UnreachableException($"no handler for {step}"),
        };
    }

    /// <summary>As shown in messages.</summary>
    public string Text(IReadOnlyList<SlotInfo> slots)
    {
        string Names(int[] places) => string.Join(", ", places.Select(p => slots[p].Name));
        return this switch
        {
            Launch s => $"{s.Id}({Names(s.Inputs)}) -> {Names(s.Outputs)}",
            Start s => $"start {s.Kind} on {s.Group.Name}({Names(s.Inputs)}) -> {Names(s.Outputs)}",
            Wait s => $"wait {s.Token}",
            Free s => $"free {slots[s.Slot].Name}",
            _ => throw new UnreachableException($"no text for {GetType().Name}"),
        };
    }
}
