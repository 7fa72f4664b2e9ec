// Messages between stages: a dense value as it is; routed rows and sets of them behind a header that says how many there are.
using System.Runtime.InteropServices;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>
/// A receiver knows the extents of dense values from its plan. For what is routed its host waits for the header, once a message, then asks for
/// as much as there is. A header has Fixed integers, then counts of experts: of those by which a set is known, for each member.
/// </summary>
internal static class NcclMessages
{
    private const int Rows = 0, Tokens = 1, Experts = 2, Width = 3, Padding = 4, Members = 5, Fixed = 6;

    /// <summary>Integers of the header in front of a value of the slot, in a job of `ranks` ranks; 0: none.</summary>
    public static int Header(SlotInfo slot, int ranks) => slot.Routed ? Fixed + (ranks * slot.Extents[2]) : 0;

    public static void Send(INcclCalls nccl, NcclLane lane, int peer, SlotValue input, int ranks, NcclLaunch launch)
    {
        var ints = new int[Header(input.Info, ranks)];
        if (!input.HoldsRows)
        {
            var value = input.Tensor;
            if (ints.Length > 0)
                ints[Rows] = (int)value.shape[0];
            Put(launch.Read(value), value.ByteCount());
        }
        else
        {
            var set = input.DeviceRows;
            (ints[Rows], ints[Tokens], ints[Experts], ints[Width], ints[Padding]) = (set.Rows, set.Tokens, set.Experts, set.Width, set.Padding);
            var counts = set.Host is null ? [] : set.Host.ByToken ? [set.Host.Counts] : set.Host.MemberCounts;
            ints[Members] = counts.Length;
            for (var member = 0; member < counts.Length; member++)
                counts[member].CopyTo(ints, Fixed + (member * set.Experts));
            if (set.ByToken)
            {
                foreach (var index in (Tensor[])[set.Counts, set.Offsets, set.Flat, set.RowOf])
                    Put(launch.Read(index), index.ByteCount());
            }
        }

        if (ints.Length > 0)
        {
            var header = empty(ints.Length, dtype: ScalarType.Int32, device: input.Device);
            nccl.Rows.FromHost(ints, NcclLaunch.Address(header));
            var (at, bytes) = (launch.Own(header), header.ByteCount());
            launch.Group.Add(stream => nccl.Send(lane.Communicator, at, bytes, peer, stream));
        }

        // two groups, as the receiver has them
        void Put(nint at, long bytes)
        {
            if (bytes > 0)
                (ints.Length > 0 ? launch.Second : launch.Group).Add(stream => nccl.Send(lane.Communicator, at, bytes, peer, stream));
        }
    }

    /// <summary>`host`: pinned memory for the header where there is one.</summary>
    public static void Receive(INcclCalls nccl, NcclLane lane, int peer, SlotValue output, int ranks, nint host, NcclLaunch launch)
    {
        var length = Header(output.Info, ranks);
        if (length == 0)
        {
            Get(output.Fill(), launch.Group);
            return;
        }

        var header = empty(length, dtype: ScalarType.Int32, device: output.Device);
        var (at, headerBytes) = (launch.Own(header), header.ByteCount());
        launch.Group.Add(stream => nccl.Receive(lane.Communicator, at, headerBytes, peer, stream));
        launch.ToHost.Add(stream => nccl.ToHost(at, host, headerBytes, stream));
        launch.Rest = () =>
        {
            var ints = new int[length];
            Marshal.Copy(host, ints, 0, length);
            if (ints[Experts] == 0)
            {
                Get(output.Fill(ints[Rows]), launch.Second);
                return;
            }

            var (experts, members) = (ints[Experts], ints[Members]);
            var known = members == 0
                ? null
                : RowSet.FromMembers([.. Enumerable.Range(0, members).Select(m => ints[(Fixed + (m * experts))..(Fixed + ((m + 1) * experts))])], ints[Padding]);
            if (ints[Tokens] > 0)
                output.Adopt(ByToken(ints, known));
            else
            {
                var set = known ?? throw new InvalidOperationException($"how many rows {output.Info.Name} has was not told");
                output.Adopt(DeviceRows.ByExpert(set, output.Device, (values, tensor) => nccl.Rows.FromHost(values, NcclLaunch.Address(tensor))));
            }
        };

        DeviceRows ByToken(int[] ints, RowSet? known)
        {
            var set = new DeviceRows(
                ints[Rows], ints[Tokens], ints[Experts], ints[Width], ints[Padding],
                Index(ints[Experts]), Index(ints[Experts] + 1), Index(ints[Rows]), Index(ints[Tokens], ints[Width]))
            { Host = known };
            foreach (var index in (Tensor[])[set.Counts, set.Offsets, set.Flat, set.RowOf])
                Get(index, launch.Second);
            return set;
        }

        Tensor Index(params long[] shape) => empty(shape, dtype: ScalarType.Int32, device: output.Device);

        void Get(Tensor target, List<System.Action<nint>> group)
        {
            var (to, bytes) = (NcclLaunch.Address(target), target.ByteCount());
            if (bytes > 0)
                group.Add(stream => nccl.Receive(lane.Communicator, to, bytes, peer, stream));
        }
    }
}
