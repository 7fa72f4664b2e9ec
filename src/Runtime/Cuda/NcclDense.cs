// Dense collectives as calls of NCCL: sums, gathers, scatters and all-to-alls along any dim.
using System.Diagnostics;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>
/// Where the dim that is cut or joined is the outermost, NCCL reads and writes the slots themselves; else blocks are copied together on
/// stream 0. Sums are NCCL's, in its order: bf16 is rounded after each addition of a member, which for two members is once.
/// </summary>
internal static class NcclDense
{
    /// <summary>Adds the calls for one value.</summary>
    public static void Add(INcclCalls nccl, NcclLane lane, Collective kind, SlotValue input, SlotValue output, NcclLaunch launch)
    {
        var value = input.Tensor;
        var (comm, n) = (lane.Communicator, lane.Members.Ranks.Length);
        if (comm == 0)
        {
            output.AdoptCopy(value);
            launch.IsPacked = true;
            return;
        }

        switch (kind)
        {
            case var _ when kind.IsAllReduceSum || kind.IsAllReduceMax:
                {
                    var max = kind.IsAllReduceMax;
                    var (from, count, type) = (launch.Read(value), value.numel(), value.dtype);
                    var to = Target(output, value.shape, type, launch);
                    launch.Group.Add(stream => nccl.AllReduce(comm, from, to, count, type, max, stream));
                    break;
                }

            case Collective.AllGather { Dim: var dim }:
                {
                    var storage = output.StorageDim(dim);
                    var (from, bytes) = (launch.Read(value), value.ByteCount());
                    var shape = Scaled(value.shape, storage, n, 1);
                    var to = Joined(output, shape, storage, n, value, launch);
                    launch.Group.Add(stream => nccl.AllGather(comm, from, to, bytes, stream));
                    break;
                }

            case Collective.ReduceScatter { Dim: var dim }:
                {
                    var storage = output.StorageDim(dim);
                    var (from, count, type) = (Blocks(value, storage, n, launch), value.numel() / n, value.dtype);
                    var to = Target(output, Scaled(value.shape, storage, 1, n), type, launch);
                    launch.Group.Add(stream => nccl.ReduceScatter(comm, from, to, count, type, stream));
                    break;
                }

            case Collective.AllToAll { SplitDim: var split, JoinDim: var join }:
                {
                    var (cut, at) = (output.StorageDim(split), output.StorageDim(join));
                    var from = Blocks(value, cut, n, launch);
                    var bytes = value.ByteCount() / n;
                    var to = Joined(output, Scaled(Scaled(value.shape, cut, 1, n), at, n, 1), at, n, value, launch);
                    Exchange(nccl, lane, launch, peer => (from + (peer * (nint)bytes), bytes), peer => (to + (peer * (nint)bytes), bytes));
                    break;
                }

            default:
                throw new UnreachableException($"{kind} is not dense");
        }
    }

    /// <summary>Something to and from every member: what goes to the rank itself is copied. Nothing of no bytes is sent.</summary>
    public static void Exchange(
        INcclCalls nccl, NcclLane lane, NcclLaunch launch, Func<int, (nint At, long Bytes)> from, Func<int, (nint At, long Bytes)> to)
    {
        var (ranks, me) = lane.Members;
        for (var peer = 0; peer < ranks.Length; peer++)
        {
            var (other, (source, sent), (target, received)) = (peer, from(peer), to(peer));
            if (peer == me)
            {
                if (sent > 0)
                    launch.Copies.Add(stream => nccl.Copy(source, target, sent, stream));
                continue;
            }

            if (sent > 0)
                launch.Group.Add(stream => nccl.Send(lane.Communicator, source, sent, other, stream));
            if (received > 0)
                launch.Group.Add(stream => nccl.Receive(lane.Communicator, target, received, other, stream));
        }
    }

    /// <summary>The address of the n blocks of a dim, one behind the other.</summary>
    private static nint Blocks(Tensor value, int dim, int n, NcclLaunch launch)
    {
        if (value.shape[dim] % n != 0)
            throw new InvalidOperationException($"{value.shape[dim]} elements do not split over {n} ranks");
        if (DenseLayout.IsOutermost(value.shape, dim))
            return launch.Read(value);
        using var blocks = DenseLayout.Blocks(value, dim, n);
        launch.IsPacked = true;
        return launch.Read(blocks);
    }

    /// <summary>Room for a result of the shape and type: the slot's own, or a tensor that is converted into it at the end.</summary>
    private static nint Target(SlotValue output, long[] shape, ScalarType type, NcclLaunch launch)
    {
        if (output.ScalarType == type)
            return NcclLaunch.Address(Filled(output, shape));
        var wide = empty(shape, dtype: type, device: output.Device);
        launch.After.Add(() => output.AdoptCopy(wide));
        return launch.Own(wide);
    }

    /// <summary>Room for n blocks, which stand side by side along a dim of the slot at the end.</summary>
    private static nint Joined(SlotValue output, long[] shape, int dim, int n, Tensor like, NcclLaunch launch)
    {
        if (output.ScalarType != like.dtype)
            throw new InvalidOperationException($"slot {output.Info.Name} has elements of type {output.ScalarType}, the values {like.dtype}");
        var target = Filled(output, shape);
        if (DenseLayout.IsOutermost(shape, dim))
            return NcclLaunch.Address(target);
        var blocks = empty(target.numel(), dtype: like.dtype, device: like.device);
        launch.After.Add(() => DenseLayout.Join(blocks, target, dim, n));
        return launch.Own(blocks);
    }

    private static Tensor Filled(SlotValue output, long[] shape)
    {
        var target = output.Info.Routed ? output.Fill((int)shape[0]) : output.Fill();
        return target.shape.AsSpan().SequenceEqual(shape)
            ? target
            : throw new InvalidOperationException(
                $"[{string.Join(", ", shape)}] elements arrive for [{string.Join(", ", target.shape)}] places of {output.Info.Name}");
    }

    private static long[] Scaled(long[] shape, int dim, long by, long over)
    {
        var scaled = (long[])shape.Clone();
        scaled[dim] = scaled[dim] * by / over;
        return scaled;
    }
}
