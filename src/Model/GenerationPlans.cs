// The two plans that generation runs: one reads prompts, one a token of each sequence; both keep latents in the same caches.

using DeepSeekGraph.Compiler;

namespace DeepSeekGraph.Models;

/// Plans of one model and mesh for up to `Batch` prompts of up to `PromptLength` tokens, `Places` tokens in all each.
public sealed record GenerationPlans(PlanSet Prefill, PlanSet Decode)
{
    /// Compiles both with the recipe's degrees, layout, dispatcher and precision; mistakes are thrown together as a
    /// DiagnosticException. The batch is rounded up to a multiple of the data parallel degree; sequences are not split
    /// (a decoding step has one token of each), and there is no virtual pipeline. Rows are exchanged
    /// between ranks of different tokens; where tensor parallel ranks cannot share the tokens, as in decoding, tokens are
    /// gathered instead (dispatcher allgather), which for so few is also less to send.
    public static GenerationPlans Compile(DeepSeekV3 model, Recipe recipe, int batch, int promptLength, int places)
    {
        if (batch < 1 || promptLength < 1 || places < promptLength)
        {
            throw DiagnosticException.Of(
                Codes.BatchIllegal,
                "generation",
                $"{batch} prompts of {promptLength} tokens in {places} places",
                "give 1 or more prompts and tokens, and at least as many places as tokens");
        }

        // objectives have no part in it, and padding is not routed
        model = model with { Config = model.Config.WithoutMtp(), Masked = true };
        recipe = recipe.WithMode(Mode.Generate).WithLayout(recipe.Layout.Replace("m", "", StringComparison.Ordinal))
            .WithSequenceParallel(false).WithVirtualPipeline(1).WithRecompute().WithRecomputeBudget(0);
        var data = Compilation.Mesh(recipe).Data;
        var each = (batch + data - 1) / data;
        return new(Of(promptLength, decoding: false), Of(1, decoding: true));

        PlanSet Of(int length, bool decoding)
        {
            var isShared = length % Math.Max(1, recipe.Tensor) == 0;
            return Compilation.Compile(
                model.DeclareGeneration(each * data, length, places, decoding),
                recipe.WithBatch(each * data, each, length)
                    .WithDispatcher(isShared ? recipe.Dispatcher : Dispatcher.AllGather)
                    .WithFacts(model.Facts));
        }
    }
}
