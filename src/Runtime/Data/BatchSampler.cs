// Which sequences a step trains on: a seeded order of the corpus, the same whatever the parallel layout.

namespace DeepSeekGraph.Runtime.Data;

/// Rows [FirstRow, FirstRow + Rows) of a step's global batch; Tokens is [Rows, Columns], row-major.
public sealed record GlobalBatch(long Step, int FirstRow, int Rows, int Columns, long[] Tokens)
{
    /// The tokens of one row, counted from FirstRow.
    public ReadOnlySpan<long> Row(int row) => Tokens.AsSpan(row * Columns, Columns);
}

/// Sequence i is tokens [i*S, i*S + S + extra): it reads on into the next one for its labels.
public sealed class BatchSampler
{
    private readonly TokenStream _tokens;
    private readonly ulong _seed;

    /// `extraTokens` = 1 for next-token labels, + the depth of multi-token prediction; DSG0811 without one sequence.
    public BatchSampler(TokenStream tokens, int globalBatch, int sequenceLength, int extraTokens, ulong seed)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(globalBatch);
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(sequenceLength);
        ArgumentOutOfRangeException.ThrowIfNegative(extraTokens);
        _tokens = tokens;
        _seed = seed;
        Batch = globalBatch;
        SequenceLength = sequenceLength;
        Columns = checked(sequenceLength + extraTokens);
        Sequences = (tokens.Length - extraTokens) / sequenceLength;
        if (tokens.Length < Columns)
        {
            throw DiagnosticException.Of(
                Codes.DataTooSmall,
                "--data",
                $"the training data '{tokens.Source}' has {tokens.Length} tokens, a sequence needs {Columns}",
                $"give --data at least {Columns} tokens of text, or shorten the sequence");
        }
    }

    /// Sequences in a global batch (G).
    public int Batch { get; }

    /// Positions that a step trains on (S).
    public int SequenceLength { get; }

    /// Tokens in a row: S and the extra ones for labels.
    public int Columns { get; }

    /// Sequences in one pass over the corpus; the next pass has another order.
    public long Sequences { get; }

    /// The whole global batch of step 0, 1, ...
    public GlobalBatch Get(long step) => Get(step, 0, Batch);

    /// Rows [first, first + rows) of it, for a rank that needs no more.
    public GlobalBatch Get(long step, int first, int rows)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(step);
        ArgumentOutOfRangeException.ThrowIfNegative(first);
        ArgumentOutOfRangeException.ThrowIfNegative(rows);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(rows, Batch - first);
        return new GlobalBatch(step, first, rows, Columns, Rows(checked((step * Batch) + first), rows));
    }

    /// The whole global batch of a step that begins at a place of the endless list of all passes.
    public GlobalBatch From(long place, long step)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(place);
        return new GlobalBatch(step, 0, Batch, Columns, Rows(place, Batch));
    }

    /// The sequence at a place of the endless list of all passes, one after the other.
    public long SequenceAt(long place)
        => new Permutation(Sequences, _seed, place / Sequences)[place % Sequences];

    private long[] Rows(long place, int rows)
    {
        var tokens = new long[checked(rows * Columns)];
        for (var row = 0; row < rows; row++)
            _tokens.CopyTo(SequenceAt(checked(place + row)) * SequenceLength, tokens.AsSpan(row * Columns, Columns));
        return tokens;
    }
}
