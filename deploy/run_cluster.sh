#!/usr/bin/env bash
# One machine of a cluster, in a container: the same command on each, with --head on the first.
#
#   deploy/run_cluster.sh IMAGE HEAD_IP --head|--worker HF_HOME [docker args…]
#
# The head prints the command for the others, with the token. Ctrl-C, SIGTERM and the end of the terminal stop the
# container and remove it. A model is served from the head's container: docker exec -it shoal-head shoal serve MODEL …
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: deploy/run_cluster.sh IMAGE HEAD_IP --head|--worker HF_HOME [docker args…]

  IMAGE      an image with Shoal, such as deploy/docker/ makes
  HEAD_IP    address of the head, the same on all machines; on the head one of its own
  --head     this machine begins the cluster; --worker: it joins
  HF_HOME    directory of this machine with the Hugging Face cache; it is /hf in the container
  the rest   goes to `docker run`, such as --gpus all, -v /models:/models:ro, -e NCCL_SOCKET_IFNAME=eth0

environment:
  SHOAL_CLUSTER_TOKEN   the cluster's token: needed with --worker; with --head one is made unless it is set
  CONTAINER_NAME        default: shoal-head, or shoal-worker
  HEAD_PORT             default: 6379
  SHM_SIZE              gives the container a /dev/shm of its own, such as 16g; default: the machine's (--ipc=host)
TEXT
}

fail() {
  echo "run_cluster.sh: $*" >&2
  exit 2
}

# Whether $1 is written as an IPv4 or IPv6 address.
is_address() {
  local part
  if [[ $1 =~ ^[0-9]{1,3}(\.[0-9]{1,3}){3}$ ]]; then
    for part in ${1//./ }; do ((10#$part <= 255)) || return 1; done
    return 0
  fi
  [[ $1 =~ ^[0-9a-fA-F:.]+$ && $1 == *:*:* ]]
}

is_loopback() {
  [[ $1 == 127.* || $1 == ::1 ]]
}

# Whether this machine has the address $1.
is_own() {
  local own
  own=" $(hostname -I 2>/dev/null || true) "
  [[ $own == *" $1 "* ]]
}

new_token() {
  od -An -N32 -tx1 /dev/urandom | tr -d ' \n'
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  usage
  exit 0
fi
if (($# < 4)); then
  usage >&2
  fail "IMAGE, HEAD_IP, --head or --worker, and HF_HOME are needed; got $# of these"
fi
image=$1 head_ip=$2 role=$3 hf_home=$4
shift 4

[[ -n $image && $image != -* && $image != *[[:space:]]* ]] || fail "IMAGE must name an image; got '$image'"
is_address "$head_ip" || fail "HEAD_IP must be an address, such as 10.0.0.1; got '$head_ip'"
! is_loopback "$head_ip" || fail "HEAD_IP $head_ip is each machine itself; give the address that the others reach the head at"
[[ $role == --head || $role == --worker ]] || fail "the third argument must be --head or --worker; got '$role'"
[[ $hf_home == /* ]] || fail "HF_HOME must be an absolute path; got '$hf_home'"
# docker takes a colon for the end of a volume's path.
[[ $hf_home != *:* ]] || fail "HF_HOME must have no ':' in it, since docker cuts volumes there; got '$hf_home'"
[[ -d $hf_home ]] || fail "HF_HOME: there is no directory $hf_home on this machine (mkdir -p makes it)"
for argument in "$@"; do
  # Short flags without a value may stand together: -itd.
  if [[ $argument =~ ^-[iPqt]*d ]]; then
    fail "$argument: this script waits for the container, to clean up after it; leave -d out"
  fi
  if [[ $argument == --ipc || ($argument == --ipc=* && $argument != --ipc=host) ]] && [[ -z ${SHM_SIZE:-} ]]; then
    fail "$argument: the ranks of the machine share its /dev/shm (--ipc host); SHM_SIZE=16g gives the container its own"
  fi
  case $argument in
    --name | --name=*) fail "the container's name is CONTAINER_NAME=…, not $argument: cleaning up needs it" ;;
    --detach | --detach=*) fail "$argument: this script waits for the container, to clean up after it" ;;
    --network | --network=* | --net | --net=*) fail "$argument: the nodes need the machine's own network (--network host)" ;;
  esac
done
port=${HEAD_PORT:-6379}
if [[ ! $port =~ ^[0-9]{1,5}$ ]] || ((10#$port < 1 || 10#$port > 65528)); then
  fail "HEAD_PORT must be a port from 1 to 65528; got '$port'"
fi
name=${CONTAINER_NAME:-shoal-${role#--}}
[[ $name =~ ^[a-zA-Z0-9][a-zA-Z0-9_.-]*$ ]] || fail "CONTAINER_NAME must be letters, digits, _ . and -; got '$name'"
command -v docker >/dev/null || fail "there is no docker on this machine's PATH"

token=${SHOAL_CLUSTER_TOKEN:-}
if [[ -n $token ]]; then
  [[ $token =~ ^[[:graph:]]{16,}$ ]] || fail "SHOAL_CLUSTER_TOKEN must be 16 or more characters without spaces"
elif [[ $role == --worker ]]; then
  fail "SHOAL_CLUSTER_TOKEN is not set: the head printed it with the command for its workers"
else
  token=$(new_token)
fi
if [[ $role == --head ]]; then
  is_own "$head_ip" ||
    fail "HEAD_IP $head_ip is no address of this machine, which is to be the head; it has: $(hostname -I || true)"
  node=(shoal node start --head --node-ip "$head_ip" --port "$port" --block)
else
  ! is_own "$head_ip" || fail "HEAD_IP $head_ip is an address of this machine: start it with --head, or name another head"
  endpoint=$head_ip
  [[ $head_ip != *:* ]] || endpoint="[$head_ip]"
  node=(shoal node start --address "$endpoint:$port" --block)
fi
if docker container inspect "$name" >/dev/null 2>&1; then
  fail "there is a container $name already: docker rm -f $name removes it, CONTAINER_NAME=… takes another name"
fi

if [[ -n ${SHM_SIZE:-} ]]; then
  [[ $SHM_SIZE =~ ^[0-9]+[bkmgBKMG]?$ ]] || fail "SHM_SIZE must be a size such as 16g; got '$SHM_SIZE'"
  memory=(--shm-size "$SHM_SIZE")
else
  memory=(--ipc host)
fi

# The container may have ended by itself; then there is nothing left to do.
# shellcheck disable=SC2317,SC2329
clean_up() {
  trap '' INT TERM HUP
  docker stop --time 30 "$name" >/dev/null 2>&1 || true
  docker rm --force "$name" >/dev/null 2>&1 || true
  if [[ -n ${client:-} ]]; then
    wait "$client" 2>/dev/null || true
  fi
}
trap clean_up EXIT
trap 'exit 143' TERM HUP
trap 'exit 130' INT

if [[ $role == --head ]]; then
  printf '%s\n' "On each of the other machines:" "" \
    "  SHOAL_CLUSTER_TOKEN=$token $0 $image $head_ip --worker HF_HOME [docker args…]" ""
fi

# The token goes by the environment: what stands on a command line is seen by everybody on the machine. A child of its
# own, so that signals reach this script at once.
export SHOAL_CLUSTER_TOKEN=$token
docker run --name "$name" --network host "${memory[@]}" --ulimit memlock=-1 --ulimit nofile=1048576 \
  --env SHOAL_CLUSTER_TOKEN --env HF_HOME=/hf --volume "$hf_home:/hf" \
  "$@" "$image" "${node[@]}" &
client=$!
code=0
wait "$client" || code=$?
exit "$code"
