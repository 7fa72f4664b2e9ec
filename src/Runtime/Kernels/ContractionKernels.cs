// Contractions of two operands as matrix products, without copies where strides allow.
using System.Collections.Concurrent;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Kernels;

/// <summary>"b s k+, n k+ -> b s n" sorted into batch (in all three), m (a, out), n (b, out) and k (a, b) letters.</summary>
internal sealed class ContractionSpec
{
    private static readonly ConcurrentDictionary<string, ContractionSpec> Cache = new();

    private ContractionSpec(string text)
    {
        var sides = text.Split("->");
        var operands = sides[0].Split(',');
        if (sides.Length != 2 || operands.Length != 2)
            throw new InvalidOperationException($"'{text}' is no contraction of two operands");
        A = Letters(operands[0]);
        B = Letters(operands[1]);
        Out = Letters(sides[1]);
        Batch = [.. Out.Where(l => A.Contains(l) && B.Contains(l))];
        M = [.. Out.Where(l => A.Contains(l) && !B.Contains(l))];
        N = [.. Out.Where(l => !A.Contains(l) && B.Contains(l))];
        K = [.. B.Where(l => A.Contains(l) && !Out.Contains(l))];
        if (Batch.Length + M.Length + K.Length != A.Length
            || Batch.Length + N.Length + K.Length != B.Length
            || Batch.Length + M.Length + N.Length != Out.Length)
            throw new InvalidOperationException($"'{text}' has a letter that only one operand knows");
        Swapped = N.Length > 0 && M.Length > 0
            && Array.FindLastIndex(Out, l => M.Contains(l)) > Array.FindLastIndex(Out, l => N.Contains(l));
    }

    public string[] A { get; }

    public string[] B { get; }

    public string[] Out { get; }

    public string[] Batch { get; }

    public string[] M { get; }

    public string[] N { get; }

    public string[] K { get; }

    /// <summary>True when the result is better computed as b x a.</summary>
    public bool Swapped { get; }

    /// <summary>Parsed once a text.</summary>
    public static ContractionSpec Of(string text) => Cache.GetOrAdd(text, static t => new ContractionSpec(t));

    private static string[] Letters(string side)
        => [.. side.Split(' ', StringSplitOptions.RemoveEmptyEntries).Select(l => l.TrimEnd('+', '^'))];
}

internal static class ContractionKernels
{
    /// <summary>a, b -> out by a spec; the types of operands that differ meet in fp32, as do bf16 ones with an fp32 result.</summary>
    public static void Contract(in KernelCall call)
    {
        var spec = ContractionSpec.Of(call.Text(0));
        Tensor a = call.In(0), b = call.In(1);
        var type = a.dtype == b.dtype && a.dtype == call.Out().ScalarType ? a.dtype : ScalarType.Float32;
        using var wideA = a.dtype == type ? null : a.to_type(type);
        using var wideB = b.dtype == type ? null : b.to_type(type);
        var result = spec.Swapped
            ? Multiply(spec, wideB ?? b, wideA ?? a, spec.B, spec.A, spec.N, spec.M)
            : Multiply(spec, wideA ?? a, wideB ?? b, spec.A, spec.B, spec.M, spec.N);
        call.Out().Adopt(result);
    }

    private static Tensor Multiply(
        ContractionSpec spec, Tensor a, Tensor b, string[] aLetters, string[] bLetters, string[] m, string[] n)
    {
        var extent = new Dictionary<string, long>();
        Measure(extent, aLetters, a);
        Measure(extent, bLetters, b);
        long Product(string[] letters) => letters.Aggregate(1L, (p, l) => p * extent[l]);
        long batch = Product(spec.Batch), rows = Product(m), columns = Product(n), inner = Product(spec.K);

        // The order of the contracted letters is free: the one in which `b` needs no copy, since that is the weight.
        using var a1 = a.permute(Order(aLetters, spec.Batch, m, spec.K));
        using var b1 = b.permute(Order(bLetters, spec.Batch, n, spec.K));
        Tensor product;
        if (spec.Batch.Length == 0)
        {
            using var a2 = a1.reshape(rows, inner);
            using var b2 = b1.reshape(columns, inner);
            using var b3 = b2.t();
            product = a2.mm(b3);
        }
        else
        {
            using var a2 = a1.reshape(batch, rows, inner);
            using var b2 = b1.reshape(batch, columns, inner);
            using var b3 = b2.transpose(1, 2);
            product = a2.bmm(b3);
        }

        string[] order = [.. spec.Batch, .. m, .. n];
        using var whole = product;
        using var shaped = whole.reshape([.. order.Select(l => extent[l])]);
        return shaped.permute([.. spec.Out.Select(l => (long)Array.IndexOf(order, l))]);
    }

    private static void Measure(Dictionary<string, long> extent, string[] letters, Tensor tensor)
    {
        var shape = tensor.shape;
        if (shape.Length != letters.Length)
            throw new InvalidOperationException($"an operand has {shape.Length} dims, its spec names {letters.Length}");
        for (var i = 0; i < letters.Length; i++)
        {
            if (!extent.TryAdd(letters[i], shape[i]) && extent[letters[i]] != shape[i])
                throw new InvalidOperationException($"axis {letters[i]} is {extent[letters[i]]} in one operand and {shape[i]} in the other");
        }
    }

    private static long[] Order(string[] letters, params ReadOnlySpan<string[]> groups)
    {
        var order = new List<long>();
        foreach (var group in groups)
        {
            foreach (var letter in group)
                order.Add(Array.IndexOf(letters, letter));
        }

        return [.. order];
    }
}
