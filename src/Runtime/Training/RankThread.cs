// A thread that runs one rank; the only one that touches its slots while a job is under way.
using System.Collections.Concurrent;
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Cuda;
using DeepSeekGraph.Runtime.Execution;
using DeepSeekGraph.Runtime.Memory;

namespace DeepSeekGraph.Runtime.Training;

internal sealed class RankThread : IDisposable
{
    private readonly BlockingCollection<(System.Action<RankRunner> Work, TaskCompletionSource Done)> _jobs = [];
    private readonly Thread _thread;
    private readonly IWorld _world;

    public RankThread(IWorld world, Func<RankRunner> create, int rank, int threads, RankDevice device)
    {
        _world = world;
        _thread = new Thread(() => Loop(create, threads, device), 16 << 20) { IsBackground = true, Name = $"rank {rank}" };
        _thread.Start();
    }

    /// <summary>The rank; set once the first job has run.</summary>
    public RankRunner? Runner { get; private set; }

    /// <summary>Runs work on the thread. The first failure of any rank stops all of them.</summary>
    public Task RunAsync(System.Action<RankRunner> work)
    {
        var done = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        _jobs.Add((work, done));
        return done.Task;
    }

    public void Dispose()
    {
        _jobs.CompleteAdding();
        _thread.Join();
        _jobs.Dispose();
    }

    private void Loop(Func<RankRunner> create, int threads, RankDevice device)
    {
        foreach (var (work, done) in _jobs.GetConsumingEnumerable())
        {
            try
            {
                if (Runner is null)
                {
                    TensorMemory.PrepareThread(threads);
                    device.Enter();
                    Runner = create();
                }

                work(Runner);
                done.SetResult();
            }
            catch (StoppedException e)
            {
                done.SetException(e);
            }
            catch (Exception e)
            {
                _world.Abort(e);
                done.SetException(e);
            }
        }

        Runner?.Dispose();
    }
}
