// The ranks of a plan that this process owns, as threads, with their world and their code.
using System.Runtime.ExceptionServices;
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Cuda;
using DeepSeekGraph.Runtime.Execution;
using DeepSeekGraph.Runtime.Execution.Generated;
using DeepSeekGraph.Runtime.Kernels;

namespace DeepSeekGraph.Runtime.Training;

/// <summary>How the ranks of a plan are run.</summary>
internal sealed record RankOptions
{
    public int ThreadsPerRank { get; init; } = 1;

    public Executor Executor { get; init; }

    /// <summary>Folder of compiled plans; null: the user's cache.</summary>
    public string? CodeFolder { get; init; }

    public Traffic? Traffic { get; init; }

    /// <summary>Where all ranks compute.</summary>
    public RankDevice Device { get; init; } = RankDevice.Cpu;

    /// <summary>What this process is part of, which outlives the ranks; null: it is alone and owns all of them.</summary>
    public IWorld? World { get; init; }

    /// <summary>Ranks of another plan over the same mesh whose parameters and caches these use; they must outlive these.</summary>
    public LocalRanks? Sharing { get; init; }
}

/// <summary>Once a rank failed or work was cancelled, only Dispose is left to do.</summary>
internal sealed class LocalRanks : IAsyncDisposable
{
    private readonly IWorld _world;
    private readonly bool _alone;
    private readonly RankThread[] _ranks;
    private readonly GeneratedCode? _code;

    /// <summary>Nothing runs yet; `prepare` sees each rank when its first work makes it.</summary>
    public LocalRanks(PlanSet plan, RankOptions options, System.Action<RankRunner>? prepare = null)
    {
        _world = options.World ?? new LoopbackWorld { Traffic = options.Traffic };
        _alone = options.World is null;
        var job = JobShape.Of(plan);
        if (options.Executor == Executor.Compiled)
            _code = new GeneratedCode(plan, new CodeCache(options.CodeFolder ?? CodeCache.DefaultFolder));
        var perStage = RankContext.RanksPerStage(plan.Mesh);
        int[] owned = [.. Enumerable.Range(0, plan.Stages.Count * perStage).Where(_world.Owns)];
        _ranks = new RankThread[owned.Length];
        for (var i = 0; i < owned.Length; i++)
        {
            var (stage, rank) = (owned[i] / perStage, RankContext.At(plan.Mesh, owned[i] / perStage, owned[i] % perStage));
            var other = options.Sharing?._ranks[i];
            _ranks[i] = new RankThread(_world, () => Create(stage, rank, other?.Runner), owned[i], options.ThreadsPerRank, options.Device);
        }

        _world.Whereabouts = () => string.Join("; ", _ranks.Select(r => r.Runner?.Whereabouts ?? "the start"));

        RankRunner Create(int stage, RankContext rank, RankRunner? sharing)
        {
            var runner = new RankRunner(
                plan, plan.Stages[stage], rank, _world.For(rank, job, options.Device), _world.Stop, _code?.For(stage), sharing, options.Device);
            prepare?.Invoke(runner);
            return runner;
        }
    }

    /// <summary>The world that they are part of.</summary>
    public IWorld World => _world;

    /// <summary>Those of this process, by number; touch their slots while no work is under way only.</summary>
    public IReadOnlyList<RankRunner> Runners => [.. _ranks.Select(r => r.Runner!)];

    /// <summary>That plans are interpreted, or not kept, and why; each once.</summary>
    public IReadOnlyList<string> Remarks => _code?.Remarks ?? [];

    /// <summary>Stages whose code was compiled here, not found in the cache.</summary>
    public int CompiledStages => _code?.Compiled ?? 0;

    /// <summary>Runs work on every rank's own thread; the first error is thrown.</summary>
    public async Task OnAllAsync(System.Action<RankRunner> work, CancellationToken cancellationToken = default)
    {
        ThrowIfStopped();
        using (cancellationToken.Register(() => _world.Abort(new OperationCanceledException(cancellationToken))))
            await Task.WhenAll(_ranks.Select(r => r.RunAsync(work))).ContinueWith(static _ => { }, CancellationToken.None, TaskContinuationOptions.None, TaskScheduler.Default).ConfigureAwait(false);
        ThrowIfStopped();
    }

    public async ValueTask DisposeAsync()
    {
        await Task.Run(() =>
        {
            foreach (var rank in _ranks)
                rank.Dispose();
        }).ConfigureAwait(false);
        _code?.Dispose();
        _world.Whereabouts = null;
        if (_alone)
            _world.Dispose();
    }

    private void ThrowIfStopped()
    {
        if (_world.FirstError is { } error)
            ExceptionDispatchInfo.Throw(error);
    }
}
