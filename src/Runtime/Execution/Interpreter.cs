// The interpreter: walks the steps of a program one by one; the reference that compiled plans are compared with.
using System.Diagnostics;
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;

namespace DeepSeekGraph.Runtime.Execution;

/// <summary>Runs instructions as they are. Belongs to one thread.</summary>
internal sealed class Interpreter(StageSite site, StageInstructions code) : StageCode(site)
{
    private readonly SlotValue[] _operands = new SlotValue[code.Programs
        .SelectMany(p => p.OfType<Instruction.Launch>())
        .Select(l => l.Inputs.Length + l.Outputs.Length)
        .Append(0)
        .Max()];

    protected override void Run(int program, Frame frame)
    {
        var steps = code.Programs[program];
        for (var i = 0; i < steps.Length; i++)
        {
            At(i);
            Run(steps[i], frame);
        }
    }

    private void Run(Instruction instruction, Frame frame)
    {
        switch (instruction)
        {
            case Instruction.Launch launch:
                Launch(launch, frame.Slots);
                break;
            case Instruction.Start start:
                Start(frame, start.Token, start.Kind, start.Group, Values(start.Inputs, frame), Values(start.Outputs, frame));
                break;
            case Instruction.Wait wait:
                Wait(frame, wait.Token);
                break;
            case Instruction.Free free:
                frame.Slots[free.Slot].Dispose();
                break;
            default:
                throw new UnreachableException($"no handler for {instruction}");
        }
    }

    private void Launch(Instruction.Launch launch, SlotValue[] slots)
    {
        var inputs = _operands.AsSpan(0, launch.Inputs.Length);
        for (var i = 0; i < inputs.Length; i++)
            inputs[i] = slots[launch.Inputs[i]];
        var outputs = _operands.AsSpan(inputs.Length, launch.Outputs.Length);
        for (var i = 0; i < outputs.Length; i++)
            outputs[i] = slots[launch.Outputs[i]];
        launch.Run(new KernelCall(launch.Attributes, inputs, outputs, Rank));
    }

    private static SlotValue[] Values(int[] places, Frame frame) => Array.ConvertAll(places, p => frame.Slots[p]);
}
