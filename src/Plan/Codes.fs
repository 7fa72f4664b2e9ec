/// The ledger of diagnostic codes: 01 graph, 02 autodiff, 03 partition, 04 fusion, 05 schedule, 06 plan, 07 model, 08 runtime, 09 command line.
namespace DeepSeekGraph

/// Every code has a page docs/errors/<code>.md; ids are never reused.
[<RequireQualifiedAccess>]
module Codes =
    /// Axes of an op's operands do not fit its signature.
    [<Literal>]
    let AxisClash = "DSG0101"

    /// Element types of an op's operands do not fit.
    [<Literal>]
    let TypeClash = "DSG0102"

    /// A graph breaks an invariant (order, names, types).
    [<Literal>]
    let IllegalGraph = "DSG0103"

    /// The text form of a graph does not parse.
    [<Literal>]
    let GraphText = "DSG0104"

    /// A gradient is asked for through an op that has none.
    [<Literal>]
    let NotDifferentiable = "DSG0201"

    /// A degree of parallelism is out of range.
    [<Literal>]
    let MeshDegree = "DSG0301"

    /// The dense and the expert grid of ranks do not nest.
    [<Literal>]
    let MeshNesting = "DSG0302"

    /// Rows of experts cannot be filled up to such a multiple.
    [<Literal>]
    let PermutePadding = "DSG0396"

    /// A plan is asked for something else than its model or its mode is for.
    [<Literal>]
    let PlanMode = "DSG0397"

    /// A recipe names a fusion rule that does not exist.
    [<Literal>]
    let UnknownFusion = "DSG0401"

    /// A layout string does not parse.
    [<Literal>]
    let LayoutSyntax = "DSG0501"

    /// A layout string does not hold the model's units, or not in a legal order.
    [<Literal>]
    let LayoutUnits = "DSG0502"

    /// An op needs the sequence whole and in order, but context parallelism splits it.
    [<Literal>]
    let SequenceOrder = "DSG0395"

    /// A recipe names a schedule that does not exist.
    [<Literal>]
    let ScheduleName = "DSG0503"

    /// Schedule, chunks and microbatches do not go together.
    [<Literal>]
    let ScheduleShape = "DSG0504"

    /// A plan does not parse.
    [<Literal>]
    let PlanText = "DSG0601"

    /// A plan has a schema version that this program does not know.
    [<Literal>]
    let PlanVersion = "DSG0602"

    /// A plan file cannot be read, is too large, or its hash does not fit.
    [<Literal>]
    let PlanFile = "DSG0603"

    /// A plan names something it does not have, or has it in an impossible shape.
    [<Literal>]
    let PlanShape = "DSG0604"

    /// A plan reads, writes or frees a slot when it must not.
    [<Literal>]
    let PlanLifetime = "DSG0605"

    /// The stages of a plan wait for each other, or their messages do not pair up.
    [<Literal>]
    let PlanDeadlock = "DSG0606"

    /// A value of a plan does not lie across the mesh as its slot declares.
    [<Literal>]
    let PlanLayout = "DSG0607"

    /// An update of a plan sees a gradient that is not complete.
    [<Literal>]
    let PlanUpdate = "DSG0608"

    /// A plan has a GPU's library compute what the library does not take.
    [<Literal>]
    let PlanPath = "DSG0609"

    /// A model's settings contradict each other or are out of range.
    [<Literal>]
    let ConfigIllegal = "DSG0701"

    /// config.json is missing or no JSON object, or a field has the wrong type.
    [<Literal>]
    let ConfigUnreadable = "DSG0702"

    /// config.json asks for something that DeepSeek-V3 as declared here does not have.
    [<Literal>]
    let ConfigUnsupported = "DSG0703"

    /// A checkpoint lacks a tensor of the model, or has it in another shape.
    [<Literal>]
    let WeightsMismatch = "DSG0704"

    /// Microbatch or sequence length is not positive.
    [<Literal>]
    let BatchIllegal = "DSG0705"

    /// No model or recipe has this name.
    [<Literal>]
    let UnknownModel = "DSG0706"

    /// A checkpoint is no folder and not in the local cache of Hugging Face's hub.
    [<Literal>]
    let CheckpointMissing = "DSG0707"

    /// A checkpoint has a tensor that the model has no part for.
    [<Literal>]
    let WeightsUnknown = "DSG0708"

    /// A checkpoint declares multi-token prediction but lacks its tensors.
    [<Literal>]
    let MtpWeightsMissing = "DSG0709"

    /// A checkpoint's tensor holds NaN or infinity.
    [<Literal>]
    let WeightsNotFinite = "DSG0710"

    /// A copy of embedding or head in a checkpoint differs from the original.
    [<Literal>]
    let CopiesDiffer = "DSG0711"

    /// A reference file lacks what a comparison needs, or contradicts the model.
    [<Literal>]
    let ReferenceMalformed = "DSG0712"

    /// What a model computes is not what the reference has.
    [<Literal>]
    let ReferenceDiffers = "DSG0713"

    /// A reference file has items that nothing is compared with.
    [<Literal>]
    let ReferenceNotCompared = "DSG0714"

    /// LibTorch is not where it is expected.
    [<Literal>]
    let LibTorchMissing = "DSG0801"

    /// LibTorch is there but does not load.
    [<Literal>]
    let LibTorchBroken = "DSG0802"

    /// A kernel failed on a rank.
    [<Literal>]
    let KernelFailed = "DSG0803"

    /// A collective failed on a rank.
    [<Literal>]
    let CollectiveFailed = "DSG0804"

    /// A step ended with slots or collectives left over: a bug of the plan.
    [<Literal>]
    let StepIncomplete = "DSG0805"

    /// A weight has another shape than the parameter.
    [<Literal>]
    let WeightMismatch = "DSG0806"

    /// Training data is missing, cannot be read, or is of an unknown kind.
    [<Literal>]
    let DataUnavailable = "DSG0810"

    /// Training data holds no text, or less than one sequence.
    [<Literal>]
    let DataTooSmall = "DSG0811"

    /// A line or file of data is not what its kind says (JSON lines, UTF-8).
    [<Literal>]
    let DataMalformed = "DSG0812"

    /// The folder for a run's results exists and is not empty.
    [<Literal>]
    let OutputTaken = "DSG0815"

    /// A result cannot be written.
    [<Literal>]
    let OutputUnwritable = "DSG0816"

    /// A safetensors file is missing or cannot be opened.
    [<Literal>]
    let SafeTensorsUnreadable = "DSG0820"

    /// A safetensors file breaks the format (header, offsets, sizes, length).
    [<Literal>]
    let SafeTensorsMalformed = "DSG0821"

    /// A tensor is not in a safetensors file.
    [<Literal>]
    let SafeTensorsNoTensor = "DSG0822"

    /// A tensor's element type cannot be read as what is asked for.
    [<Literal>]
    let SafeTensorsType = "DSG0823"

    /// The index of a sharded checkpoint is damaged, or names a file that is not beside it.
    [<Literal>]
    let SafeTensorsIndex = "DSG0824"

    /// The index of a sharded checkpoint and its files disagree.
    [<Literal>]
    let SafeTensorsShards = "DSG0825"

    /// An fp8 weight and its scales do not fit together, or a value has no fp8 form.
    [<Literal>]
    let Fp8Blocks = "DSG0826"

    /// A tokenizer's file is missing or cannot be read.
    [<Literal>]
    let TokenizerUnreadable = "DSG0830"

    /// A tokenizer's file is no JSON of the form it must have, or contradicts itself.
    [<Literal>]
    let TokenizerMalformed = "DSG0831"

    /// A tokenizer is of a kind that is not supported.
    [<Literal>]
    let TokenizerUnsupported = "DSG0832"

    /// A chat template is not one of those that are known.
    [<Literal>]
    let ChatTemplateUnknown = "DSG0833"

    /// Messages of a chat lack what the template needs.
    [<Literal>]
    let ChatMalformed = "DSG0834"

    /// A tokenizer has ids that the model's vocabulary does not.
    [<Literal>]
    let VocabularySmaller = "DSG0835"

    /// There is no whole checkpoint where one is to be read.
    [<Literal>]
    let NoCheckpoint = "DSG0840"

    /// A checkpoint's manifest is damaged, or contradicts itself or its files.
    [<Literal>]
    let CheckpointMalformed = "DSG0841"

    /// A checkpoint is of another version of the format.
    [<Literal>]
    let CheckpointVersion = "DSG0842"

    /// A file of a checkpoint is missing or not what was written.
    [<Literal>]
    let CheckpointDamaged = "DSG0843"

    /// A checkpoint is not of the model that the plan trains.
    [<Literal>]
    let CheckpointMismatch = "DSG0844"

    /// Another process saves checkpoints to the same folder.
    [<Literal>]
    let CheckpointBusy = "DSG0845"

    /// A checkpoint does not say which model it is of, or of one that has no published form.
    [<Literal>]
    let CheckpointModel = "DSG0847"

    /// A run that is resumed has no steps left.
    [<Literal>]
    let NothingLeft = "DSG0848"

    /// A way of drawing tokens is none.
    [<Literal>]
    let SamplingIllegal = "DSG0850"

    /// Prompts do not fit the plans that are to go on with them.
    [<Literal>]
    let PromptIllegal = "DSG0851"

    /// What running on a GPU needs is not on this machine.
    [<Literal>]
    let CudaMissing = "DSG0852"

    /// A CUDA source of dsg does not compile on this machine.
    [<Literal>]
    let CudaSource = "DSG0853"

    /// A plan asks for what no kernel on a GPU does.
    [<Literal>]
    let DeviceUnsupported = "DSG0854"

    /// NCCL, which processes with GPUs talk by, is not on this machine, or too old.
    [<Literal>]
    let NcclMissing = "DSG0855"

    /// A collective between GPUs does not end.
    [<Literal>]
    let NcclTimeout = "DSG0856"

    /// NCCL reports a fault of a GPU or a link.
    [<Literal>]
    let NcclFault = "DSG0857"

    /// Variables that say how a process was launched are incomplete or contradict each other.
    [<Literal>]
    let LaunchEnvironment = "DSG0860"

    /// A job has not as many processes as its plan has ranks.
    [<Literal>]
    let WorldSize = "DSG0861"

    /// Processes of a job are about to do different things.
    [<Literal>]
    let RanksDiffer = "DSG0862"

    /// What works in one process only is asked for in a job of several.
    [<Literal>]
    let OneProcessOnly = "DSG0863"

    /// Processes of a job do not find or do not hear each other.
    [<Literal>]
    let Rendezvous = "DSG0864"

    /// A process of a job is gone.
    [<Literal>]
    let RankGone = "DSG0865"

    /// MPI is not there, or fails.
    [<Literal>]
    let MpiUnavailable = "DSG0867"

    /// A job for a cluster that cannot be.
    [<Literal>]
    let SubmissionIllegal = "DSG0868"

    /// Processes of a job do not see each other's files of a checkpoint.
    [<Literal>]
    let FolderNotShared = "DSG0866"

    /// A recompute policy names something that cannot be recomputed.
    [<Literal>]
    let UnknownRecompute = "DSG0590"

    /// No recomputation makes a stage fit the budget of bytes.
    [<Literal>]
    let RecomputeBudget = "DSG0592"

    /// The model names no units, so it cannot be cut into stages.
    [<Literal>]
    let NoUnits = "DSG0591"

    /// An axis does not divide by the mesh axes that split it.
    [<Literal>]
    let NotDivisible = "DSG0391"

    /// A recipe asks for something that no pass carries out yet.
    [<Literal>]
    let NotCompiledYet = "DSG0392"

    /// The batch does not fall into microbatches.
    [<Literal>]
    let BatchSize = "DSG0393"

    /// Experts are split over mesh axes that do not split tokens.
    [<Literal>]
    let RowsLayout = "DSG0394"

    /// The command line has an option, verb or word that is not known.
    [<Literal>]
    let UnknownOption = "DSG0901"

    /// The value of an option is not one it takes.
    [<Literal>]
    let OptionValue = "DSG0902"

    /// A plan has more ranks, or needs more memory, than this machine can run.
    [<Literal>]
    let JobTooLarge = "DSG0903"

    /// --set names a setting that a job does not have, or one that the command does not use.
    [<Literal>]
    let UnknownSetting = "DSG0904"
