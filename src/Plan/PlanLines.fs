/// The lines of a plan's text form, each read by itself.
module internal DeepSeekGraph.PlanLines

open System
open System.Collections.Generic
open System.Globalization
open DeepSeekGraph
open DeepSeekGraph.PlanWords

let shape (s: Scanner) : struct (DType * string[] * int[]) =
    let dtype = lookup "element type" dtypes (s.Word "an element type")
    let axes, extents = List<string>(), List<int>()
    s.Expect "["

    while not (s.Try "]") do
        if axes.Count > 0 then
            s.Expect ","

        axes.Add(s.Word "an axis name")
        extents.Add(s.Int "an extent")

    struct (dtype, axes.ToArray(), extents.ToArray())

let layout (s: Scanner) : AxisState[] =
    let states = List<AxisState>()
    s.Expect "<"

    while not (s.Try ">") do
        let state =
            if s.Try "R" then AxisState.Replicated
            elif s.Try "S" then AxisState.Split(s.Int "a dim")
            elif s.Try "P" then AxisState.PartialSum
            elif s.Try "M" then AxisState.PartialMax
            else raise (malformed "a layout has a state that is none of R, S<dim>, P, M" "")

        states.Add state

    states.ToArray()

let private attributes (s: Scanner) : Attribute[] =
    let found = List<Attribute>()

    while s.Peek <> '%' && s.Peek <> ';' && not s.AtEnd do
        if s.IsQuoted then
            found.Add(Attribute.Text(s.Word "a text"))
        elif s.Try "[" then
            let values = List<int64>()

            while not (s.Try "]") do
                values.Add(s.Long "an integer")

            found.Add(Attribute.Ints(values.ToArray()))
        else
            let mutable isInt = false
            let word = s.Number("an attribute", &isInt)

            if isInt then
                match Int64.TryParse(word, NumberStyles.AllowLeadingSign, CultureInfo.InvariantCulture) with
                | true, n -> found.Add(Attribute.Int n)
                | false, _ -> raise (malformed $"'%s{word}' is no 64-bit integer" "")
            else
                match Double.TryParse(word, NumberStyles.Float, CultureInfo.InvariantCulture) with
                | true, x -> found.Add(Attribute.Float x)
                | false, _ ->
                    raise (malformed $"'%s{word}' is no number" "attributes are numbers, [integers] or \"text\"")

    found.ToArray()

let private kernel (name: string) =
    match kernels.TryGetValue name with
    | true, kernel -> kernel
    | false, _ -> raise (malformed $"there is no kernel '%s{name}'" $"the nearest are %s{nearest name kernels.Keys}")

let private collectives = [|
    "all_reduce"
    "all_reduce_max"
    "all_gather"
    "reduce_scatter"
    "all_to_all"
    "route_to_experts"
    "rows_to_experts"
    "rows_to_tokens"
    "dispatch"
    "combine"
    "send"
    "recv"
|]

let private collective (s: Scanner) : Collective =
    let name = s.Word "a collective"

    let one () =
        s.Expect "("
        let n = s.Int "a dim or stage"
        s.Expect ")"
        n

    match name with
    | "all_reduce" -> Collective.AllReduceSum
    | "all_reduce_max" -> Collective.AllReduceMax
    | "all_gather" -> Collective.AllGather(one ())
    | "reduce_scatter" -> Collective.ReduceScatter(one ())
    | "all_to_all" ->
        s.Expect "("
        let split = s.Int "a dim"
        s.Expect ","
        let join = s.Int "a dim"
        s.Expect ")"
        Collective.AllToAll(split, join)
    | "route_to_experts" -> Collective.RouteToExperts
    | "rows_to_experts" -> Collective.RowsToExperts
    | "rows_to_tokens" -> Collective.RowsToTokens
    | "dispatch" -> Collective.Dispatch(one ())
    | "combine" -> Collective.Combine(one ())
    | "send" -> Collective.Send(one ())
    | "recv" -> Collective.Recv(one ())
    | other -> raise (malformed $"there is no collective '%s{other}'" $"the nearest are %s{nearest other collectives}")

let private path (s: Scanner) =
    s.Expect ";"
    let path = s.Word "a module path"
    s.Close()
    path

/// A line of a program.
let step (s: Scanner) : Step =
    if s.Peek = '%' || s.Peek = '=' then
        let outputs = s.Slots()
        s.Expect "="
        let kernel = kernel (s.Word "a kernel")
        let attributes = attributes s
        let inputs = s.Slots()
        Step.Launch(kernel, attributes, inputs, outputs, path s)
    elif s.Try "wait t" then
        let token = s.Int "a token"
        s.Close()
        Step.Wait token
    elif s.Try "free %" then
        let slot = s.Int "a slot"
        s.Close()
        Step.Free slot
    elif s.Try "t" then
        let token = s.Int "a token"
        s.Expect "<-"
        let kind = collective s
        s.Expect "g"
        let group = s.Int "a group"
        let inputs = s.Slots()
        s.Expect "->"
        let outputs = s.Slots()
        Step.Start(token, kind, group, inputs, outputs, path s)
    else
        raise (
            malformed "this is no step" "a step is '%out = kernel ...', 't1 <- collective ...', 'wait t1' or 'free %1'"
        )

