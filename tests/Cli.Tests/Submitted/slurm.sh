#!/bin/bash
#SBATCH --job-name=dsg-deepseek-v3-tiny
#SBATCH --nodes=4
#SBATCH --ntasks=16
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --mem=NM
#SBATCH --time=12:00:00
#SBATCH --partition=gpu
#SBATCH --output=%x-%j.log
# plan HASH: 16 ranks, 4 on each of 4 nodes
set -euo pipefail
# a stranger's process on the same port is refused
DSG_JOB_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export DSG_JOB_TOKEN
# a rank that dies ends the step; dsg says first which one it was
exec srun --wait=60 --kill-on-bad-exit=0 \
  dsg run small.plan --data 'a b'\''c"d$(date)`id`\' --out '# no: comment
- x'
