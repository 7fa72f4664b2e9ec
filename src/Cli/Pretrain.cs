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
        verb.SetAction(parse => Start(job.Read(parse), options.Read(parse)));
        return verb;
    }

    private static int Start(JobChoices choices, RunChoices run)
    {
        using var resumed = Resumed.Open(run, choices);
        var job = Jobs.Chosen(resumed?.Over(choices) ?? choices, settings => resumed?.Over(settings) ?? settings);
        return Training.Run(job.Compile(), run.Over(job.Training), run.Executor, resumed);
    }
}
