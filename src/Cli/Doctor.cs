// dsg doctor: what of this machine dsg can use, what is missing, and the command that mends it.

using System.CommandLine;
using System.Text.Json;
using System.Text.Json.Nodes;

namespace DeepSeekGraph.Cli;

internal static class Doctor
{
    private static readonly JsonSerializerOptions s_indented = new() { WriteIndented = true };

    public static Command Verb()
    {
        var json = new Option<bool>("--json") { Description = "As one JSON object" };
        var folder = new Option<string?>("--out") { HelpName = "DIR", Description = "Where runs would be written; without, runs" };
        var verb = new Command("doctor", "Say what this machine has for dsg, what is missing, and how to mend it; 0 if dsg pretrain can run")
        {
            json, folder,
        };
        verb.SetAction(parse => Report([.. Examination.Of(parse.GetValue(folder) ?? "runs")], parse.GetValue(json)));
        return verb;
    }

    private static int Report(IReadOnlyList<Finding> findings, bool json)
    {
        var canTrain = findings.All(finding => finding.IsThere || !finding.IsNeeded);
        if (json)
        {
            Console.WriteLine(new JsonObject
            {
                ["can_train"] = canTrain,
                ["findings"] = new JsonArray([.. findings.Select(finding => new JsonObject
                {
                    ["name"] = finding.Name,
                    ["found"] = finding.Found,
                    ["needed"] = finding.IsNeeded,
                    ["for"] = finding.For,
                    ["mend"] = finding.Mend,
                })]),
            }.ToJsonString(s_indented));
        }
        else
        {
            Render.Table(
                ["what", "", "found", "for"],
                [.. findings.Select(f => (string[])[f.Name, f.IsThere ? "ok" : f.IsNeeded ? "MISSING" : "no", f.Found ?? "nothing", f.For])]);
            foreach (var finding in findings.Where(finding => finding.Mend is not null))
                Console.WriteLine($"{finding.Name}: {finding.Mend}");
            Console.WriteLine(canTrain ? "dsg pretrain can run here" : "dsg pretrain cannot run here");
        }

        return canTrain ? ExitCode.Ok : ExitCode.Diagnostics;
    }
}

/// `Found`: in words, null where it is missing; `Mend`: what to do, null where nothing is to be done.
internal sealed record Finding(string Name, string? Found, string For, bool IsNeeded = false, string? Mend = null)
{
    public bool IsThere => Found is not null;
}
