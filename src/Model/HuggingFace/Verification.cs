// Does the model, under any layout, compute what another implementation computed? Every item of a reference file is compared.

using DeepSeekGraph.Compiler;
using DeepSeekGraph.Runtime.Cuda;
using DeepSeekGraph.Runtime.Parameters;
using DeepSeekGraph.Runtime.Training;
using DeepSeekGraph.Runtime.Weights;
using TorchSharp;

namespace DeepSeekGraph.Models.HuggingFace;

/// One item compared: the largest difference, alone and over the largest magnitude of the reference. For tokens: how many
/// differ, and their share. Where the reference is all zero, the relative error is the absolute one.
public sealed record VerifiedItem(
    string Name, IReadOnlyList<long> Shape, double MaxAbs, double Relative, double Tolerance, string Remark = "")
{
    public bool IsWithin => Relative <= Tolerance;
}

/// What a comparison found; items of the file that nothing is compared with are named.
public sealed record VerificationResult(IReadOnlyList<VerifiedItem> Items, IReadOnlyList<string> NotCompared)
{
    public bool IsWithin => Items.All(item => item.IsWithin);
}

/// A comparison, compiled but not yet run.
public sealed class Verification : IDisposable
{
    /// Largest relative error where nothing else is said.
    public const double Float32Tolerance = 1e-4;

    /// The same for bf16, where near-ties send tokens to other experts: those differ by up to a third of the largest logit, and
    /// gradients of single experts by up to 0.6 of their largest element.
    public const double BFloat16Tolerance = 0.75;

    private const string GradientPrefix = "grad.";
    private static readonly string[] Given = ["input_ids", "prompt_ids", "mtp_scale"];

    private readonly AutoBridge _bridge;
    private readonly DeepSeekV3Config _config;
    private readonly SafeTensorsFile _reference;
    private readonly SafeTensorsFile? _gradients;
    private readonly ReferenceBatch _batch;
    private readonly double _tolerance;

    private Verification(
        AutoBridge bridge,
        DeepSeekV3Config config,
        SafeTensorsFile reference,
        SafeTensorsFile? gradients,
        ReferenceBatch batch,
        double tolerance,
        PlanSet plan)
        => (_bridge, _config, _reference, _gradients, _batch, _tolerance, Plan)
            = (bridge, config, reference, gradients, batch, tolerance, plan);

    /// What will run.
    public PlanSet Plan { get; }

    /// Reads the ids of a reference file and compiles the model for the recipe's degrees; its batch is the file's. Experts
    /// are chosen as Hugging Face does. DSG0712, and what reading and compiling refuse.
    public static Verification Prepare(
        AutoBridge bridge, string reference, string? gradients, Recipe recipe, double? tolerance = null)
    {
        SafeTensorsFile? file = null, grads = null;
        try
        {
            file = SafeTensorsFile.Open(reference);
            grads = gradients is null ? null : SafeTensorsFile.Open(gradients);

            // gradients are of total_loss where the file has one, else of the main loss alone
            var scale = file.Contains("mtp_scale") ? file.ReadFloat32("mtp_scale")[0]
                : file.Contains("total_loss") ? bridge.Config.MtpLossScalingFactor : 0;
            var config = bridge.Config.LikeHuggingFace().WithMtpLossScalingFactor(scale);
            var mesh = Compilation.Mesh(recipe);
            var blocks = mesh.Tensor * (mesh.Context > 1 ? 2 * mesh.Context : 1);
            var batch = ReferenceBatch.Read(file, config, mesh.Data, blocks);
            var plan = new DeepSeekV3(config) { Observe = true, Masked = true }
                .Compile(recipe.WithBatch(batch.Rows, batch.Rows / mesh.Data, batch.SeqLength));
            var usual = recipe.DType.IsFloat32 ? Float32Tolerance : BFloat16Tolerance;
            return new(bridge, config, file, grads, batch, tolerance ?? usual, plan);
        }
        catch
        {
            file?.Dispose();
            grads?.Dispose();
            throw;
        }
    }

