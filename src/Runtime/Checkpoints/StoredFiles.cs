// What a process says of its files of a checkpoint, or why it has none, as bytes.

using DeepSeekGraph.Runtime.Launch;

namespace DeepSeekGraph.Runtime.Checkpoints;

internal static class StoredFiles
{
    public static byte[] Pack(int process, IReadOnlyList<StoredFile> files, Exception? failure)
        => Packing.Pack(writer =>
        {
            writer.WriteBlob(failure is null ? [] : Fault.Of(process, failure).ToBytes());
            writer.Write(files.Count);
            foreach (var file in files)
            {
                writer.Write(file.Name);
                writer.Write(file.Bytes);
                writer.Write(file.Checksum);
            }
        });

    /// The files; throws the failure where there is one.
    public static IReadOnlyList<StoredFile> Unpack(byte[] bytes)
        => Packing.Unpack(bytes, reader =>
        {
            if (reader.ReadBlob() is { Length: > 0 } failure)
                throw Fault.Read(failure).ToException();
            var files = new StoredFile[reader.ReadCount()];
            for (var i = 0; i < files.Length; i++)
                files[i] = new StoredFile(reader.ReadString(), reader.ReadInt64(), reader.ReadString());
            return files;
        });
}