/// W3.2@1 -> W 2, 3, 1; what is left out is -1 before '.' and '@', part 0 and chunk 0 behind them.
let private action (word: string) : struct (Phase * int * int) =
    let number role (digits: string) =
        match Int32.TryParse(digits, NumberStyles.None, CultureInfo.InvariantCulture) with
        | true, n -> n
        | false, _ ->
            raise (
                malformed
                    $"'%s{word}' has no 32-bit %s{role}"
                    "an action is a phase and a microbatch: F3, F3@1 in chunk 1, or W3.2 of part 2"
            )

    let cut (text: string) (mark: char) role =
        match text.IndexOf mark with
        | -1 -> struct (text, 0)
        | at -> struct (text.Substring(0, at), number role (text.Substring(at + 1)))

    let struct (front, chunk) = cut word '@' "chunk"
    let struct (front, part) = cut front '.' "part"
    let name = front.TrimEnd([| '0' .. '9' |])
    let digits = front.Substring name.Length

    let whole = lookup "phase" phases name

    if word.Contains '.' && not whole.HasParts then
        raise (malformed $"'%s{word}' names a part, and %s{whole.Word} is one piece" "F, I, W and R have parts")

    let phase = whole.WithPart part

    struct (phase, (if digits = "" then -1 else number "microbatch" digits), chunk)

/// Whose program follows: F, or F@1 of chunk 1.
let program (s: Scanner) : struct (Phase * int) =
    let word = s.Word "a phase"

    match action word with
    | struct (phase, -1, chunk) -> struct (phase, chunk)
    | _other -> raise (malformed $"'%s{word}' names a microbatch; a program is for all of them" "")

let timetable (s: Scanner) : Action[] =
    let actions = List<Action>()

    while not s.AtEnd do
        let word = s.Word "an action"
        let struct (phase, microbatch, chunk) = action word

        if phase.IsOnce <> (microbatch < 0) || phase.IsOnce && not phase.IsR && chunk <> 0 then
            raise (
                malformed
                    $"'%s{word}' is no action"
                    "F, I, W and S have a microbatch, prologue, R and epilogue have none"
            )

        actions.Add {
            Phase = phase
            Chunk = chunk
            Microbatch = max 0 microbatch
        }

    actions.ToArray()

let slot (s: Scanner) : SlotInfo =
    s.Expect "%"
    let id = s.Int "a slot"
    let kind = lookup "slot kind" kinds (s.Word "a slot kind")
    let name = s.Word "a name"
    let struct (dtype, axes, extents) = shape s
    let layout = layout s
    let routed = s.Try "routed"
    let density = if s.Try "density=" then s.Float "a density" else 1.0
    let padding = if s.Try "padding=" then s.Int "rows" else 1
    s.Close()

    {
        Id = id
        Name = name
        Kind = kind
        DType = dtype
        Axes = axes
        Extents = extents
        Routed = routed
        Density = density
        Padding = padding
        Layout = layout
    }

let parameter (s: Scanner) : ParameterInfo =
    let inBrackets k =
        s.Expect "("
        let x = s.Float "a number"
        s.Expect ")"
        k x

    let name = s.Word "a name"
    let struct (dtype, axes, extents) = shape s
    let layout = layout s
    s.Expect "init="

    let init =
        match s.Word "an initial value" with
        | "zeros" -> Init.Zeros
        | "ones" -> Init.Ones
        | "normal" -> inBrackets Init.Normal
        | other -> raise (malformed $"there is no initial value '%s{other}'" "choose one of zeros, ones, normal(std)")

    s.Expect "update="

    let update =
        match s.Word "an update" with
        | "adamw_decay" -> Update.AdamW true
        | "adamw" -> Update.AdamW false
        | "router_bias" -> inBrackets Update.RouterBias
        | "frozen" -> Update.Frozen
        | other ->
            raise (
                malformed
                    $"there is no update '%s{other}'"
                    "choose one of adamw_decay, adamw, router_bias(rate), frozen"
            )

    s.Expect "stages"
    let stages = s.Ints "a stage"
    s.Close()

    {
        Name = name
        DType = dtype
        Axes = axes
        Extents = extents
        Layout = layout
        Init = init
        Update = update
        Stages = stages
    }
