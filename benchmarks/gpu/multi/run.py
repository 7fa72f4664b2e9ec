"""The same plans on 1 and on N GPUs of one machine over NCCL; builds nothing, prints one table last, writes multi.json to OUT.

DSG="dotnet .../dsg.dll" BENCH="dotnet .../DeepSeekGraph.GpuBenchmarks.dll" OUT=DIR python3 benchmarks/gpu/multi/run.py [N]

N: 2 (the default), 4 or 8. PARTS="equal kill nccl speed beside restart" chooses parts and their order; SECONDS_IN_ALL (470) ends the script
in time: a part that no longer fits is skipped and said so. DEVICE=cpu runs all parts but nccl without a GPU, to test the script.
"""

import json
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

GPUS = int(sys.argv[1]) if len(sys.argv) > 1 else 2
DEVICE = os.environ.get("DEVICE", "cuda")
DSG = shlex.split(os.environ.get("DSG", "dsg"))
BENCH = shlex.split(os.environ.get("BENCH", ""))
OUT = os.path.abspath(os.environ.get("OUT", "."))
DEADLINE = time.monotonic() + float(os.environ.get("SECONDS_IN_ALL", "470"))
STEPS = int(os.environ.get("STEPS", "10"))
WORK = tempfile.mkdtemp(prefix="dsg-multi-")
DATA = os.path.join(WORK, "data.txt")
# forward and backward of the proxy over 4096 tokens: benchmarks/results/gpu.md
FLOPS_A_TOKEN = 71.4e12 / 4096
ROWS, RESULTS = [], {"gpus": GPUS, "commit": os.environ.get("COMMIT", ""), "device": "", "parts": []}

PAIRS = "--set recipe.overlap_moe_expert_parallel_comm=true"

# fp32 tiny: layouts of N ranks, each beside one GPU
LAYOUTS = {
    2: [
        ("EP 2", "--ep 2"),
        ("TP 2, sequence parallel", "--tp 2"),
        ("PP 2, 1F1B", "--pp 2"),
        ("DP 2, distributed optimizer", "--dp 2"),
        ("PP 2, interleaved", "--pp 2 --vp 2"),
        ("EP 2, allgather", "--ep 2 --set recipe.dispatcher=allgather"),
        ("TP 2 in EP 2", "--tp 2 --ep 2"),
        ("EP 2, flex", "--ep 2 --set recipe.dispatcher=flex"),
        ("EP 2, F beside W", f"--ep 2 {PAIRS}"),
        ("PP 2, interleaved, F beside W", f"--pp 2 --vp 2 {PAIRS}"),
    ],
    4: [
        ("TP 2 x DP 2, EP 4", "--tp 2 --dp 2 --ep 4"),
        ("TP 2 x PP 2", "--tp 2 --pp 2"),
        ("PP 2 x DP 2, EP 2", "--pp 2 --dp 2 --ep 2"),
        ("DP 4, EP 4", "--dp 4 --ep 4"),
        ("DP 4, EP 4, flex", "--dp 4 --ep 4 --set recipe.dispatcher=flex"),
        ("DP 4, EP 4, flex, F beside W", f"--dp 4 --ep 4 --set recipe.dispatcher=flex {PAIRS}"),
        ("TP 2 x DP 2, EP 2, ETP 2", "--tp 2 --dp 2 --ep 2 --etp 2"),
    ],
    8: [
        ("TP 2 x PP 2 x DP 2, EP 4", "--tp 2 --pp 2 --dp 2 --ep 4"),
        ("TP 2 x DP 4, EP 8", "--tp 2 --dp 4 --ep 8"),
        ("TP 2 x DP 4, EP 8, flex", "--tp 2 --dp 4 --ep 8 --set recipe.dispatcher=flex"),
        ("TP 2 x DP 4, EP 4, ETP 2", "--tp 2 --dp 4 --ep 4 --etp 2"),
        ("PP 2 x DP 4, EP 4, interleaved", "--pp 2 --vp 2 --dp 4 --ep 4"),
        ("PP 2 x DP 4, EP 4, interleaved, F beside W", f"--pp 2 --vp 2 --dp 4 --ep 4 {PAIRS}"),
    ],
}[GPUS]


os.makedirs(OUT, exist_ok=True)


def say(*row):
    """A line of the table: part, what, figure, bound or remark, verdict."""
    ROWS.append(row)
    print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)


def left():
    return DEADLINE - time.monotonic()


def name_of(text):
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower()


