// Tokens that are cut out of a text before anything else looks at it.

using System.Buffers;

namespace DeepSeekGraph.Runtime.Data.Tokenizers;

/// A token outside the merges: its text is one id wherever it stands.
public sealed record AddedToken(int Id, string Content, bool Special)
{
    /// Matched after those that are not (they would see normalized text; no normalizer is supported).
    internal bool Normalized { get; init; }
}

/// Finds added tokens: from left to right, the longest at each place.
internal sealed class AddedTokens
{
    private readonly Dictionary<(int Node, char Next), int> _edges = [];
    private readonly List<int> _ids = [-1];
    private readonly SearchValues<char> _first;

    public AddedTokens(IEnumerable<AddedToken> tokens)
    {
        var first = new HashSet<char>();
        foreach (var token in tokens)
        {
            first.Add(token.Content[0]);
            var node = 0;
            foreach (var c in token.Content)
            {
                if (!_edges.TryGetValue((node, c), out var next))
                {
                    next = _ids.Count;
                    _ids.Add(-1);
                    _edges.Add((node, c), next);
                }

                node = next;
            }

            _ids[node] = token.Id;
        }

        _first = SearchValues.Create([.. first]);
    }

    /// The next token of text[from..to): its place, length and id; false where there is none.
    public bool TryFind(string text, int from, int to, out int at, out int length, out int id)
    {
        for (at = from; at < to; at++)
        {
            var skip = text.AsSpan(at, to - at).IndexOfAny(_first);
            if (skip < 0)
                break;
            at += skip;
            (length, id) = LongestAt(text, at, to);
            if (length > 0)
                return true;
        }

        (length, id) = (0, -1);
        return false;
    }

    private (int Length, int Id) LongestAt(string text, int at, int to)
    {
        var (node, best) = (0, (Length: 0, Id: -1));
        for (var i = at; i < to && _edges.TryGetValue((node, text[i]), out node); i++)
        {
            if (_ids[node] >= 0)
                best = (i - at + 1, _ids[node]);
        }

        return best;
    }
}
