// Work that process 0 does for all, of which every process learns how it ended.
using System.Text;
using DeepSeekGraph.Runtime.Collectives;

namespace DeepSeekGraph.Runtime.Launch;

/// <summary>Unlike an error in a meeting itself, a failure here ends nothing: every process throws it, and the job can go on.</summary>
public static class SharedWork
{
    /// <summary>
    /// `work` sees what all processes hand in, in process 0; all get its text, or its DiagnosticException. Goes on when the job is told to
    /// stop by a signal, so that what was begun is finished; StoppedException when another process does not come any more.
    /// </summary>
    public static string OnFirst(IWorld world, string topic, byte[] mine, Func<IReadOnlyList<byte[]>, string> work)
    {
        DiagnosticException? failed = null;
        var answer = world.Meet(topic, mine, all =>
        {
            try
            {
                return [1, .. Encoding.UTF8.GetBytes(work(all))];
            }
            catch (DiagnosticException e)
            {
                failed = e;
                return [0, .. Fault.Of(world.Process, e).ToBytes()];
            }
        }, CancellationToken.None);
        if (failed is not null)
            System.Runtime.ExceptionServices.ExceptionDispatchInfo.Throw(failed);
        return answer is [1, .. var text] ? Encoding.UTF8.GetString(text) : throw Fault.Read(answer[1..]).ToException();
    }
}
