/// Properties: how many random cases, and with which generators.
namespace DeepSeekGraph.Testing

open System
open Expecto

[<RequireQualifiedAccess>]
module Properties =
    /// Random cases of one property: DSG_FSCHECK_TESTS, or 100. (Expecto's own option does not reach
    /// properties that have a configuration.)
    let cases =
        match Int32.TryParse(Environment.GetEnvironmentVariable "DSG_FSCHECK_TESTS") with
        | true, count when count > 0 -> count
        | _ -> 100

    /// A configuration with these types of generators (static members that return Arbitrary).
    let config (generators: Type list) = {
        FsCheckConfig.defaultConfig with
            maxTest = cases
            arbitrary = generators
    }

    /// A law in words, with built-in generators only.
    let property name law = testPropertyWithConfig (config []) name law

    /// A law in words, over the values of `generators`.
    let propertyOver generators name law = testPropertyWithConfig (config generators) name law
