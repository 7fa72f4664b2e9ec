// Contractions of two operands as matrix products, without copies where the order of dims allows.
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
        string[] a = Letters(operands[0]), b = Letters(operands[1]), result = Letters(sides[1]);
        string[] batch = [.. result.Where(l => a.Contains(l) && b.Contains(l))];
        string[] m = [.. result.Where(l => a.Contains(l) && !b.Contains(l))];
        string[] n = [.. result.Where(l => !a.Contains(l) && b.Contains(l))];
        string[] k = [.. b.Where(l => a.Contains(l) && !result.Contains(l))];
        if (batch.Length + m.Length + k.Length != a.Length
            || batch.Length + n.Length + k.Length != b.Length
            || batch.Length + m.Length + n.Length != result.Length)
            throw new InvalidOperationException($"'{text}' has a letter that only one operand knows");

        // Computed as b x a where the result's last letter is one of a's.
        Swapped = n.Length > 0 && m.Length > 0 && Array.FindLastIndex(result, m.Contains) > Array.FindLastIndex(result, n.Contains);
        Left = Swapped ? new Side(b, batch, n, k) : new Side(a, batch, m, k);
        Right = Swapped ? new Side(a, batch, m, k) : new Side(b, batch, n, k);
        HasBatch = batch.Length > 0;
        string[] computed = Swapped ? [.. batch, .. n, .. m] : [.. batch, .. m, .. n];
        ResultOrder = result.SequenceEqual(computed) ? null : [.. result.Select(l => (long)Array.IndexOf(computed, l))];
        var all = a.Concat(b).Distinct().ToArray();
        ALetters = [.. a.Select(l => Array.IndexOf(all, l))];
        BLetters = [.. b.Select(l => Array.IndexOf(all, l))];
        Computed = [.. computed.Select(l => Array.IndexOf(all, l))];
        Batch = [.. batch.Select(l => Array.IndexOf(all, l))];
        M = [.. (Swapped ? n : m).Select(l => Array.IndexOf(all, l))];
        N = [.. (Swapped ? m : n).Select(l => Array.IndexOf(all, l))];
        K = [.. k.Select(l => Array.IndexOf(all, l))];
        Count = all.Length;
    }

    public bool Swapped { get; }

    public bool HasBatch { get; }

    public Side Left { get; }

    public Side Right { get; }

    /// <summary>Distinct letters; the arrays below hold their numbers.</summary>
    public int Count { get; }

    public int[] ALetters { get; }

    public int[] BLetters { get; }

    public int[] Computed { get; }

    public int[] Batch { get; }

    public int[] M { get; }

    public int[] N { get; }

    public int[] K { get; }

    /// <summary>How to permute the product into the result; null when it lies right.</summary>
    public long[]? ResultOrder { get; }

    /// <summary>Parsed once a text.</summary>
    public static ContractionSpec Of(string text) => Cache.GetOrAdd(text, static t => new ContractionSpec(t));

    private static string[] Letters(string side)
        => [.. side.Split(' ', StringSplitOptions.RemoveEmptyEntries).Select(l => l.TrimEnd('+', '^'))];

    /// <summary>How an operand becomes [batch, outer, inner].</summary>
    internal sealed class Side
    {
        public Side(string[] letters, string[] batch, string[] outer, string[] inner)
        {
            IsTransposed = outer.Length > 0 && inner.Length > 0 && letters.SequenceEqual([.. batch, .. inner, .. outer]);
            Order = IsTransposed || letters.SequenceEqual([.. batch, .. outer, .. inner])
                ? null
                : [.. batch.Concat(outer).Concat(inner).Select(l => (long)Array.IndexOf(letters, l))];
        }

        /// <summary>Lies as [batch, inner, outer].</summary>
        public bool IsTransposed { get; }

        /// <summary>A permutation that is needed first; null when a view will do.</summary>
        public long[]? Order { get; }
    }
}

internal static class ContractionKernels
{
    /// <summary>a, b -> out by a spec; operands whose types differ meet in fp32, as do bf16 ones with an fp32 result.</summary>
    public static void Contract(in KernelCall call)
        => Contract(
            call, Products.TypeOf(call.In(0).dtype, call.In(1).dtype, call.Out().ScalarType), static (a, b) => a.dim() == 2 ? a.mm(b) : a.bmm(b));

    /// <summary>The same with operands in `type` and a product of matrices (or batches of them) that the device has.</summary>
    internal static void Contract(in KernelCall call, ScalarType type, Func<Tensor, Tensor, Tensor> multiply)
    {
        var spec = ContractionSpec.Of(call.Text(0));
        Tensor a = call.In(0), b = call.In(1);
        Span<long> extent = stackalloc long[spec.Count];
        Measure(extent, spec.ALetters, call.Inputs[0].Info.Extents);
        Measure(extent, spec.BLetters, call.Inputs[1].Info.Extents);
        using var wideA = Products.Wide(a, type);
        using var wideB = Products.Wide(b, type);
        var left = spec.Swapped ? wideB ?? b : wideA ?? a;
        var right = spec.Swapped ? wideA ?? a : wideB ?? b;
        long batch = Product(extent, spec.Batch), rows = Product(extent, spec.M), columns = Product(extent, spec.N), inner = Product(extent, spec.K);
        using var l = Matrix(left, spec.Left, spec.HasBatch ? batch : -1, rows, inner, false);
        using var r = Matrix(right, spec.Right, spec.HasBatch ? batch : -1, columns, inner, true);
        using var product = multiply(l, r);
        var shape = new long[spec.Computed.Length];
        for (var i = 0; i < shape.Length; i++)
            shape[i] = extent[spec.Computed[i]];
        var shaped = product.view(shape);
        if (spec.ResultOrder is null)
        {
            call.Out().Adopt(shaped);
            return;
        }

        using var lying = shaped;
        call.Out().Adopt(lying.permute(spec.ResultOrder));
    }

    /// <summary>A view [batch, outer, inner], or [batch, inner, outer] if `turned`; a copy where dims lie otherwise.</summary>
    private static Tensor Matrix(Tensor tensor, ContractionSpec.Side side, long batch, long outer, long inner, bool turned)
    {
        var turn = turned != side.IsTransposed;
        long first = side.IsTransposed ? inner : outer, second = side.IsTransposed ? outer : inner;
        Tensor matrix;
        if (side.Order is null)
            matrix = batch < 0 ? tensor.view(first, second) : tensor.view(batch, first, second);
        else
        {
            using var ordered = tensor.permute(side.Order);
            matrix = batch < 0 ? ordered.reshape(first, second) : ordered.reshape(batch, first, second);
        }

        if (!turn)
            return matrix;
        using var lying = matrix;
        return batch < 0 ? lying.t() : lying.transpose(1, 2);
    }

    private static void Measure(Span<long> extent, int[] letters, IReadOnlyList<int> extents)
    {
        if (extents.Count != letters.Length)
            throw new InvalidOperationException($"an operand has {extents.Count} dims, its spec names {letters.Length}");
        for (var i = 0; i < letters.Length; i++)
        {
            if (extent[letters[i]] != 0 && extent[letters[i]] != extents[i])
                throw new InvalidOperationException($"a contracted axis is {extent[letters[i]]} in one operand and {extents[i]} in the other");
            extent[letters[i]] = extents[i];
        }
    }

    private static long Product(ReadOnlySpan<long> extent, int[] letters)
    {
        long product = 1;
        foreach (var letter in letters)
            product *= extent[letter];
        return product;
    }
}
