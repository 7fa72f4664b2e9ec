// Messages between processes of a job, on which collectives are built.
namespace DeepSeekGraph.Runtime.Collectives;

/// <summary>The place of a message among those between two ranks: the group, whether it is one of its stages' own, and its number there.</summary>
internal readonly record struct MessageKey(int Group, bool BetweenStages, long Number);

/// <summary>Sends and receives parcels. Belongs to one rank; the thread of the rank calls it.</summary>
internal interface IMessages : IDisposable
{
    /// <summary>Takes the parcel over and returns at once, whatever the receiver does.</summary>
    void Send(int to, MessageKey key, Parcel parcel);

    /// <summary>Waits for a message; the caller disposes it. StoppedException when the job stops.</summary>
    Parcel Receive(int from, MessageKey key, CancellationToken stop);

    /// <summary>The rank that Receive waits for; -1 while it does not.</summary>
    int WaitingFor { get; }
}

/// <summary>Messages that have come, until they are asked for.</summary>
internal sealed class Inbox : IDisposable
{
    private readonly Dictionary<(int From, MessageKey Key), Parcel> _arrived = [];
    private bool _closed;

    /// <summary>Of a rank's two messages of one key, the second is a mistake of the sender.</summary>
    public void Put(int from, MessageKey key, Parcel parcel)
    {
        lock (_arrived)
        {
            if (_closed || !_arrived.TryAdd((from, key), parcel))
            {
                parcel.Dispose();
                if (!_closed)
                    throw new InvalidDataException($"rank {from} sent message {key.Number} of group {key.Group} twice");
            }

            Monitor.PulseAll(_arrived);
        }
    }

    /// <summary>The message if it is there.</summary>
    public Parcel? TryTake(int from, MessageKey key)
    {
        lock (_arrived)
            return _arrived.Remove((from, key), out var parcel) ? parcel : null;
    }

    /// <summary>Waits for the message, or for `stop`.</summary>
    public Parcel Take(int from, MessageKey key, CancellationToken stop)
    {
        using var woken = stop.UnsafeRegister(static inbox => ((Inbox)inbox!).Wake(), this);
        lock (_arrived)
        {
            while (true)
            {
                if (_arrived.Remove((from, key), out var parcel))
                    return parcel;
                if (stop.IsCancellationRequested)
                    throw new StoppedException("another rank stopped the job");
                Monitor.Wait(_arrived);
            }
        }
    }

    public void Dispose()
    {
        lock (_arrived)
        {
            _closed = true;
            foreach (var parcel in _arrived.Values)
                parcel.Dispose();
            _arrived.Clear();
        }
    }

    private void Wake()
    {
        lock (_arrived)
            Monitor.PulseAll(_arrived);
    }
}
