// Which code a GPU runs for a launch that it has two for: what the plan says, and nothing else.
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;

namespace DeepSeekGraph.Runtime.Cuda;

internal static class CudaPath
{
    /// <summary>
    /// True where attribute `at` says library, false where it says exact; DSG0609 where it says library and the library does not take
    /// these operands: a plan that was not checked.
    /// </summary>
    public static bool IsLibrary(in KernelCall call, KernelId kernel, int at)
    {
        if (call.Path(at).IsExact)
            return false;
        var refusal = LibraryKernels.refusal(kernel, Types(call.Inputs), Types(call.Outputs));
        return refusal.Length == 0
            ? true
            : throw DiagnosticException.Of(
                Codes.PlanPath, call.Out().Info.Name, $"the plan has the library compute {kernel}, which does not take {refusal}", "compile the plan again");
    }

    private static OperandType[] Types(ReadOnlySpan<SlotValue> values)
    {
        var types = new OperandType[values.Length];
        for (var i = 0; i < types.Length; i++)
            types[i] = OperandType.Of(values[i].Info);
        return types;
    }
}
