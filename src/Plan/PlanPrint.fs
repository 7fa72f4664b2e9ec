/// A plan as text: versioned, readable, the same on every machine, and read back by PlanText.
module internal DeepSeekGraph.PlanPrint

open System.Collections.Generic
open System.Globalization
open System.Text

let private text (out: StringBuilder) (s: string) = out.Append s |> ignore
let private number (out: StringBuilder) (n: int64) = out.Append(n.ToString CultureInfo.InvariantCulture) |> ignore

let private ints (out: StringBuilder) (values: IReadOnlyList<int>) =
    for n in values do
        text out " "
        number out (int64 n)

let private slots (out: StringBuilder) (values: IReadOnlyList<int>) =
    for n in values do
        text out " %"
        number out (int64 n)

/// bf16[batch 2, seq 64, hidden 128]
let private shape (out: StringBuilder) (dtype: DType) (axes: IReadOnlyList<string>) (extents: IReadOnlyList<int>) =
    if axes.Count <> extents.Count then
        invalidArg (nameof extents) $"%i{axes.Count} axes have %i{extents.Count} extents"

    text out dtype.Name
    text out "["

    for i in 0 .. axes.Count - 1 do
        if i > 0 then
            text out ", "

        PlanWords.write out axes[i]
        text out " "
        number out (int64 extents[i])

    text out "]"

/// One state per mesh axis: R, S and a dim, P, M.
let private layout (out: StringBuilder) (states: IReadOnlyList<AxisState>) =
    text out " <"

    for i in 0 .. states.Count - 1 do
        if i > 0 then
            text out " "

        match states[i] with
        | AxisState.Replicated -> text out "R"
        | AxisState.Split d ->
            text out "S"
            number out (int64 d)
        | AxisState.PartialSum -> text out "P"
        | AxisState.PartialMax -> text out "M"

    text out ">"

let private attribute (out: StringBuilder) (a: Attribute) =
    text out " "

    match a with
    | Attribute.Int n -> number out n
    | Attribute.Float x -> text out (PlanWords.float x)
    | Attribute.Ints values ->
        text out "["

        for i in 0 .. values.Count - 1 do
            if i > 0 then
                text out " "

            number out values[i]

        text out "]"
    | Attribute.Text word -> PlanWords.writeQuoted out word

let private collective (kind: Collective) =
    match kind with
    | Collective.AllReduceSum -> "all_reduce"
    | Collective.AllReduceMax -> "all_reduce_max"
    | Collective.AllGather d -> $"all_gather(%i{d})"
    | Collective.ReduceScatter d -> $"reduce_scatter(%i{d})"
    | Collective.AllToAll(split, join) -> $"all_to_all(%i{split},%i{join})"
    | Collective.RouteToExperts -> "route_to_experts"
    | Collective.RowsToExperts -> "rows_to_experts"
    | Collective.RowsToTokens -> "rows_to_tokens"
    | Collective.Dispatch ranks -> $"dispatch(%i{ranks})"
    | Collective.Combine ranks -> $"combine(%i{ranks})"
    | Collective.Send stage -> $"send(%i{stage})"
    | Collective.Recv stage -> $"recv(%i{stage})"

let private step (out: StringBuilder) (s: Step) =
    match s with
    | Step.Launch(kernel, attributes, inputs, outputs, path) ->
        text out " "
        slots out outputs
        text out " = "
        text out (PlanWords.kernelName kernel)

        for a in attributes do
            attribute out a

        slots out inputs
        text out " ; "
        PlanWords.write out path
    | Step.Start(token, kind, group, inputs, outputs, path) ->
        text out "  t"
        number out (int64 token)
        text out " <- "
        text out (collective kind)
        text out " g"
        number out (int64 group)
        slots out inputs
        text out " ->"
        slots out outputs
        text out " ; "
        PlanWords.write out path
    | Step.Wait token ->
        text out "  wait t"
        number out (int64 token)
    | Step.Free slot ->
        text out "  free %"
        number out (int64 slot)

    text out "\n"

