// The legal names next to a wrong one.

namespace DeepSeekGraph.Cli;

internal static class Nearest
{
    /// More names than these are cut to the nearest ones.
    private const int Most = 4;

    /// Fingers swap letters more often than they miss them.
    private const double Swap = 0.7;

    /// "choose from ..." with the nearest first.
    public static string Help(string wrong, IEnumerable<string> names)
        => $"choose from {string.Join(' ', Names(wrong, names))}";

    /// The nearest of `names`, nearest first.
    public static IEnumerable<string> Names(string wrong, IEnumerable<string> names)
        => names.OrderBy(name => Distance(wrong, name)).ThenBy(name => name, StringComparer.Ordinal).Take(Most);

    /// Insertions, deletions, changes and swaps of neighbours between two words, case ignored; a common start is near.
    internal static double Distance(string a, string b)
    {
        (a, b) = (a.ToLowerInvariant(), b.ToLowerInvariant());
        var d = new double[a.Length + 1, b.Length + 1];
        for (var i = 0; i <= a.Length; i++)
        {
            for (var j = 0; j <= b.Length; j++)
            {
                if (i == 0 || j == 0)
                {
                    d[i, j] = i + j;
                    continue;
                }

                var change = d[i - 1, j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1);
                d[i, j] = Math.Min(change, 1 + Math.Min(d[i - 1, j], d[i, j - 1]));
                if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
                    d[i, j] = Math.Min(d[i, j], d[i - 2, j - 2] + Swap);
            }
        }

        var start = a.Zip(b).TakeWhile(pair => pair.First == pair.Second).Count();
        return d[a.Length, b.Length] - (0.1 * start);
    }
}