class Memory(threading.Thread):
    """The most memory in use by GPU, in GB, as nvidia-smi tells it twice a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.stop = {}, threading.Event()

    def run(self):
        while DEVICE == "cuda" and not self.stop.wait(0.5):
            try:
                text = subprocess.run(
                    ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"],
                    capture_output=True, text=True, timeout=10).stdout
                for line in text.splitlines():
                    index, used = line.split(",")
                    self.peak[int(index)] = max(self.peak.get(int(index), 0), float(used) * 2**20 / 1e9)
            except (OSError, ValueError, subprocess.SubprocessError):
                return


def command(processes, options, folder, seed=7):
    verb = DSG + (["launch", "--nproc", str(processes)] if processes > 1 else [])
    if processes > 1 and "--max-restarts" in options:
        at = options.index("--max-restarts")
        verb, options = verb + options[at:at + 2], options[:at] + options[at + 2:]
    verb += (["--"] if processes > 1 else []) + ["pretrain"] + options
    return verb + ["--device", DEVICE, "--data", DATA, "--seed", str(seed), "--executor", "interpreter", "--out", folder]


def train(name, processes, options, seconds, seed=7):
    """Runs a job; its metrics, log and peak memory. A job that fails says so in the table."""
    folder, log = os.path.join(WORK, name_of(name)), os.path.join(OUT, name_of(name) + ".log")
    memory = Memory()
    memory.start()
    begin = time.monotonic()
    with open(log, "w") as out:
        job = subprocess.Popen(command(processes, shlex.split(options), folder, seed), stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = job.wait(timeout=max(1, min(seconds, left())))
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGTERM)
            try:
                job.wait(timeout=8)
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
            code = "timeout"
    memory.stop.set()
    text = open(log, errors="replace").read()
    path = os.path.join(folder, "metrics.jsonl")
    lines = [json.loads(line) for line in open(path)] if os.path.exists(path) else []
    if code != 0:
        print(f"-- {name}: exit {code}; {log} ends:\n" + "\n".join(text.splitlines()[-12:]), flush=True)
    return {"code": code, "metrics": lines, "log": text, "memory": memory.peak, "seconds": time.monotonic() - begin}


def table_of_memory(text):
    """Predicted and counted MB of the stage that needs most."""
    rows = re.findall(r"^(?:\[0\] )?\s+\d+\s+\S+((?:\s+[\d.,]+){8})\s*$", text, re.M)
    numbers = [[float(cell.replace(",", "")) for cell in row.split()] for row in rows]
    return (max(row[5] for row in numbers), max(row[7] for row in numbers)) if numbers else (None, None)


def union(pieces):
    """Disjoint pieces in order."""
    merged = []
    for begin, end in sorted(pieces):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return merged


def common(a, b):
    """Time that two unions have in common."""
    i, j, total = 0, 0, 0.0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        i, j = (i + 1, j) if a[i][1] < b[j][1] else (i, j + 1)
    return total


def joint_shares(traces):
    """Of each rank the hidden share of communication proper. A collective is over for all its members at once, so the one that comes last
    sees it shortest: what others see before that is waiting for it. (All groups of these jobs but messages have all ranks.)"""
    moved = {}
    for rank, data in traces.items():
        events = [e for e in data["traceEvents"] if e.get("ph") == "X"]
        compute = union([(e["ts"], e["ts"] + e["dur"]) for e in events if e["cat"] == "compute"])
        groups = {}
        for e in sorted((e for e in events if e["cat"] == "communication"), key=lambda e: e["ts"]):
            groups.setdefault((e["args"]["group"], e["name"]), []).append(e)
        moved[rank] = (compute, groups)
    shares = {}
    for rank, (compute, groups) in moved.items():
        proper = []
        for key, events in groups.items():
            peers = [other[1].get(key, []) for other in moved.values()]
            if key[0].startswith("pp.") or any(len(peer) != len(events) for peer in peers):
                continue
            for k, e in enumerate(events):
                end = e["ts"] + e["dur"]
                proper.append((end - min(peer[k]["dur"] for peer in peers), end))
        proper = union(proper)
        length = sum(end - begin for begin, end in proper)
        shares[rank] = {"communication_ms": length / 1e3, "hidden_share": common(proper, compute) / length if length else None}
    return shares


def overlaps(folder):
    """What a trace says of each rank: {rank: overlap}, with what remains where waiting for other ranks is left out."""
    traces = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        with open(os.path.join(folder, name)) as f:
            data = json.load(f)
        traces[data["otherData"]["rank"]] = data
    joint = joint_shares(traces)
    return {rank: {**data["otherData"]["overlap"], "joint": joint[rank]} for rank, data in sorted(traces.items())}


def say_hidden(part, name, found):
    """The share of communication that each rank hides, without and with waiting for others, and the collectives that most of the worst
    rank's exposed time is of."""
    if not found:
        say(part, name + ", hidden", "", "no trace was written", "FAILED")
        return
    shares = {rank: one["hidden_share"] for rank, one in found.items() if one["hidden_share"] is not None}
    if not shares:
        say(part, name + ", hidden", "no communication", "", "")
        return
    worst = min(shares, key=shares.get)
    most = [f"{one['exposed_ms']:.1f} ms {one['kind']} of {one['path']} ({one['count']})" for one in found[worst]["collectives"][:3]]
    joint = ", ".join(f"{one['joint']['hidden_share']:.1%} of {one['joint']['communication_ms']:.1f} ms" for one in found.values() if one["joint"]["hidden_share"] is not None)
    compute = ", ".join(f"{one['compute_ms']:.1f}" for one in found.values())
    say(part, name + ", hidden", joint + "; with waiting for the other " + ", ".join(f"{share:.1%}" for share in shares.values()),
        f"aim 95 %; compute {compute} of {found[worst]['step_ms']:.1f} ms; rank {worst}: {found[worst]['communication_ms']:.1f} ms communication"
        "; exposed: " + "; ".join(most), "")


