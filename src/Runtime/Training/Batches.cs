// Where the rows of a step's global batch come from, and how a rank gets its part of a microbatch.
using System.Runtime.InteropServices;
using DeepSeekGraph.Runtime.Data;
using DeepSeekGraph.Runtime.Execution;
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using DeepSeekGraph.Runtime.Parameters;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Training;

/// <summary>
/// A global batch: tokens [Rows, Columns]; masks [Rows, sequence length], null where every position counts. Every depth of
/// multi-token prediction has the mask MtpMask; TokenMask is 0 for tokens that go to no routed expert.
/// </summary>
public sealed record TrainingBatch(
    int Rows, int Columns, long[] Tokens, float[]? LossMask = null, float[]? MtpMask = null, float[]? TokenMask = null);

/// <summary>Global batches by step, from 0; equal calls give equal batches.</summary>
public interface IBatchSource
{
    TrainingBatch Get(long step);
}

/// <summary>The batches of a corpus. A run that is resumed after `doneSteps` begins behind the `doneSequences` that those have read.</summary>
public sealed class SampledBatches(BatchSampler sampler, long doneSteps = 0, long doneSequences = 0) : IBatchSource
{
    public TrainingBatch Get(long step)
    {
        var batch = sampler.From(checked(doneSequences + ((step - doneSteps) * sampler.Batch)), step);
        return new TrainingBatch(batch.Rows, batch.Columns, batch.Tokens);
    }
}

/// <summary>Cuts a global batch: rows by microbatch first, then over the ranks as the input's layout says.</summary>
internal sealed class BatchInputs : IInputSource
{
    private readonly PlanSet _plan;
    private readonly TrainingBatch _batch;
    private readonly Dictionary<string, InputInfo> _inputs;

    public BatchInputs(PlanSet plan, TrainingBatch batch)
    {
        _plan = plan;
        _batch = batch;
        _inputs = plan.Inputs.ToDictionary(i => i.Name);
        if (batch.Rows != plan.Microbatches * plan.MicroBatch)
            throw new ArgumentException($"a batch of {batch.Rows} rows, the plan trains on {plan.Microbatches} x {plan.MicroBatch}", nameof(batch));
        Tokens = Count("loss_mask");
    }

    /// <summary>Valid positions of the global batch, for the main loss.</summary>
    public long Tokens { get; }

    /// <summary>Valid positions of the global batch by a mask of that name.</summary>
    public long Count(string mask)
        => MaskOf(mask) is { } given ? given.LongCount(m => m != 0) : (long)_batch.Rows * _plan.SeqLength;

    public void Fill(SlotInfo slot, RankContext rank, int microbatch, Tensor target)
    {
        var input = _inputs[slot.Name];
        var shard = Shard.Of(input.Extents, input.Layout, rank);
        var rows = input.Extents[0];
        var columns = input.Extents[1];
        switch (slot.Name)
        {
            case "tokens":
                {
                    var tokens = new long[rows * columns];
                    for (var row = 0; row < rows; row++)
                        _batch.Tokens.AsSpan(((microbatch * rows) + row) * _batch.Columns, columns).CopyTo(tokens.AsSpan(row * columns));
                    shard.CopyFrom<long>(tokens, target);
                    break;
                }

            default:
                FillMask(MaskOf(slot.Name));
                break;
        }

        void FillMask(float[]? mask)
        {
            if (mask is not null)
                shard.CopyFrom<float>(mask.AsSpan(microbatch * rows * columns, rows * columns), target);
            else
            {
                using var one = (TorchSharp.Scalar)1f;
                target.fill_(one).On(target);
            }
        }
    }

    /// mtp_mask, mtp2_mask, ...: by depth.
    private float[]? MaskOf(string name)
        => name == "loss_mask" ? _batch.LossMask
            : name == "token_mask" ? _batch.TokenMask
            : name.StartsWith("mtp", StringComparison.Ordinal) && name.EndsWith("_mask", StringComparison.Ordinal)
                && name[3..^5].All(char.IsAsciiDigit) ? _batch.MtpMask
            : throw new InvalidOperationException(
                $"the plan wants an input '{name}', the data has tokens, loss_mask, token_mask and a mask of each depth of multi-token prediction (mtp_mask)");
}

/// <summary>Inputs given as whole tensors, one dictionary a microbatch.</summary>
internal sealed class TensorInputs(PlanSet plan, IReadOnlyList<IReadOnlyDictionary<string, Tensor>> microbatches) : IInputSource
{
    private readonly Dictionary<string, InputInfo> _inputs = plan.Inputs.ToDictionary(i => i.Name);

    public void Fill(SlotInfo slot, RankContext rank, int microbatch, Tensor target)
    {
        var input = _inputs[slot.Name];
        using var part = Shard.Of(input.Extents, input.Layout, rank).View(microbatches[microbatch][slot.Name]);
        target.copy_(part).On(target);
    }

    /// <summary>Non-zero elements of a mask over all microbatches; 0 when it is not given.</summary>
    public unsafe long Count(string mask)
    {
        long count = 0;
        foreach (var inputs in microbatches)
        {
            if (!inputs.TryGetValue(mask, out var tensor))
                continue;
            using var floats = tensor.to_type(ScalarType.Float32);
            using var whole = floats.contiguous();
            foreach (var value in MemoryMarshal.CreateReadOnlySpan(ref *(float*)whole.Pointer(), (int)whole.numel()))
                count += value != 0 ? 1 : 0;
        }

        return count;
    }
}
