/// Plans on disk: atomic writes, capped reads, and the hash that names a plan.
namespace DeepSeekGraph

open System
open System.IO
open System.Security.Cryptography
open System.Text

/// How a plan is encoded; the hash is the same for both.
type PlanForm =
    /// To read and compare; the last line is the hash of all before it.
    | Text = 0
    /// To ship: less than half the size.
    | Binary = 1

/// Reads and writes plan files of both forms.
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
            bytes
        with
        | :? FileNotFoundException
        | :? DirectoryNotFoundException ->
            raise (wrong path "there is no such file" "give a plan file that dsg compile wrote")
        | :? IOException
        | :? UnauthorizedAccessException as e -> raise (wrong path $"the file cannot be read: %s{e.Message}" "")

    static let textOf (path: string) (bytes: byte[]) =
        try
            utf8.GetString bytes
        with :? ArgumentException ->
            raise (
                wrong path "the file is neither a binary plan nor UTF-8 text" "give a plan file that dsg compile wrote"
            )

    static let orThrow (result: Result<PlanSet, Diagnostic list>) =
        match result with
        | Ok plan -> plan
        | Error diagnostics -> raise (DiagnosticException(Array.ofList diagnostics))

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

        orThrow (PlanText.parseFrom source body)

    /// The plan in a file of either form; throws DiagnosticException if it is none.
    static member Read(path: string) : PlanSet =
        let bytes = load path

        if PlanBinary.isBinary bytes then
            orThrow (PlanBinary.parseFrom path bytes)
        else
            PlanFile.Parse(textOf path bytes, path)

    /// Writes a plan's text form and returns its hash.
    static member Write(path: string, plan: PlanSet) : string = PlanFile.Write(path, plan, PlanForm.Text)

    /// Writes a plan in one go and returns its hash; a file that was there before is replaced or stays whole.
    static member Write(path: string, plan: PlanSet, form: PlanForm) : string =
        let text = PlanText.print plan
        let hash = hashOf text

        let bytes =
            match form with
            | PlanForm.Binary -> PlanBinary.print plan
            | _text -> utf8.GetBytes(text + mark + hash + "\n")

        let temporary = $"%s{path}.%i{Environment.ProcessId}.tmp"

        try
            try
                File.WriteAllBytes(temporary, bytes)
                File.Move(temporary, path, true)
            finally
                File.Delete temporary
        with
        | :? IOException
        | :? UnauthorizedAccessException as e -> raise (wrong path $"the file cannot be written: %s{e.Message}" "")

        hash
