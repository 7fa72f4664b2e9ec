// The compiled executors of a plan: from the cache or from Roslyn, once a stage, when the first of its ranks asks.
using System.Collections.Concurrent;
using System.Globalization;
using System.Security.Cryptography;
using System.Text;

namespace DeepSeekGraph.Runtime.Execution.Generated;

/// <summary>Belongs to a trainer, whose ranks share the code of their stage. Dispose lets the code be unloaded.</summary>
internal sealed class GeneratedCode(PlanSet plan, CodeCache cache) : IDisposable
{
    /// <summary>A stage of more steps is interpreted: to compile it would take longer than it is worth.</summary>
    private const int MostSteps = 200_000;

    private readonly Lazy<string> _hash = new(() => PlanFile.Hash(plan));
    private readonly ConcurrentDictionary<int, Lazy<StageCodeFactory?>> _stages = new();
    private readonly ConcurrentBag<CodeLoadContext> _contexts = [];
    private readonly ConcurrentDictionary<string, bool> _remarks = new();

    /// <summary>What a user should know: why stages are interpreted, or not kept; each once.</summary>
    public IReadOnlyList<string> Remarks
        => [.. _remarks.Keys.Concat(cache.Refusal is { } refusal ? [refusal] : []).Order(StringComparer.Ordinal)];

    /// <summary>Stages that were compiled here, not found in the cache.</summary>
    public int Compiled { get; private set; }

    /// <summary>The code of a stage, given by its place in the plan; null where it must be interpreted.</summary>
    public StageCodeFactory? For(int stage)
        => _stages.GetOrAdd(stage, s => new Lazy<StageCodeFactory?>(() => Load(s))).Value;

    public void Dispose()
    {
        _stages.Clear();
        foreach (var context in _contexts)
            context.Unload();
    }

    private StageCodeFactory? Load(int stage)
    {
        if (plan.Stages[stage].Programs.Sum(p => p.Steps.Count) > MostSteps)
        {
            _remarks["a stage is too long to compile: the interpreter runs it"] = true;
            return null;
        }

        var key = Key(stage);
        var assembly = cache.Read(key);
        if (assembly is null)
        {
            if (CodeCompiler.Obstacle() is { } obstacle)
            {
                _remarks[$"plans are interpreted, not compiled: {obstacle}"] = true;
                return null;
            }

            assembly = CodeCompiler.Compile(CodeWriter.Write(plan, plan.Stages[stage]));
            cache.Write(key, assembly);
            lock (_contexts)
                Compiled++;
        }

        var context = new CodeLoadContext();
        _contexts.Add(context);
        return context.Load(assembly);
    }

    /// <summary>Whatever the compiled code depends on: the plan, the stage, the writer, and the assemblies it was compiled against.</summary>
    private string Key(int stage)
    {
        var builds = CodeCompiler.Own.Select(a => a.ManifestModule.ModuleVersionId.ToString("N"));
        var text = string.Create(CultureInfo.InvariantCulture, $"{_hash.Value} {stage} {CodeWriter.Version} {string.Join(' ', builds)}");
        return Convert.ToHexStringLower(SHA256.HashData(Encoding.ASCII.GetBytes(text)));
    }
}
