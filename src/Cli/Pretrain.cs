// dsg pretrain: compiles a recipe and runs its plan.

using System.CommandLine;

namespace DeepSeekGraph.Cli;

internal static class Pretrain
{
    public static Command Verb()
    {
        var (job, options) = (new JobOptions(), new RunOptions());
        var verb = new Command("pretrain", "Train a model: compile a recipe and run its plan, a thread a rank");
        job.AddTo(verb);
        options.AddTo(verb);
        verb.SetAction(parse => Start(job, options.Read(parse), parse));
        return verb;
    }

    private static int Start(JobOptions options, RunChoices run, ParseResult parse)
    {
        var choices = options.Read(parse);
        if (run.Device.IsCuda && choices.IsSilentOnDegrees)
            choices = choices with { Tensor = 1 };
        using var resumed = Resumed.Open(run, choices);
        var job = Jobs.Chosen(resumed?.Over(choices) ?? choices, settings => resumed?.Over(settings) ?? settings);
        return Training.Run(job.Compile(), run.Over(job.Training), run, resumed);
    }
}
