// dsg launch: the processes of a job on this machine, started again from the newest checkpoint when one dies.

using System.CommandLine;

namespace DeepSeekGraph.Cli;

internal static class LaunchVerb
{
    public const string Name = "launch";

    private static readonly string[] s_verbs = ["pretrain", "run"];

    /// What the launcher's own words are, and what those of the command that it starts: from the first verb on, or behind `--`.
    public static (string[] Own, string[] Command) Split(string[] args)
    {
        if (args is not [Name or Submit.Name, ..])
            return (args, []);
        var at = Array.FindIndex(args, 1, word => word == "--" || (args[0] == Name && s_verbs.Contains(word)));
        return at < 0 ? (args, []) : (args[..at], args[at] == "--" ? args[(at + 1)..] : args[at..]);
    }

    public static Command Verb(string[] command)
    {
        var processes = new Option<int?>("--nproc") { HelpName = "N", Description = "Processes: as many as the plan has ranks" };
        var restarts = new Option<int>("--max-restarts")
        {
            HelpName = "K",
            Description = "Start all again, from the newest checkpoint (--save-interval), up to K times when one dies; without, none",
            DefaultValueFactory = _ => 0,
        };
        var nodes = new Option<int>("--nnodes")
        {
            HelpName = "M",
            Description = "Nodes, on each of which a launcher is started with one DSG_JOB_TOKEN; without, 1",
            DefaultValueFactory = _ => 1,
        };
        var node = new Option<int>("--node-rank")
        {
            HelpName = "I",
            Description = "The number of this node, from 0",
            DefaultValueFactory = _ => 0,
        };
        var address = new Option<string?>("--master-addr")
        {
            HelpName = "HOST",
            Description = "Of several nodes: the first one's name or address",
        };
        var port = new Option<int?>("--master-port") { HelpName = "PORT", Description = "Of several nodes: a port of it that is free" };
        var words = new Argument<string[]>("COMMAND")
        {
            Description = "What each process runs: pretrain or run with its options; -- may stand before it",
            Arity = ArgumentArity.ZeroOrMore,
        };
        var verb = new Command(Name, "Start a job's processes on this machine, one a rank: dsg launch --nproc 8 pretrain --steps 100")
        {
            processes, restarts, nodes, node, address, port, words,
        };
        verb.SetAction(parse =>
        {
            var wrong = parse.GetValue(words)!;
            if (command.Length == 0 || wrong.Length > 0 || !s_verbs.Contains(command[0]))
            {
                var word = wrong.FirstOrDefault() ?? command.FirstOrDefault();
                throw DiagnosticException.Of(
                    Codes.OptionValue,
                    $"dsg {Name}",
                    word is null ? "there is no command to start" : $"'{word}' is no command that runs as several processes",
                    $"give one behind the options: dsg {Name} --nproc N pretrain ...; {Nearest.Help(word ?? "", s_verbs)}");
            }

            if (parse.GetValue(processes) is not (>= 1 and <= 4096))
                throw Wrong("--nproc", "give the number of ranks of the plan, 1 or more");
            if (parse.GetValue(restarts) < 0)
                throw Wrong("--max-restarts", "give 0 or more");
            var all = parse.GetValue(nodes);
            if (all is < 1 or > 65_536)
                throw Wrong("--nnodes", "give 1 or more");
            if (parse.GetValue(node) is var here && (here < 0 || here >= all))
                throw Wrong("--node-rank", $"give a number from 0 to {all - 1}");
            if (all > 1 && (string.IsNullOrEmpty(parse.GetValue(address)) || parse.GetValue(port) is not (>= 1 and <= 65535)))
                throw Wrong("--master-addr, --master-port", "of several nodes, give the first one's address and a free port of it");
            return new LocalJob(parse.GetValue(processes)!.Value, parse.GetValue(restarts), command)
            {
                Nodes = all,
                Node = here,
                Master = all > 1 ? (parse.GetValue(address)!, parse.GetValue(port)!.Value) : null,
            }.Run();
        });
        return verb;
    }

    private static DiagnosticException Wrong(string option, string help)
        => DiagnosticException.Of(Codes.OptionValue, $"dsg {Name}", $"{option} needs another value", help);
}
