/// Reads a plan's text form; wrong text gives a diagnostic with the line, never an exception.
[<RequireQualifiedAccess>]
module DeepSeekGraph.PlanText

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.PlanWords
open DeepSeekGraph.PlanLines

/// Longest line that is read.
let private longestLine = 1 <<< 20

let private keywords =
    ("recipe mesh axis layout schedule chunks microbatches micro_batch seq_length "
     + "group parameter input memory region offsets stage slot program timetable")
        .Split
        ' '

let private memoryFields = [|
    "parameters"
    "optimizer"
    "gradients"
    "counters"
    "activations"
    "collectives"
    "peak"
    "headroom"
    "worst"
    "arena"
|]

/// Grows a plan line by line.
[<Sealed>]
type private Reader() =
    let recipe, axes, groups = List<string>(), List<MeshAxis>(), List<Group>()
    let parameters, inputs, memory = List<ParameterInfo>(), List<InputInfo>(), List<MemoryRow>()
    let stages, slots, programs, steps = List<StagePlan>(), List<SlotInfo>(), List<Program>(), List<Step>()
    let degrees: int[] = Array.create 7 1
    let mutable seen = Set.empty<string>
    let mutable layoutText, schedule = "", ""
    let mutable chunks, microbatches, microBatch, seqLength = 0, 0, 0, 0
    // phase and chunk of the program that is read
    let mutable phase = ValueNone
    let mutable open' = ValueNone

    let once (word: string) =
        if seen.Contains word then
            raise (malformed $"'%s{word}' comes twice" "")

        seen <- seen.Add word

    let closeProgram () =
        match phase with
        | ValueSome(struct (p, chunk)) ->
            programs.Add {
                Phase = p
                Chunk = chunk
                Steps = steps.ToArray()
            }
        | ValueNone -> ()

        steps.Clear()
        phase <- ValueNone

    let within word =
        if ValueOption.isNone open' then
            raise (malformed $"'%s{word}' stands outside a stage" "")

    let without word =
        if ValueOption.isSome open' then
            raise (malformed $"'%s{word}' stands inside a stage" "a stage ends with its timetable")

    let field (s: Scanner) (name: string) =
        s.Expect(name + "=")
        s.Long name

    /// Lines behind a memory line add to it.
    let lastMemory word (change: MemoryRow -> MemoryRow) =
        if memory.Count = 0 then
            raise (malformed $"'%s{word}' stands before any 'memory'" "")

        if memory[memory.Count - 1].Regions.Count > 1000 then
            raise (malformed "a stage has more than 1000 regions" "")

        memory[memory.Count - 1] <- change memory[memory.Count - 1]

    let scalar (s: Scanner) word =
        once word
        without word
        let n = s.Int word
        s.Close()
        n

    member _.Line(line: string) : unit =
        let s = Scanner line

        if s.Peek = '#' || s.AtEnd then
            ()
        elif phase.IsSome && (line.StartsWith "  ") then
            steps.Add(step s)
        else
            match s.Word "a keyword" with
            | "recipe" ->
                without "recipe"
                recipe.Add(s.Word "a recipe line")
                s.Close()
            | "mesh" ->
                once "mesh"

                [| "tp"; "cp"; "dp"; "pp"; "etp"; "ep"; "edp" |]
                |> Array.iteri (fun i name ->
                    s.Expect(name + "=")
                    degrees[i] <- s.Int name)

                s.Close()
            | "axis" ->
                without "axis"
                let name = s.Word "a name"
                axes.Add { Name = name; Size = s.Int "a size" }
                s.Close()
            | "layout" ->
                once "layout"
                layoutText <- s.Word "a layout"
                s.Close()
            | "schedule" ->
                once "schedule"
                schedule <- s.Word "a schedule"
                s.Close()
            | "chunks" -> chunks <- scalar s "chunks"
            | "microbatches" -> microbatches <- scalar s "microbatches"
            | "micro_batch" -> microBatch <- scalar s "micro_batch"
            | "seq_length" -> seqLength <- scalar s "seq_length"
            | "group" ->
                without "group"
                s.Expect "g"
                let id = s.Int "a group"
                let name = s.Word "a name"
                s.Expect "axes"
                let along = s.Ints "a mesh axis"
                s.Expect "stages"
                let across = s.Ints "a stage"
                s.Close()

                groups.Add {
                    Id = id
                    Name = name
                    MeshAxes = along
                    Stages = across
                }
            | "parameter" ->
                without "parameter"
                parameters.Add(parameter s)
            | "input" ->
                without "input"
                let name = s.Word "a name"
                let struct (dtype, axes, extents) = shape s
                let layout = layout s
                s.Close()

                inputs.Add {
                    Name = name
                    DType = dtype
                    Axes = axes
                    Extents = extents
                    Layout = layout
                }
            | "memory" ->
                without "memory"
                let stage = s.Int "a stage"

                let fields = [|
                    for name in memoryFields do
                        field s name
                |]

                s.Close()

                memory.Add {
                    Stage = stage
                    Parameters = fields[0]
                    Optimizer = fields[1]
                    Gradients = fields[2]
                    Counters = fields[3]
                    Activations = fields[4]
                    Collectives = fields[5]
                    Peak = fields[6]
                    Headroom = fields[7]
                    Worst = fields[8]
                    Arena = fields[9]
                    Regions = [||]
                    Offsets = [||]
                }
            | "region" ->
                without "region"
                let from = s.Word "where it begins"
                let until = s.Word "where it ends"

                let fields = [|
                    for name in [| "routed"; "base"; "stride"; "count" |] do
                        field s name
                |]

                s.Close()

                if fields[0] <> 0L && fields[0] <> 1L || fields[3] < 0L || fields[3] > int64 System.Int32.MaxValue then
                    raise (malformed $"a region has routed=%i{fields[0]} and count=%i{fields[3]}" "")

                lastMemory "region" (fun row -> {
                    row with
                        Regions = [|
                            yield! row.Regions

                            {
                                From = from
                                Until = until
                                Routed = (fields[0] = 1L)
                                Base = fields[1]
                                Stride = fields[2]
                                Count = int fields[3]
                            }
                        |]
                })
            | "offsets" ->
                without "offsets"
                let offsets = s.Longs "an offset"
                s.Close()
                lastMemory "offsets" (fun row -> { row with Offsets = offsets })
            | "stage" ->
                without "stage"
                let stage = s.Int "a stage"
                open' <- ValueSome struct (stage, s.Word "units")
                s.Close()
            | "slot" ->
                within "slot"
                slots.Add(slot s)
            | "program" ->
                within "program"
                closeProgram ()
                phase <- ValueSome(program s)
                s.Close()
            | "timetable" ->
                within "timetable"
                closeProgram ()
                let struct (stage, units) = open'.Value

                stages.Add {
                    Stage = stage
                    Units = units
                    Slots = slots.ToArray()
                    Programs = programs.ToArray()
                    Timetable = timetable s
                }

                slots.Clear()
                programs.Clear()
                open' <- ValueNone
            | other ->
                raise (malformed $"'%s{other}' starts no line of a plan" $"the nearest are %s{nearest other keywords}")

    member _.Finish() : PlanSet =
        without "the end of the text"

        for word in
            [
                "mesh"
                "layout"
                "schedule"
                "chunks"
                "microbatches"
                "micro_batch"
                "seq_length"
            ] do
            if not (seen.Contains word) then
                raise (malformed $"the plan has no line '%s{word}'" "")

        {
            Version = PlanSchema.Version
            Recipe = recipe.ToArray()
            Mesh = {
                Tensor = degrees[0]
                Context = degrees[1]
                Data = degrees[2]
                Pipeline = degrees[3]
                ExpertTensor = degrees[4]
                Expert = degrees[5]
                ExpertData = degrees[6]
                Axes = axes.ToArray()
            }
            Layout = layoutText
            Schedule = schedule
            Chunks = chunks
            Microbatches = microbatches
            MicroBatch = microBatch
            SeqLength = seqLength
            Groups = groups.ToArray()
            Parameters = parameters.ToArray()
            Inputs = inputs.ToArray()
            Stages = stages.ToArray()
            Memory = memory.ToArray()
        }

