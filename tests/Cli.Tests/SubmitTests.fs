/// Jobs for clusters: scripts and manifests as they are kept, read back by bash and by a YAML library; and what dsg doctor finds.
module DeepSeekGraph.Cli.Tests.SubmitTests

open System
open System.Diagnostics
open System.IO
open System.Text.Json
open System.Text.RegularExpressions
open Expecto
open YamlDotNet.RepresentationModel
open DeepSeekGraph
open DeepSeekGraph.Cli.Tests

let private golden name = Path.Combine(Dsg.root, "tests", "Cli.Tests", "Submitted", name)

/// A plan of 16 ranks; its hash may change with the compiler, and is masked in what is kept.
let private inPlan (test: string -> unit) =
    Dsg.inFolder (fun folder ->
        let arguments = [
            "compile"
            "--tp"
            "2"
            "--pp"
            "2"
            "--ep"
            "4"
            "--dp"
            "4"
            "--dtype"
            "bf16"
            "--out"
            "small.plan"
        ]

        let result = Dsg.run folder arguments
        Expect.equal result.Code 0 result.Error
        test folder)

let private submit folder arguments =
    let result = Dsg.run folder ("submit" :: arguments)
    Expect.equal (result.Code, result.Error) (0, "") result.Out
    result.Out

/// Equal to the file of that name; DSG_UPDATE_DOCS=1 writes it.
let private isKept name (text: string) =
    let masked =
        Regex.Replace(Regex.Replace(text, "plan [0-9a-f]{64}", "plan HASH"), @"(mem=|memory: "")\d+M", "${1}NM")

    if Environment.GetEnvironmentVariable "DSG_UPDATE_DOCS" = "1" then
        File.WriteAllText(golden name, masked)

    Expect.equal masked (File.ReadAllText(golden name)) $"as in tests/Cli.Tests/Submitted/%s{name}"

/// Words that a shell, YAML and Kubernetes would each read otherwise.
let private hard = [ "--data"; "a b'c\"d$(date)`id`\\"; "--out"; "# no: comment\n- x" ]

let private shell (script: string) =
    let info = ProcessStartInfo("bash", [ "-c"; script ], RedirectStandardOutput = true)
    use bash = Process.Start info |> nonNull
    let out = bash.StandardOutput.ReadToEnd()
    bash.WaitForExit()
    bash.ExitCode, out

let private slurm =
    testCase "a script for Slurm: as kept, and srun gets every word as it was given"
    <| fun () ->
        inPlan (fun folder ->
            let options = [
                "--slurm"
                "small.plan"
                "--nodes"
                "4"
                "--cpus-per-rank"
                "8"
                "--time"
                "12:00:00"
                "--partition"
                "gpu"
            ]

            let text = submit folder (options @ "--" :: hard)
            isKept "slurm.sh" text

            // srun prints what it is given, word by word
            let start = "srun() { printf '%s\\0' \"$@\"; }\n"
            let code, words = shell (start + text.Replace("exec srun", "srun"))
            Expect.equal code 0 "bash reads it"
            let given = words.Split('\000', StringSplitOptions.None) |> List.ofArray

            Expect.equal
                given
                ([ "--wait=60"; "--kill-on-bad-exit=0"; "dsg"; "run"; "small.plan" ] @ hard @ [ "" ])
                "words"

            Expect.stringContains
                (submit folder [ "--slurm"; "small.plan"; "--gpus-per-node"; "8" ])
                "--nodes=2\n"
                "nodes follow from GPUs")

let private kubernetes =
    testCase "a manifest for Kubernetes: as kept, and YAML reads back what was meant"
    <| fun () ->
        inPlan (fun folder ->
            let options = [
                "--kubernetes"
                "small.plan"
                "--nodes"
                "2"
                "--gpus-per-node"
                "8"
                "--cpus-per-rank"
                "4"
                "--image"
                "registry/dsg:1"
            ]

            let text = submit folder (options @ "--" :: hard)
            isKept "kubernetes.yaml" text
            let yaml = YamlStream()
            yaml.Load(new StringReader(text))
            let roots = [ for document in yaml.Documents -> document.RootNode ]

            let rec at (path: string) (node: YamlNode) =
                path.Split('/')
                |> Array.fold
                    (fun (node: YamlNode) key ->
                        match node with
                        | :? YamlSequenceNode as list -> list[int key]
                        | _ -> node[YamlScalarNode key])
                    node

            let value path node = (at path node :?> YamlScalarNode).Value |> string
            Expect.equal (roots |> List.map (value "kind")) [ "PersistentVolumeClaim"; "Service"; "Job" ] "kinds"
            let job = roots[2]

            Expect.equal
                (value "spec/completions" job, value "spec/completionMode" job)
                ("2", "Indexed")
                "a pod a node"

            let container = at "spec/template/spec/containers/0" job
            let command = at "command" container :?> YamlSequenceNode
            let words = [ for word in command -> string word ]
            let literal = hard |> List.map _.Replace("$(", "$$(")

            Expect.equal
                (List.skip (words.Length - hard.Length) words)
                literal
                "options, safe from Kubernetes' own variables"

            Expect.equal
                (words[..7])
                [
                    "dsg"
                    "launch"
                    "--nproc"
                    "8"
                    "--nnodes"
                    "2"
                    "--node-rank"
                    "$(DSG_NODE)"
                ]
                "launcher"

            let limits = at "resources/limits" container
            Expect.equal (string (limits[YamlScalarNode "nvidia.com/gpu"]), value "cpu" limits) ("8", "32") "of a node"

            Expect.equal
                (value "metadata/name" roots[1])
                (value "spec/template/spec/subdomain" job)
                "pods are named by the service"

            Expect.equal
                (value "spec/template/spec/volumes/0/persistentVolumeClaim/claimName" job)
                (value "metadata/name" roots[0])
                "the claim")

