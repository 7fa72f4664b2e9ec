// Writes a stage's programs as C#: straight-line code that holds only numbers and names of closed lists.
using System.Diagnostics;
using System.Globalization;
using System.Text;
using Microsoft.FSharp.Reflection;

namespace DeepSeekGraph.Runtime.Execution.Generated;

/// <summary>
/// The source of one stage. A plan may come from anywhere, so none of its strings is written, not even into a comment: slots
/// and groups are places, kernels, phases and element types are words of the runtime, and axis names become letters.
/// </summary>
public sealed class CodeWriter
{
    /// <summary>Raised with every change of what is written; part of the key of the cache.</summary>
    public const int Version = 1;

    /// <summary>Namespace and name of the class in every source.</summary>
    internal const string ClassName = "DeepSeekGraph.Generated.Stage";

    /// <summary>Steps of one method: long methods cost the just-in-time compiler more than their length.</summary>
    private const int StepsOfMethod = 64;

    private readonly StagePlan _stage;
    private readonly StageInstructions _code;
    private readonly StringBuilder _text = new();
    private readonly Dictionary<string, string> _constants = [];
    private readonly List<string> _declarations = [];
    private readonly List<string> _given = [];

    private CodeWriter(StagePlan stage, StageInstructions code) => (_stage, _code) = (stage, code);

    /// <summary>The C# of a stage.</summary>
    public static string Write(PlanSet plan, StagePlan stage)
        => new CodeWriter(stage, new StageInstructions(stage, plan.Groups, Kernels.KernelTable.Cpu)).Write();

    private string Write()
    {
        // The programs come first: they find out which constants and kernels are needed.
        var programs = new StringBuilder();
        for (var i = 0; i < _code.Programs.Length; i++)
            WriteProgram(programs, i);

        _text.Append("// Written by dsg from a plan; computes what its interpreter does, bit for bit. s: slots, by place in the plan.\n");
        foreach (var given in Enumerable.Range(0, _stage.Slots.Count).Where(i => !IsMade(_stage.Slots[i].Kind)))
            _text.Append($"// s[{Of(given)}]: {Describe(given)}\n");
        _text.Append("""

            using DeepSeekGraph.Runtime.Execution;
            using DeepSeekGraph.Runtime.Kernels;
            using DeepSeekGraph.Runtime.Memory;
            using Attribute = DeepSeekGraph.Attribute;

            namespace DeepSeekGraph.Generated;

            public sealed class Stage : StageCode
            {

            """);
        foreach (var declaration in _declarations)
            _text.Append($"    private static readonly {declaration};\n");
        if (_declarations.Count > 0)
            _text.Append('\n');
        KernelId[] kernels = [.. _code.Programs.SelectMany(p => p.OfType<Instruction.Launch>()).Select(l => l.Id).Distinct().Order()];
        if (kernels.Length > 0)
            _text.Append($"    private readonly Kernel {string.Join(", ", kernels.Select(NameOf))};\n");
        foreach (var given in _given)
            _text.Append($"    private readonly Attribute[] {given[..given.IndexOf(' ')]};\n");
        _text.Append("\n    public Stage(StageSite site)\n        : base(site)\n    {\n");
        foreach (var kernel in kernels)
            _text.Append($"        {NameOf(kernel)} = Find(KernelId.{NameOf(kernel)});\n");
        foreach (var given in _given)
            _text.Append($"        {given};\n");
        _text.Append("    }\n");
        WriteDispatch();
        return _text.Append(programs).Append("}\n").ToString();
    }

    private void WriteDispatch()
    {
        _text.Append("\n    protected override void Run(int program, Frame f)\n    {\n        switch (program)\n        {\n");
        for (var i = 0; i < _code.Programs.Length; i++)
        {
            _text.Append($"            case {Of(i)}:\n");
            for (var part = 0; part * StepsOfMethod < _code.Programs[i].Length; part++)
                _text.Append($"                {Method(i, part)}(f, f.Slots);\n");
            _text.Append("                break;\n");
        }

        _text.Append("        }\n    }\n");
    }

    private void WriteProgram(StringBuilder text, int program)
    {
        var steps = _code.Programs[program];
        for (var i = 0; i < steps.Length; i++)
        {
            if (i % StepsOfMethod == 0)
            {
                text.Append(i == 0 ? "" : "    }\n");
                text.Append($"\n    private void {Method(program, i / StepsOfMethod)}(Frame f, SlotValue[] s)\n    {{\n");
            }

            text.Append($"        At({Of(i)}); ").Append(Statement(program, i, steps[i])).Append('\n');
        }

        if (steps.Length > 0)
            text.Append("    }\n");
    }

    private string Statement(int program, int step, Instruction instruction)
        => instruction switch
        {
            Instruction.Launch s => $"{NameOf(s.Id)}(new({Attributes(program, step, s)}, {Slots(s.Inputs)}, {Slots(s.Outputs)}, Rank));{Comment(s.Outputs)}",
            Instruction.Start s => $"Start(f, {Of(s.Token)}, {Constant("Collective", "C", Kind(s.Kind))}, {Of(s.Group)}, {Slots(s.Inputs)}, {Slots(s.Outputs)});{Comment(s.Outputs)}",
            Instruction.Wait s => $"Wait(f, {Of(s.Token)});",
            Instruction.Free s => $"s[{Of(s.Slot)}].Dispose();",
            _ => throw new UnreachableException($"no code for {instruction.GetType().Name}"),
        };

