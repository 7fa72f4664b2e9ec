/// Reads a plan's binary form; damaged bytes give a diagnostic with their place, never an exception.
[<RequireQualifiedAccess>]
module DeepSeekGraph.PlanBinary

open System
open System.Buffers.Binary
open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.PlanWords
open DeepSeekGraph.PlanBinaryPrint

/// Letters of all texts together, each counted as often as it is named.
let private mostText = 1L <<< 28

/// Reads from left to right; lists grow as their elements are read, so that a length that lies costs nothing.
[<Sealed>]
type private Reader(bytes: byte[]) =
    let mutable at = 0
    let mutable texts: string[] = [||]
    let mutable said = 0L
    let fail message : exn = malformed message "give a plan file that dsg compile wrote"

    member _.At = at
    member _.Fail(message: string) : exn = fail message

    member _.Skip(count: int) : ReadOnlySpan<byte> =
        if bytes.Length - at < count then
            raise (fail "the file ends in the middle of a plan")

        at <- at + count
        ReadOnlySpan(bytes, at - count, count)

    member this.UInt() : uint64 =
        let mutable value = 0UL
        let mutable shift = 0
        let mutable more = true

        while more do
            let b = this.Skip(1)[0]

            // the tenth byte has one bit left; a last byte of zero would be a second spelling of the same number
            if shift = 63 && b > 1uy || shift > 0 && b = 0uy then
                raise (fail "a number is spelled wrongly")

            value <- value ||| (uint64 (b &&& 0x7Fuy) <<< shift)
            shift <- shift + 7
            more <- b >= 0x80uy

        value

    member this.Long() : int64 =
        let v = this.UInt()
        int64 (v >>> 1) ^^^ -(int64 (v &&& 1UL))

    member this.Int() : int =
        match this.Long() with
        | n when n >= int64 Int32.MinValue && n <= int64 Int32.MaxValue -> int n
        | n -> raise (fail $"%i{n} has more than 32 bits")

    member this.Float() : float = BinaryPrimitives.ReadDoubleLittleEndian(this.Skip 8)

    /// A length, which cannot be more than the bytes that are left: every element takes one.
    member this.Count() : int =
        match this.UInt() with
        | n when n <= uint64 (bytes.Length - at) -> int n
        | n -> raise (fail $"a list of %i{n} elements does not fit into the %i{bytes.Length - at} bytes left")

    member this.List(read: unit -> 'a) : 'a[] =
        let count = this.Count()
        let found = List<'a>()

        for _ in 1..count do
            found.Add(read ())

        found.ToArray()

    /// One of a closed list.
    member this.OneOf(role: string, all: 'a[]) : 'a =
        match this.UInt() with
        | n when n < uint64 all.Length -> all[int n]
        | n -> raise (fail $"%i{n} is no %s{role}; there are %i{all.Length}")

    member this.Ints() : int[] = this.List this.Int

    /// The table that Text looks up.
    member this.Table() : unit =
        let letter () =
            match this.UInt() with
            | n when n <= 0xFFFFUL -> char n
            | n -> raise (fail $"%i{n} is no UTF-16 unit")

        texts <- this.List(fun () -> String(this.List letter))

    /// A few bytes that name a long text again and again must not become more than a file may hold.
    member this.Text() : string =
        let text = this.OneOf("text of the table", texts)
        said <- said + int64 text.Length

        if said > mostText then
            raise (fail $"the texts of the plan have more than %i{mostText} letters")

        text

let private dtype (r: Reader) = r.OneOf("element type", dtypeOf)

let private readLayout (r: Reader) : AxisState[] =
    r.List(fun () ->
        match r.Int() with
        | -1 -> AxisState.Replicated
        | -2 -> AxisState.PartialSum
        | -3 -> AxisState.PartialMax
        | d when d >= 0 -> AxisState.Split d
        | other -> raise (r.Fail $"%i{other} is no state of a mesh axis"))

/// Element type, axes and extents, as many of these as of those.
let private readShape (r: Reader) : struct (DType * string[] * int[]) =
    let dtype = dtype r
    let axes = r.List r.Text
    let extents = r.Ints()

    if axes.Length <> extents.Length then
        raise (r.Fail $"%i{axes.Length} axes have %i{extents.Length} extents")

    struct (dtype, axes, extents)

let private attribute (r: Reader) : Attribute =
    match r.UInt() with
    | 0UL -> Attribute.Int(r.Long())
    | 1UL -> Attribute.Float(r.Float())
    | 2UL -> Attribute.Ints(r.List r.Long)
    | 3UL -> Attribute.Text(r.Text())
    | other -> raise (r.Fail $"%i{other} is no kind of attribute")

let private collective (r: Reader) : Collective =
    match r.UInt() with
    | 0UL -> Collective.AllReduceSum
    | 1UL -> Collective.AllReduceMax
    | 2UL -> Collective.AllGather(r.Int())
    | 3UL -> Collective.ReduceScatter(r.Int())
    | 4UL ->
        let split = r.Int()
        Collective.AllToAll(split, r.Int())
    | 5UL -> Collective.RouteToExperts
    | 6UL -> Collective.RowsToExperts
    | 7UL -> Collective.RowsToTokens
    | 8UL -> Collective.Send(r.Int())
    | 9UL -> Collective.Recv(r.Int())
    | 10UL -> Collective.Dispatch(r.Int())
    | 11UL -> Collective.Combine(r.Int())
    | other -> raise (r.Fail $"%i{other} is no collective")

let private kernel (r: Reader) : KernelId =
    let name = r.Text()

    match kernels.TryGetValue name with
    | true, kernel -> kernel
    | false, _ -> raise (malformed $"there is no kernel '%s{name}'" $"the nearest are %s{nearest name kernels.Keys}")

let private step (r: Reader) : Step =
    match r.UInt() with
    | 0UL ->
        let kernel = kernel r
        let attributes = r.List(fun () -> attribute r)
        let inputs = r.Ints()
        let outputs = r.Ints()
        Step.Launch(kernel, attributes, inputs, outputs, r.Text())
    | 1UL ->
        let token = r.Int()
        let kind = collective r
        let group = r.Int()
        let inputs = r.Ints()
        let outputs = r.Ints()
        Step.Start(token, kind, group, inputs, outputs, r.Text())
    | 2UL -> Step.Wait(r.Int())
    | 3UL -> Step.Free(r.Int())
    | other -> raise (r.Fail $"%i{other} is no step")

let private slot (r: Reader) : SlotInfo =
    let id = r.Int()
    let name = r.Text()
    let kind = r.OneOf("slot kind", kindOf)
    let struct (dtype, axes, extents) = readShape r
    let flags = r.OneOf("set of slot flags", [| 0..7 |])

    let density =
        if flags &&& 2 = 0 then
            1.0
        else
            match r.Float() with
            | 1.0 -> raise (r.Fail "a density of 1 is not written")
            | density -> density

    let padding =
        if flags &&& 4 = 0 then
            1
        else
            match r.Int() with
            | 1 -> raise (r.Fail "a padding of 1 is not written")
            | padding -> padding

    {
        Id = id
        Name = name
        Kind = kind
        DType = dtype
        Axes = axes
        Extents = extents
        Routed = flags % 2 = 1
        Density = density
        Padding = padding
        Layout = readLayout r
    }

let private stage (r: Reader) : StagePlan =
    let phase () =
        let phase = r.OneOf("phase", phaseOf)
        if phase.HasParts then phase.WithPart(r.Int()) else phase

    let number = r.Int()
    let units = r.Text()
    let slots = r.List(fun () -> slot r)

    let programs =
        r.List(fun () ->
            let phase = phase ()
            let chunk = r.Int()

            {
                Phase = phase
                Chunk = chunk
                Steps = r.List(fun () -> step r)
            })

    let action () : Action =
        let phase = phase ()
        let chunk = r.Int()

        let microbatch = r.Int()

        if phase.IsOnce && (microbatch <> 0 || chunk <> 0 && not phase.IsR) then
            raise (r.Fail $"the %s{phase.Name} is said to be of chunk %i{chunk}, microbatch %i{microbatch}")

        {
            Phase = phase
            Chunk = chunk
            Microbatch = microbatch
        }

    {
        Stage = number
        Units = units
        Slots = slots
        Programs = programs
        Timetable = r.List action
    }

let private parameter (r: Reader) : ParameterInfo =
    let name = r.Text()
    let struct (dtype, axes, extents) = readShape r
    let layout = readLayout r

    let init =
        match r.UInt() with
        | 0UL -> Init.Zeros
        | 1UL -> Init.Ones
        | 2UL -> Init.Normal(r.Float())
        | other -> raise (r.Fail $"%i{other} is no initial value")

    let update =
        match r.UInt() with
        | 0UL -> Update.AdamW false
        | 1UL -> Update.AdamW true
        | 2UL -> Update.RouterBias(r.Float())
        | 3UL -> Update.Frozen
        | other -> raise (r.Fail $"%i{other} is no update")

    {
        Name = name
        DType = dtype
        Axes = axes
        Extents = extents
        Layout = layout
        Init = init
        Update = update
        Stages = r.Ints()
    }

let private input (r: Reader) : InputInfo =
    let name = r.Text()
    let struct (dtype, axes, extents) = readShape r

    {
        Name = name
        DType = dtype
        Axes = axes
        Extents = extents
        Layout = readLayout r
    }

let private region (r: Reader) : MemoryRegion =
    let from = r.Text()
    let until = r.Text()
    let routed = r.OneOf("flag", [| false; true |])
    let first = r.Long()
    let stride = r.Long()

    {
        From = from
        Until = until
        Routed = routed
        Base = first
        Stride = stride
        Count = r.Int()
    }

let private memory (r: Reader) : MemoryRow =
    let stage = r.Int()
    let bytes = Array.init 10 (fun _ -> r.Long())

    {
        Stage = stage
        Parameters = bytes[0]
        Optimizer = bytes[1]
        Gradients = bytes[2]
        Counters = bytes[3]
        Activations = bytes[4]
        Collectives = bytes[5]
        Peak = bytes[6]
        Headroom = bytes[7]
        Worst = bytes[8]
        Arena = bytes[9]
        Regions = r.List(fun () -> region r)
        Offsets = r.List r.Long
    }

let private group (r: Reader) : Group =
    let id = r.Int()
    let name = r.Text()
    let axes = r.Ints()

    {
        Id = id
        Name = name
        MeshAxes = axes
        Stages = r.Ints()
    }

let private axis (r: Reader) : MeshAxis =
    let name = r.Text()
    { Name = name; Size = r.Int() }

let private plan (r: Reader) : PlanSet =
    let recipe = r.List r.Text
    let degrees = Array.init 7 (fun _ -> r.Int())
    let axes = r.List(fun () -> axis r)
    let layout = r.Text()
    let schedule = r.Text()
    let chunks = r.Int()
    let microbatches = r.Int()
    let microBatch = r.Int()
    let seqLength = r.Int()
    let groups = r.List(fun () -> group r)
    let parameters = r.List(fun () -> parameter r)
    let inputs = r.List(fun () -> input r)
    let memory = r.List(fun () -> memory r)

    {
        Version = PlanSchema.Version
        Recipe = recipe
        Mesh = {
            Tensor = degrees[0]
            Context = degrees[1]
            Data = degrees[2]
            Pipeline = degrees[3]
            ExpertTensor = degrees[4]
            Expert = degrees[5]
            ExpertData = degrees[6]
            Axes = axes
        }
        Layout = layout
        Schedule = schedule
        Chunks = chunks
        Microbatches = microbatches
        MicroBatch = microBatch
        SeqLength = seqLength
        Groups = groups
        Parameters = parameters
        Inputs = inputs
        Stages = r.List(fun () -> stage r)
        Memory = memory
    }

/// The plan, or the first thing wrong with the bytes. `source` names them in messages.
let parseFrom (source: string) (bytes: byte[]) : Result<PlanSet, Diagnostic list> =
    let r = Reader bytes

    try
        if not (isBinary bytes) then
            raise (r.Fail "the file does not begin as a binary plan")

        let _magic = r.Skip magic.Length
        let version = BinaryPrimitives.ReadUInt32LittleEndian(r.Skip 4)

        if version <> uint32 PlanSchema.Version then
            raise (
                Malformed(
                    Codes.PlanVersion,
                    $"the plan has schema version %i{version}; this program reads version %i{PlanSchema.Version}",
                    "compile the recipe again with this version of dsg"
                )
            )

        let said = (r.Skip hashSize).ToArray()
        r.Table()
        let plan = plan r

        if r.At <> bytes.Length then
            raise (r.Fail $"%i{bytes.Length - r.At} bytes follow the plan")

        let hash = contentHash plan

        if not (said.AsSpan().SequenceEqual(ReadOnlySpan hash)) then
            raise (
                Malformed(
                    Codes.PlanFile,
                    $"the file says hash %s{Convert.ToHexStringLower said} but its content has %s{Convert.ToHexStringLower hash}",
                    "the file was changed: compile it again"
                )
            )

        Ok plan
    with :? Malformed as e ->
        Error [
            {
                Code = e.Code
                At = $"%s{source}, byte %i{r.At}"
                Message = e.Message
                Help = e.Help
            }
        ]

/// Do these bytes begin as a binary plan?
let isBinary (bytes: byte[]) : bool = PlanBinaryPrint.isBinary bytes

/// The binary form; equal plans give equal bytes.
let print (plan: PlanSet) : byte[] = PlanBinaryPrint.print plan

/// The plan, or the first thing wrong with the bytes.
let parse (bytes: byte[]) : Result<PlanSet, Diagnostic list> = parseFrom "plan" bytes
