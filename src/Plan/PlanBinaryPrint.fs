/// A plan as bytes: magic, version, hash of the text form, a table of texts, then the plan as varints, read back by PlanBinary.
module internal DeepSeekGraph.PlanBinaryPrint

open System
open System.Buffers.Binary
open System.Collections.Generic
open System.IO
open System.Security.Cryptography
open System.Text
open DeepSeekGraph
open DeepSeekGraph.PlanWords

/// Not UTF-8, so that no text file begins like this.
let magic = [|
    0x89uy
    byte 'D'
    byte 'S'
    byte 'G'
    byte 'P'
    byte 'L'
    byte 'A'
    byte 'N'
|]

let hashSize = 32

/// Do these bytes begin as a binary plan?
let isBinary (bytes: byte[]) =
    bytes.Length >= magic.Length && bytes.AsSpan(0, magic.Length).SequenceEqual(ReadOnlySpan magic)

/// SHA-256 of the text form: the hash names the content, whatever its encoding.
let contentHash (plan: PlanSet) : byte[] = SHA256.HashData(UTF8Encoding(false, true).GetBytes(PlanPrint.print plan))

// what is written by number: positions in these lists, which only ever grow at their end

let dtypeOf = DType.All
let kindOf = kinds |> Array.map snd

let phaseOf = [|
    Phase.Prologue
    Phase.F 0
    Phase.I 0
    Phase.W 0
    Phase.S
    Phase.Epilogue
    Phase.R 0
|]

[<Sealed>]
type private Writer() =
    let out = new MemoryStream()
    let texts = Dictionary<string, int>(StringComparer.Ordinal)
    let order = List<string>()

    member _.UInt(value: uint64) =
        let mutable v = value

        while v >= 0x80UL do
            out.WriteByte(byte v ||| 0x80uy)
            v <- v >>> 7

        out.WriteByte(byte v)

    /// Small negative numbers are short too.
    member this.Long(value: int64) = this.UInt(uint64 ((value <<< 1) ^^^ (value >>> 63)))
    member this.Int(value: int) = this.Long(int64 value)
    member this.Count(value: int) = this.UInt(uint64 value)

    member _.Float(value: float) =
        let bytes = Array.zeroCreate<byte> 8
        BinaryPrimitives.WriteDoubleLittleEndian(bytes.AsSpan(), value)
        out.Write(bytes, 0, 8)

    /// By its place in the table of texts.
    member this.Text(value: string) =
        match texts.TryGetValue value with
        | true, n -> this.Count n
        | false, _ ->
            texts[value] <- order.Count
            this.Count order.Count
            order.Add value

    member this.List(values: IReadOnlyList<'a>, write: 'a -> unit) =
        this.Count values.Count

        for v in values do
            write v

    member this.Ints(values: IReadOnlyList<int>) = this.List(values, this.Int)
    member _.Texts = order
    member _.Bytes = out.ToArray()

let private indexOf (all: 'a[]) (value: 'a) = Array.IndexOf(all, value)

let private writeShape (w: Writer) (dtype: DType) (axes: IReadOnlyList<string>) (extents: IReadOnlyList<int>) =
    w.Count(indexOf dtypeOf dtype)
    w.List(axes, w.Text)
    w.Ints extents

let private writeLayout (w: Writer) (layout: IReadOnlyList<AxisState>) =
    w.List(
        layout,
        fun state ->
            match state with
            | AxisState.Replicated -> w.Int -1
            | AxisState.PartialSum -> w.Int -2
            | AxisState.PartialMax -> w.Int -3
            | AxisState.Split d -> w.Int d
    )

let private writeAttribute (w: Writer) (a: Attribute) =
    match a with
    | Attribute.Int n ->
        w.Count 0
        w.Long n
    | Attribute.Float x ->
        w.Count 1
        w.Float x
    | Attribute.Ints values ->
        w.Count 2
        w.List(values, w.Long)
    | Attribute.Text word ->
        w.Count 3
        w.Text word

let private writeCollective (w: Writer) (kind: Collective) =
    match kind with
    | Collective.AllReduceSum -> w.Count 0
    | Collective.AllReduceMax -> w.Count 1
    | Collective.AllGather d ->
        w.Count 2
        w.Int d
    | Collective.ReduceScatter d ->
        w.Count 3
        w.Int d
    | Collective.AllToAll(split, join) ->
        w.Count 4
        w.Int split
        w.Int join
    | Collective.RouteToExperts -> w.Count 5
    | Collective.RowsToExperts -> w.Count 6
    | Collective.RowsToTokens -> w.Count 7
    | Collective.Send stage ->
        w.Count 8
        w.Int stage
    | Collective.Recv stage ->
        w.Count 9
        w.Int stage
    | Collective.Dispatch ranks ->
        w.Count 10
        w.Int ranks
    | Collective.Combine ranks ->
        w.Count 11
        w.Int ranks

