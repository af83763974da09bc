#!/usr/bin/env bash
# What the images run. Arguments are a command to run instead (`docker run IMAGE shoal serve …`); without any, the
# environment says what this container is: the head of a cluster with a server, or a node that joins a head.
set -euo pipefail

usage() {
  cat <<'TEXT'
A container of Shoal. Arguments are run as a command; without any, these variables count:

  MODEL_PATH               what the head serves: a model's directory, or shoal-tiny
  SERVED_MODEL_NAME        name of the model in the API; several with spaces between them
  TENSOR_PARALLEL_SIZE     ranks that share each layer (default 1)
  PIPELINE_PARALLEL_SIZE   pipeline stages (default 1)
  MAX_MODEL_LEN            longest sequence
  QUANTIZATION             how the weights are quantized, such as gptq_marlin
  GPU_MEMORY_UTILIZATION   share of each GPU's memory, such as 0.9
  PORT                     port of the API (default 8000)
  IP_OF_HEAD_NODE          address of the cluster's head: on the head itself, its own address; on the others, where to
                           join (HOST or HOST:PORT). Not set, or empty: this container is a head
  NUM_NODES                machines that the head waits for before it serves, itself one of them (default 1)
  JOIN_TIMEOUT             seconds that it waits for them (default 600)
  SHOAL_CLUSTER_TOKEN      the same on all; needed to join
  SHOAL_SERVE_ARGS         further flags of `shoal serve`, with spaces between them

All SHOAL_* variables of docs/flags.md count too.
TEXT
}

fail() {
  echo "entrypoint: $*" >&2
  exit 2
}

