/// What two plans do differently, in words: settings, mesh, parameters, slots, steps aligned program by program, memory.
namespace DeepSeekGraph.Compiler

open System
open System.Collections.Generic
open DeepSeekGraph

/// One part of a comparison: lines that begin with "- " are of the first plan, "+ " of the second.
type DiffSection = {
    Title: string
    Lines: IReadOnlyList<string>
}

/// The shortest script from one list to another (Myers, "An O(ND) Difference Algorithm").
[<RequireQualifiedAccess>]
module Alignment =
    /// Lists further apart than this are not aligned: the work grows with its square.
    let private furthest = 3000

    /// Removed and added elements in order, unchanged ones left out; ValueNone where the lists are too far apart.
    let changes (a: string[]) (b: string[]) : (bool * string) list voption =
        let n, m = a.Length, b.Length
        let most = min furthest (n + m)
        let v = Array.create (2 * most + 3) 0
        let mid = most + 1
        let trace = List<int[]>()
        let mutable distance = -1
        let mutable d = 0

        while distance < 0 && d <= most do
            trace.Add(Array.sub v (mid - d) (2 * d + 1))

            for k in -d .. 2 .. d do
                let down = k = -d || k <> d && v[mid + k - 1] < v[mid + k + 1]
                let mutable x = if down then v[mid + k + 1] else v[mid + k - 1] + 1
                let mutable y = x - k

                while x < n && y < m && x >= 0 && y >= 0 && a[x] = b[y] do
                    x <- x + 1
                    y <- y + 1

                v[mid + k] <- x

                if x >= n && y >= m && distance < 0 then
                    distance <- d

            d <- d + 1

        if distance < 0 then
            ValueNone
        else
            // walk back: before step d the furthest points were trace[d], diagonals -d..d
            let mutable found = []
            let mutable x, y = n, m

            for d in distance .. -1 .. 1 do
                let before k = trace[d][k + d]
                let k = x - y
                let down = k = -d || k <> d && before (k - 1) < before (k + 1)
                let from = if down then k + 1 else k - 1
                let x0 = before from
                let y0 = x0 - from

                found <- (if down then (true, b[y0]) else (false, a[x0])) :: found
                x <- x0
                y <- y0

            ValueSome found

