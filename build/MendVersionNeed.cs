// A build task: copies an ELF file and makes one of the symbol versions that it needs optional.
using System;
using System.IO;
using System.Text;
using Microsoft.Build.Framework;
using Microsoft.Build.Utilities;

/// <summary>
/// libLibTorchSharp.so asks for GLIBCXX_3.4.32 only through a marker that no relocation uses. With VER_FLG_WEAK on
/// that entry of .gnu.version_r the loader no longer refuses the file on systems with an older libstdc++.
/// </summary>
public class MendVersionNeed : Task
{
    const uint VersionNeedSection = 0x6ffffffe;
    const byte Weak = 2;

    [Required] public string Source { get; set; }
    [Required] public string Destination { get; set; }
    [Required] public string Version { get; set; }

    public override bool Execute()
    {
        var elf = File.ReadAllBytes(Source);
        if (BitConverter.ToUInt32(elf, 0) != 0x464c457f || elf[4] != 2 || elf[5] != 1)
        {
            Log.LogError("{0} is not a 64-bit little-endian ELF file", Source);
            return false;
        }

        // Elf64_Ehdr: e_shoff at 40, e_shentsize at 58, e_shnum at 60.
        for (var i = 0; i < BitConverter.ToUInt16(elf, 60); i++)
        {
            var section = SectionHeader(elf, i);
            if (BitConverter.ToUInt32(elf, section + 4) == VersionNeedSection)
            {
                MakeWeak(elf, section);
            }
        }

        Directory.CreateDirectory(Path.GetDirectoryName(Destination));
        File.WriteAllBytes(Destination, elf);
        return true;
    }

    // Elf64_Verneed: vn_cnt at 2, vn_aux at 8, vn_next at 12. Elf64_Vernaux: vna_flags at 4, vna_name at 8, vna_next at 12.
    void MakeWeak(byte[] elf, int section)
    {
        var names = Offset(elf, SectionHeader(elf, BitConverter.ToInt32(elf, section + 40)));
        var need = Offset(elf, section);
        for (var n = BitConverter.ToInt32(elf, section + 44); n > 0; n--)
        {
            var entry = need + BitConverter.ToInt32(elf, need + 8);
            for (var count = BitConverter.ToUInt16(elf, need + 2); count > 0; count--)
            {
                if (Text(elf, names + BitConverter.ToInt32(elf, entry + 8)) == Version)
                {
                    elf[entry + 4] |= Weak;
                }

                entry += BitConverter.ToInt32(elf, entry + 12);
            }

            need += BitConverter.ToInt32(elf, need + 12);
        }
    }

    static int SectionHeader(byte[] elf, int index) =>
        (int)BitConverter.ToInt64(elf, 40) + index * BitConverter.ToUInt16(elf, 58);

    static int Offset(byte[] elf, int section) => (int)BitConverter.ToInt64(elf, section + 24);

    static string Text(byte[] elf, int start) =>
        Encoding.ASCII.GetString(elf, start, Array.IndexOf(elf, (byte)0, start) - start);
}