    /// Loads the weights, runs forward and backward once, and compares.
    public async Task<VerificationResult> RunAsync(
        Executor executor = Executor.Interpreter, RankDevice? device = null, CancellationToken cancellationToken = default)
    {
        var options = new TrainerOptions { Weights = _bridge.Load, Executor = executor, Device = device ?? RankDevice.Cpu };
        var trainer = await Trainer.StartAsync(Plan, options, cancellationToken).ConfigureAwait(false);
        await using (trainer.ConfigureAwait(false))
        {
            var inputs = _batch.ToInputs(Plan);
            await trainer.ForwardBackwardAsync([inputs], null, cancellationToken).ConfigureAwait(false);
            foreach (var input in inputs.Values)
                input.Dispose();

            var items = new List<VerifiedItem>();
            var unknown = new List<string>();
            foreach (var name in _reference.Names.Except(Given))
            {
                if (Compare(trainer, name) is { } item)
                    items.Add(item);
                else
                    unknown.Add(name);
            }

            if (_gradients is not null)
                CompareGradients(trainer, items, unknown);
            return new(items, unknown);
        }
    }

    public void Dispose()
    {
        _reference.Dispose();
        _gradients?.Dispose();
    }

    private VerifiedItem? Compare(Trainer trainer, string name)
    {
        var extra = Enumerable.Range(1, _config.NumNextnPredictLayers)
            .Select(depth => depth == 1 ? "metric:mtp_loss" : $"metric:mtp{depth}_loss")
            .ToArray();
        return name switch
        {
            "loss" or "main_loss" => Loss(name, trainer.GatherMetric("metric:loss")),
            "mtp_loss" when extra.Length > 0 => Loss(name, extra.Average(trainer.GatherMetric)),
            "total_loss" when extra.Length > 0 => Loss(
                name,
                trainer.GatherMetric("metric:loss") + (_config.MtpLossScalingFactor * extra.Average(trainer.GatherMetric))),
            "generated_ids" when _batch.Generated is { } generated => Tokens(trainer, generated),
            _ => Observed(trainer, "observe:" + name) is { } ours ? Positions(name, ours) : null,
        };
    }

    private VerifiedItem Loss(string name, double ours)
        => Item(name, _reference.Info(name).Shape, [(float)ours], _reference.ReadFloat32(name));

    /// An output [rows, sequence, width], of which the reference has the first rows and positions.
    private VerifiedItem Positions(string name, torch.Tensor whole)
    {
        using (whole)
        {
            var theirs = _reference.Info(name).Shape;
            var ours = whole.shape;
            var fits = theirs.Count == 3 && theirs[0] == _batch.Inputs.Rows && theirs[1] <= _batch.Inputs.Columns && theirs[2] == ours[2];
            if (!fits)
                return new(name, theirs, double.PositiveInfinity, double.PositiveInfinity, _tolerance, $"ours is [{string.Join(", ", ours)}]");
            using var rows = whole.narrow(0, 0, theirs[0]);
            using var cut = rows.narrow(1, 0, theirs[1]);
            return Item(name, theirs, Floats(cut), _reference.ReadFloat32(name));
        }
    }

