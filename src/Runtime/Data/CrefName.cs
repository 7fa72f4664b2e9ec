// Reads names out of documentation ids.

using System.Text;

namespace DeepSeekGraph.Runtime.Data;

/// Names of documented things: "M:System.String.Format(System.String)" reads String.Format.
internal static class CrefName
{
    /// The id without its argument list.
    public static string WithoutArguments(string id)
        => id.IndexOf('(', StringComparison.Ordinal) is >= 0 and var at ? id[..at] : id;

    /// The type that owns a member.
    public static string Owner(string member)
        => member.LastIndexOf('.') is > 0 and var at ? member[..at] : member;

    /// Without marks of generic arity: List`1 is List.
    public static string Plain(string name)
    {
        var tick = name.IndexOf('`', StringComparison.Ordinal);
        if (tick < 0)
        {
            return name;
        }

        var plain = new StringBuilder(name.Length);
        for (var i = 0; i < name.Length; i++)
        {
            if (name[i] != '`')
            {
                plain.Append(name[i]);
                continue;
            }

            while (i + 1 < name.Length && (name[i + 1] == '`' || char.IsAsciiDigit(name[i + 1])))
            {
                i++;
            }
        }

        return plain.ToString();
    }

    /// The type alone, or type and member; a constructor reads "new Type".
    public static string Short(string cref)
    {
        var (kind, id) = cref is [var k, ':', .. var rest] ? (k, rest) : ('T', cref);
        var name = Plain(WithoutArguments(id)).Split('{')[0];
        var member = name.LastIndexOf('.');
        if (member < 0)
        {
            return name;
        }

        if (kind is 'T' or 'N' or '!')
        {
            return kind == 'T' ? name[(member + 1)..] : name;
        }

        var type = name.LastIndexOf('.', member - 1);
        if (name.EndsWith(".#ctor", StringComparison.Ordinal))
        {
            return "new " + name[(type + 1)..member];
        }

        return name[(type + 1)..].Replace('#', '.');
    }
}