let private slot (out: StringBuilder) (s: SlotInfo) =
    text out "slot %"
    number out (int64 s.Id)
    text out " "
    text out (PlanWords.kindName s.Kind)
    text out " "
    PlanWords.write out s.Name
    text out " "
    shape out s.DType s.Axes s.Extents
    layout out s.Layout

    if s.Routed then
        text out " routed"

    if s.Density <> 1.0 then
        text out (" density=" + PlanWords.float s.Density)

    if s.Padding <> 1 then
        text out " padding="
        number out (int64 s.Padding)

    text out "\n"

let private stage (out: StringBuilder) (s: StagePlan) =
    text out "\nstage "
    number out (int64 s.Stage)
    text out " "
    PlanWords.writeQuoted out s.Units
    text out "\n"

    for info in s.Slots do
        slot out info

    for program in s.Programs do
        text out ("program " + program.Name + "\n")

        for one in program.Steps do
            step out one

    text out "timetable"

    for action in s.Timetable do
        text out " "
        text out action.Name

    text out "\n"

let private parameter (out: StringBuilder) (p: ParameterInfo) =
    text out "parameter "
    PlanWords.write out p.Name
    text out " "
    shape out p.DType p.Axes p.Extents
    layout out p.Layout

    match p.Init with
    | Init.Zeros -> text out " init=zeros"
    | Init.Ones -> text out " init=ones"
    | Init.Normal std -> text out $" init=normal(%s{PlanWords.float std})"

    match p.Update with
    | Update.AdamW true -> text out " update=adamw_decay"
    | Update.AdamW false -> text out " update=adamw"
    | Update.RouterBias rate -> text out $" update=router_bias(%s{PlanWords.float rate})"
    | Update.Frozen -> text out " update=frozen"

    text out " stages"
    ints out p.Stages
    text out "\n"

/// The whole plan. Lists print in their own order.
let print (plan: PlanSet) : string =
    let out = StringBuilder(1 <<< 16)
    let mesh = plan.Mesh
    text out $"dsg-plan %i{plan.Version}\n"

    for line in plan.Recipe do
        text out "recipe "
        PlanWords.writeQuoted out line
        text out "\n"

    text
        out
        $"mesh tp=%i{mesh.Tensor} cp=%i{mesh.Context} dp=%i{mesh.Data} pp=%i{mesh.Pipeline} etp=%i{mesh.ExpertTensor} ep=%i{mesh.Expert} edp=%i{mesh.ExpertData}\n"

    for axis in mesh.Axes do
        text out "axis "
        PlanWords.write out axis.Name
        text out $" %i{axis.Size}\n"

    text out "layout "
    PlanWords.writeQuoted out plan.Layout
    text out "\nschedule "
    PlanWords.writeQuoted out plan.Schedule

    text
        out
        $"\nchunks %i{plan.Chunks}\nmicrobatches %i{plan.Microbatches}\nmicro_batch %i{plan.MicroBatch}\nseq_length %i{plan.SeqLength}\n"

    for g in plan.Groups do
        text out $"group g%i{g.Id} "
        PlanWords.write out g.Name
        text out " axes"
        ints out g.MeshAxes
        text out " stages"
        ints out g.Stages
        text out "\n"

    for p in plan.Parameters do
        parameter out p

    for i in plan.Inputs do
        text out "input "
        PlanWords.write out i.Name
        text out " "
        shape out i.DType i.Axes i.Extents
        layout out i.Layout
        text out "\n"

    for m in plan.Memory do
        text
            out
            $"memory %i{m.Stage} parameters=%i{m.Parameters} optimizer=%i{m.Optimizer} gradients=%i{m.Gradients} counters=%i{m.Counters} activations=%i{m.Activations} collectives=%i{m.Collectives} peak=%i{m.Peak} headroom=%i{m.Headroom} worst=%i{m.Worst} arena=%i{m.Arena}\n"

        for r in m.Regions do
            text out "region "
            PlanWords.write out r.From
            text out " "
            PlanWords.write out r.Until
            let routed = if r.Routed then 1 else 0
            text out $" routed=%i{routed} base=%i{r.Base} stride=%i{r.Stride} count=%i{r.Count}\n"

        text out "offsets"

        for at in m.Offsets do
            text out " "
            number out at

        text out "\n"

    for s in plan.Stages do
        stage out s

    out.ToString()
