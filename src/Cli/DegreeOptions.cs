// The degrees of a layout as options, for verbs whose recipe is their own.

using System.CommandLine;
using DeepSeekGraph.Compiler;

namespace DeepSeekGraph.Cli;

/// Degrees that are not given are 1; data: the smallest for which etp x ep divides tp x cp x dp.
internal sealed class DegreeOptions
{
    private readonly Option<int?> _tensor = JobOptions.Number("--tp", "Tensor parallel degree");
    private readonly Option<int?> _pipeline = JobOptions.Number("--pp", "Pipeline parallel degree: stages");
    private readonly Option<int?> _expert = JobOptions.Number("--ep", "Expert parallel degree");
    private readonly Option<int?> _data = JobOptions.Number(
        "--dp", "Data parallel degree; without, the smallest for which etp x ep divides tp x cp x dp");

    private readonly Option<int?> _expertTensor = JobOptions.Number("--etp", "Tensor parallel degree of the experts");
    private readonly Option<string?> _layout = new("--layout") { HelpName = "LAYOUT", Description = "What each stage holds, such as 'Et|tL'" };

    public void AddTo(Command command)
    {
        foreach (var option in (Option[])[_tensor, _pipeline, _expert, _data, _expertTensor, _layout])
            command.Add(option);
    }

    /// The recipe with the degrees and the layout that are given.
    public Recipe Over(Recipe recipe, ParseResult parse)
    {
        int Given(Option<int?> option) => JobOptions.Degree(parse, option) ?? 0;
        return recipe
            .WithParallelism(Given(_tensor), Given(_pipeline), Given(_expert), Given(_data))
            .WithExpertTensorParallel(Given(_expertTensor))
            .WithLayout(parse.GetValue(_layout) ?? "");
    }
}
