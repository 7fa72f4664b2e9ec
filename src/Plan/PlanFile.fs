/// Plans on disk: atomic writes, capped reads, and the hash that names a plan.
namespace DeepSeekGraph

open System
open System.IO
open System.Security.Cryptography
open System.Text

/// Reads and writes plan files; the last line of a file is the hash of all before it.
[<AbstractClass; Sealed>]
type PlanFile private () =
    static let largest = 1L <<< 28
    static let mark = "sha256 "
    static let utf8 = UTF8Encoding(false, true)

    static let hashOf (text: string) = Convert.ToHexStringLower(SHA256.HashData(utf8.GetBytes text))

    static let wrong path message help = DiagnosticException.Of(Codes.PlanFile, path, message, help)

    static let load (path: string) =
        try
            use file = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read)

            if file.Length > largest then
                raise (wrong path $"the file has %i{file.Length} bytes; a plan has at most %i{largest}" "")

            let bytes = Array.zeroCreate<byte>(int file.Length)
            file.ReadExactly(bytes.AsSpan())
            utf8.GetString bytes
        with
        | :? FileNotFoundException
        | :? DirectoryNotFoundException ->
            raise (wrong path "there is no such file" "give a plan file that dsg compile wrote")
        | :? IOException
        | :? UnauthorizedAccessException as e -> raise (wrong path $"the file cannot be read: %s{e.Message}" "")
        | :? ArgumentException ->
            raise (wrong path "the file is not UTF-8 text" "give a plan file that dsg compile wrote")

    /// The text form.
    static member Print(plan: PlanSet) : string = PlanText.print plan

    /// SHA-256 of the text form, in hex: equal plans have equal hashes on every machine.
    static member Hash(plan: PlanSet) : string = hashOf (PlanText.print plan)

    /// The plan that a text says; throws DiagnosticException for anything else. `source` names it in messages.
    static member Parse(text: string, source: string) : PlanSet =
        let last = text.LastIndexOf('\n', max 0 (text.Length - 2)) + 1

        let body =
            if last > 0 && String.CompareOrdinal(text, last, mark, 0, mark.Length) = 0 then
                let body = text.Substring(0, last)
                let said = text.Substring(last + mark.Length).TrimEnd()

                if said <> hashOf body then
                    raise (
                        wrong
                            source
                            $"the file's hash line says %s{said} but its content has %s{hashOf body}"
                            "the file was changed: compile it again, or remove the hash line to run it as it is"
                    )

                body
            else
                text

        match PlanText.parseFrom source body with
        | Ok plan -> plan
        | Error diagnostics -> raise (DiagnosticException(Array.ofList diagnostics))

    /// The plan in a file; throws DiagnosticException if it is none.
    static member Read(path: string) : PlanSet = PlanFile.Parse(load path, path)

    /// Writes a plan in one go and returns its hash; a file that was there before is replaced or stays whole.
    static member Write(path: string, plan: PlanSet) : string =
        let text = PlanText.print plan
        let hash = hashOf text
        let temporary = $"%s{path}.%i{Environment.ProcessId}.tmp"

        try
            try
                File.WriteAllText(temporary, text + mark + hash + "\n", utf8)
                File.Move(temporary, path, true)
            finally
                File.Delete temporary
        with
        | :? IOException
        | :? UnauthorizedAccessException as e -> raise (wrong path $"the file cannot be written: %s{e.Message}" "")

        hash
