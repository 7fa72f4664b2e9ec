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
        if (args is not [Name, ..])
            return (args, []);
        var at = Array.FindIndex(args, 1, word => word == "--" || s_verbs.Contains(word));
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
        var words = new Argument<string[]>("COMMAND")
        {
            Description = "What each process runs: pretrain or run with its options; -- may stand before it",
            Arity = ArgumentArity.ZeroOrMore,
        };
        var verb = new Command(Name, "Start a job's processes on this machine, one a rank: dsg launch --nproc 8 pretrain --steps 100")
        {
            processes, restarts, words,
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
            return new LocalJob(parse.GetValue(processes)!.Value, parse.GetValue(restarts), command).Run();
        });
        return verb;
    }

    private static DiagnosticException Wrong(string option, string help)
        => DiagnosticException.Of(Codes.OptionValue, $"dsg {Name}", $"{option} needs another value", help);
}
