// Turns one XML documentation file into readable English, type by type.

using System.Xml;

namespace DeepSeekGraph.Runtime.Data;

/// The documentation of one type: its full name and a paragraph for each member that says something.
internal sealed record DocType(string Name, List<string> Members);

/// Reads safely: no DTD, no external files; a malformed file yields what came before the fault.
internal static class DocXml
{
    private static readonly XmlReaderSettings s_settings = new()
    {
        DtdProcessing = DtdProcessing.Prohibit,
        XmlResolver = null,
        IgnoreComments = true,
        IgnoreProcessingInstructions = true,
        MaxCharactersInDocument = 200_000_000,
    };

    /// Types in the order of the file; empty when the file is no documentation or cannot be read.
    public static List<DocType> Read(string path)
    {
        var types = new List<DocType>();
        try
        {
            using var reader = XmlReader.Create(path, s_settings);
            Read(reader, types);
        }
        catch (Exception e) when (e is XmlException or IOException or UnauthorizedAccessException)
        {
            // The default corpus is whatever this machine has; one bad file must not stop a run.
        }

        return types;
    }

    private static void Read(XmlReader reader, List<DocType> types)
    {
        while (reader.ReadToFollowing("member"))
        {
            if (reader.GetAttribute("name") is not [var kind, ':', .. var id] || reader.IsEmptyElement)
            {
                continue;
            }

            var bare = CrefName.WithoutArguments(id);
            var type = kind == 'T' ? bare : CrefName.Owner(bare);
            if (ReadMember(reader, kind == 'T', bare) is not { } text)
            {
                continue;
            }

            if (types.Count == 0 || types[^1].Name != CrefName.Plain(type))
            {
                types.Add(new DocType(CrefName.Plain(type), []));
            }

            types[^1].Members.Add(text);
        }
    }

    /// Leaves the reader at the member's end tag; null when nothing is said.
    private static string? ReadMember(XmlReader reader, bool isType, string name)
    {
        var text = new DocWriter();
        var parameters = new List<string>();
        var depth = reader.Depth;
        while (reader.Read() && reader.Depth > depth)
        {
            if (reader.NodeType != XmlNodeType.Element)
            {
                continue;
            }

            // The body of an element ends at its own end tag, so the next Read is a sibling.
            switch (reader.Name)
            {
                case "summary" or "remarks" or "value" or "example" or "code":
                    ReadBody(reader, text, "");
                    break;
                case "returns":
                    ReadBody(reader, text, "Returns: ");
                    break;
                case "param" or "typeparam":
                    var parameter = reader.GetAttribute("name") ?? "";
                    if (reader.Name == "param")
                    {
                        parameters.Add(parameter);
                    }

                    ReadBody(reader, text, $"{parameter}: ");
                    break;
                case "exception":
                    ReadBody(reader, text, $"Throws {CrefName.Short(reader.GetAttribute("cref") ?? "")}: ");
                    break;
                default:
                    SkipBody(reader);
                    break;
            }
        }

        if (text.IsEmpty)
        {
            return null;
        }

        if (isType)
        {
            return text.ToString();
        }

        var signature = parameters.Count > 0 ? $"({string.Join(", ", parameters)})" : "";
        return $"{CrefName.Short("M:" + name)}{signature}\n{text}";
    }

    private static void ReadBody(XmlReader reader, DocWriter text, string label)
    {
        if (reader.IsEmptyElement)
        {
            return;
        }

        text.BeginParagraph(label);
        var depth = reader.Depth;
        var code = reader.Name == "code";
        while (reader.Read() && reader.Depth > depth)
        {
            switch (reader.NodeType)
            {
                case XmlNodeType.Text or XmlNodeType.CDATA:
                case XmlNodeType.SignificantWhitespace or XmlNodeType.Whitespace:
                    text.Append(reader.Value, code);
                    break;
                case XmlNodeType.Element:
                    Inline(reader, text, ref code);
                    break;
                case XmlNodeType.EndElement:
                    code &= reader.Name != "code";
                    if (IsBlock(reader.Name))
                    {
                        text.Break();
                    }
                    else if (reader.Name == "term")
                    {
                        text.Append(": ", verbatim: false);
                    }

                    break;
                default:
                    break;
            }
        }

        text.EndParagraph();
    }

    private static void Inline(XmlReader reader, DocWriter text, ref bool code)
    {
        var empty = reader.IsEmptyElement;
        switch (reader.Name)
        {
            case "see" or "seealso" or "xref" or "paramref" or "typeparamref" when empty:
                text.Append(Reference(reader), verbatim: false);
                break;
            case "code" when !empty:
                // One word in <code> is a name in a sentence; lines of it are an example.
                code = true;
                break;
            case "script" or "devremarks":
                SkipBody(reader);
                break;
            case var name when IsBlock(name):
                text.Break();
                break;
            default:
                break;
        }
    }

    /// What an empty reference reads as: a short name, a keyword, or nothing.
    private static string Reference(XmlReader reader)
        => reader.GetAttribute("langword")
            ?? reader.GetAttribute("name")
            ?? (reader.GetAttribute("cref") is { } cref ? CrefName.Short(cref) : "");

    private static void SkipBody(XmlReader reader)
    {
        if (reader.IsEmptyElement)
        {
            return;
        }

        var depth = reader.Depth;
        while (reader.Read() && reader.Depth > depth)
        {
        }
    }

    private static bool IsBlock(string name)
        => name is "para" or "p" or "br" or "li" or "item" or "listheader" or "list" or "ul" or "div";
}
