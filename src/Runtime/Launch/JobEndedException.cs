// A job that ended before this process was part of it.
namespace DeepSeekGraph.Runtime.Launch;

/// <summary>The inner exception says why; `isKnown`: process 0 knows, and says so.</summary>
public sealed class JobEndedException(Exception why, bool isKnown) : Exception(why.Message, why)
{
    public bool IsKnown => isKnown;
}
