// Words of a command line that mean nothing: one diagnostic that names the nearest ones that do.

using System.CommandLine;
using System.CommandLine.Help;
using System.CommandLine.Parsing;

namespace DeepSeekGraph.Cli;

internal static class Mistakes
{
    /// The exit code where the command line is wrong, after saying why; null where it is fine.
    public static int? In(ParseResult parse)
    {
        if (parse.Action is HelpAction)
            return null;

        var command = parse.CommandResult.Command;
        if (Stray(parse) is { } stray)
        {
            Tell(parse, stray);
            return ExitCode.Diagnostics;
        }

        if (parse.Errors.Count == 0)
            return null;

        if (command.Subcommands.Count > 0)
        {
            parse.CommandResult.Command.Parse(["--help"]).Invoke();
            return ExitCode.Usage;
        }

        var error = parse.Errors[0];
        var name = error.SymbolResult is OptionResult option ? option.Option.Name
            : error.SymbolResult is ArgumentResult argument ? argument.Argument.Name
            : Full(command);
        if (error.SymbolResult is { Tokens: [var value, ..] } && error.SymbolResult is not CommandResult)
        {
            Render.Diagnostic(
                Codes.OptionValue, name, $"'{value.Value}' is no value for '{name}'", Expected(error.SymbolResult));
            return ExitCode.Diagnostics;
        }

        Render.Diagnostic(Codes.OptionValue, Full(command), error.Message, $"see {Full(command)} --help");
        return ExitCode.Usage;
    }

    /// The first word that is no option, verb or argument: an unknown option is easily taken for an argument.
    private static string? Stray(ParseResult parse)
    {
        var arguments = parse.CommandResult.Children.OfType<ArgumentResult>().SelectMany(result => result.Tokens);
        return arguments.Select(token => token.Value).Concat(parse.UnmatchedTokens).FirstOrDefault(IsOption)
            ?? parse.UnmatchedTokens.FirstOrDefault();
    }

    private static void Tell(ParseResult parse, string stray)
    {
        var command = parse.CommandResult.Command;
        var at = Full(command);
        if (IsOption(stray))
        {
            var known = command.Options.Where(option => !option.Hidden).Select(option => option.Name);
            Render.Diagnostic(
                Codes.UnknownOption,
                at,
                $"there is no option '{stray}'",
                $"{Nearest.Help(stray.Split('=')[0], known)}; {at} --help lists all");
        }
        else if (command.Subcommands.Count > 0)
        {
            Render.Diagnostic(
                Codes.UnknownOption,
                at,
                $"there is no command '{stray}'",
                Nearest.Help(stray, command.Subcommands.Select(verb => verb.Name)));
        }
        else
        {
            Render.Diagnostic(Codes.UnknownOption, at, $"'{stray}' is one word too many", $"see {at} --help");
        }
    }

    private static bool IsOption(string word) => word.Length > 1 && word[0] == '-';

    private static string Expected(SymbolResult result)
    {
        var given = result is OptionResult { Option.ValueType: var t } ? t : typeof(string);
        var type = Nullable.GetUnderlyingType(given) ?? given;
        return type == typeof(double) ? "give a number such as 0.001"
            : type == typeof(int) || type == typeof(ulong) ? "give one whole number"
            : "give one value";
    }

    private static string Full(Command command)
        => command.Parents.OfType<Command>().FirstOrDefault() is { } parent ? $"{Full(parent)} {command.Name}" : "dsg";
}
