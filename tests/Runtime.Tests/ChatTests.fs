/// Chats as text: as Jinja renders DeepSeek-V3's template, and nothing else.
module DeepSeekGraph.Runtime.Tests.ChatTests

open System.IO
open System.Text.Json
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Runtime.Data.Tokenizers
open DeepSeekGraph.Runtime.Tests.DataTests
open DeepSeekGraph.Runtime.Tests.TokenizerTests
open DeepSeekGraph.Testing

let private message (json: JsonElement) =
    let text (name: string) (from: JsonElement) = from.GetProperty(name).GetString() |> nonNull

    let calls =
        match json.TryGetProperty "tool_calls" with
        | true, calls -> [|
            for call in calls.EnumerateArray() do
                let f = call.GetProperty "function"
                ChatToolCall(text "name" f, text "arguments" f, text "type" call)
          |]
        | _ -> [||]

    ChatMessage(text "role" json, json.GetProperty("content").GetString(), calls)

let tests =
    testList "ChatTemplate" [
        test "chats come out as Jinja renders DeepSeek-V3's template" {
            use cases = JsonDocument.Parse(File.ReadAllBytes(Shared.inRepository "tests/golden/chat/deepseek_v3.json"))

            for case in cases.RootElement.EnumerateArray() do
                let messages = case[0].EnumerateArray() |> Seq.map message |> Seq.toArray

                let rendered = ChatTemplate.DeepSeekV3.Render(messages, "<｜begin▁of▁sentence｜>", case[1].GetBoolean())

                Expect.equal rendered (case[2].GetString() |> nonNull) (case[0].GetRawText())
        }
        test "templates that are not known are refused, never run" {
            for template, word in
                [
                    "null", "no chat template"
                    "\"{% for m in messages %}{{ m }}{% endfor %}\"", "not known"
                ] do
                let config = SampleTokenizer.config.Replace("\"pad_token\": null", $"\"chat_template\": %s{template}")
                let d = diagnosticOf (fun () -> (load SampleTokenizer.json config).RenderChat [||] |> ignore)
                Expect.equal d.Code Codes.ChatTemplateUnknown (string d)
                Expect.stringContains d.Message word "the words"
                Expect.stringContains d.Help "DeepSeek-V3" "what is supported"
        }
        test "messages that the template would drop or break on are told by their place" {
            let ok = ChatMessage("user", "q")
            let call = [| ChatToolCall("f", "{}") |]

            for wrong in
                [
                    ChatMessage("robot", "x")
                    ChatMessage("user", null)
                    ChatMessage("system", null)
                    ChatMessage("tool", null)
                    ChatMessage("assistant", null)
                    ChatMessage("assistant", null, [||])
                    ChatMessage("assistant", "x", call)
                ] do
                let d = diagnosticOf (fun () -> ChatTemplate.DeepSeekV3.Render([| ok; wrong |], "", true) |> ignore)
                Expect.equal (d.Code, d.At) (Codes.ChatMalformed, "messages[1]") (string d)
        }
    ]
