// The font of all pictures, carried in the program: a machine without any font draws the same text.

using ScottPlot;
using SkiaSharp;

namespace DeepSeekGraph.Cli;

/// DejaVu Sans (Assets/DejaVu-LICENSE.txt), under a name that no installed font has.
internal sealed class EmbeddedFont : IFontResolver
{
    /// The family name that ScottPlot is asked for.
    public const string Family = "dsg embedded";

    private const string Resource = "DejaVuSans.ttf";

    private static readonly Lazy<bool> s_registered = new(() =>
    {
        Fonts.FontResolvers.Insert(0, new EmbeddedFont());
        return true;
    });

    /// Sets it for every text of `plot`.
    public static void Use(Plot plot)
    {
        _ = s_registered.Value;
        plot.Font.Set(Family);
        plot.Legend.FontName = Family;
    }

    /// The file itself.
    public static Stream Open()
        => typeof(EmbeddedFont).Assembly.GetManifestResourceStream(Resource)
            ?? throw new InvalidOperationException($"the resource '{Resource}' is missing: a bug in dsg");

    /// A new typeface each time, owned by who asks; null for other families.
    public SKTypeface? CreateTypeface(string fontName, FontWeight weight, FontSlant slant, FontSpacing spacing)
    {
        if (fontName != Family)
        {
            return null;
        }

        using var stream = Open();
        return SKTypeface.FromStream(stream);
    }

    public SKTypeface? CreateTypeface(string fontName, bool bold, bool italic)
        => CreateTypeface(fontName, FontWeight.Normal, FontSlant.Upright, FontSpacing.Normal);
}
