// What ran when in one step of one rank, and its file in the Chrome Trace Event format.
using System.Globalization;
using System.Text.Json;

namespace DeepSeekGraph.Runtime.Telemetry;

/// <summary>The kinds of threads of a trace.</summary>
public enum TraceLane
{
    /// <summary>Kernels, and copies before and behind collectives.</summary>
    Compute,

    /// <summary>Collectives under way, by group.</summary>
    Communication,

    /// <summary>The thread that runs the rank, while it waits.</summary>
    Host,
}

/// <summary>Something that took time: nanoseconds since the begin of the step.</summary>
public sealed record TraceEvent(TraceLane Lane, string Name, long Begin, long End)
{
    /// <summary>Kernel or kind of collective, without what is done of it.</summary>
    public string Kind { get; init; } = Name;

    /// <summary>Module path that the instruction came from.</summary>
    public required string Path { get; init; }

    /// <summary>Program and microbatch as printed: prologue, F3, W3@1.</summary>
    public required string Program { get; init; }

    /// <summary>Null in prologue and epilogue.</summary>
    public int? Microbatch { get; init; }

    /// <summary>Held by the operands of a kernel, or brought to a collective.</summary>
    public long Bytes { get; init; }

    /// <summary>The group of a collective; empty for kernels.</summary>
    public string Group { get; init; } = "";
}

/// <summary>One step of one rank: its length in nanoseconds, when it began, and its events in order of their begin.</summary>
public sealed record StepTrace(int Rank, long Step, string Device, DateTime Begin, long Length, IReadOnlyList<TraceEvent> Events)
{
    /// <summary>How much of communication is hidden.</summary>
    public Overlap Overlap => Overlap.Of(this);

    /// <summary>The file's name in the folder of a trace.</summary>
    public string FileName => string.Create(CultureInfo.InvariantCulture, $"rank-{Rank}.json");

    /// <summary>Writes the file into a folder, which is made where it is missing: whole or not at all. Its path; DSG0816.</summary>
    public string Write(string folder)
    {
        var path = Path.Combine(folder, FileName);
        var temporary = $"{path}.{Guid.NewGuid():N}.tmp";
        try
        {
            Directory.CreateDirectory(folder);
            using (var file = new FileStream(temporary, FileMode.CreateNew, FileAccess.Write))
                Write(file);
            File.Move(temporary, path, overwrite: true);
            return path;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            if (File.Exists(temporary))
                File.Delete(temporary);
            throw DiagnosticException.Of(
                Codes.OutputUnwritable, path, $"the trace cannot be written: {e.Message}", "free some space, or give another --trace");
        }
    }

    /// <summary>The text of the file; the same events give the same bytes.</summary>
    public void Write(Stream to)
    {
        using var json = new Utf8JsonWriter(to);
        json.WriteStartObject();
        json.WriteString("displayTimeUnit", "ms");
        json.WriteStartObject("otherData");
        json.WriteNumber("rank", Rank);
        json.WriteNumber("step", Step);
        json.WriteString("device", Device);
        json.WriteNumber("begin_us", (Begin - DateTime.UnixEpoch).Ticks / TimeSpan.TicksPerMicrosecond);
        json.WriteStartObject("overlap");
        WriteOverlap(json, Overlap);
        json.WriteEndObject();
        json.WriteEndObject();
        json.WriteStartArray("traceEvents");
        var threads = Threads();
        Name(json, "process_name", 0, $"rank {Rank}");
        for (var i = 0; i < threads.Count; i++)
            Name(json, "thread_name", i + 1, threads[i].Name);
        for (var i = 0; i < threads.Count; i++)
        {
            foreach (var one in threads[i].Events)
                WriteEvent(json, i + 1, one);
        }

        json.WriteEndArray();
        json.WriteEndObject();
    }

