// Byte-pair merges of pieces that are too long for the package's loop, whose time grows with the square of the length.

namespace DeepSeekGraph.Runtime.Data.Tokenizers;

/// The same merges in n log n: the pair of the lowest rank first, the leftmost of equals (arXiv 1508.07909).
internal sealed class LongPieces
{
    private readonly IReadOnlyDictionary<string, int> _vocabulary;
    private readonly Dictionary<(int Left, int Right), (int Rank, int Id)> _merges;

    public LongPieces(IReadOnlyDictionary<string, int> vocabulary, IReadOnlyList<(string Left, string Right)> merges)
    {
        _vocabulary = vocabulary;
        _merges = new(merges.Count);
        for (var rank = 0; rank < merges.Count; rank++)
        {
            var (left, right) = merges[rank];
            _merges.Add((vocabulary[left], vocabulary[right]), (rank, vocabulary[left + right]));
        }
    }

    /// Appends the ids of a piece spelled in the byte alphabet.
    public void Encode(string piece, List<int> ids)
    {
        var count = piece.Length;
        var (symbols, next, previous) = (new int[count], new int[count], new int[count]);
        var queue = new PriorityQueue<(int At, int Left, int Right), (int Rank, int At)>();
        for (var i = 0; i < count; i++)
            (symbols[i], next[i], previous[i]) = (_vocabulary[piece[i].ToString()], i + 1, i - 1);
        for (var i = 0; i + 1 < count; i++)
            Offer(i);

        while (queue.TryDequeue(out var pair, out _))
        {
            // one of the two may have been merged with another since
            var right = symbols[pair.At] == pair.Left ? next[pair.At] : count;
            if (right >= count || symbols[right] != pair.Right)
                continue;
            symbols[pair.At] = _merges[(pair.Left, pair.Right)].Id;
            symbols[right] = -1;
            next[pair.At] = next[right];
            if (next[right] < count)
                previous[next[right]] = pair.At;
            Offer(pair.At);
            if (previous[pair.At] >= 0)
                Offer(previous[pair.At]);
        }

        for (var i = 0; i < count; i = next[i])
            ids.Add(symbols[i]);

        void Offer(int at)
        {
            if (next[at] < count && _merges.TryGetValue((symbols[at], symbols[next[at]]), out var merge))
                queue.Enqueue((at, symbols[at], symbols[next[at]]), (merge.Rank, at));
        }
    }
}