def relative(a, b):
    return abs(a - b) / max(abs(b), 1e-30)


def compare(part, name, result, reference, bounds):
    """Loss and gradient norm of every step beside one GPU's."""
    mine, theirs = result["metrics"], reference["metrics"]
    if not mine or len(mine) < len(theirs):
        say(part, name, f"{len(mine)} of {len(theirs)} steps", f"exit {result['code']}", "FAILED")
        RESULTS["parts"].append({"part": part, "name": name, "failed": True, "exit": result["code"]})
        return False
    loss = max(relative(a["loss"], b["loss"]) for a, b in zip(mine, theirs))
    norm = max(relative(a["grad_norm"], b["grad_norm"]) for a, b in zip(mine, theirs))
    good = loss <= bounds[0] and norm <= bounds[1] and result["code"] == 0
    say(part, name, f"loss {loss:.1e}, grad_norm {norm:.1e}", f"at most {bounds[0]:.0e}, {bounds[1]:.0e}; {len(theirs)} steps, {result['seconds']:.0f} s",
        "ok" if good else f"FAILED (exit {result['code']})")
    RESULTS["parts"].append({
        "part": part, "name": name, "loss": loss, "grad_norm": norm, "ok": good, "exit": result["code"],
        "nccl": re.findall(r"backend: (nccl \S+?),", result["log"])[:1],
    })
    return good


def equal():
    shape = f"deepseek_v3_tiny --dtype fp32 --steps {STEPS}"
    references = {}

    def reference_of(seed):
        if seed not in references:
            references[seed] = train(f"equal one {seed}", 1, shape + " --tp 1", 90, seed)
        return references[seed]

    reference = reference_of(7)
    if len(reference["metrics"]) < STEPS:
        say("equal", "one GPU", f"{len(reference['metrics'])} of {STEPS} steps", f"exit {reference['code']}", "FAILED")
        return
    for name, options in LAYOUTS:
        if left() < 15:
            say("equal", name, "", "no time left", "skipped")
            continue
        good = compare("equal", name, train("equal " + name, GPUS, f"{shape} {options}", 60), reference, (1e-4, 1e-4))
        # a token near a tie chooses other experts where sums round otherwise: is it this seed, or the layout?
        for seed in () if good or left() < 45 else (8, 9):
            compare("equal", f"{name}, seed {seed}", train(f"equal {name} {seed}", GPUS, f"{shape} {options}", 60, seed), reference_of(seed), (1e-4, 1e-4))