[<RequireQualifiedAccess>]
module PlanDiff =
    let private shape (dtype: DType) (axes: IReadOnlyList<string>) (extents: IReadOnlyList<int>) =
        let dims = Seq.map2 (fun a e -> $"%s{a} %i{e}") axes extents |> String.concat ", "
        $"%s{dtype.Name}[%s{dims}]"

    let private state (s: AxisState) =
        match s with
        | AxisState.Replicated -> "R"
        | AxisState.Split d -> $"S%i{d}"
        | AxisState.PartialSum -> "P"
        | AxisState.PartialMax -> "M"

    let private layout (states: IReadOnlyList<AxisState>) = "<" + String.Join(" ", Seq.map state states) + ">"

    /// A slot by what it is, not by its number, which shifts when another is added before it.
    let private slot (s: SlotInfo) =
        let what = $"%s{shape s.DType s.Axes s.Extents} %s{layout s.Layout}"
        if s.Name.StartsWith '%' then what else $"%s{s.Name} %s{what}"

    let private attribute (a: Attribute) =
        match a with
        | Attribute.Int n -> string n
        | Attribute.Float x -> x.ToString("R", Globalization.CultureInfo.InvariantCulture)
        | Attribute.Ints values -> "[" + String.Join(" ", values) + "]"
        | Attribute.Text word -> $"\"%s{word}\""

    let private step (plan: PlanSet) (names: string[]) (s: Step) =
        let slots (ids: IReadOnlyList<int>) = ids |> Seq.map (fun i -> names[i]) |> String.concat ", "

        match s with
        | Step.Launch(kernel, attributes, inputs, outputs, path) ->
            let words = PlanNames.kernel kernel :: [ for a in attributes -> attribute a ]
            $"""%s{String.concat " " words}(%s{slots inputs}) -> %s{slots outputs} ; %s{path}"""
        | Step.Start(_, kind, group, inputs, outputs, path) ->
            $"start %O{kind} over %s{plan.Groups[group].Name} (%s{slots inputs}) -> %s{slots outputs} ; %s{path}"
        // a wait or a free moves with the step it belongs to
        | Step.Wait _ -> "wait"
        | Step.Free id -> $"free %s{names[id]}"

    let private section title (lines: string seq) = {
        Title = title
        Lines = Array.ofSeq lines
    }

    /// Lines of one list that the other lacks, counted: order does not matter.
    let private sets (a: string seq) (b: string seq) = [
        let count (lines: string seq) = lines |> Seq.countBy id |> dict
        let inA, inB = count a, count b

        let missing mark (here: IDictionary<string, int>) (there: IDictionary<string, int>) order = [
            for line in Seq.distinct order do
                let other =
                    match there.TryGetValue line with
                    | true, n -> n
                    | false, _ -> 0

                let more = here[line] - other

                if more = 1 then
                    $"%s{mark} %s{line}"
                elif more > 1 then
                    $"%s{mark} %i{more} x %s{line}"
        ]

        yield! missing "-" inA inB a
        yield! missing "+" inB inA b
    ]

    let private ordered (a: string[]) (b: string[]) =
        match Alignment.changes a b with
        | ValueSome changes -> [ for added, line in changes -> (if added then "+ " else "- ") + line ]
        | ValueNone -> [
            $"- %i{a.Length} lines"
            $"+ %i{b.Length} lines, too far from the others to align"
          ]

    let private head (plan: PlanSet) =
        let m = plan.Mesh

        [
            for axis in m.Axes do
                $"axis %s{axis.Name} %i{axis.Size}"

            $"tp %i{m.Tensor}"
            $"cp %i{m.Context}"
            $"dp %i{m.Data}"
            $"pp %i{m.Pipeline}"
            $"etp %i{m.ExpertTensor}"
            $"ep %i{m.Expert}"
            $"edp %i{m.ExpertData}"
            $"layout %s{plan.Layout}"
            $"schedule %s{plan.Schedule}"
            $"chunks %i{plan.Chunks}"
            $"microbatches %i{plan.Microbatches}"
            $"micro_batch %i{plan.MicroBatch}"
            $"seq_length %i{plan.SeqLength}"
        ]

    let private parameter (p: ParameterInfo) =
        let stages = p.Stages |> Seq.map string |> String.concat " "
        $"%s{p.Name} %s{shape p.DType p.Axes p.Extents} %s{layout p.Layout} %O{p.Init} %O{p.Update} stages %s{stages}"

    let private input (i: InputInfo) = $"%s{i.Name} %s{shape i.DType i.Axes i.Extents} %s{layout i.Layout}"

    let private group (g: Group) =
        $"""%s{g.Name} axes %s{String.Join(" ", g.MeshAxes)} stages %s{String.Join(" ", g.Stages)}"""

    let private memory (m: MemoryRow) =
        $"stage %i{m.Stage}: parameters %i{m.Parameters}, optimizer %i{m.Optimizer}, gradients %i{m.Gradients}, activations %i{m.Activations}, collectives %i{m.Collectives}, peak %i{m.Peak}, headroom %i{m.Headroom}, arena %i{m.Arena}"

    let private stages (a: PlanSet) (b: PlanSet) = [
        for number in 0 .. max a.Stages.Count b.Stages.Count - 1 do
            match Seq.tryItem number a.Stages, Seq.tryItem number b.Stages with
            | Some x, Some y ->
                let names (s: StagePlan) = s.Slots |> Seq.map slot |> Array.ofSeq
                let namesA, namesB = names x, names y
                let title what = $"stage %i{number}, %s{what}"
                let kinds (s: StagePlan) all = Seq.map2 (fun (i: SlotInfo) name -> $"%O{i.Kind} %s{name}") s.Slots all
                section (title "units") (sets [ x.Units ] [ y.Units ])
                section (title "slots") (sets (kinds x namesA) (kinds y namesB))

                let programs = Seq.append x.Programs y.Programs |> Seq.map (fun p -> p.Name) |> Seq.distinct

                for name in programs do
                    let steps (plan: PlanSet) (s: StagePlan) names =
                        s.Programs
                        |> Seq.tryFind (fun p -> p.Name = name)
                        |> Option.map (fun p -> p.Steps |> Seq.map (step plan names) |> Array.ofSeq)
                        |> Option.defaultValue [||]

                    section (title $"program %s{name}") (ordered (steps a x namesA) (steps b y namesB))

                let actions (s: StagePlan) = s.Timetable |> Seq.map (fun t -> t.Name) |> Array.ofSeq
                section (title "timetable") (ordered (actions x) (actions y))
            | x, y ->
                let units (s: StagePlan option) = s |> Option.map _.Units |> Option.toList
                section $"stage %i{number}" (sets (units x) (units y))
    ]

    /// Sections with differences; empty for equal plans.
    let run (a: PlanSet) (b: PlanSet) : IReadOnlyList<DiffSection> =
        [
            section "recipe" (sets a.Recipe b.Recipe)
            section "mesh and batch" (sets (head a) (head b))
            section "groups" (sets (Seq.map group a.Groups) (Seq.map group b.Groups))
            section "parameters" (sets (Seq.map parameter a.Parameters) (Seq.map parameter b.Parameters))
            section "inputs" (sets (Seq.map input a.Inputs) (Seq.map input b.Inputs))
            section "memory" (sets (Seq.map memory a.Memory) (Seq.map memory b.Memory))
            yield! stages a b
        ]
        |> List.filter (fun s -> s.Lines.Count > 0)
        |> fun found ->
            // numbers of slots and tokens are names; where only they differ, the plans still are not the same bytes
            if found.IsEmpty && PlanFile.Hash a <> PlanFile.Hash b then
                [
                    section "numbering" [ "- ids of slots, tokens or groups, or their order"; "+ otherwise" ]
                ]
            else
                found
        |> fun found -> found :> IReadOnlyList<DiffSection>
