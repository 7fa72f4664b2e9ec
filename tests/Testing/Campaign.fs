/// The one law that is worth a campaign: many cases, over several processes, each with a seed that replays it.
namespace DeepSeekGraph.Testing

open System
open System.Diagnostics
open System.Threading
open Expecto

[<RequireQualifiedAccess>]
module Campaign =
    let private variable (name: string) =
        match Environment.GetEnvironmentVariable name with
        | null
        | "" -> None
        | text -> Some text

    let private count (text: string) =
        match Int32.TryParse text with
        | true, n when n > 0 -> Some n
        | _ -> None

    /// Cases of the law: DSG_LAW_CASES, or twice those of any property.
    let cases = variable "DSG_LAW_CASES" |> Option.bind count |> Option.defaultValue (2 * Properties.cases)

    /// DSG_LAW_SEED: a number, another one for each process, or the three of a failure, "s,gamma,size".
    let parse (text: string) : struct (uint64 * uint64 * int option) option =
        let number (word: string) =
            match UInt64.TryParse(word.Trim().TrimEnd('U', 'L')) with
            | true, n -> Some n
            | false, _ -> None

        match text.Split ',' |> Array.map number with
        // gamma is odd
        | [| Some seed |] -> Some(struct (seed, 2UL * seed + 1UL, None))
        | [| Some seed; Some gamma; Some size |] -> Some(struct (seed, gamma, Some(int size)))
        | _other -> None

    let private seed =
        match variable "DSG_LAW_SEED" with
        | None -> None
        | Some text ->
            match parse text with
            | Some seed -> Some seed
            | None -> failwithf "DSG_LAW_SEED is %s; give a number, or the three of a failure: s,gamma,size" text

    /// The body, which also says on stderr how far a campaign is.
    let private told (body: 'a -> unit) =
        let watch = Stopwatch.StartNew()
        let mutable ran = 0
        let every = 250

        fun case ->
            body case
            let n = Interlocked.Increment &ran

            if cases > every && n % every = 0 then
                eprintfn $"%i{n} of %i{cases} cases, %.0f{watch.Elapsed.TotalSeconds} s"

    /// The property over values of `generators`. A failure shrinks and prints the seed that replays it.
    let law (generators: Type list) (name: string) (body: 'a -> unit) : Test =
        let config = {
            Properties.config generators with
                maxTest = cases
        }

        match seed with
        | None -> testPropertyWithConfig config name (told body)
        | Some(struct (seed, gamma, size)) -> testPropertyWithConfigStdGen (seed, gamma, size) config name (told body)