    /// Greedy decoding, by one pass over the reference's own sequences: they are ours if and only if each token behind the
    /// prompt is the most likely one after those before it. Behind a token that ends generation, nothing is compared. Where more than
    /// fp32's tolerance is given, of two logits nearer to each other than twice what ours differ from the reference's, either may be the larger one.
    private VerifiedItem Tokens(Trainer trainer, ReferenceIds generated)
    {
        using var whole = Observed(trainer, "observe:logits")!;
        using var best = whole.argmax(-1);
        var chosen = best.data<long>().ToArray();
        var ends = ReferenceBatch.Ends(_bridge.Folder);
        using var logits = whole.to_type(torch.ScalarType.Float32);
        var tie = _tolerance > Float32Tolerance && _reference.Names.Contains("logits") ? 2 * Positions("logits", whole.alias()).MaxAbs : 0;
        int compared = 0, differing = 0, ties = 0;
        var first = "";
        for (var row = 0; row < generated.Rows; row++)
        {
            for (var s = _batch.Prompt; s < generated.Columns; s++)
            {
                var ours = chosen[((_batch.Inputs.Rows + row) * _batch.SeqLength) + s - 1];
                compared++;
                if (ours != generated[row, s] && tie > 0 && Gap(ours, generated[row, s]) <= tie)
                    ties++;
                else if (ours != generated[row, s])
                {
                    differing++;
                    if (first == "")
                        first = $", first at row {row}, position {s}: {ours} instead of {generated[row, s]}";
                }

                if (ends.Contains(generated[row, s]))
                    break;

                double Gap(long most, long other)
                    => logits[_batch.Inputs.Rows + row, s - 1, most].item<float>() - logits[_batch.Inputs.Rows + row, s - 1, other].item<float>();
            }
        }

        return new(
            "generated_ids",
            [generated.Rows, generated.Columns],
            differing,
            (double)differing / compared,
            0,
            $"{compared - differing - ties} of {compared} tokens equal{(ties > 0 ? $", {ties} by near-ties" : "")}{first}");
    }

    private void CompareGradients(Trainer trainer, List<VerifiedItem> items, List<string> unknown)
    {
        var ours = trainer.GatherGradients();
        foreach (var name in _gradients!.Names)
        {
            var tensor = name.StartsWith(GradientPrefix, StringComparison.Ordinal) ? name[GradientPrefix.Length..] : "";
            if (_bridge.Weights.Map.Find(tensor) is not { } place || !ours.TryGetValue(place.Entry.Parameter, out var whole))
            {
                unknown.Add(name);
                continue;
            }

            using var flat = whole.reshape(-1);
            using var part = flat.narrow(0, place.Piece.Offset, place.Piece.Elements);
            items.Add(Item(name, _gradients.Info(name).Shape, Floats(part), _gradients.ReadFloat32(name)));
        }

        foreach (var gradient in ours.Values)
            gradient.Dispose();
    }

    private VerifiedItem Item(string name, IReadOnlyList<long> shape, float[] ours, float[] theirs)
    {
        if (ours.Length != theirs.Length)
            return new(name, shape, double.PositiveInfinity, double.PositiveInfinity, _tolerance, $"ours has {ours.Length} elements");
        double apart = 0, largest = 0;
        for (var i = 0; i < ours.Length; i++)
        {
            var difference = Math.Abs((double)ours[i] - theirs[i]);
            apart = Math.Max(apart, double.IsNaN(difference) ? double.PositiveInfinity : difference);
            largest = Math.Max(largest, Math.Abs((double)theirs[i]));
        }

        return new(name, shape, apart, largest > 0 ? apart / largest : apart, _tolerance);
    }

    /// An observed output [rows, sequence, width], whole; context parallelism keeps sequences in another order.
    private static torch.Tensor? Observed(Trainer trainer, string slot)
    {
        if (trainer.Ranks.FirstOrDefault(rank => rank.Find(slot) is not null) is not { } holder)
            return null;
        var whole = Gathering.Slot(trainer.Ranks, holder.Rank.Stage, slot);
        var context = trainer.Plan.Mesh.Context;
        if (context == 1)
            return whole;
        using (whole)
        {
            var length = (int)whole.shape[1];
            var places = new long[length];
            for (var s = 0; s < length; s++)
                places[ZigzagOrder.natural(context, length, s)] = s;
            using var order = torch.tensor(places);
            return whole.index_select(1, order);
        }
    }

    private static float[] Floats(torch.Tensor tensor)
    {
        using var wide = tensor.to_type(torch.ScalarType.Float32);
        using var whole = wide.contiguous();
        return whole.data<float>().ToArray();
    }
}
