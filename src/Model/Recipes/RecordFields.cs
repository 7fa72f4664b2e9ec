// The settings of an immutable record by name: `num_hidden_layers` is NumHiddenLayers, `rope_scaling.factor` one of a part.

using System.Globalization;
using System.Reflection;
using System.Text;

namespace DeepSeekGraph.Models;

/// One setting of a record.
public sealed record RecordField(string Key, Type Type, object? Value)
{
    /// As plans record it and `--set` takes it.
    public string Text => Value switch
    {
        null => "none",
        bool flag => flag ? "true" : "false",
        Enum choice => RecordFields.Snake(choice.ToString()),
        IEnumerable<string> many => string.Join(",", many),
        _ => Convert.ToString(Value, CultureInfo.InvariantCulture)!,
    };

    /// What may be given, in words.
    public string Values
        => Type == typeof(bool) ? "true or false"
            : Type == typeof(double) ? "a number such as 0.001"
            : Type == typeof(int) || Type == typeof(ulong) ? "a whole number"
            : Type.IsEnum ? $"one of {string.Join(" ", Enum.GetNames(Type).Select(RecordFields.Snake))}"
            : Type == typeof(YarnScaling) ? "none, or one of its own settings"
            : "text; commas between several";
}

/// Reads and changes records by the names of their settings.
public static class RecordFields
{
    /// All settings in the order of declaration; a part that is there lists its own.
    public static IEnumerable<RecordField> Of(object record, string prefix = "")
    {
        foreach (var property in Settable(record.GetType()))
        {
            var (key, value) = (prefix + Snake(property.Name), property.GetValue(record));
            if (value is YarnScaling part)
            {
                foreach (var inner in Of(part, key + "."))
                    yield return inner;
            }
            else
            {
                yield return new RecordField(key, property.PropertyType, value);
            }
        }
    }

    /// The model of a plan's recipe lines; null where they record none, or none that is legal.
    public static DeepSeekV3Config? ConfigOf(IReadOnlyList<string> recipe)
    {
        const string prefix = "model.";
        var config = new DeepSeekV3Config { RopeScaling = null };
        var known = Of(new DeepSeekV3Config()).Select(field => field.Key).Append("rope_scaling").ToHashSet();
        var given = 0;
        foreach (var line in recipe.Where(l => l.StartsWith(prefix, StringComparison.Ordinal)))
        {
            if (line[prefix.Length..].Split('=', 2) is not [var key, var text] || !known.Contains(key)
                || With(config, key, text) is not { } changed)
                return null;
            (config, given) = (changed, given + 1);
        }

        return given > 0 && ConfigCheck.Check(config).Count == 0 ? config : null;
    }

    /// A configuration with one setting changed; null where the text is no value of it.
    public static DeepSeekV3Config? With(DeepSeekV3Config config, string key, string text)
    {
        if (key == "rope_scaling")
            return text == "none" ? config with { RopeScaling = null } : null;
        const string part = "rope_scaling.";
        if (!key.StartsWith(part, StringComparison.Ordinal))
            return Set(config with { }, key, text);
        return Set((config.RopeScaling ?? new()) with { }, key[part.Length..], text) is { } yarn
            ? config with { RopeScaling = yarn }
            : null;
    }

    /// Training settings with one changed; null where the text is no value of it.
    public static TrainingSettings? With(TrainingSettings settings, string key, string text)
        => Set(settings with { }, key, text);

    /// Sets a property of a fresh copy.
    private static T? Set<T>(T copy, string key, string text)
        where T : class
    {
        var property = Settable(typeof(T)).Single(p => Snake(p.Name) == key);
        if (Parse(property.PropertyType, text) is not { } value)
            return null;

        property.SetValue(copy, value);
        return copy;
    }

    private static object? Parse(Type type, string text)
    {
        var c = CultureInfo.InvariantCulture;
        if (type == typeof(int))
            return int.TryParse(text, NumberStyles.AllowLeadingSign, c, out var n) ? n : null;
        if (type == typeof(ulong))
            return ulong.TryParse(text, NumberStyles.None, c, out var n) ? n : null;
        if (type == typeof(double))
            return double.TryParse(text, NumberStyles.Float, c, out var x) && double.IsFinite(x) ? x : null;
        if (type == typeof(bool))
            return text switch { "true" => true, "false" => false, _ => null };
        if (type.IsEnum)
            return Enum.GetNames(type).FirstOrDefault(name => Snake(name) == text) is { } name ? Enum.Parse(type, name) : null;
        if (type == typeof(string))
            return text == "" ? null : text;
        return type == typeof(IReadOnlyList<string>) ? text.Split(',', StringSplitOptions.RemoveEmptyEntries) : null;
    }

    private static IEnumerable<PropertyInfo> Settable(Type type)
        => type.GetProperties().Where(property => property.CanWrite).OrderBy(property => property.MetadataToken);

    /// NumHiddenLayers -> num_hidden_layers
    internal static string Snake(string name)
    {
        var text = new StringBuilder();
        foreach (var letter in name)
        {
            if (char.IsAsciiLetterUpper(letter) && text.Length > 0)
                text.Append('_');
            text.Append(char.ToLowerInvariant(letter));
        }

        return text.ToString();
    }
}
