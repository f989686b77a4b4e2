#!/usr/bin/env bash
# A Slurm of one node on this machine, for tests: `slurm_here.sh start FOLDER` and `slurm_here.sh stop FOLDER`.
#
# Needs slurmctld, slurmd, the client programs and munge (Debian: slurmctld slurmd slurm-client munge) and the rights of
# root. Everything it writes lies in FOLDER; ports are its own. Clients find it by SLURM_CONF=FOLDER/slurm.conf.
# It ends with 3 where it cannot be started, and says why.
set -euo pipefail
what=$1 folder=$2

cannot() { echo "$1"; exit 3; }

stop() {
    for name in slurmd slurmctld munged; do
        [ -s "$folder/$name.pid" ] && kill "$(cat "$folder/$name.pid")" 2>/dev/null || true
    done
}

if [ "$what" = stop ]; then stop; exit 0; fi

export PATH=$PATH:/usr/sbin:/sbin
for program in slurmctld slurmd sbatch squeue munged; do
    command -v "$program" >/dev/null || cannot "$program is not installed"
done
[ "$(id -u)" -eq 0 ] || cannot "only root can start slurmd"

mkdir -p "$folder/state" "$folder/spool" "$folder/munge"
chmod 755 "$folder"
chmod 700 "$folder/munge"
head -c 128 /dev/urandom > "$folder/munge/key"
chmod 400 "$folder/munge/key"
munged --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" --force >/dev/null 2>&1 \
    || cannot "munged did not start: $(tail -n 1 "$folder/munge/log" 2>/dev/null)"

cores=$(nproc) host=$(hostname -s) base=$((20000 + $$ % 20000))
memory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 - 500))
cat > "$folder/slurm.conf" <<CONF
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
SlurmctldPort=$base
SlurmdPort=$((base + 1))
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0,defer_batch=no
JobRequeue=1
KillWait=5
MaxArraySize=101
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory State=UNKNOWN
PartitionName=here Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf
slurmctld -f "$SLURM_CONF" >>"$folder/slurmctld.log" 2>&1 || { stop; cannot "slurmctld did not start: $(tail -n 1 "$folder/slurmctld.log")"; }
slurmd -f "$SLURM_CONF" -N "$host" >>"$folder/slurmd.log" 2>&1 || { stop; cannot "slurmd did not start: $(tail -n 1 "$folder/slurmd.log")"; }
for _ in $(seq 60); do
    if sinfo --noheader --format=%T 2>/dev/null | grep -qE 'idle|mixed'; then exit 0; fi
    sleep 0.5
done
state=$(sinfo --noheader --format='%T %E' 2>&1 | head -n 1)
stop
cannot "the node is not ready: $state; $(tail -n 1 "$folder/slurmd.log")"
