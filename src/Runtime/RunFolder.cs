// The folder that a run writes to: a new one each time, never over the results of another.

using System.Globalization;

namespace DeepSeekGraph.Runtime;

/// A folder belongs to the run that created its `.claim` file: of two that start at once, one gets it.
public static class RunFolder
{
    private const string ClaimFile = ".claim";
    private const int MostTries = 1000;

    /// `chosen` if given (new or empty), else the next of runs/0001, runs/0002, ... in `parent`; DSG0815, DSG0816.
    public static string Create(string? chosen = null, string parent = "runs")
    {
        try
        {
            return Path.GetFullPath(chosen is null ? CreateNext(parent) : CreateChosen(chosen));
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or ArgumentException)
        {
            throw Unwritable(chosen ?? parent, e.Message);
        }
    }

    private static string CreateChosen(string folder)
    {
        if (File.Exists(folder))
        {
            throw Taken(folder, "is a file");
        }

        return TryClaim(folder) ? folder : throw Taken(folder, "is not empty");
    }

    private static string CreateNext(string parent)
    {
        var next = Directory.CreateDirectory(parent)
            .EnumerateFileSystemInfos()
            .Select(entry => NumberOf(entry.Name))
            .Append(0)
            .Max();
        for (var tries = 0; tries < MostTries; tries++)
        {
            var folder = Path.Combine(parent, (++next).ToString("D4", CultureInfo.InvariantCulture));
            if (!File.Exists(folder) && TryClaim(folder))
            {
                return folder;
            }
        }

        throw Unwritable(parent, $"no free number up to {next}");
    }

    private static int NumberOf(string name)
        => int.TryParse(name, NumberStyles.None, CultureInfo.InvariantCulture, out var number)
            && number < int.MaxValue - MostTries
            ? number
            : 0;

    /// False when the folder holds something, be it another run's claim of a moment ago.
    private static bool TryClaim(string folder)
    {
        Directory.CreateDirectory(folder);
        if (Directory.EnumerateFileSystemEntries(folder).Any())
        {
            return false;
        }

        var claim = Path.Combine(folder, ClaimFile);
        try
        {
            using var file = new FileStream(claim, FileMode.CreateNew, FileAccess.Write);
            return true;
        }
        catch (IOException) when (File.Exists(claim))
        {
            return false;
        }
    }

    private static DiagnosticException Taken(string folder, string what) => DiagnosticException.Of(
        Codes.OutputTaken,
        "--out",
        $"the output folder '{folder}' {what}",
        "give --out a new or empty folder, or leave it out for the next of runs/0001, runs/0002, ...");

    private static DiagnosticException Unwritable(string folder, string why) => DiagnosticException.Of(
        Codes.OutputUnwritable,
        "--out",
        $"the output folder '{folder}' cannot be made: {why}",
        "give --out a folder that you may write to");
}