# $1 must be a whole number from $2 up, when it is set.
check_number() {
  local name=$1 least=$2 value=${!1:-}
  [[ -z $value ]] && return 0
  if [[ ! $value =~ ^[0-9]{1,9}$ ]] || ((10#$value < least)); then
    fail "$name must be a whole number, $least or more; got '$value'"
  fi
}

# Addresses of this container, one a line.
own_addresses() {
  hostname -I 2>/dev/null | tr -s ' ' '\n' | grep . || true
  echo 127.0.0.1
  echo ::1
}

# Every address that a host has, itself if it is an address.
addresses_of() {
  getent ahosts "$1" | awk '{print $1}' | sort -u
}

# The first address of HOST that is one of this container's; nothing where HOST is another machine.
own_of() {
  local address own
  own=$'\n'$(own_addresses)$'\n'
  while read -r address; do
    if [[ $own == *$'\n'"$address"$'\n'* ]]; then
      echo "$address"
      return
    fi
  done < <(addresses_of "$1")
}

# Refuses a head at the loopback where other machines are to join it: there each of them is its own head.
refuse_loopback() {
  local address
  ((10#${NUM_NODES:-1} > 1)) || return 0
  address=$(own_of "$1")
  [[ -n $address ]] || read -r address < <(addresses_of "$1")
  [[ $address != 127.* && $address != ::1 ]] ||
    fail "IP_OF_HEAD_NODE=$IP_OF_HEAD_NODE is $address, each machine itself, and NUM_NODES is $NUM_NODES; give the address" \
      "that the others reach the head at (here: $(hostname -I 2>/dev/null || true))"
}

# Sets `host` and `port` from IP_OF_HEAD_NODE: HOST, HOST:PORT, [v6], [v6]:PORT or a bare v6 address.
split_head() {
  host=$1 port=6379
  if [[ $1 =~ ^\[([^]]+)\](:([0-9]+))?$ ]]; then
    host=${BASH_REMATCH[1]} port=${BASH_REMATCH[3]:-6379}
  elif [[ $1 =~ ^([^:]+):([0-9]+)$ ]]; then
    host=${BASH_REMATCH[1]} port=${BASH_REMATCH[2]}
  fi
  [[ -n $host && $host != *[[:space:]]* ]] || fail "IP_OF_HEAD_NODE must be HOST or HOST:PORT; got '$1'"
}

# Sets `arguments` to the flags of `shoal serve`.
collect_arguments() {
  local name
  arguments=("$MODEL_PATH" --host 0.0.0.0 --port "${PORT:-8000}")
  if [[ -n ${SERVED_MODEL_NAME:-} ]]; then
    read -ra names <<<"$SERVED_MODEL_NAME"
    for name in "${names[@]}"; do arguments+=("--served-model-name=$name"); done
  fi
  arguments+=(${TENSOR_PARALLEL_SIZE:+"--tensor-parallel-size=$TENSOR_PARALLEL_SIZE"})
  arguments+=(${PIPELINE_PARALLEL_SIZE:+"--pipeline-parallel-size=$PIPELINE_PARALLEL_SIZE"})
  arguments+=(${MAX_MODEL_LEN:+"--max-model-len=$MAX_MODEL_LEN"})
  arguments+=(${QUANTIZATION:+"--quantization=$QUANTIZATION"})
  arguments+=(${GPU_MEMORY_UTILIZATION:+"--gpu-memory-utilization=$GPU_MEMORY_UTILIZATION"})
  # Ranks that would fit this machine are to be spread all the same.
  ((10#${NUM_NODES:-1} == 1)) || arguments+=(--distributed-executor-backend=ray)
  if [[ -n ${SHOAL_SERVE_ARGS:-} ]]; then
    read -ra more <<<"$SHOAL_SERVE_ARGS"
    arguments+=("${more[@]}")
  fi
}

check_variables() {
  check_number TENSOR_PARALLEL_SIZE 1
  check_number PIPELINE_PARALLEL_SIZE 1
  check_number MAX_MODEL_LEN 1
  check_number PORT 0
  check_number NUM_NODES 1
  check_number JOIN_TIMEOUT 1
  ((10#${PORT:-8000} <= 65535)) || fail "PORT must be at most 65535; got '$PORT'"
  local share=${GPU_MEMORY_UTILIZATION:-}
  [[ -z $share || $share =~ ^(0?\.[0-9]+|1(\.0*)?)$ ]] ||
    fail "GPU_MEMORY_UTILIZATION must be a share above 0 and at most 1, such as 0.9; got '$share'"
}

# How many nodes Ray can place ranks on now; 0 while that cannot be told.
num_nodes() {
  shoal status --json 2>/dev/null | python3 -c \
    'import json, sys; print(sum(node["is_ray_alive"] is True for node in json.load(sys.stdin)["nodes"]))' 2>/dev/null ||
    echo 0
}

# Until NUM_NODES machines are in the cluster.
wait_for_nodes() {
  local wanted=${NUM_NODES:-1} deadline=$((SECONDS + ${JOIN_TIMEOUT:-600})) found=1 before=0
  while true; do
    ((wanted == 1)) || found=$(num_nodes)
    ((found < wanted)) || return 0
    ((SECONDS < deadline)) || fail "only $found of $wanted nodes (NUM_NODES) are here after ${JOIN_TIMEOUT:-600} s (JOIN_TIMEOUT)"
    ((found == before)) || echo "entrypoint: waiting for nodes: $found of $wanted are here"
    before=$found
    sleep 1
  done
}

# A node of the cluster for as long as the server runs. The first signal goes on to the server, which drains.
serve_as_head() {
  local -a node=(shoal node start --head --port "$port")
  # An address that is named is the one that the others know.
  [[ -z ${IP_OF_HEAD_NODE:-} ]] || node+=(--node-ip "$(own_of "$host")")
  local server='' signalled='' code=0 before
  trap 'shoal node stop || true' EXIT
  # Without a server a signal is the end, as soon as the command that runs has come to its own.
  trap 'signalled=1; [[ -n $server ]] || exit 143; kill -TERM "$server" 2>/dev/null || true' TERM INT HUP
  "${node[@]}"
  wait_for_nodes
  shoal serve "${arguments[@]}" &
  server=$!
  while true; do
    signalled='' before=$code code=0
    wait "$server" || code=$?
    # A signal ends `wait`, too; the server may be draining then.
    [[ -n $signalled ]] || break
  done
  # 127: its end had been seen already, as the signal came.
  ((code != 127)) || code=$before
  exit "$code"
}

main() {
  if (($#)); then
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      -*) fail "a command is expected, such as 'shoal serve …'; got '$1' (--help shows the variables)" ;;
    esac
    exec "$@"
  fi

  check_variables
  local host=127.0.0.1 port=6379
  local -a arguments=()
  [[ -z ${IP_OF_HEAD_NODE:-} ]] || split_head "$IP_OF_HEAD_NODE"
  if [[ -n ${IP_OF_HEAD_NODE:-} ]]; then
    [[ -n $(addresses_of "$host") ]] || fail "IP_OF_HEAD_NODE: the name '$host' does not resolve here"
    refuse_loopback "$host"
    if [[ -z $(own_of "$host") ]]; then
      [[ -n ${SHOAL_CLUSTER_TOKEN:-} || -r ${HOME:-/}/.shoal/cluster-token ]] ||
        fail "SHOAL_CLUSTER_TOKEN is not set: the head prints it (docker logs), and all nodes need the same"
      [[ $host == *:* ]] && host="[$host]"
      exec shoal node start --address "$host:$port" --block
    fi
  fi

  [[ -n ${MODEL_PATH:-} ]] || fail "MODEL_PATH is not set, so there is nothing to serve (--help shows the variables)"
  [[ $MODEL_PATH != /* || -e $MODEL_PATH ]] ||
    fail "MODEL_PATH=$MODEL_PATH does not exist in the container; mount it: docker run -v /path/here:$MODEL_PATH:ro"
  collect_arguments
  serve_as_head
}

main "$@"
