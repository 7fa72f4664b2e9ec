// dsg submit: a plan as a job for Slurm or Kubernetes.

using System.CommandLine;
using DeepSeekGraph.Models;

namespace DeepSeekGraph.Cli;

internal static class Submit
{
    public const string Name = "submit";

    /// `options`: what stands behind `--`, for dsg run.
    public static Command Verb(string[] options)
    {
        var plan = new Argument<string>("PLAN") { Description = "A plan file, where the nodes find it too" };
        var slurm = new Option<bool>("--slurm") { Description = "A batch script for sbatch" };
        var kubernetes = new Option<bool>("--kubernetes")
        {
            Description = "A manifest for kubectl apply: indexed job, headless service, claim of a shared volume",
        };
        var target = Word("--out", "FILE", "Where to write it; without, standard output");
        var nodes = JobOptions.Number("--nodes", "Nodes");
        var perNode = JobOptions.Number("--ranks-per-node", "Ranks of a node; without, its GPUs, or what --nodes leaves, or 8");
        var gpus = JobOptions.Number("--gpus-per-node", "GPUs of a node; without, none are asked for");
        var cpus = JobOptions.Number("--cpus-per-rank", "Cores of a rank");
        var name = Word("--name", "NAME", "The job's name; without, dsg- and the recipe's");
        var time = Word("--time", "TIME", "Slurm: time limit, such as 12:00:00");
        var partition = Word("--partition", "NAME", "Slurm: partition");
        var account = Word("--account", "NAME", "Slurm: account");
        var image = Word("--image", "IMAGE", "Kubernetes: container image, with dsg or what its folder on the volume needs");
        var claim = Word("--claim", "NAME", "Kubernetes: claim of the shared volume; without, the job's name and -work");
        var program = Word("--dsg", "PATH", "dsg on the nodes; without, dsg on the PATH");
        var verb = new Command(Name, "Write a job for a cluster from a plan: dsg submit --slurm PLAN [-- options of dsg run]")
        {
            plan, slurm, kubernetes, target, nodes, perNode, gpus, cpus, name, time, partition, account, image, claim, program,
        };
        verb.SetAction(parse =>
        {
            var path = parse.GetValue(plan)!;
            if (parse.GetValue(slurm) == parse.GetValue(kubernetes))
                throw Submission.Wrong("--slurm, --kubernetes", "one of the two is needed", "give --slurm or --kubernetes");
            var read = PlanFile.Read(path);
            Jobs.Check(read, path);
            var (count, each) = Submission.Shape(PlanSummary.Ranks(read), parse.GetValue(nodes), parse.GetValue(perNode), parse.GetValue(gpus));
            string? Given(Option<string?> option) => Submission.Word(option.Name, parse.GetValue(option));
            var called = Given(name) ?? Submission.NameOf(read);
            var job = new Submission
            {
                Name = called,
                Plan = path,
                Hash = PlanFile.Hash(read),
                Nodes = count,
                PerNode = each,
                BytesPerRank = read.Memory.Max(row => row.Headroom),
                GpusPerNode = parse.GetValue(gpus),
                CpusPerRank = parse.GetValue(cpus),
                Time = Given(time),
                Partition = Given(partition),
                Account = Given(account),
                Image = Given(image) ?? "dsg",
                Claim = Given(claim) ?? $"{called}-work",
                Program = parse.GetValue(program) ?? "dsg",
                Options = options,
            };
            return Write(parse.GetValue(slurm) ? SlurmScript.Of(job) : KubernetesManifest.Of(job), parse.GetValue(target));
        });
        return verb;
    }

    private static Option<string?> Word(string name, string of, string text) => new(name) { HelpName = of, Description = text };

    private static int Write(string text, string? path)
    {
        if (path is null)
        {
            Console.Out.Write(text);
            return ExitCode.Ok;
        }

        try
        {
            File.WriteAllText(path, text);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw DiagnosticException.Of(Codes.OutputUnwritable, path, $"the file cannot be written: {e.Message}", "give another --out");
        }

        Console.WriteLine($"written to {path}");
        return ExitCode.Ok;
    }
}
