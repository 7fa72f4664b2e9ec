/// The cache of compiled stages: what it keeps, what it refuses, and that damage is noticed.
module DeepSeekGraph.Runtime.Tests.CodeCacheTests

open System
open System.Diagnostics
open System.IO
open System.Threading
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Runtime.Execution.Generated
open DeepSeekGraph.Runtime.Training
open DeepSeekGraph.Runtime.Tests.RunnerTests

let private inFolder (body: string -> unit) =
    let folder = Directory.CreateTempSubdirectory "dsg-cache-test-"

    try
        body folder.FullName
    finally
        folder.Delete true

let private entries folder = Directory.GetFiles folder |> Array.map (nonNull << Path.GetFileName) |> Array.sort

let private content = Array.init 1000 byte

/// A fresh cache below a folder, with one entry in it.
let private filled folder =
    let place = Path.Combine(folder, "code")
    let cache = CodeCache place
    cache.Write("key", content)
    Expect.isNull cache.Refusal "taken"
    place

let private read folder = (CodeCache folder).Read "key"

let private mode (path: string) = int (File.GetUnixFileMode path)

let private keeping =
    testList "keeping" [
        test "an entry comes back; folder and file are their owner's alone, and nothing else lies there" {
            inFolder (fun folder ->
                let place = filled folder
                Expect.equal (read place) content "content"
                Expect.isNull ((CodeCache place).Read "other") "no such key"
                Expect.equal (mode place) 0o700 "folder"
                Expect.equal (entries place) [| "key.stage" |] "one file"
                Expect.equal (mode (Path.Combine(place, "key.stage"))) 0o600 "file")
        }

        test "every damaged byte and every lost end is noticed" {
            inFolder (fun folder ->
                let place = filled folder
                let file = Path.Combine(place, "key.stage")
                let whole = File.ReadAllBytes file

                for at in 0..37 .. whole.Length - 1 do
                    let damaged = Array.copy whole
                    damaged[at] <- damaged[at] ^^^ 1uy
                    File.WriteAllBytes(file, damaged)
                    Expect.isNull (read place) $"byte %i{at}"

                for length in [ 0; 1; 31; 32; 33; whole.Length - 1 ] do
                    File.WriteAllBytes(file, whole[.. length - 1])
                    Expect.isNull (read place) $"%i{length} bytes"

                (CodeCache place).Write("key", content)
                Expect.equal (read place) content "written again")
        }

        test "the entries unused for longest go" {
            inFolder (fun folder ->
                let place = filled folder
                let old = Path.Combine(place, "key.stage")
                File.SetLastWriteTimeUtc(old, DateTime.UtcNow.AddDays -2.0)
                let cache = CodeCache place

                for i in 1..511 do
                    File.Copy(old, Path.Combine(place, $"%i{i}.stage"))
                    File.SetLastWriteTimeUtc(Path.Combine(place, $"%i{i}.stage"), DateTime.UtcNow.AddDays -1.0)

                cache.Write("new", content)
                Expect.equal (entries place).Length 512 "bounded"
                Expect.isNull (cache.Read "key") "the oldest"
                Expect.equal (cache.Read "new") content "the newest")
        }
    ]

