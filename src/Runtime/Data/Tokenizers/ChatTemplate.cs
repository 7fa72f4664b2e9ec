// Chats as text: published templates are recognised and rendered by our own code; a template is never run.

using System.Security.Cryptography;
using System.Text;

namespace DeepSeekGraph.Runtime.Data.Tokenizers;

/// A call of a tool by the assistant; arguments are JSON as text.
public sealed record ChatToolCall(string Name, string Arguments, string Type = "function");

/// One message: role system, user, assistant or tool; an assistant has either content or calls. Names of tokens in a
/// content are tokens, as in Hugging Face: whoever takes content from strangers must look for them first.
public sealed record ChatMessage(string Role, string? Content, IReadOnlyList<ChatToolCall>? ToolCalls = null);

/// Templates by the SHA-256 of their Jinja source.
internal sealed class ChatTemplate
{
    private const string User = "<｜User｜>", Assistant = "<｜Assistant｜>", End = "<｜end▁of▁sentence｜>";
    private const string CallsBegin = "<｜tool▁calls▁begin｜>", CallsEnd = "<｜tool▁calls▁end｜>";
    private const string CallBegin = "<｜tool▁call▁begin｜>", CallEnd = "<｜tool▁call▁end｜>", Separator = "<｜tool▁sep｜>";
    private const string OutputsBegin = "<｜tool▁outputs▁begin｜>", OutputsEnd = "<｜tool▁outputs▁end｜>";
    private const string OutputBegin = "<｜tool▁output▁begin｜>", OutputEnd = "<｜tool▁output▁end｜>";

    public static ChatTemplate DeepSeekV3 { get; } = new();

    private static readonly Dictionary<string, ChatTemplate> s_known = new(StringComparer.Ordinal)
    {
        ["3b8267e54b67df6500f231ffa969955cc9d26b3444a291ced4eb96ca7d3ca1ea"] = DeepSeekV3,
    };

    private ChatTemplate()
    {
    }

    /// The template of this source; DSG0833 where it is another, or none.
    public static ChatTemplate Recognise(string? source, string path)
    {
        var hash = source is null ? "" : Convert.ToHexStringLower(SHA256.HashData(Encoding.UTF8.GetBytes(source)));
        return s_known.TryGetValue(hash, out var known) ? known : throw DiagnosticException.Of(
            Codes.ChatTemplateUnknown,
            path,
            source is null ? "the tokenizer has no chat template" : $"its chat template (SHA-256 {hash[..16]}..., {source.Length} characters) is not known",
            "supported: DeepSeek-V3's, by its exact text; templates are programs and are not run");
    }

    /// As DeepSeek-V3's template does, down to its oddities: the first call of a conversation opens the list of calls and
    /// each later one closes it, and only the first output of a conversation opens the list of outputs.
    public string Render(IReadOnlyList<ChatMessage> messages, string bos, bool addGenerationPrompt)
    {
        var text = new StringBuilder(bos);
        text.AppendJoin("\n\n", messages.Where(message => message.Role == "system").Select((message, _) => Content(message)));
        var (called, answered, open) = (false, false, false);
        foreach (var message in messages)
        {
            switch (message.Role)
            {
                case "system":
                    break;
                case "user":
                    text.Append(User).Append(Content(message));
                    open = false;
                    break;
                case "assistant" when message.Content is null:
                    foreach (var call in Calls(message))
                    {
                        text.Append(called ? "\n" : Assistant + CallsBegin)
                            .Append(CallBegin).Append(call.Type).Append(Separator).Append(call.Name)
                            .Append("\n```json\n").Append(call.Arguments).Append("\n```").Append(CallEnd)
                            .Append(called ? CallsEnd + End : "");
                        called = true;
                    }

                    open = false;
                    break;
                case "assistant":
                    if (message.ToolCalls is { Count: > 0 })
                        throw Malformed(messages, message, "has both content and calls of tools, of which the template renders one");
                    text.Append(open ? OutputsEnd : Assistant).Append(message.Content).Append(End);
                    open = false;
                    break;
                case "tool":
                    text.Append(answered ? "\n" : OutputsBegin).Append(OutputBegin).Append(Content(message)).Append(OutputEnd);
                    (answered, open) = (true, true);
                    break;
                default:
                    throw Malformed(messages, message, $"has the role '{message.Role}'");
            }
        }

        text.Append(open ? OutputsEnd : "");
        return text.Append(addGenerationPrompt && !open ? Assistant : "").ToString();

        string Content(ChatMessage message) => message.Content ?? throw Malformed(messages, message, $"of the {message.Role} has no content");

        IReadOnlyList<ChatToolCall> Calls(ChatMessage message)
            => message.ToolCalls is { Count: > 0 } calls ? calls : throw Malformed(messages, message, "of the assistant has neither content nor calls of tools");
    }

    private static DiagnosticException Malformed(IReadOnlyList<ChatMessage> messages, ChatMessage message, string what)
        => DiagnosticException.Of(
            Codes.ChatMalformed,
            $"messages[{messages.TakeWhile(other => !ReferenceEquals(other, message)).Count()}]",
            $"the message {what}",
            "roles are system, user, assistant and tool; each has content, an assistant content or tool calls");
}
