/// The binary form of plans: the same content and hash as the text form, and no damage that is not told.
module DeepSeekGraph.Compiler.Tests.PlanBinaryTests

open System
open System.Buffers.Binary
open System.Diagnostics
open System.IO
open System.Security.Cryptography
open System.Text
open Expecto
open FsCheck.FSharp
open DeepSeekGraph
open DeepSeekGraph.Testing
open DeepSeekGraph.Models

let private property name law = Properties.propertyOver [ typeof<Plans.Arbitraries> ] name law
let private sample = (Gen.sampleWithSeed (FsCheck.Rnd 11UL) 50 1 Plans.plan)[0]
let private tiny = lazy Recipes.Tiny.Compile()

/// One diagnostic of the plan file that names a place.
let private isTold (bytes: byte[]) =
    match PlanBinary.parse bytes with
    | Ok _ -> false
    | Error wrong ->
        wrong.Length = 1
        && wrong.Head.Code.StartsWith "DSG060"
        && wrong.Head.At.Contains "byte"
        && wrong.Head.Message <> ""

let private refused (bytes: byte[]) =
    match PlanBinary.parse bytes with
    | Ok _ -> failtest "this should be refused"
    | Error wrong -> wrong.Head

/// Magic, the version, a hash of nothing, and a body.
let private handMade (body: byte list) = [|
    yield! (PlanBinary.print sample)[0..11]
    yield! Array.zeroCreate<byte> 32
    yield! body
|]

let tests =
    testList "Plan.PlanBinary" [
        property "bytes read back as the plan, and as the same text" (fun (plan: PlanSet) ->
            match PlanBinary.parse (PlanBinary.print plan) with
            | Ok again -> again = plan && PlanText.print again = PlanText.print plan
            | Error wrong -> failtestf "%A" wrong)

        property "text and bytes say the same, and equal plans give equal bytes" (fun (plan: PlanSet) ->
            match PlanText.parse (PlanText.print plan) with
            | Ok again -> PlanBinary.print again = PlanBinary.print plan
            | Error wrong -> failtestf "%A" wrong)

        property "any byte changed is told, whatever it becomes" (fun (plan: PlanSet, at: int, by: byte) ->
            let bytes = PlanBinary.print plan
            let at = abs (at % bytes.Length)
            bytes[at] <- bytes[at] + (max 1uy by)
            isTold bytes)

        property "several bytes overwritten are told" (fun (plan: PlanSet, at: int, over: byte list) ->
            let bytes = PlanBinary.print plan
            let before = Array.copy bytes
            let at = abs (at % bytes.Length)

            over
            |> List.iteri (fun i b ->
                if at + i < bytes.Length then
                    bytes[at + i] <- b)

            bytes = before || isTold bytes)

        property "bytes cut off anywhere are told" (fun (plan: PlanSet, at: int) ->
            let bytes = PlanBinary.print plan
            isTold bytes[.. abs (at % bytes.Length) - 1])

        property "bytes that follow a plan are told" (fun (plan: PlanSet, more: byte) ->
            isTold (Array.append (PlanBinary.print plan) [| more |]))

        testCase "every single bit of a compiled plan's first bytes is guarded"
        <| fun () ->
            let bytes = PlanBinary.print sample

            for at in 0 .. min 400 bytes.Length - 1 do
                for bit in 0..7 do
                    let damaged = Array.copy bytes
                    damaged[at] <- damaged[at] ^^^ (1uy <<< bit)
                    Expect.isTrue (isTold damaged) $"bit %i{bit} of byte %i{at}"

        testCase "the hash in the file is that of the text form"
        <| fun () ->
            let plan = tiny.Force()
            let bytes = PlanBinary.print plan
            let text = SHA256.HashData(Encoding.UTF8.GetBytes(PlanText.print plan))
            Expect.sequenceEqual bytes[12..43] text "hash"
            Expect.equal (Convert.ToHexStringLower text) (PlanFile.Hash plan) "as PlanFile names it"

        testCase "a compiled plan takes half the bytes of its text"
        <| fun () ->
            let plan = tiny.Force()
            let text = (PlanText.print plan).Length
            Expect.isLessThan (2 * (PlanBinary.print plan).Length) text "bytes"

        testCase "an unknown version is refused with both versions"
        <| fun () ->
            let bytes = PlanBinary.print sample
            BinaryPrimitives.WriteUInt32LittleEndian(bytes.AsSpan 8, 4000000000u)
            let wrong = refused bytes
            Expect.equal wrong.Code Codes.PlanVersion ""
            Expect.stringContains wrong.Message "version 4000000000" ""
            Expect.stringContains wrong.Message $"version %i{PlanSchema.Version}" ""

        testCase "lengths that lie allocate nothing"
        <| fun () ->
            // 2^63 texts; 127 texts of which the first has 2^56 letters; a number of eleven bytes
            for body in
                [
                    List.replicate 9 0xFFuy @ [ 1uy ]
                    [ 2uy; yield! List.replicate 7 0xFFuy; 0x7Fuy ]
                    List.replicate 11 0xFFuy
                ] do
                let before = GC.GetAllocatedBytesForCurrentThread()
                Expect.isTrue (isTold (handMade body)) "told"
                Expect.isLessThan (GC.GetAllocatedBytesForCurrentThread() - before) 200_000L "bytes allocated"

        testCase "a long text named a million times is refused in time"
        <| fun () ->
            let letters = 1 <<< 20
            // one text of 2^20 letters 'a', then a recipe of 2^20 lines, each that text
            let body = [
                1uy
                yield! [ 0x80uy; 0x80uy; 0x40uy ]
                yield! List.replicate letters 97uy
                yield! [ 0x80uy; 0x80uy; 0x40uy ]
                yield! List.replicate letters 0uy
            ]

            let clock = Stopwatch.StartNew()
            let wrong = refused (handMade body)
            Expect.stringContains wrong.Message "letters" "the limit"
            Expect.isLessThan clock.ElapsedMilliseconds 10000L "ms"

        testCase "files of both forms read as one plan"
        <| fun () ->
            let path = Path.Combine(Path.GetTempPath(), $"%s{Path.GetRandomFileName()}.plan")

            try
                let binary = PlanFile.Write(path, sample, PlanForm.Binary)
                Expect.equal (PlanFile.Read path) sample "binary"
                let text = PlanFile.Write(path, sample, PlanForm.Text)
                Expect.equal (PlanFile.Read path) sample "text"
                Expect.equal binary text "hash"
            finally
                File.Delete path
    ]
