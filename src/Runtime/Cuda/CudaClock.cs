// Marks of time on a GPU: events on its streams, made before the step so that a mark is one short call.
using DeepSeekGraph.Runtime.Telemetry;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>Of the calling thread's device, which has nothing to do when the clock is made. `marks`: about how many will be taken.</summary>
internal sealed class CudaClock : IStepClock
{
    private readonly List<nint> _events = [];
    private readonly nint _begin = Driver.NewTimedEvent();
    private int _taken;

    public CudaClock(int marks)
    {
        for (var i = 0; i < marks; i++)
            _events.Add(Driver.NewTimedEvent());
        Driver.Record(_begin, 0);
        Begin = HostTime.Now;
    }

    public long Begin { get; }

    public bool IsHost => false;

    public long Mark(nint stream)
    {
        if (_taken == _events.Count)
            _events.Add(Driver.NewTimedEvent());
        Driver.Record(_events[_taken], stream);
        return _taken++;
    }

    public long Since(long mark) => (long)(Driver.Milliseconds(_begin, _events[(int)mark]) * 1e6);

    public void Dispose()
    {
        foreach (var one in _events.Append(_begin))
            Driver.Destroy(one);
    }
}
