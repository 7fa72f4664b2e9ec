// Numbers that one rank has and every process wants to know: the metrics of a step.
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Launch;

namespace DeepSeekGraph.Runtime.Training;

internal static class SharedNumbers
{
    /// <summary>For each place, the number of the last process that has one; null where none has.</summary>
    public static double?[] Of(IWorld world, double?[] mine)
        => world.Processes == 1
            ? mine
            : Read(world.Meet("metrics", Bytes(mine), all =>
            {
                var whole = new double?[mine.Length];
                foreach (var numbers in all.Select(Read))
                {
                    for (var i = 0; i < whole.Length && i < numbers.Length; i++)
                        whole[i] = numbers[i] ?? whole[i];
                }

                return Bytes(whole);
            }, world.Stop));

    private static byte[] Bytes(double?[] numbers)
        => Packing.Pack(writer =>
        {
            writer.Write(numbers.Length);
            foreach (var number in numbers)
            {
                writer.Write(number.HasValue);
                writer.Write(number ?? 0);
            }
        });

    private static double?[] Read(byte[] bytes)
        => Packing.Unpack(bytes, reader =>
        {
            var numbers = new double?[reader.ReadCount()];
            for (var i = 0; i < numbers.Length; i++)
            {
                var has = reader.ReadBoolean();
                var number = reader.ReadDouble();
                numbers[i] = has ? number : null;
            }

            return numbers;
        });
}
