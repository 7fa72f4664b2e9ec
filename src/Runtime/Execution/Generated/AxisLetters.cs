// Axis names of a contraction become a, b, c, ...: what the spec computes stays, what the plan wrote goes.
namespace DeepSeekGraph.Runtime.Execution.Generated;

internal static class AxisLetters
{
    private const string Letters = "abcdefghijklmnopqrstuvwxyz";

    /// <summary>"tok in+, out in+ -> tok out" as "a b, c b -> a c"; null where it is no contraction of at most 26 axes.</summary>
    public static string? Rename(string spec)
    {
        var sides = spec.Split("->");
        if (sides.Length != 2 || sides[0].Split(',') is not [var a, var b])
            return null;
        var names = new List<string>();
        if (Side(a, names) is not { } left || Side(b, names) is not { } right || Side(sides[1], names) is not { } result)
            return null;
        return $"{left}, {right} -> {result}";
    }

    private static string? Side(string side, List<string> names)
    {
        var letters = new List<char>();
        foreach (var word in side.Split(' ', StringSplitOptions.RemoveEmptyEntries))
        {
            // marks of reduction and of sharding say nothing to the kernel
            var name = word.TrimEnd('+', '^');
            var at = names.IndexOf(name);
            if (at < 0)
            {
                at = names.Count;
                names.Add(name);
            }

            if (at >= Letters.Length)
                return null;
            letters.Add(Letters[at]);
        }

        return string.Join(' ', letters);
    }
}