    /// <summary>
    /// What each thread shows, none of its events beside another: compute, the host, then a lane for each group, and more for
    /// what is under way there at the same time.
    /// </summary>
    internal IReadOnlyList<(string Name, IReadOnlyList<TraceEvent> Events)> Threads()
    {
        var threads = new List<(string Name, IReadOnlyList<TraceEvent> Events)>();
        foreach (var lane in (TraceLane[])[TraceLane.Compute, TraceLane.Host, TraceLane.Communication])
        {
            foreach (var group in Events.Where(e => e.Lane == lane).GroupBy(e => lane == TraceLane.Communication ? e.Group : "").OrderBy(g => g.Key, StringComparer.Ordinal))
            {
                var name = lane switch
                {
                    TraceLane.Compute => "compute",
                    TraceLane.Host => "host",
                    _ => group.Key,
                };
                var rows = new List<List<TraceEvent>>();
                foreach (var one in group)
                {
                    if (rows.Find(row => row[^1].End <= one.Begin) is { } free)
                        free.Add(one);
                    else
                        rows.Add([one]);
                }

                for (var i = 0; i < rows.Count; i++)
                    threads.Add((i == 0 ? name : string.Create(CultureInfo.InvariantCulture, $"{name} ({i + 1})"), rows[i]));
            }
        }

        return threads;
    }

    private void Name(Utf8JsonWriter json, string what, int thread, string name)
    {
        json.WriteStartObject();
        json.WriteString("name", what);
        json.WriteString("ph", "M");
        json.WriteNumber("pid", Rank);
        json.WriteNumber("tid", thread);
        json.WriteStartObject("args");
        json.WriteString("name", name);
        json.WriteEndObject();
        json.WriteEndObject();
    }

    private void WriteEvent(Utf8JsonWriter json, int thread, TraceEvent one)
    {
        json.WriteStartObject();
        json.WriteString("name", one.Name);
        json.WriteString("cat", one.Lane switch
        {
            TraceLane.Compute => "compute",
            TraceLane.Communication => "communication",
            _ => "host",
        });
        json.WriteString("ph", "X");
        json.WriteNumber("pid", Rank);
        json.WriteNumber("tid", thread);
        json.WriteNumber("ts", one.Begin / 1000m);
        json.WriteNumber("dur", (one.End - one.Begin) / 1000m);
        json.WriteStartObject("args");
        json.WriteString("path", one.Path);
        json.WriteString("program", one.Program);
        if (one.Microbatch is { } microbatch)
            json.WriteNumber("microbatch", microbatch);
        json.WriteNumber("bytes", one.Bytes);
        if (one.Group.Length > 0)
            json.WriteString("group", one.Group);
        json.WriteEndObject();
        json.WriteEndObject();
    }

    private static void WriteOverlap(Utf8JsonWriter json, Overlap overlap)
    {
        json.WriteNumber("step_ms", Milliseconds(overlap.Length));
        json.WriteNumber("compute_ms", Milliseconds(overlap.Compute));
        json.WriteNumber("idle_ms", Milliseconds(overlap.Idle));
        json.WriteNumber("communication_ms", Milliseconds(overlap.Communication));
        json.WriteNumber("exposed_ms", Milliseconds(overlap.Exposed));
        if (overlap.HiddenShare is { } share)
            json.WriteNumber("hidden_share", share);
        else
            json.WriteNull("hidden_share");
        json.WriteNumber("host_wait_ms", Milliseconds(overlap.HostWait));
        json.WriteStartArray("collectives");
        foreach (var one in overlap.Collectives)
        {
            json.WriteStartObject();
            json.WriteString("kind", one.Kind);
            json.WriteString("path", one.Path);
            json.WriteString("group", one.Group);
            json.WriteNumber("count", one.Count);
            json.WriteNumber("ms", Milliseconds(one.Time));
            json.WriteNumber("exposed_ms", Milliseconds(one.Exposed));
            json.WriteEndObject();
        }

        json.WriteEndArray();
    }

    private static decimal Milliseconds(long nanoseconds) => nanoseconds / 1_000_000m;
}