def child_of(launcher, rank):
    """The process that a launcher started as a rank."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as f:
                parent = int(f.read().rsplit(")", 1)[1].split()[1])
            with open(f"/proc/{entry}/environ", "rb") as f:
                variables = f.read().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue
        if parent == launcher and f"RANK={rank}".encode() in variables:
            return int(entry)
    return None


def kill_one(name, options, until, restarted):
    """Kills rank 1 with -9 once `until` steps are written; seconds until the job ended (or, restarted, until it was through)."""
    folder, log = os.path.join(WORK, name_of(name)), os.path.join(OUT, name_of(name) + ".log")
    metrics = os.path.join(folder, "metrics.jsonl")
    with open(log, "w") as out:
        job = subprocess.Popen(command(GPUS, shlex.split(options), folder), stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while left() > 5 and job.poll() is None and not (os.path.exists(metrics) and sum(1 for _ in open(metrics)) >= until):
            time.sleep(0.05)
        victim = child_of(job.pid, 1)
        if victim is None or job.poll() is not None:
            say(name, "", f"the job did not get to step {until}", f"exit {job.poll()}", "FAILED")
            print("\n".join(open(log, errors="replace").read().splitlines()[-12:]), flush=True)
            return
        os.kill(victim, signal.SIGKILL)
        begin = time.monotonic()
        try:
            code = job.wait(timeout=max(1, min(100, left())))
        except subprocess.TimeoutExpired:
            code = "timeout"
        seconds = time.monotonic() - begin
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    text = open(log, errors="replace").read()
    errors = [line for line in text.splitlines() if re.search(r"error DSG|launch: |^(\[\d+\] )?  at ", line)]
    for line in errors[:8]:
        print("   " + line[:220], flush=True)
    if restarted:
        steps = [json.loads(line)["step"] for line in open(metrics)]
        good = code == 0 and steps == list(range(1, len(steps) + 1)) and "starting again" in text
        say(name, "rank 1", f"{len(steps)} steps in order, {seconds:.1f} s after", f"exit {code}", "ok" if good else "FAILED")
    else:
        named = any("DSG0865" in line for line in errors) and "rank 1" in " ".join(errors)
        where = next((line for line in text.splitlines() if re.search(r"\bat\b.*rank 1", line) or re.search(r"at +rank 1", line)), "")
        good = code not in (0, "timeout") and seconds <= 30 and named
        say(name, "rank 1", f"all ended after {seconds:.1f} s", (where or "no place named").strip()[:160], "ok" if good else f"FAILED (exit {code})")
    RESULTS["parts"].append({"part": name, "seconds": seconds, "exit": code, "ok": good, "messages": errors[:8]})


def kill():
    options = f"deepseek_v3_tiny --dtype fp32 --steps 100000 {LAYOUTS[0][1]}"
    kill_one("kill -9", options, 20 if DEVICE == "cuda" else 2, False)


def restart():
    steps = 60 if DEVICE == "cuda" else 6
    options = f"--max-restarts 1 deepseek_v3_tiny --dtype fp32 --steps {steps} --save-interval {steps // 6} {LAYOUTS[0][1]}"
    kill_one("restart", options, steps // 2, True)


def nccl():
    if DEVICE != "cuda":
        say("nccl", "", "", "needs GPUs", "skipped")
        return
    try:
        done = subprocess.run(BENCH + ["nccl", str(GPUS)], capture_output=True, text=True, timeout=max(1, min(90, left())))
        text, problem = done.stdout, done.stderr
    except subprocess.TimeoutExpired as e:
        text, problem = "", f"timeout {e}"
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    for one in found:
        RESULTS["parts"].append({"part": "nccl", **one})
        say("nccl", f"{one['kind']}, {one['mib']} MiB", f"{one['ms']} ms", f"bus {one['bus_gb_s']} GB/s", "")
    if not found:
        say("nccl", "", "", problem.strip().splitlines()[-1][:160] if problem.strip() else "no output", "FAILED")


# figures of a processor say nothing, but that the script works
SPEED = "deepseek_v3_proxy --dtype bf16" if DEVICE == "cuda" else "deepseek_v3_tiny --dtype fp32 --seq-length 32"


def traced(name, processes, options, steps):
    """A run whose last two steps are recorded, so that none that counts is. Its weights hardly move: a router in training sends more rows
    to one GPU than to the other, which is no matter of communication."""
    folder = os.path.join(OUT, name_of(name) + ".trace")
    shutil.rmtree(folder, ignore_errors=True)
    result = train(name, processes, f"{SPEED} --steps {steps} --lr 1e-9 {options} --trace {shlex.quote(folder)} --trace-step {steps}", 130)
    return {**result, "steps": steps, "overlap": overlaps(folder)}


def rate(result):
    late = [line["tokens_per_s"] for line in result["metrics"][2:result["steps"] - 2]]
    return statistics.median(late) if late else None


def report(part, name, result, gpus, one):
    """Tokens a second and GPU beside one GPU's, memory, and what is hidden."""
    tokens = rate(result)
    if tokens is None:
        say(part, name, f"{len(result['metrics'])} of {result['steps']} steps", f"exit {result['code']}", "FAILED")
        RESULTS["parts"].append({"part": part, "name": name, "failed": True, "exit": result["code"]})
        return
    predicted, counted = table_of_memory(result["log"])
    waited = re.findall(r"host wait for rows: ([\d.]+) ms", result["log"])
    used = max(result["memory"].values(), default=None)
    share = tokens / gpus / one if one else 1.0
    tflops = tokens / gpus * FLOPS_A_TOKEN / 1e12 if DEVICE == "cuda" else None
    say(part, name, f"{tokens / gpus:.0f} tokens/s a GPU" + (f", {tflops:.0f} TFLOP/s" if tflops else "") + f", {share:.1%} of one",
        f"MB predicted {predicted}, counted {counted}; nvidia-smi {used and round(used, 1)} GB" + (f"; host waits {waited[0]} ms a step" if waited else ""), "")
    if gpus > 1:
        say_hidden(part, name, result["overlap"])
    RESULTS["parts"].append({
        "part": part, "name": name, "tokens_per_s_per_gpu": tokens / gpus, "tflops_per_gpu": tflops, "share_of_one": share, "predicted_mb": predicted, "counted_mb": counted,
        "nvidia_smi_gb": result["memory"], "host_wait_ms": waited[:1], "overlap": result["overlap"], "seconds": result["seconds"],
        "metrics": [{k: m[k] for k in ("step", "loss", "grad_norm", "seconds")} for m in result["metrics"]],
    })


