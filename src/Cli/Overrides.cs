// --set KEY=VALUE: every setting of a job by its dotted name, in our words or Megatron's.

using DeepSeekGraph.Compiler;
using DeepSeekGraph.Models;

namespace DeepSeekGraph.Cli;

internal static class Overrides
{
    private const string RecipePart = "recipe.";
    private const string OptimizerPart = "optimizer.";
    private const string ModelPart = "model.";
    private const string TrainingPart = "training.";

    /// Megatron's word -> ours.
    private static readonly Dictionary<string, string> Megatron = new(StringComparer.Ordinal)
    {
        ["recipe.tensor_model_parallel_size"] = "recipe.tensor",
        ["recipe.pipeline_model_parallel_size"] = "recipe.pipeline",
        ["recipe.context_parallel_size"] = "recipe.context",
        ["recipe.expert_model_parallel_size"] = "recipe.expert",
        ["recipe.expert_tensor_parallel_size"] = "recipe.expert_tensor",
        ["recipe.virtual_pipeline_model_parallel_size"] = "recipe.virtual_pipeline",
        ["recipe.microbatch_group_size_per_vp_stage"] = "recipe.microbatch_group",
        ["recipe.pipeline_model_parallel_layout"] = "recipe.layout",
        ["recipe.moe_token_dispatcher_type"] = "recipe.dispatcher",
        ["optimizer.adam_beta1"] = "optimizer.beta1",
        ["optimizer.adam_beta2"] = "optimizer.beta2",
        ["optimizer.adam_eps"] = "optimizer.eps",
        ["model.num_layers"] = "model.num_hidden_layers",
        ["model.ffn_hidden_size"] = "model.intermediate_size",
        ["model.qk_head_dim"] = "model.qk_nope_head_dim",
        ["model.qk_pos_emb_head_dim"] = "model.qk_rope_head_dim",
        ["model.num_moe_experts"] = "model.n_routed_experts",
        ["model.moe_ffn_hidden_size"] = "model.moe_intermediate_size",
        ["model.moe_router_topk"] = "model.num_experts_per_tok",
        ["model.moe_router_num_groups"] = "model.n_group",
        ["model.moe_router_group_topk"] = "model.topk_group",
        ["model.moe_router_score_function"] = "model.scoring_func",
        ["model.moe_router_topk_scaling_factor"] = "model.routed_scaling_factor",
        ["model.moe_router_bias_update_rate"] = "model.bias_update_speed",
        ["model.moe_aux_loss_coeff"] = "model.seq_aux_loss_alpha",
        ["model.mtp_num_layers"] = "model.num_nextn_predict_layers",
        ["model.rotary_base"] = "model.rope_theta",
        ["model.layernorm_epsilon"] = "model.rms_norm_eps",
        ["model.init_method_std"] = "model.initializer_range",
    };

    /// Megatron's choice -> ours, where it says with two settings what one says here.
    private static readonly Dictionary<string, string> MegatronChoices = new(StringComparer.Ordinal)
    {
        ["recipe.attention_backend=unfused"] = "recipe.attention_backend=exact",
        ["optimizer.store_param_remainders=true"] = "optimizer.main_params_dtype=remainder",
        ["optimizer.store_param_remainders=false"] = "optimizer.main_params_dtype=fp32",
    };

    /// Does this assignment choose the element type of matrices?
    public static bool IsDType(string assignment)
        => assignment.StartsWith("recipe.dtype=", StringComparison.Ordinal);

    /// Is this about a run, not about a plan?
    public static bool IsTraining(string assignment) => assignment.StartsWith(TrainingPart, StringComparison.Ordinal);

    /// The job with every assignment carried out, in order; DSG0904 for an unknown key, DSG0902 for a value it does not take.
    public static NamedRecipe Apply(NamedRecipe job, IEnumerable<string> assignments)
        => assignments.Aggregate(job, Assign);

    /// Dotted key and text of every setting of a job, as shown and set.
    public static IEnumerable<RecordField> All(NamedRecipe job)
    {
        foreach (var setting in RecipeSettings.all)
            yield return new RecordField(KeyOf(setting), typeof(string), setting.Value(job.Recipe));
        foreach (var field in RecordFields.Of(job.Config, ModelPart))
            yield return field;
        foreach (var field in RecordFields.Of(job.Training, TrainingPart))
            yield return field;
    }

    private static string KeyOf(Setting setting)
        => setting.Key.StartsWith(OptimizerPart, StringComparison.Ordinal) ? setting.Key : RecipePart + setting.Key;

    private static NamedRecipe Assign(NamedRecipe job, string assignment)
    {
        if (MegatronChoices.GetValueOrDefault(assignment, assignment).Split('=', 2) is not [var word, var text])
        {
            throw DiagnosticException.Of(
                Codes.OptionValue, "--set", $"'{assignment}' is no KEY=VALUE", "such as --set model.num_layers=12");
        }

        var key = Megatron.GetValueOrDefault(word, word);
        if (RecipeSettings.all.FirstOrDefault(s => KeyOf(s) == key) is { } setting)
        {
            return setting.TryChange(job.Recipe, text, out var recipe)
                ? job with { Recipe = recipe }
                : throw Wrong(word, text, setting.Values);
        }

        var field = All(job).FirstOrDefault(f => f.Key == key) ?? Part(key) ?? throw Unknown(job, word);
        if (key.StartsWith(ModelPart, StringComparison.Ordinal))
        {
            return RecordFields.With(job.Config, key[ModelPart.Length..], text) is { } config
                ? job with { Config = config }
                : throw Wrong(word, text, field.Values);
        }

        return RecordFields.With(job.Training, key[TrainingPart.Length..], text) is { } training
            ? job with { Training = training }
            : throw Wrong(word, text, field.Values);
    }

    /// Settings of YaRN can be given where there is none yet, and it can be taken away where there is one.
    private static RecordField? Part(string key)
        => key == "model.rope_scaling"
            ? new RecordField(key, typeof(YarnScaling), null)
            : RecordFields.Of(new YarnScaling(), "model.rope_scaling.").FirstOrDefault(f => f.Key == key);

    private static DiagnosticException Wrong(string key, string text, string values)
        => DiagnosticException.Of(
            Codes.OptionValue, $"--set {key}", $"'{text}' is no value for '{key}'", $"give {values}");

    private static DiagnosticException Unknown(NamedRecipe job, string key)
        => DiagnosticException.Of(
            Codes.UnknownSetting,
            "--set",
            $"there is no setting '{key}'",
            $"{Nearest.Help(key, All(job).Select(f => f.Key).Concat(Megatron.Keys).Concat(MegatronChoices.Keys))};"
                + $" dsg recipes show {job.Name} lists all");
}
