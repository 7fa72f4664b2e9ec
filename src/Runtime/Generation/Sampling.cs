// The next token from logits: the likeliest, or one drawn from the likeliest few.

namespace DeepSeekGraph.Runtime.Generation;

/// How tokens are drawn. Draws are a function of (seed, prompt, step) and the logits alone, whatever the parallel layout.
public sealed record Sampling
{
    /// 0: the likeliest token, of equal ones the lowest id. Otherwise logits are divided by it.
    public double Temperature { get; init; }

    /// Only so many of the likeliest tokens; 0: all.
    public int TopK { get; init; }

    /// Only the fewest likeliest tokens whose probabilities reach this sum; 1: all. Applied after TopK.
    public double TopP { get; init; } = 1;

    public ulong Seed { get; init; } = 1234;

    /// DSG0850 for what is no temperature, number or probability.
    public void Check()
    {
        Require(double.IsFinite(Temperature) && Temperature >= 0, "temperature", Temperature, "0 for the likeliest token, or a positive number such as 0.7");
        Require(TopK >= 0, "top_k", TopK, "a number of tokens, or 0 for all");
        Require(TopP is > 0 and <= 1, "top_p", TopP, "a probability in (0, 1]");

        static void Require(bool holds, string name, double value, string help)
        {
            if (!holds)
                throw DiagnosticException.Of(Codes.SamplingIllegal, name, FormattableString.Invariant($"{name} is {value}"), $"give {help}");
        }
    }

    /// The token that follows, at step 0, 1, ... of a prompt.
    public long Next(ReadOnlySpan<float> logits, int prompt, int step)
    {
        if (Temperature == 0)
            return Likeliest(logits);

        // likeliest first; of equal ones the lowest id, so that the order is one
        var order = new int[logits.Length];
        for (var i = 0; i < order.Length; i++)
            order[i] = i;
        var keys = logits.ToArray();
        Array.Sort(order, (a, b) => keys[a] != keys[b] ? keys[b].CompareTo(keys[a]) : a.CompareTo(b));
        var kept = TopK > 0 ? Math.Min(TopK, order.Length) : order.Length;
        var weights = new double[kept];
        double total = 0;
        for (var i = 0; i < kept; i++)
            total += weights[i] = Math.Exp(((double)keys[order[i]] - keys[order[0]]) / Temperature);

        if (TopP < 1)
        {
            double sum = 0;
            var fewest = 0;
            while (fewest < kept && sum < TopP * total)
                sum += weights[fewest++];
            (kept, total) = (Math.Max(fewest, 1), Math.Max(sum, weights[0]));
        }

        var place = Uniform(Seed, prompt, step) * total;
        for (var i = 0; i < kept - 1; i++)
        {
            place -= weights[i];
            if (place < 0)
                return order[i];
        }

        return order[kept - 1];
    }

    private static long Likeliest(ReadOnlySpan<float> logits)
    {
        var best = 0;
        for (var i = 1; i < logits.Length; i++)
        {
            if (logits[i] > logits[best])
                best = i;
        }

        return best;
    }

    /// In [0, 1), counter-based.
    private static double Uniform(ulong seed, int prompt, int step)
        => (Parameters.ParameterInit.Mix(Parameters.ParameterInit.Mix(seed + (ulong)(uint)prompt + 1) + (ulong)(uint)step) >> 11)
            * (1.0 / (1L << 53));
}
