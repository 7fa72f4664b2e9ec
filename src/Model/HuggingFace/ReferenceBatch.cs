// The step that a reference file asks for: its ids and the sequences that were generated, padded to what a layout divides.

using System.Text.Json;
using DeepSeekGraph.Runtime.Weights;
using TorchSharp;

namespace DeepSeekGraph.Models.HuggingFace;

/// Ids [Rows, Columns] of a reference file.
internal sealed record ReferenceIds(int Rows, int Columns, long[] Values)
{
    public long this[int row, int column] => Values[(row * Columns) + column];
}

/// One microbatch: the rows of `input_ids`, then those of `generated_ids`, then rows of padding. Padding goes to no expert,
/// counts in no loss, and stands behind what it pads, where no position sees it.
internal sealed record ReferenceBatch(ReferenceIds Inputs, ReferenceIds? Generated, int Prompt, int Rows, int SeqLength)
{
    /// Reads the ids; DSG0712. `ranks`: what the number of rows must be a multiple of, `blocks` the sequence length.
    public static ReferenceBatch Read(SafeTensorsFile file, DeepSeekV3Config config, int ranks, int blocks)
    {
        var inputs = Ids("input_ids") ?? throw Malformed(file, "input_ids is missing");
        if (inputs.Columns < 2)
            throw Malformed(file, $"input_ids has {inputs.Columns} position, and no next token");
        var (generated, prompt) = (Ids("generated_ids"), Ids("prompt_ids"));
        if (generated is not null && (prompt is null || prompt.Rows != generated.Rows || prompt.Columns >= generated.Columns
            || prompt.Columns == 0 || !Begins(generated, prompt)))
        {
            throw Malformed(file, "generated_ids does not begin with prompt_ids, or has no more than them");
        }

        return new(
            inputs,
            generated,
            prompt?.Columns ?? 0,
            Up(inputs.Rows + (generated?.Rows ?? 0), ranks),
            Up(Math.Max(inputs.Columns, generated?.Columns ?? 0), blocks));

        ReferenceIds? Ids(string name)
        {
            if (!file.Contains(name))
                return null;
            if (file.Info(name).Shape is not [var rows and >= 1 and < int.MaxValue, var columns and < int.MaxValue])
                throw Malformed(file, $"{name} is [{string.Join(", ", file.Info(name).Shape)}], not [batch, sequence]");
            var values = file.ReadInt64(name);
            var beyond = Array.FindIndex(values, id => id < 0 || id >= config.VocabSize);
            return beyond < 0
                ? new((int)rows, (int)columns, values)
                : throw Malformed(file, $"{name} has the id {values[beyond]}, the vocabulary has {config.VocabSize}");
        }
    }

    /// The inputs that the plan asks for; the caller disposes them.
    public Dictionary<string, torch.Tensor> ToInputs(PlanSet plan) => plan.Inputs.ToDictionary(input => input.Name, Input);

    private torch.Tensor Input(InputInfo input)
    {
        var columns = input.Extents[1];
        if (input.Name == "tokens")
        {
            return torch.tensor(Fill<long>(columns, (row, s) => Inside(row, s) ? Id(row, s) : 0))
                .reshape(Rows, columns);
        }

        // a label lies one position ahead, and one more for each depth of multi-token prediction
        var depth = input.Name switch
        {
            "loss_mask" => 0,
            "mtp_mask" => 1,
            _ => input.Name.StartsWith("mtp", StringComparison.Ordinal) ? int.Parse(input.Name[3..^5], null) : -1,
        };
        var mask = depth < 0
            ? Fill<float>(columns, (row, s) => Inside(row, s) ? 1 : 0)
            : Fill<float>(columns, (row, s) => row < Inputs.Rows && s < Inputs.Columns - 1 - depth ? 1 : 0);
        return torch.tensor(mask).reshape(Rows, columns);
    }

    private T[] Fill<T>(int columns, Func<int, int, T> at)
        => [.. Enumerable.Range(0, Rows * columns).Select(i => at(i / columns, i % columns))];

    private bool Inside(int row, int s)
        => row < Inputs.Rows ? s < Inputs.Columns
            : Generated is { } g && row - Inputs.Rows < g.Rows && s < g.Columns;

    private long Id(int row, int s) => row < Inputs.Rows ? Inputs[row, s] : Generated![row - Inputs.Rows, s];

    private static bool Begins(ReferenceIds whole, ReferenceIds start)
        => Enumerable.Range(0, start.Rows).All(row => Enumerable.Range(0, start.Columns).All(s => whole[row, s] == start[row, s]));

    private static int Up(int n, int multiple) => (n + multiple - 1) / multiple * multiple;

    private static DiagnosticException Malformed(SafeTensorsFile file, string what)
        => DiagnosticException.Of(
            Codes.ReferenceMalformed,
            file.Path,
            what,
            "a reference holds input_ids I64 [batch, sequence] and what another implementation computes from them");

    /// Ids that end generation, of config.json; none where it names none.
    public static IReadOnlyList<long> Ends(string folder)
    {
        using var json = JsonDocument.Parse(File.ReadAllText(System.IO.Path.Combine(folder, "config.json")));
        return json.RootElement.TryGetProperty("eos_token_id", out var ends)
            ? ends.ValueKind switch
            {
                JsonValueKind.Number => [ends.GetInt64()],
                JsonValueKind.Array => [.. ends.EnumerateArray().Where(e => e.ValueKind == JsonValueKind.Number).Select(e => e.GetInt64())],
                _ => [],
            }
            : [];
    }
}
