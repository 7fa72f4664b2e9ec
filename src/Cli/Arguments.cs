// The command line: verbs and options, whose help text is the manual. Nothing heavy is loaded before a verb starts.

using System.CommandLine;

namespace DeepSeekGraph.Cli;

internal static class Arguments
{
    /// Parses and runs; a mistake in the words themselves is one diagnostic.
    public static int Invoke(string[] args)
    {
        (args, var command) = LaunchVerb.Split(args);
        var root = Root(command);
        var plain = new ParserConfiguration { EnablePosixBundling = false, ResponseFileTokenReplacer = null };
        var parse = root.Parse(args, plain);
        if (Mistakes.In(parse) is { } exit)
            return exit;

        // Program reports what is thrown, StopSignals sees to Ctrl-C
        return parse.Invoke(new()
        {
            EnableDefaultExceptionHandler = false,
            ProcessTerminationTimeout = null,
        });
    }

    /// `command`: what dsg launch starts, or the options that dsg submit gives to dsg run.
    public static RootCommand Root(params string[] command) => new("""
        DeepSeekGraph: DeepSeek-V3 training as a compiled, checked plan.

        Start with `dsg pretrain`: it trains a small DeepSeek-V3 on this machine for about a minute,
        as 8 ranks in one process (TP 2 x PP 2 x DP 2 with EP 2).

        Exit codes: 0 ok, 1 a mistake was reported (diff: the plans differ), 2 wrong usage, 70 a bug in dsg,
        130 or 143 stopped by a signal.
        """)
    {
        Pretrain.Verb(),
        Compile.Verb(),
        Run.Verb(),
        LaunchVerb.Verb(command),
        Submit.Verb(command),
        Import.Verb(),
        Export.Verb(),
        Generate.Verb(),
        Show.Verb(),
        Diff.Verb(),
        Check.Verb(),
        Verify.Verb(),
        ListRecipes.Verb(),
        ListPasses.Verb(),
        Explain.Verb(),
        Doctor.Verb(),
    };
}