let private refused =
    testCase "shapes that do not fit, and words that could be more than words"
    <| fun () ->
        inPlan (fun folder ->
            for arguments in
                [
                    [ "--slurm"; "small.plan"; "--nodes"; "3" ]
                    [ "--slurm"; "small.plan"; "--nodes"; "2"; "--ranks-per-node"; "4" ]
                    [ "--slurm"; "small.plan"; "--partition"; "a\n#SBATCH --uid=root" ]
                    [ "--kubernetes"; "small.plan"; "--name"; "Under_Score" ]
                    [ "small.plan" ]
                    [ "small.plan"; "--slurm"; "--kubernetes" ]
                ] do
                let result = Dsg.run folder ("submit" :: arguments)
                Expect.equal result.Code 1 result.Out
                Expect.stringStarts result.Error $"error %s{Codes.SubmissionIllegal}: " (String.concat " " arguments))

let private doctor =
    testCase "doctor finds what pretrain needs, and says how to mend what is missing"
    <| fun () ->
        Dsg.inFolder (fun folder ->
            let result = Dsg.run folder [ "doctor"; "--json" ]
            Expect.equal (result.Code, result.Error) (0, "") result.Out
            use json = JsonDocument.Parse result.Out
            Expect.isTrue (json.RootElement.GetProperty("can_train").GetBoolean()) "can train"

            let findings = [
                for finding in json.RootElement.GetProperty("findings").EnumerateArray() ->
                    finding.GetProperty("name").GetString() |> string, finding
            ]

            for name in
                [
                    "cores"
                    "memory"
                    "disk of runs"
                    "LibTorch"
                    "GPU driver"
                    "NCCL"
                    "NVRTC"
                    "MPI"
                    "srun"
                ] do
                Expect.contains (List.map fst findings) name "is looked for"

            let torch = findings |> List.find (fun (name, _) -> name = "LibTorch") |> snd

            Expect.isTrue
                (File.Exists(Path.Combine(torch.GetProperty("found").GetString() |> string, "libtorch.so")))
                "where it is"

            let table = Dsg.run folder [ "doctor" ]
            Expect.stringContains table.Out "dsg pretrain can run here" "in words"
            let without = Dsg.runWith folder [ "DSG_LIBTORCH", folder ] [ "doctor" ]
            Expect.equal without.Code 1 without.Error
            Expect.stringContains without.Out "MISSING" "what is missing"
            Expect.stringContains without.Out "DSG_LIBTORCH" "how to mend it")

/// A folder with LibTorch, run with nothing of this machine in the environment.
let private published =
    let name = "the published folder trains without .NET, alone and as two processes"

    if Environment.GetEnvironmentVariable "DSG_PUBLISH" = "1" then
        testCase name (fun () ->
            Dsg.inFolder (fun folder ->
                let data = Dsg.writeText folder
                let code, out = shell $"'%s{Dsg.root}/build.sh' publish '%s{folder}/dsg'"
                Expect.equal code 0 out
                let bare = $"cd '%s{folder}' && env -i HOME='%s{folder}' PATH=/nonexistent dsg/dsg"

                let job =
                    $"pretrain --data '%s{data}' --steps 2 --tp 2 --pp 1 --ep 1 --dp 1 --seq-length 16 --dtype fp32 --out"

                for command in [ "doctor"; $"%s{job} a"; $"launch --nproc 2 %s{job} b" ] do
                    let code, out = shell $"%s{bare} %s{command}"
                    Expect.equal code 0 $"%s{command}: %s{out}"))
    else
        ptestCase $"%s{name} (DSG_PUBLISH=1)" ignore

let tests = testList "Submit" [ slurm; kubernetes; refused; doctor; published ]
