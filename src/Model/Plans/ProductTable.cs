// Which matrix products of a plan run in fp8 and which stay, by weight and direction, with the blocks of both operands.

using System.Globalization;
using System.Text.Json.Nodes;
using DeepSeekGraph.Compiler;

namespace DeepSeekGraph.Models;

/// Products of equal weight (layer numbers left out), direction and operands; `Count`: launches in the programs of all stages.
public sealed record ProductRow(string Weight, string Direction, bool IsFp8, string First, string Second, int Count)
{
    /// "fp8", or the types of the operands.
    public string Precision => IsFp8 ? "fp8" : First == Second ? First : $"{First}, {Second}";

    internal JsonObject ToJson() => new()
    {
        ["weight"] = Weight,
        ["product"] = Direction,
        ["precision"] = Precision,
        ["operands"] = new JsonArray(First, Second),
        ["count"] = Count,
    };
}

/// Products of a plan, told apart by precision.
public static class ProductTable
{
    /// All products, those in fp8 first; empty for a plan without any in fp8.
    public static IReadOnlyList<ProductRow> Of(PlanSet plan)
    {
        var products = PlanProducts.list(plan);
        return products.Any(product => product.IsFp8)
            ? [.. products
                .GroupBy(p => (
                    Weight: PlanExplanation.General(p.Weight), p.Direction, p.IsFp8, First: Text(p.Operands[0]),
                    Second: Text(p.Operands[1])))
                .Select(same => new ProductRow(
                    same.Key.Weight, same.Key.Direction, same.Key.IsFp8, same.Key.First, same.Key.Second, same.Count()))
                .OrderBy(row => row.IsFp8 ? 0 : 1)
                .ThenBy(row => row.Weight, StringComparer.Ordinal)
                .ThenBy(row => row.Direction, StringComparer.Ordinal)]
            : [];
    }

    internal static TextTable AsTable(IReadOnlyList<ProductRow> rows) => new(
        "matrix products: fp8 is E4M3 in blocks, 1 x 128 and 128 x 1 of activations and gradients, 128 x 128 of weights",
        ["weight or module", "product", "precision", "first operand", "second operand", "launches"],
        [.. rows.Select(row => (string[])
        [
            row.Weight, row.Direction, row.Precision, row.First, row.Second,
            row.Count.ToString(CultureInfo.InvariantCulture),
        ])]);

    /// "128 x 128", "1 x 128 along hidden", "128 x 1 along seq", or the type of what was not rounded.
    private static string Text(ProductOperand operand)
    {
        var blocked = Enumerable.Range(0, operand.Blocks.Count).Where(dim => operand.Blocks[dim] > 1).ToArray();
        return operand.Blocks.Count == 0
            ? operand.DType.Name
            : blocked is [var one]
                ? (one == operand.Blocks.Count - 1 ? $"1 x {operand.Blocks[one]}" : $"{operand.Blocks[one]} x 1")
                    + $" along {operand.Axes[one]}"
                : string.Join(" x ", blocked.Select(dim => operand.Blocks[dim]));
    }
}
