#!/bin/sh
# Four pretend Slurm nodes on this machine (slurmctld, four slurmd and munge, all in one new folder, as root), and on them a job of 4 ranks
# that trains, is cancelled and resumes. Prints what it sees; the last line is `slurm: ok`. Needs Debian's slurm-wlm and munge.
# Use: tests/cluster/slurm.sh [DSG]   (DSG: the command; without, the dsg.dll of this checkout's build)
set -eu
repository=$(cd "$(dirname "$0")/../.." && pwd)
dsg=${1:-dotnet $repository/artifacts/bin/Cli/release/dsg.dll}
root=$(mktemp -d)
daemons= srun=

stop() {
  scancel --user="$(id -un)" 2>/dev/null || true
  for pid in $srun $daemons; do kill "$pid" 2>/dev/null || true; done
  sleep 1
  for pid in $srun $daemons; do kill -9 "$pid" 2>/dev/null || true; done
  rm -rf "$root"
}
trap stop EXIT

fail() {
  echo "slurm: $*" >&2
  tail -n 20 "$root"/log/* "$root"/job*.txt >&2 2>/dev/null || true
  exit 1
}

# daemon NAME COMMAND...: in the background, its output in a log of its own
daemon() {
  name=$1
  shift
  "$@" >"$root/log/$name.out" 2>&1 &
  daemons="$daemons $!"
}

# until SECONDS COMMAND...: true as soon as the command is
until_true() {
  tries=$(($1 * 10))
  shift
  while ! "$@" >/dev/null 2>&1; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || return 1
    sleep 0.1
  done
}

configure() {
  mkdir "$root/etc" "$root/run" "$root/log" "$root/state" "$root/spool"
  head -c 1024 /dev/urandom >"$root/etc/munge.key"
  chmod 700 "$root" "$root/etc" "$root/run"
  chmod 400 "$root/etc/munge.key"
  host=$(hostname -s)
  cat >"$root/etc/slurm.conf" <<CONF
ClusterName=pretend
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=socket=$root/run/munge.socket
CryptoType=crypto/munge
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool/%n
SlurmctldPidFile=$root/run/slurmctld.pid
SlurmdPidFile=$root/run/slurmd-%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n[0-3] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17004] CPUs=4 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

bring_up() {
  daemon munged munged --foreground --force --key-file="$root/etc/munge.key" --socket="$root/run/munge.socket" \
    --pid-file="$root/run/munge.pid" --seed-file="$root/run/munge.seed" --log-file="$root/log/munged.log"
  until_true 10 test -S "$root/run/munge.socket" || fail 'munged does not come up'
  daemon slurmctld slurmctld -D -f "$SLURM_CONF"
  until_true 10 sinfo || fail 'slurmctld does not come up'
  for node in n0 n1 n2 n3; do
    mkdir "$root/spool/$node"
    daemon "$node" slurmd -D -N "$node" -f "$SLURM_CONF"
  done
  until_true 20 sh -c '[ "$(sinfo -h -t idle -o %D)" = 4 ]' || fail 'the nodes do not come up'
}

for command in munged slurmctld slurmd srun; do
  command -v "$command" >/dev/null || { echo "slurm: there is no $command: apt install slurm-wlm munge" >&2; exit 2; }
done
configure
export SLURM_CONF="$root/etc/slurm.conf"
bring_up
echo "nodes: $(sinfo -h -o '%D %t')"

cd "$root"
i=0
while [ $i -lt 400 ]; do echo "step $i of a text that ranks learn by heart, node by node"; i=$((i + 1)); done >text.txt
job="$dsg pretrain --data text.txt --dtype fp32 --seq-length 16 --global-batch 4 --executor interpreter --tp 2 --pp 2 --ep 2 --dp 1
  --set model.num_hidden_layers=2 --save-interval 5"

# shellcheck disable=SC2086 # the words of the job are words
srun -N4 -n4 --export=ALL $job --steps 1000000 --out first >job1.txt 2>&1 &
srun=$!
until_true 60 grep -q '"step":12,' first/metrics.jsonl || fail 'the job does not train'
grep '^launch:' job1.txt
scancel "$(squeue -h -o %A | head -n 1)"
wait $srun && fail 'a cancelled job ends with exit code 0'
until_true 20 sh -c '[ -z "$(squeue -h)" ]' || fail 'the cancelled job is still there'
[ -z "$(find first/checkpoints -name '*.tmp*')" ] || echo 'what the kill left half-written goes with the next start'
last=$(cat first/checkpoints/latest)
echo "cancelled behind $(wc -l <first/metrics.jsonl) steps, last checkpoint $last"

# shellcheck disable=SC2086
srun -N4 -n4 --export=ALL $job --steps 1000 --resume first --out second >job2.txt 2>&1 &
srun=$!
until_true 60 grep -q '"step":' second/metrics.jsonl || fail 'the job does not resume'
grep '^resumed:' job2.txt | sed "s#$root/##"
from=$(($(echo "$last" | sed 's/iter_0*//') + 1))
head -n 1 second/metrics.jsonl | grep -q "\"step\":$from," || fail 'it goes on from another step'
# the same step of the first run, which went on after its checkpoint, has the same loss
loss() { sed -n "s/^{\"step\":$from,\"loss\":\([^,]*\),.*/\1/p" "$1"; }
before=$(loss first/metrics.jsonl) after=$(loss second/metrics.jsonl)
[ -n "$after" ] || fail 'no loss'
[ -z "$before" ] || [ "$before" = "$after" ] || fail "step $from: loss $after, the first run had $before"
echo "resumed at step $from, loss $after${before:+ as in the first run}"
scancel "$(squeue -h -o %A | head -n 1)"
wait $srun || true
until_true 20 sh -c '[ -z "$(squeue -h)" ]' || fail 'the second job is still there'

# what dsg submit writes, as it is
# shellcheck disable=SC2086
$dsg compile --dtype fp32 --seq-length 16 --global-batch 4 --tp 2 --pp 2 --ep 2 --dp 1 --set model.num_hidden_layers=2 --out small.plan >compile.txt
$dsg submit --slurm small.plan --ranks-per-node 1 --dsg "$root/dsg" --out job.sh -- --data text.txt --steps 3 --executor interpreter \
  --out third >>compile.txt
printf '#!/bin/sh\nexec %s "$@"\n' "$dsg" >dsg
chmod 700 dsg
sed -i 's/^#SBATCH --mem=.*/#SBATCH --mem=500M/' job.sh   # pretend nodes share one machine's memory
timeout 60 sbatch --wait --output=job3.txt job.sh >>compile.txt || fail 'the submitted job fails'
grep -q '"step":3,' third/metrics.jsonl || fail 'the submitted job does not train'
echo "submitted: $(grep '^launch:' job3.txt)"
echo 'slurm: ok'
