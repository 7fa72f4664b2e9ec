/// What the product says when an input is wrong: a code, the place, both values, and the valid choices.
namespace DeepSeekGraph

open System
open System.Collections.Generic

/// One mistake, told so that it can be mended: code (docs/errors/<code>.md), place, message, help.
type Diagnostic = {
    /// Stable id such as DSG0301; never reused.
    Code: string
    /// Where: module path, input, recipe field, file and line.
    At: string
    /// What: roles and both values.
    Message: string
    /// What to do: an action with the valid choices; empty when there is none.
    Help: string
} with

    override this.ToString() =
        let line label text = if String.IsNullOrEmpty text then "" else $"\n  %s{label}%s{text}"

        $"error %s{this.Code}: %s{this.Message}" + line "at   " this.At + line "help: " this.Help

/// Carries diagnostics across the languages: user mistakes never surface as stack traces.
[<Sealed>]
type DiagnosticException(diagnostics: IReadOnlyList<Diagnostic>) =
    inherit Exception(String.Join("\n", diagnostics))

    /// Every mistake found, at least one.
    member _.Diagnostics = diagnostics

    /// One diagnostic, thrown by C# as `throw DiagnosticException.Of(code, at, message, help)`.
    static member Of(code: string, at: string, message: string, help: string) =
        DiagnosticException [|
            {
                Code = code
                At = at
                Message = message
                Help = help
            }
        |]
