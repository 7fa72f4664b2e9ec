# The lines of run.sh as a table and as results.json; and how far apart dsg and its peer are when they start alike.
# usage: python3 table.py LINES OUT
import json, os, subprocess, sys, datetime

lines = [json.loads(line) for line in open(sys.argv[1])]
out = sys.argv[2]
gpu = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()
print(f"\n{gpu}, {datetime.date.today()}, commit {os.environ.get('COMMIT', 'unknown')}")
print(f"{'':26} {'fwd+bwd':>9} {'TFLOP/s':>8} {'step':>9} {'TFLOP/s':>8} {'tokens/s':>9} {'host':>6} {'GB':>6}")
for r in lines:
    if r["name"] == "dsg by kernel":
        continue
    host = f"{r['step_host_ms']:.1f}" if "step_host_ms" in r else ""
    memory = r.get("device_gb") or r["mem"] * 1.073741824
    tokens = r.get("tokens_per_s") or r["tok_s"]
    print(f"{r['name']:26} {r['fb_ms']:9.1f} {r['tflops_fb']:8.0f} {r['step_ms']:9.1f} {r['tflops_step']:8.0f} {tokens:9.0f} {host:>6} {memory:6.1f}")
equal = None
try:
    a, b = ([list(map(float, line.split())) for line in open(f"{out}/losses_{who}.txt")] for who in ("dsg", "peer"))
    apart = lambda i, k: abs(a[k][i] - b[k][i]) / abs(b[k][i])
    worst = [max(apart(i, k) for k in range(len(a))) for i in (0, 1)]
    equal = dict(steps=len(a), first_loss=apart(0, 0), first_norm=apart(1, 0), worst_loss=worst[0], worst_norm=worst[1], dsg=a, peer=b)
    print(f"\nfrom the same weights: first loss {a[0][0]:.6f} and {b[0][0]:.6f} ({apart(0, 0):.1e} apart), gradient norm {a[0][1]:.5f} and {b[0][1]:.5f} ({apart(1, 0):.1e});"
          f" in {len(a)} steps loss {worst[0]:.1e} and norm {worst[1]:.1e} apart at most; last loss {a[-1][0]:.4f} and {b[-1][0]:.4f}")
except (OSError, ValueError) as e:
    print(f"\nno comparison of losses: {e}")
log = f"{out}/dsg_by_kernel.log"
kernels = [line.split() for line in open(log) if line[:1].isupper()] if os.path.exists(log) else []
json.dump(dict(device=gpu, date=str(datetime.date.today()), commit=os.environ.get("COMMIT"), runs=lines, equal=equal,
               kernels={k[0]: dict(ms=float(k[1]), calls=float(k[3])) for k in kernels if len(k) == 5}), open(f"{out}/results.json", "w"), indent=1)
