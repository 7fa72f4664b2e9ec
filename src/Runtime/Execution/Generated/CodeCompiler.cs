// C# to an assembly in memory, by Roslyn, and that assembly loaded so that it can be unloaded again.
using System.Reflection;
using System.Runtime.CompilerServices;
using System.Runtime.Loader;
using Microsoft.CodeAnalysis;
using Microsoft.CodeAnalysis.CSharp;

namespace DeepSeekGraph.Runtime.Execution.Generated;

internal static class CodeCompiler
{
    /// <summary>What generated code refers to, besides the base library.</summary>
    internal static readonly Assembly[] Own =
    [
        typeof(StageCode).Assembly,
        typeof(PlanSet).Assembly,
        typeof(Microsoft.FSharp.Core.Unit).Assembly,
        typeof(TorchSharp.torch).Assembly,
    ];

    private static readonly string[] Base = ["System.Private.CoreLib.dll", "System.Runtime.dll", "netstandard.dll"];

    /// <summary>Why this program cannot compile or load code; null where it can.</summary>
    public static string? Obstacle()
    {
        if (!RuntimeFeature.IsDynamicCodeSupported)
            return "this build of the program cannot load code";
        if (References().Any(r => !File.Exists(r)))
            return "this build of the program has no assemblies to compile against";
        try
        {
            TouchRoslyn();
            return null;
        }
        catch (Exception e) when (e is IOException or BadImageFormatException or TypeLoadException)
        {
            return $"the C# compiler is missing: {e.Message}";
        }
    }

    /// <summary>The assembly of a source; equal sources give equal bytes.</summary>
    /// <exception cref="InvalidOperationException">The source does not compile, which is a bug of the writer.</exception>
    public static byte[] Compile(string source)
    {
        var options = new CSharpCompilationOptions(
            OutputKind.DynamicallyLinkedLibrary, optimizationLevel: OptimizationLevel.Release, deterministic: true);
        var compilation = CSharpCompilation.Create(
            "DeepSeekGraph.Generated",
            [CSharpSyntaxTree.ParseText(source)],
            References().Select(path => MetadataReference.CreateFromFile(path)),
            options);
        using var assembly = new MemoryStream();
        var result = compilation.Emit(assembly);
        return result.Success
            ? assembly.ToArray()
            : throw new InvalidOperationException(
                $"generated code does not compile: {result.Diagnostics.First(d => d.Severity == DiagnosticSeverity.Error)}");
    }

    private static IEnumerable<string> References()
    {
        var trusted = (AppContext.GetData("TRUSTED_PLATFORM_ASSEMBLIES") as string ?? "").Split(Path.PathSeparator);
        return Base.Select(name => Array.Find(trusted, path => Path.GetFileName(path) == name) ?? "")
            .Concat(Own.Select(a => a.Location));
    }

    [MethodImpl(MethodImplOptions.NoInlining)]
    private static void TouchRoslyn() => RuntimeHelpers.RunClassConstructor(typeof(CSharpCompilation).TypeHandle);
}

/// <summary>One stage's assembly; goes when the context is unloaded and no rank uses it any more.</summary>
internal sealed class CodeLoadContext() : AssemblyLoadContext("DeepSeekGraph generated code", isCollectible: true)
{
    /// <summary>The class of a compiled stage as a factory; another runtime's assembly is refused by the loader.</summary>
    public StageCodeFactory Load(byte[] assembly)
    {
        var type = LoadFromStream(new MemoryStream(assembly)).GetType(CodeWriter.ClassName, throwOnError: true)!;
        var constructor = type.GetConstructor([typeof(StageSite)])
            ?? throw new InvalidOperationException($"{type} has no constructor for a rank");
        return site => (StageCode)constructor.Invoke(BindingFlags.DoNotWrapExceptions, null, [site], null);
    }

    /// <summary>The same runtime that runs the ranks, wherever it was loaded.</summary>
    protected override Assembly? Load(AssemblyName name) => Array.Find(CodeCompiler.Own, a => a.GetName().Name == name.Name);
}
