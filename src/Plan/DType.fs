/// Element types and their widths.
namespace DeepSeekGraph

/// Element type of a value. C# switches on `Tag`.
[<RequireQualifiedAccess>]
type DType =
    | Float32
    | BFloat16
    | Int64
    | Int32
    | Bool
    /// The low half of an fp32 number whose high half, rounded, is a bf16 one.
    | Int16

    /// Bytes of one element.
    member this.Bytes =
        match this with
        | Float32
        | Int32 -> 4
        | BFloat16
        | Int16 -> 2
        | Int64 -> 8
        | Bool -> 1

    /// As printed: fp32, bf16, i64, i32, bool, i16.
    member this.Name =
        match this with
        | Float32 -> "fp32"
        | BFloat16 -> "bf16"
        | Int64 -> "i64"
        | Int32 -> "i32"
        | Bool -> "bool"
        | Int16 -> "i16"

    /// True for types that carry gradients.
    member this.IsFloat =
        match this with
        | Float32
        | BFloat16 -> true
        | Int64
        | Int32
        | Bool
        | Int16 -> false

    /// All element types.
    static member All = [| Float32; BFloat16; Int64; Int32; Bool; Int16 |]

    /// The type printed as `name`; null when there is none.
    static member TryParse(name: string, found: byref<DType>) =
        match Array.tryFind (fun (d: DType) -> d.Name = name) DType.All with
        | Some d ->
            found <- d
            true
        | None -> false
