// Elementwise kernels; the second operand of a binary one is broadcast by the dims it names.
using DeepSeekGraph.Runtime.Memory;
using TorchSharp;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Kernels;

internal static unsafe class ElementwiseKernels
{
    /// <summary>a1, ..., an -> out; n operands of one type are summed in fp32, in operand order, and rounded once.</summary>
    public static void Add(in KernelCall call)
    {
        var a = call.In(0);
        if (call.Inputs.Length == 1)
        {
            call.Out().AdoptCopy(a);
            return;
        }

        var same = LieAlike(call);
        if (!same && call.Inputs.Length > 2)
            throw new InvalidOperationException("operands of a sum of more than two lie alike");
        if (!same || a.dtype is not (ScalarType.Float32 or ScalarType.BFloat16))
        {
            AddWhole(call);
            return;
        }

        using var out0 = new Result(call.Out(), a.dtype, Rows(call.Inputs[0]));
        if (Simd.IsBFloat16(a.dtype))
            Sum<BF16>(call, out0);
        else
            Sum<F32>(call, out0);
    }

    /// <summary>a - b.</summary>
    public static void Sub(in KernelCall call) => Binary(call, static (a, b) => a.sub(b));

    /// <summary>a * b.</summary>
    public static void Mul(in KernelCall call) => Binary(call, static (a, b) => a.mul(b));

    /// <summary>a / b.</summary>
    public static void Div(in KernelCall call) => Binary(call, static (a, b) => a.div(b));

    public static void Neg(in KernelCall call) => call.Out().Adopt(call.In(0).neg());

    public static void Exp(in KernelCall call) => call.Out().Adopt(call.In(0).exp());

    public static void Log(in KernelCall call) => call.Out().Adopt(call.In(0).log());

    public static void Rsqrt(in KernelCall call) => call.Out().Adopt(call.In(0).rsqrt());

    public static void Sigmoid(in KernelCall call) => call.Out().Adopt(call.In(0).sigmoid());

    public static void Silu(in KernelCall call) => call.Out().Adopt(nn.functional.silu(call.In(0)));

    /// <summary>a * factor.</summary>
    public static void Scale(in KernelCall call)
    {
        using var factor = (Scalar)call.Float(0);
        call.Out().Adopt(call.In(0).mul(factor));
    }

    /// <summary>a + addend.</summary>
    public static void Offset(in KernelCall call)
    {
        using var addend = (Scalar)call.Float(0);
        call.Out().Adopt(call.In(0).add(addend));
    }

    /// <summary>a -> out in the slot's element type.</summary>
    public static void Cast(in KernelCall call) => call.Out().AdoptCopy(call.In(0));

    /// <summary>Rows of a routed value, else -1.</summary>
    internal static int Rows(SlotValue value) => value.Info.Routed ? (int)value.Tensor.shape[0] : -1;

    private static void Binary(in KernelCall call, Func<Tensor, Tensor, Tensor> compute)
    {
        using var b = Align(call, 1);
        call.Out().Adopt(compute(call.In(0), b));
    }

    /// <summary>True where all operands have the dims of the first.</summary>
    internal static bool LieAlike(in KernelCall call)
        => call.AttributeCount == 0 || (call.Ints(0).Count == call.Inputs[0].Info.Extents.Count && Ascending(call.Ints(0)));

    /// <summary>Sums by the library: operands that are broadcast, integers, more operands than a kernel takes.</summary>
    internal static void AddWhole(in KernelCall call)
    {
        using var b = Align(call, 1);
        var sum = call.In(0).add(b, Scalars.One);
        for (var i = 2; i < call.Inputs.Length; i++)
            sum.add_(call.In(i), Scalars.One).On(sum);
        call.Out().Adopt(sum);
    }

    /// <summary>A view of an operand with the rank of operand 0, extents 1 where it has no dim; the caller disposes it.</summary>
    private static Tensor Align(in KernelCall call, int operand)
    {
        SlotValue a = call.Inputs[0], b = call.Inputs[operand];
        var dims = call.Ints(0);
        if (LieAlike(call))
            return b.Tensor.alias();
        var places = new List<(int At, int From)>();
        for (var i = 0; i < dims.Count; i++)
        {
            var place = (At: a.StorageDim((int)dims[i]), From: b.StorageDim(i));
            if (a.Info.Routed && !b.Info.Routed && dims[i] < 3)
                throw new InvalidOperationException($"{b.Info.Name} has a dense axis among the routed axes of {a.Info.Name}");
            if (!places.Contains(place))
                places.Add(place);
        }

        places.Sort();
        var shape = new long[a.Tensor.dim()];
        Array.Fill(shape, 1);
        foreach (var (at, from) in places)
            shape[at] = b.Tensor.shape[from];
        using var ordered = b.Tensor.permute([.. places.Select(p => (long)p.From)]);
        return ordered.reshape(shape);
    }

    private static bool Ascending(IReadOnlyList<long> dims)
    {
        for (var i = 0; i < dims.Count; i++)
        {
            if (dims[i] != i)
                return false;
        }

        return true;
    }

    private static void Sum<T>(in KernelCall call, in Result result)
        where T : struct, IElement
    {
        var type = call.In(0).dtype;
        var n = result.Count;
        var operands = stackalloc void*[call.Inputs.Length];
        var copies = new Tensor?[call.Inputs.Length];
        for (var i = 0; i < copies.Length; i++)
        {
            var tensor = call.In(i);
            copies[i] = tensor.dtype == type ? null : tensor.to_type(type);
            operands[i] = (copies[i] ?? tensor).Pointer();
        }

        long at = 0;
        for (; at <= n - 8; at += 8)
        {
            var sum = T.Load8(operands[0], at);
            for (var i = 1; i < copies.Length; i++)
                sum += T.Load8(operands[i], at);
            T.Store8(result.P, at, sum);
        }

        for (; at < n; at++)
        {
            var sum = T.Load(operands[0], at);
            for (var i = 1; i < copies.Length; i++)
                sum += T.Load(operands[i], at);
            T.Store(result.P, at, sum);
        }

        foreach (var copy in copies)
            copy?.Dispose();
    }
}