    /// <summary>A constant that holds the attributes of a launch; where one is a word of the plan, a field that is read from the plan.</summary>
    private string Attributes(int program, int step, Instruction.Launch launch)
    {
        var written = Array.ConvertAll(launch.Attributes, a => Value(launch.Id, a));
        if (!written.Contains(null))
            return Constant("Attribute[]", "A", $"[{string.Join(", ", written)}]");
        for (var i = 0; i < written.Length; i++)
            written[i] ??= $"Given({Of(program)}, {Of(step)}, {Of(i)})";
        var name = $"Given{Of(_given.Count)}";
        _given.Add($"{name} = [{string.Join(", ", written)}]");
        return name;
    }

    private static string? Value(KernelId kernel, Attribute attribute)
        => attribute switch
        {
            Attribute.Int { Value: var value } => $"Attribute.NewInt({Long(value)})",
            Attribute.Float { Value: var value } => $"Attribute.NewFloat({Double(value)})",
            Attribute.Ints { Values: var values } => $"Attribute.NewInts(new long[] {{ {string.Join(", ", values.Select(Long))} }})",
            Attribute.Text { Value: var value } when kernel == KernelId.Contract && AxisLetters.Rename(value) is { } spec
                => $"Attribute.NewText(\"{spec}\")",
            Attribute.Text { Value: var word } when LibraryKernels.has(kernel) && KernelPath.TryParse(word, out var path) => $"Attribute.NewText(\"{path.Name}\")",
            Attribute.Text => null,
            _ => throw new UnreachableException($"no code for {attribute.GetType().Name}"),
        };

    private string Constant(string type, string letter, string value)
    {
        if (!_constants.TryGetValue(value, out var name))
        {
            _constants[value] = name = $"{letter}{Of(_constants.Count)}";
            _declarations.Add($"{type} {name} = {value}");
        }

        return name;
    }

    /// <summary>A collective as an expression: its case, a word of the plan's own types, and the case's numbers.</summary>
    internal static string Kind(Collective kind)
    {
        var (form, fields) = FSharpValue.GetUnionFields(kind, typeof(Collective), null);
        return fields.Length == 0
            ? $"Collective.{form.Name}"
            : $"Collective.New{form.Name}({string.Join(", ", fields.Select(f => Of((int)f)))})";
    }

    private static string Slots(int[] places) => $"[{string.Join(", ", places.Select(p => $"s[{Of(p)}]"))}]";

    private string Comment(int[] outputs) => outputs.Length == 0 ? "" : $" // {string.Join("; ", outputs.Select(Describe))}";

    /// <summary>Kind, element type and extents of a slot; its name stays in the plan.</summary>
    private string Describe(int place) => Describe(_stage.Slots[place]);

    private static string Describe(SlotInfo slot)
        => $"{SlotKindName(slot.Kind)} {slot.DType.Name} [{string.Join(", ", slot.Extents.Select(Of))}]{(slot.Routed ? " routed" : "")}";

    private static bool IsMade(SlotKind kind) => kind.IsSaved || kind.IsTemporary;

    private static string SlotKindName(SlotKind kind)
        => kind.Tag switch
        {
            SlotKind.Tags.Parameter => "parameter",
            SlotKind.Tags.Optimizer => "optimizer",
            SlotKind.Tags.Gradient => "gradient",
            SlotKind.Tags.Counter => "counter",
            SlotKind.Tags.Scalar => "scalar",
            SlotKind.Tags.Cache => "cache",
            SlotKind.Tags.Input => "input",
            SlotKind.Tags.Saved => "saved",
            SlotKind.Tags.Temporary => "temporary",
            _ => throw new UnreachableException($"no word for {kind}"),
        };

    private static string NameOf(KernelId kernel)
        => Enum.GetName(kernel) ?? throw new UnreachableException($"no kernel {(int)kernel}");

    private string Method(int program, int part)
        => $"Program{Of(program)}_{PhaseName(_stage.Programs[program].Phase)}_Chunk{Of(_stage.Programs[program].Chunk)}_Part{Of(part)}";

    private static string PhaseName(Phase phase)
        => phase.Tag switch
        {
            Phase.Tags.Prologue => "Prologue",
            Phase.Tags.F => "F" + Of(phase.Part),
            Phase.Tags.I => "I" + Of(phase.Part),
            Phase.Tags.W => "W" + Of(phase.Part),
            Phase.Tags.S => "S",
            Phase.Tags.R => "R" + Of(phase.Part),
            Phase.Tags.Epilogue => "Epilogue",
            _ => throw new UnreachableException($"no word for {phase}"),
        };

    private static string Of(int number) => number.ToString(CultureInfo.InvariantCulture);

    private static string Long(long number) => $"{number.ToString(CultureInfo.InvariantCulture)}L";

    private static string Double(double number)
        => double.IsFinite(number) ? $"{number.ToString("R", CultureInfo.InvariantCulture)}d"
            : $"System.BitConverter.Int64BitsToDouble({Long(BitConverter.DoubleToInt64Bits(number))})";
}
