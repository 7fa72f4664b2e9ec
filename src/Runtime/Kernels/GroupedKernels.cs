// Matrix products of routed rows with the weights of their experts, one product per expert that has rows.
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Kernels;

// Blocks of rows that are filled up are for products that take whole blocks; those here take the rows that there are, so that zeros
// cost nothing.
internal static unsafe class GroupedKernels
{
    /// <summary>x[rows k], w[E n k], route -> out[rows n]; transposed: w[E k n]. Trailing dims are merged.</summary>
    public static void GroupedMatMul(in KernelCall call)
    {
        Tensor x = call.In(0), w = call.In(1);
        var route = call.Route(2);
        var transposed = call.Int(0) != 0;
        var target = call.Out().Fill(Checked(route, x));
        if (route.Rows == 0)
            return;
        var type = Products.TypeOf(x.dtype, w.dtype, target.dtype);
        using var wideX = Products.Wide(x, type);
        using var wideW = Products.Wide(w, type);
        using var wideOut = target.dtype == type ? null : empty(target.shape, dtype: type);
        using var x2 = (wideX ?? x).view(route.Rows, -1);
        using var w3 = transposed
            ? (wideW ?? w).view(route.Experts, x2.shape[1], -1)
            : (wideW ?? w).view(route.Experts, -1, x2.shape[1]);
        using var out2 = (wideOut ?? target).view(route.Rows, -1);
        for (var e = 0; e < route.Experts; e++)
        {
            if (route.Counts[e] == 0)
                continue;
            using var rows = x2.narrow(0, route.Offsets[e], route.Counts[e]);
            using var results = out2.narrow(0, route.Offsets[e], route.Counts[e]);
            using var weight = w3.select(0, e);
            using var turned = weight.t();
            results.addmm_(rows, transposed ? weight : turned, 0f, 1f).On(results);
        }

        if (wideOut is not null)
            target.copy_(wideOut).On(target);
        route.ClearPadding((byte*)target.Pointer(), target.ByteCount() / route.Rows);
    }

    /// <summary>dy[rows n], x[rows k], route -> dw[E n k]; zero for experts without rows.</summary>
    public static void GroupedWeightGrad(in KernelCall call)
    {
        Tensor dy = call.In(0), x = call.In(1);
        var route = call.Route(2);
        Checked(route, x);
        var target = call.Out().Fill();
        if (route.Rows == 0)
        {
            target.zero_().On(target);
            return;
        }

        var type = Products.TypeOf(dy.dtype, x.dtype, target.dtype);
        using var wideDy = Products.Wide(dy, type);
        using var wideX = Products.Wide(x, type);
        using var wideOut = target.dtype == type ? null : empty(target.shape, dtype: type);
        using var dy2 = (wideDy ?? dy).view(route.Rows, -1);
        using var x2 = (wideX ?? x).view(route.Rows, -1);
        using var out3 = (wideOut ?? target).view(route.Experts, dy2.shape[1], x2.shape[1]);
        for (var e = 0; e < route.Experts; e++)
        {
            using var grad = out3.select(0, e);
            if (route.Counts[e] == 0)
            {
                grad.zero_().On(grad);
                continue;
            }

            using var dyRows = dy2.narrow(0, route.Offsets[e], route.Counts[e]);
            using var xRows = x2.narrow(0, route.Offsets[e], route.Counts[e]);
            using var turned = dyRows.t();
            grad.addmm_(turned, xRows, 0f, 1f).On(grad);
        }

        if (wideOut is not null)
            target.copy_(wideOut).On(target);
    }

    private static int Checked(RowSet route, Tensor rows)
        => rows.shape[0] == route.Rows
            ? route.Rows
            : throw new InvalidOperationException($"{rows.shape[0]} rows, but the row set says {route.Rows}");
}
