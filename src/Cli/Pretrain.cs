// dsg pretrain: compiles a recipe and runs its plan.

using System.CommandLine;

namespace DeepSeekGraph.Cli;

internal static class Pretrain
{
    public static Command Verb()
    {
        var (job, options) = (new JobOptions(), new RunOptions());
        var verb = new Command("pretrain", "Train a model: compile a recipe and run its plan, a thread or (when launched so) a process a rank");
        job.AddTo(verb);
        options.AddTo(verb);
        verb.SetAction(parse => Launched.Run(launched => Start(job.Read(parse), options.Read(parse, launched), launched)));
        return verb;
    }

    private static int Start(JobChoices choices, RunChoices run, Launched launched)
    {
        launched.Announce(run.Device);
        if (run.Device.IsCuda && launched.World is null or { Processes: 1 } && choices.IsSilentOnDegrees)
            choices = choices with { Tensor = 1 };
        using var resumed = Resumed.Open(run, launched, choices);
        var job = Jobs.Chosen(resumed?.Over(choices) ?? choices, settings => resumed?.Over(settings) ?? settings, launched.FasterType);
        return Training.Run(job.Compile(), run.Over(job.Training), run, resumed, launched);
    }
}