let private refusing =
    testList "refusing" [
        test "an entry that others may use is not read" {
            inFolder (fun folder ->
                let place = filled folder
                let file = Path.Combine(place, "key.stage")

                for bits in [ 0o640; 0o620; 0o604; 0o602; 0o601 ] do
                    File.SetUnixFileMode(file, enum bits)
                    Expect.isNull (read place) $"mode %o{bits}"

                File.SetUnixFileMode(file, enum 0o600)
                Expect.equal (read place) content "its owner's again")
        }

        test "a folder that others may use is neither read nor written, and said so" {
            inFolder (fun folder ->
                let place = filled folder

                for bits in [ 0o750; 0o720; 0o705; 0o777 ] do
                    File.SetUnixFileMode(place, enum bits)
                    let cache = CodeCache place
                    Expect.isNull (cache.Read "key") $"mode %o{bits}"
                    cache.Write("more", content)
                    Expect.equal (entries place) [| "key.stage" |] "not written"
                    Expect.stringContains (string cache.Refusal) "other users may use it" "why")
        }

        test "a link to a folder, a file, and a place that cannot be made are refused" {
            inFolder (fun folder ->
                let place = filled folder
                let link = Path.Combine(folder, "link")
                Directory.CreateSymbolicLink(link, place) |> ignore
                let cache = CodeCache link
                Expect.isNull (cache.Read "key") "through a link"
                Expect.stringContains (string cache.Refusal) "not a folder" "link"
                let file = CodeCache(Path.Combine(place, "key.stage"))
                Expect.isNull (file.Read "key") "a file"
                Expect.stringContains (string file.Refusal) "are not kept" "file"
                let below = CodeCache(Path.Combine(place, "key.stage", "below"))
                Expect.stringContains (string below.Refusal) "are not kept" "below a file"
                let none = CodeCache null
                none.Write("key", content)
                Expect.isNull (none.Read "key") "no folder"
                Expect.stringContains (string none.Refusal) "no cache folder" "none")
        }

        test "another user's folder or entry is refused" {
            if Environment.UserName <> "root" then
                skiptest "only the superuser can give files away"

            inFolder (fun folder ->
                let place = filled folder

                let give (path: string) (owner: string) =
                    use child = Process.Start("chown", [ owner; path ])
                    child.WaitForExit()
                    Expect.equal child.ExitCode 0 "chown"

                give (Path.Combine(place, "key.stage")) "65534"
                Expect.isNull (read place) "entry"
                give (Path.Combine(place, "key.stage")) "0"
                give place "65534"
                let cache = CodeCache place
                Expect.isNull (cache.Read "key") "folder"
                Expect.stringContains (string cache.Refusal) "another user" "why"
                give place "0"
                Expect.equal (read place) content "ours again")
        }
    ]

/// Loss of a step, stages compiled, and remarks.
let private run folder (plan: PlanSet) =
    task {
        use! trainer = Trainer.StartAsync(plan, TrainerOptions(Batches = Pattern(8, 0), CodeFolder = folder))
        let steps = trainer.RunAsync(1L, CancellationToken.None).GetAsyncEnumerator()
        let! _ = steps.MoveNextAsync()
        return steps.Current.Loss, trainer.CompiledStages, List.ofSeq trainer.Remarks
    }
    |> _.GetAwaiter().GetResult()

let private training =
    testList "training" [
        test "a plan is compiled once; damage, another plan or a lost entry compile again" {
            inFolder (fun folder ->
                let place = Path.Combine(folder, "code")
                let plan = TinyPlan.plan 1 2 4
                let loss, compiled, remarks = run place plan
                Expect.equal (compiled, remarks) (2, []) "first: both stages"
                Expect.equal (run place plan) (loss, 0, []) "kept"
                let files = Directory.GetFiles place |> Array.sort
                Expect.equal files.Length 2 "a file a stage"
                let damaged = File.ReadAllBytes files[0]
                damaged[damaged.Length / 2] <- damaged[damaged.Length / 2] ^^^ 255uy
                File.WriteAllBytes(files[0], damaged)
                Expect.equal (run place plan) (loss, 1, []) "damaged"
                Expect.equal (run place plan) (loss, 0, []) "mended"
                File.Delete files[1]
                Expect.equal (run place plan) (loss, 1, []) "lost"

                let _, others, _ =
                    run place {
                        plan with
                            Recipe = [| "name=other" |]
                    }

                Expect.equal others 2 "another plan has another hash")
        }

        test "without a folder that can be trusted plans are compiled and that is said once" {
            inFolder (fun folder ->
                let place = filled folder
                File.SetUnixFileMode(place, enum 0o755)
                let loss, compiled, remarks = run place (TinyPlan.plan 2 2 4)
                Expect.equal (compiled, remarks.Length) (2, 1) "compiled, one remark"
                Expect.stringContains remarks[0] place "which folder"
                let again, _, _ = run (Path.Combine(folder, "good")) (TinyPlan.plan 2 2 4)
                Expect.equal again loss "same bits")
        }
    ]

let tests = testSequenced (testList "Code cache" [ keeping; refusing; training ])
