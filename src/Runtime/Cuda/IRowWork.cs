// What collectives do with routed rows in a rank's own memory: on a GPU by its kernels, in the processor's memory by loops.
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>
/// Everything but Move happens on stream 0. `flat` says of each row to which token it belongs, as token * per + something below `per`, and -1
/// where there is none; `rowOf`, [tokens, width], lists the rows of each token, then -1.
/// </summary>
internal interface IRowWork
{
    /// <summary>Integers into this device's memory; `values` may change as soon as this returns.</summary>
    void FromHost(ReadOnlySpan<int> values, nint to);

    /// <summary>Rows of one or two values from range to range, on a stream; `tables` is the address of the integers that the table is of.</summary>
    void Move(nint tables, RowTable table, ReadOnlySpan<MovedRows> values, nint stream);

    /// <summary>The rows that a mask [tokens, columns] of bytes chooses, `width` a token at most, column by column without blocks.</summary>
    DeviceRows Route(Tensor mask, int width);

    /// <summary>Which of `ranks` ranks, among whom the experts are split, have experts of a token: bytes [tokens, ranks].</summary>
    Tensor Reach(DeviceRows route, int ranks);

    /// <summary>
    /// Where the token of each row lies at the rank of its expert, and the how manieth of the token's rows there it is: place * width +
    /// ordinal, [rows] i32. `sent` are tokens as rows of ranks; added to `shift` of the rank, their row is the place.
    /// </summary>
    Tensor Places(DeviceRows route, DeviceRows sent, int[] shift, int width);

    /// <summary>The rows of `tokens` tokens out of `flat`: [tokens, per] i32, where `flat` says token * per + ordinal.</summary>
    Tensor RowOf(Tensor flat, long tokens, int per);

    /// <summary>tokens[tokens h] -> rows[rows h], zero where there is no token.</summary>
    void Gather(Tensor tokens, Tensor flat, int per, Tensor rows);

    /// <summary>rows[rows h] -> tokens[tokens h]: a token's rows are added in the order of rowOf, in fp32, and rounded once.</summary>
    void Sum(Tensor rows, Tensor rowOf, Tensor tokens);

    /// <summary>The same, where rows came from ranks: added inside each node (`nodes` has that of each rank), rounded, then over nodes.</summary>
    void SumByNode(Tensor rows, DeviceRows sent, int[] nodes, Tensor tokens);

    /// <summary>p[tokens per] -> rows[rows] by `flat`, fp32; zero where there is no token.</summary>
    void GatherOne(Tensor p, Tensor flat, Tensor rows);

    /// <summary>rows[rows] -> p[tokens per], fp32; zero where nothing is routed.</summary>
    void ScatterOne(Tensor rows, Tensor flat, Tensor p);
}