def measured(part, batch, steps, jobs):
    """Jobs of N GPUs beside one GPU that has as many sequences a step."""
    what = "a sequence" if batch == 1 else f"{batch} sequences"
    one = traced(f"{part} one", 1, f"--tp 1 --global-batch {batch}", steps)
    report(part, f"one GPU, {what} a step", one, 1, rate(one))
    for name, options in jobs:
        if left() > 60:
            result = traced(f"{part} {name}", GPUS, f"--dp {GPUS} --global-batch {batch * GPUS} {options}", steps)
            report(part, f"{name}, {what} a GPU", result, GPUS, rate(one))
        else:
            say(part, name, "", "no time left", "skipped")


def speed():
    expert, flex = f"--ep {GPUS}", "--set recipe.dispatcher=flex"
    measured("speed", 1, 8, [(f"EP {GPUS}", expert), (f"DP {GPUS}", ""), (f"EP {GPUS} by flex", f"{expert} {flex}")])
    if left() > 90:
        several = train("equal proxy", GPUS, f"{SPEED} --steps 8 --lr 1e-5 --dp {GPUS} --ep {GPUS} --global-batch {GPUS}", 130)
        again = train("equal proxy one", 1, f"{SPEED} --steps 8 --lr 1e-5 --tp 1 --global-batch {GPUS}", 130)
        compare("equal", f"{SPEED.split()[0]}, EP {GPUS}", several, again, (5e-3, 5e-2))


def beside():
    """Several microbatches a step: a forward beside the backward of another, and not."""
    expert, flex = f"--ep {GPUS}", "--set recipe.dispatcher=flex"
    measured("beside", 16, 6, [
        (f"EP {GPUS} by flex, F beside W", f"{expert} {flex} {PAIRS}"),
        (f"EP {GPUS}, F beside W", f"{expert} {PAIRS}"),
        (f"EP {GPUS} by flex", f"{expert} {flex}"),
        (f"EP {GPUS}", expert),
    ])


def main():
    # a token is a byte: text of few letters would send most tokens to the same experts
    random.seed(1)
    alphabets = [(0x21, 0x7E), (0xA1, 0x7FF), (0x1000, 0xD7FF)]
    with open(DATA, "w", encoding="utf-8") as f:
        for _ in range(20000):
            f.write("".join(chr(random.randint(*random.choice(alphabets))) for _ in range(80)) + "\n")
    if DEVICE == "cuda":
        names = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True).stdout
        RESULTS["device"] = "; ".join(names.splitlines())
    parts = {"equal": equal, "kill": kill, "nccl": nccl, "speed": speed, "beside": beside, "restart": restart}
    for part in os.environ.get("PARTS", "equal kill nccl speed beside restart").split():
        if left() < 20:
            say(part, "", "", "no time left", "skipped")
            continue
        try:
            parts[part]()
        except Exception as e:  # one part that fails does not stop the next
            say(part, "", "", f"{type(e).__name__}: {e}"[:160], "FAILED")
        with open(os.path.join(OUT, "multi.json"), "w") as f:
            json.dump({**RESULTS, "date": time.strftime("%Y-%m-%d")}, f, indent=1)
    print(f"\n{RESULTS['device'] or DEVICE}, {GPUS} processes\n\n| part | what | figure | remark | |\n|---|---|---|---|---|")
    for row in ROWS:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    return any("FAILED" in str(row[-1]) for row in ROWS)


sys.exit(1 if main() else 0)