let private writeStep (w: Writer) (step: Step) =
    match step with
    | Step.Launch(kernel, attributes, inputs, outputs, path) ->
        w.Count 0
        w.Text(kernelName kernel)
        w.List(attributes, writeAttribute w)
        w.Ints inputs
        w.Ints outputs
        w.Text path
    | Step.Start(token, kind, group, inputs, outputs, path) ->
        w.Count 1
        w.Int token
        writeCollective w kind
        w.Int group
        w.Ints inputs
        w.Ints outputs
        w.Text path
    | Step.Wait token ->
        w.Count 2
        w.Int token
    | Step.Free slot ->
        w.Count 3
        w.Int slot

let private writeSlot (w: Writer) (s: SlotInfo) =
    w.Int s.Id
    w.Text s.Name
    w.Count(indexOf kindOf s.Kind)
    writeShape w s.DType s.Axes s.Extents
    // 1: routed; 2: a density other than 1 follows; 4: a padding other than 1 follows
    w.Count(
        (if s.Routed then 1 else 0)
        + (if s.Density <> 1.0 then 2 else 0)
        + (if s.Padding <> 1 then 4 else 0)
    )

    if s.Density <> 1.0 then
        w.Float s.Density

    if s.Padding <> 1 then
        w.Int s.Padding

    writeLayout w s.Layout

let private writePhase (w: Writer) (phase: Phase) =
    w.Count(indexOf phaseOf (phase.WithPart 0))

    if phase.HasParts then
        w.Int phase.Part

let private writeStage (w: Writer) (s: StagePlan) =
    w.Int s.Stage
    w.Text s.Units
    w.List(s.Slots, writeSlot w)

    w.List(
        s.Programs,
        fun p ->
            writePhase w p.Phase
            w.Int p.Chunk
            w.List(p.Steps, writeStep w)
    )

    w.List(
        s.Timetable,
        fun a ->
            writePhase w a.Phase
            w.Int a.Chunk
            w.Int a.Microbatch
    )

let private writeParameter (w: Writer) (p: ParameterInfo) =
    w.Text p.Name
    writeShape w p.DType p.Axes p.Extents
    writeLayout w p.Layout

    match p.Init with
    | Init.Zeros -> w.Count 0
    | Init.Ones -> w.Count 1
    | Init.Normal std ->
        w.Count 2
        w.Float std

    match p.Update with
    | Update.AdamW decay -> w.Count(if decay then 1 else 0)
    | Update.RouterBias rate ->
        w.Count 2
        w.Float rate
    | Update.Frozen -> w.Count 3

    w.Ints p.Stages

let private writeInput (w: Writer) (i: InputInfo) =
    w.Text i.Name
    writeShape w i.DType i.Axes i.Extents
    writeLayout w i.Layout

let private writeMemory (w: Writer) (m: MemoryRow) =
    w.Int m.Stage

    for bytes in
        [
            m.Parameters
            m.Optimizer
            m.Gradients
            m.Counters
            m.Activations
            m.Collectives
            m.Peak
            m.Headroom
            m.Worst
            m.Arena
        ] do
        w.Long bytes

    w.List(
        m.Regions,
        fun r ->
            w.Text r.From
            w.Text r.Until
            w.Count(if r.Routed then 1 else 0)
            w.Long r.Base
            w.Long r.Stride
            w.Int r.Count
    )

    w.List(m.Offsets, w.Long)

let private writePlan (w: Writer) (plan: PlanSet) =
    w.List(plan.Recipe, w.Text)
    let m = plan.Mesh

    for degree in
        [
            m.Tensor
            m.Context
            m.Data
            m.Pipeline
            m.ExpertTensor
            m.Expert
            m.ExpertData
        ] do
        w.Int degree

    w.List(
        m.Axes,
        fun a ->
            w.Text a.Name
            w.Int a.Size
    )

    w.Text plan.Layout
    w.Text plan.Schedule
    w.Int plan.Chunks
    w.Int plan.Microbatches
    w.Int plan.MicroBatch
    w.Int plan.SeqLength

    w.List(
        plan.Groups,
        fun g ->
            w.Int g.Id
            w.Text g.Name
            w.Ints g.MeshAxes
            w.Ints g.Stages
    )

    w.List(plan.Parameters, writeParameter w)
    w.List(plan.Inputs, writeInput w)
    w.List(plan.Memory, writeMemory w)
    w.List(plan.Stages, writeStage w)

/// The binary form; equal plans give equal bytes.
let print (plan: PlanSet) : byte[] =
    let body, table = Writer(), Writer()
    writePlan body plan
    // UTF-16 units one by one: every text survives, halves of a pair too, and ASCII takes a byte a letter
    table.List(body.Texts, (fun text -> table.List(text.ToCharArray(), (fun c -> table.Count(int c)))))
    let version = Array.zeroCreate<byte> 4
    BinaryPrimitives.WriteUInt32LittleEndian(version.AsSpan(), uint32 plan.Version)
    Array.concat [ magic; version; contentHash plan; table.Bytes; body.Bytes ]