let private header (line: string) : unit =
    let s = Scanner line

    if not (s.Try "dsg-plan ") then
        raise (malformed "the first line is not 'dsg-plan <version>'" "give a file that dsg compile wrote")

    let version = s.Int "the version"
    s.Close()

    if version <> PlanSchema.Version then
        raise (
            Malformed(
                Codes.PlanVersion,
                $"the plan has schema version %i{version}; this program reads version %i{PlanSchema.Version}",
                "compile the recipe again with this version of dsg"
            )
        )

/// The text form; `parse` reads it back.
let print (plan: PlanSet) : string = PlanPrint.print plan

/// The plan, or the first thing wrong with the text. `source` names it in messages.
let parseFrom (source: string) (text: string) : Result<PlanSet, Diagnostic list> =
    let reader = Reader()
    let mutable line = 0
    let mutable at = 0

    try
        while at < text.Length do
            let next =
                match text.IndexOf('\n', at) with
                | -1 -> text.Length
                | i -> i

            line <- line + 1

            if next - at > longestLine then
                raise (malformed $"the line has %i{next - at} characters; at most %i{longestLine} are read" "")

            let content = text.Substring(at, next - at).TrimEnd('\r')
            if line = 1 then header content else reader.Line content
            at <- next + 1

        if line = 0 then
            header ""

        Ok(reader.Finish())
    with :? Malformed as e ->
        Error [
            {
                Code = e.Code
                At = $"%s{source}, line %i{max 1 line}"
                Message = e.Message
                Help = e.Help
            }
        ]

/// The plan, or the first thing wrong with the text.
let parse (text: string) : Result<PlanSet, Diagnostic list> = parseFrom "plan" text
