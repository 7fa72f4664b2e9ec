// Writes the outputs of a collective from what its members brought, in member order: the same arithmetic over threads and processes.
using System.Diagnostics;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Collectives;

/// <summary>
/// One member's end of a collective whose parcels are all there. `addressed`: they hold this member's part only (Letters), not all
/// that the others brought.
/// </summary>
internal sealed class Finishing(CollectiveCall call, Exchange exchange, int me, int[] ranks, bool addressed = false)
{
    /// <summary>Parts of which a parcel consists, and mine among them.</summary>
    private int Parts => addressed ? 1 : exchange.Members;

    private int Part => addressed ? 0 : me;

    /// <summary>A bundle is one meeting: output i has the operand tuple of inputs that begins at i x arity.</summary>
    public void All()
    {
        if (!call.Kind.TakesTuples)
        {
            Finish(0, call.Outputs[0]);
            return;
        }

        var arity = call.Inputs.Count / call.Outputs.Count;
        for (var i = 0; i < call.Outputs.Count; i++)
            Finish(i * arity, call.Outputs[i]);
    }

    private void Finish(int i, SlotValue output)
    {
        var inputs = call.Inputs;
        switch (call.Kind)
        {
            case var kind when kind.IsRouteToExperts:
                output.Adopt(RowExchange.ToExperts(Routes(i), Part, Parts, output.Info.Padding));
                break;
            case var kind when kind.IsRowsToExperts:
                RowExchange.Collect(Values(i), Routes(i + 1), Part * inputs[i + 2].Rows.Experts, inputs[i + 2].Rows, output);
                break;
            case var kind when kind.IsRowsToTokens:
                RowExchange.Return(Values(i), Routes(i + 1), Part, inputs[i + 2].Rows, output);
                break;
            case Collective.Dispatch:
                {
                    var values = call.Outputs.Count;
                    var mine = inputs[values + 1].Rows;
                    FusedExchange.Tokens(Values(0), Routes(values), me * mine.Experts, mine, output);
                    if (values == 2)
                        FusedExchange.Probabilities(Values(1), Routes(values), me * mine.Experts, mine, call.Outputs[1]);
                    break;
                }

            case Collective.Combine { RanksPerNode: var perNode }:
                {
                    var values = call.Outputs.Count;
                    var mine = inputs[values + 1].Rows;
                    int[] nodes = [.. ranks.Select(r => r / perNode)];
                    FusedExchange.Sums(Values(0), Routes(values), nodes, Part, mine, output);
                    if (values == 2)
                        FusedExchange.Scattered(Values(1), Routes(values), Part, mine, call.Outputs[1]);
                    break;
                }

            case Collective.AllGather when exchange[0].Rows[i] is not null:
                output.Adopt(RowExchange.Joined(Routes(i), output.Info.Padding));
                break;
            case Collective.AllGather { Dim: < 3 } when output.Info.Routed:
                RowExchange.Collect(Values(i), Routes(i + 1), 0, inputs[i + 2].Rows, output);
                break;
            case Collective.ReduceScatter { Dim: < 3 } when output.Info.Routed:
                RowExchange.ReduceScatter(exchange, i, inputs[i + 1].Rows, inputs[i + 2].Rows, me, output);
                break;
            default:
                FinishDense(i, output);
                break;
        }
    }

    private void FinishDense(int i, SlotValue output)
    {
        switch (call.Kind)
        {
            case var kind when kind.IsAllReduceSum || kind.IsAllReduceMax:
                output.AdoptCopy(exchange.Reduced(i, kind.IsAllReduceMax));
                break;
            case Collective.AllGather { Dim: var dim }:
                Join(output, output.StorageDim(dim), Values(i), static (tensor, _, _) => tensor.alias(), 0);
                break;
            case Collective.ReduceScatter { Dim: var dim }:
                {
                    var storage = output.StorageDim(dim);
                    output.Adopt(Reduction.OfBlock(exchange, i, storage, Part, Block(i, storage)));
                    break;
                }

            case Collective.AllToAll { SplitDim: var split, JoinDim: var join }:
                {
                    var storage = output.StorageDim(split);
                    var length = Block(i, storage);
                    Join(output, output.StorageDim(join), Values(i), (tensor, s, mine) => tensor.narrow(s, mine * length, length), storage);
                    break;
                }

            case Collective.Recv when exchange[0].Rows[i] is { } rows:
                output.Adopt(rows);
                break;
            case Collective.Recv:
                output.AdoptCopy(exchange[0].Tensors[i]!);
                break;
            default:
                throw new UnreachableException($"no handler for {call.Kind}");
        }
    }

    private long Block(int i, int dim)
    {
        var (length, rest) = Math.DivRem(exchange[me].Tensors[i]!.shape[dim], Parts);
        return rest == 0 ? length : throw new InvalidOperationException($"{exchange[me].Tensors[i]!.shape[dim]} elements do not split over {Parts} ranks");
    }

    private void Join(SlotValue output, int dim, List<Tensor> values, Func<Tensor, int, int, Tensor> part, int split)
    {
        long total = 0, at = 0;
        foreach (var value in values)
        {
            using var block = part(value, split, Part);
            total += block.shape[dim];
        }

        using var first = part(values[0], split, Part);
        var target = output.FillLike(first);
        if (target.shape[dim] != total)
            throw new InvalidOperationException($"{total} elements arrived for {target.shape[dim]} places of {output.Info.Name}");
        foreach (var value in values)
        {
            using var block = part(value, split, Part);
            using var place = target.narrow(dim, at, block.shape[dim]);
            place.copy_(block).On(place);
            at += block.shape[dim];
        }
    }

    private List<Tensor> Values(int i) => [.. Enumerable.Range(0, exchange.Members).Select(m => exchange[m].Tensors[i]!)];

    private List<RowSet> Routes(int i) => [.. Enumerable.Range(0, exchange.Members).Select(m => exchange[m].Rows[i]!)];
}
