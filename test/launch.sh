#!/usr/bin/env bash
# What all launchers share: arguments, environment, log, start, signals, exit status. It knows no model and no script.
# A launcher sources it, states its settings and ends with launch "$@":
#
#   source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
#   script=train_something.py                           # in the root of the repository
#   argument batch_size 4 --train_batch_size            # --batch_size=N, 4 by default: --train_batch_size=N
#   path_argument model_name "" --pretrained_model_name_or_path
#   takes_processes 8                                   # or takes_machines 8; neither: one process, no torchrun
#   settings() { flags=(--seed=1); }                    # further flags, made when the arguments are known
#   launch "$@"
#
# A launcher that takes --demo defines demo_settings (defaults, by demo_default), build_demo (by build_part) and
# judge_demo. All these functions see the arguments, $processes, $output_dir, $demo and, in the demo, $demo_dir.
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

script=                     # what the launcher starts
flags=()                    # of the script, beside those of the arguments
demo=0
by_torchrun=0               # 0: one process, without torchrun
nnodes=1 nproc_per_node=1 node_rank=0 master_ip="" master_port=8989 start_timeout=600

known_arguments=()          # in the order of --help
declare -A flag_of=()       # the script's flag that an argument sets
declare -A argument_of=()   # the argument that sets a flag of the script
declare -A default_of=()
paths=" "                   # arguments that may be paths
given=" "                   # arguments that the user gave
left_out=()                 # names of the launcher's own flags that the user does not want
passed_on=()                # what the user gave after --

problems=()                 # what is wrong with the arguments, a sentence each

fail() { echo "$(basename "$0"): $1" >&2; exit 2; }

# A word as messages show it: of an address what library/redaction.py shows, or less.
shown() {
    local before="" text=$1 rest
    if [[ $text == --*=* ]]; then before=${text%%=*}= text=${text#*=}; fi
    case $text in
        pipe:*) text="pipe:…" ;;
        *://*)
            rest=${text#*://}
            if [[ ${rest%%[?#]*} == *@* ]]; then rest=${rest%%[?#]*} rest=${rest##*@}; fi
            if [[ $rest == *@* ]]; then rest="…"; fi  # in a query string, or behind a password with a question mark
            text=${text%%://*}://${rest%%[?#]*}
            ;;
    esac
    printf %s "$before$text"
}

# Takes note of something that is wrong with the arguments; all of it is said at once.
wrong() { problems+=("$1"); }

say_what_is_wrong() {
    local problem
    if [ ${#problems[@]} = 0 ]; then return; fi
    for problem in "${problems[@]}"; do echo "$(basename "$0"): $problem" >&2; done
    if [[ "${problems[*]}" == *"unknown argument"* ]]; then
        echo "$(basename "$0"): arguments are$(has_demo && echo " --demo and") --NAME=VALUE for: ${known_arguments[*]}" >&2
    fi
    exit 2
}

# argument NAME DEFAULT [FLAG ...]: --NAME=VALUE, the script's first FLAG; the others are aliases of that one.
argument() {
    local name=$1 default=$2 flag
    shift 2
    known_arguments+=("$name")
    printf -v "$name" %s "$default"
    default_of[$name]=$default
    flag_of[$name]=${1:-}
    for flag in "$@"; do argument_of[$flag]=$name; done
}

# An argument whose value is a path where there is one of that name, and else, for example, a hub name.
path_argument() {
    argument "$@"
    paths+="$1 "
}

takes_processes() {
    by_torchrun=1
    argument nproc_per_node "$1"    # processes on a machine, one a device
}

takes_machines() {
    takes_processes "$1"
    argument nnodes 1               # machines
    argument node_rank 0            # this machine's number
    argument master_ip ""           # of machine 0
    argument master_port 8989
    argument start_timeout 600      # seconds that the machines wait for each other
}

# What every launcher takes.
path_argument output_dir "" --output_dir    # test/output/DEVICE_ID if not given
path_argument resume "" --resume            # auto, or the folder of a training state

has_demo() { declare -F demo_settings >/dev/null; }

is_given() { [[ "$given" == *" $1 "* ]]; }

is_known() { [[ " ${known_arguments[*]} " == *" $1 "* ]]; }

parse_arguments() {
    local word name names value
    while [ $# -gt 0 ]; do
        word=$1
        shift
        case $word in
            --) take_passed_on "$@"; return ;;
            --help | -h) usage; exit 0 ;;
            --demo) if has_demo; then demo=1; else wrong "--demo: there is none for $script"; fi ;;
            --demo=*) wrong "$word: --demo takes no value" ;;
            --without=?*) IFS=, read -ra names <<< "${word#*=}"; left_out+=("${names[@]}") ;;
            --without | --without=) wrong "$word needs names: --without=NAME[,NAME ...]" ;;
            --*=*)
                name=${word%%=*}
                if is_known "${name#--}"; then
                    set_argument "${name#--}" "${word#*=}"
                else
                    wrong "$(unknown_argument "$name")"
                fi
                ;;
            --*)
                value=
                if [[ $# -gt 0 && "$1" != -* ]]; then value=$1; shift; fi
                if ! is_known "${word#--}"; then
                    wrong "$(unknown_argument "$word")"
                elif [ -n "$value" ]; then
                    wrong "$word $(shown "$value"): write $word=$(printf %q "$(shown "$value")")"
                else
                    wrong "$word needs a value: $word=VALUE"
                fi
                ;;
            *) wrong "$(unknown_argument "$word")" ;;
        esac
    done
}

# Says that the launcher does not take a name; where it is the script's, with the way to give it.
unknown_argument() {
    local own=${argument_of[$1]:-}
    local hint="flags of $script itself stand at the end, after --"
    if [ -n "$own" ]; then hint="$script's $1 is --$own=VALUE here"; fi
    echo "unknown argument $(shown "$1"); $hint"
}

set_argument() {
    printf -v "$1" %s "$(from_callers_folder "$1" "$2")"
    given+="$1 "
}

# A path that is relative to where the user stands, made absolute; what is no path there (a hub name) stays as it is.
from_callers_folder() {
    local is_path=0
    if [ "$1" = output_dir ] || [[ "$paths" == *" $1 "* && -e "$caller/$2" ]]; then is_path=1; fi
    if [[ $is_path = 1 && -n "$2" && "$2" != /* ]]; then printf %s "$caller/$2"; else printf %s "$2"; fi
}

# What follows -- goes to the script as it is. A flag that is an argument's, too, sets that argument, for the launcher
# derives other things from it: the name of the case, or whether the length is given in steps or in epochs.
take_passed_on() {
    local number flag
    passed_on=("$@")
    [[ $# = 0 || "$1" == -* ]] || wrong "$1: what follows -- starts with a flag of $script, such as --seed=1"
    for ((number = 0; number < $#; number++)); do
        flag=${passed_on[number]%%=*}
        [ -n "$flag" ] && [ -n "${argument_of[$flag]:-}" ] || continue
        if [ "$flag" = --output_dir ]; then
            wrong "--output_dir=FOLDER stands before --: the log is written there, too"
            continue
        fi
        if [[ "${passed_on[number]}" == *=* ]]; then
            set_argument "${argument_of[$flag]}" "${passed_on[number]#*=}"
        elif [ $((number + 1)) -lt $# ]; then
            set_argument "${argument_of[$flag]}" "${passed_on[number + 1]}"
        fi  # otherwise the script says that a value is missing
    done
}

usage() {
    local name
    echo "usage: bash test/$(basename "$0") [--NAME=VALUE ...] [--without=NAME,...] [-- FLAG ...]"
    if has_demo; then
        echo "  --demo  builds a small model and data set offline, trains in minutes, judges the pictures"
    fi
    for name in "${known_arguments[@]}"; do echo "  --$name=$(shown "${!name}")"; done
    echo "What follows -- goes to $script as it is and takes the place of the launcher's own flags:"
    echo "  bash test/$(basename "$0") --output_dir=out -- --learning_rate=1e-5 --optimizer_args \"weight_decay=0.1\""
    echo "--without leaves own flags of the launcher out, such as switches, which nothing else turns off."
}

# Takes note where an argument is no whole number in MIN .. MAX (no bound where MAX is empty); it is MIN from then on, so
# that the other arguments can be judged.
check_number() {
    local name=$1 minimum=$2 maximum=$3 value=${!1} problem=
    if [[ ! $value =~ ^(0|[1-9][0-9]{0,8})$ ]]; then
        problem="must be a whole number"
    elif [ "$value" -lt "$minimum" ]; then
        problem="must be at least $minimum"
    elif [ -n "$maximum" ] && [ "$value" -gt "$maximum" ]; then
        problem="must be at most $maximum${4:+ ($4)}"
    fi
    if [ -z "$problem" ]; then return; fi
    wrong "--$name=$value: $problem"
    printf -v "$name" %s "$minimum"
}

check_machines() {
    check_number nproc_per_node 1 ""
    check_number nnodes 1 ""
    check_number node_rank 0 $((nnodes - 1)) "the machines of --nnodes=$nnodes are 0 to $((nnodes - 1))"
    check_number master_port 1 65535
    check_number start_timeout 1 ""
    if [ "$nnodes" = 1 ]; then
        if [ -n "$master_ip" ] && ! is_given nnodes; then wrong "--master_ip without --nnodes: how many machines are there?"; fi
        return
    fi
    if [ -z "$master_ip" ]; then wrong "--nnodes=$nnodes needs --master_ip=ADDRESS, machine 0's, the same on all machines"; fi
    if ! is_given node_rank; then
        wrong "--nnodes=$nnodes needs --node_rank=NUMBER, 0 to $((nnodes - 1)), another on each machine"
    fi
}

# Sets a default that holds in the demo only, unless the user gave the argument.
demo_default() { is_given "$1" || printf -v "$1" %s "$2"; }

# Reads the arguments into the output folder, the log's stem and the script's command line ($train); starts nothing.
resolve() {
    local device_id=${ASCEND_DEVICE_ID:-${DEVICE_ID:-0}}
    parse_arguments "$@"
    check_machines
    processes=$((nnodes * nproc_per_node))
    if [ "$demo" = 1 ]; then
        demo_dir=${output_dir:-$root/test/output/demo}
        output_dir=$demo_dir/$device_id
        demo_settings
    fi
    output_dir=${output_dir:-$root/test/output/$device_id}
    # Machines that share the folder write logs of their own.
    log_stem=$output_dir/train_$device_id
    if [ "$node_rank" != 0 ]; then log_stem+=.node$node_rank; fi
    settings
    script_flags
    say_what_is_wrong
}

# The script's flags, into $train: those of the arguments, the launcher's own, and last, so that they win, the user's.
script_flags() {
    local name flag not_given="" names_given=()
    train=()
    for name in "${known_arguments[@]}"; do
        flag=${flag_of[$name]}
        if [ -z "$flag" ]; then continue; fi
        # An empty value says "none" where that is the default; elsewhere the script judges it.
        if [ -n "${!name}" ] || { is_given "$name" && [ -n "${default_of[$name]}" ]; }; then
            train+=("$flag=$(from_the_root "$name")")
        fi
    done
    train+=("${flags[@]}")
    for name in "${left_out[@]}"; do leave_out "--${name#--}"; done
    if [ -n "$not_given" ]; then wrong "--without=${not_given# --}: the launcher gives no$not_given; it gives ${names_given[*]}"; fi
    train+=("${passed_on[@]}")
}

# An argument's value; a default that is a path in the repository is made absolute: the script runs where the user is.
from_the_root() {
    local value=${!1}
    if [[ "$paths" == *" $1 "* && -n "$value" && "$value" != /* && -e "$root/$value" ]] && ! is_given "$1"; then
        value=$root/$value
    fi
    printf %s "$value"
}

# Takes a flag and its values out of $train.
leave_out() {
    local word kept=() inside=0 found=0
    names_given=()
    for word in "${train[@]}"; do
        if [[ "$word" == --* ]]; then
            names_given+=("${word%%=*}")
            if [ "${word%%=*}" = "$1" ]; then inside=1 found=1; else inside=0; fi
        fi
        if [ "$inside" = 0 ]; then kept+=("$word"); fi
    done
    if [ "$found" = 0 ]; then not_given+=" $1"; fi
    train=("${kept[@]}")
}

# build_part NAME TOOL: builds a part of the demo with a tool, unless it is there as the files of the tool's folder make
# it. It is built aside and renamed, so that machines that share the folder may do it at once: the first one's stays.
build_part() {
    local target=$demo_dir/$1 made_by aside tools earlier
    readarray -t tools < <(find "$(dirname "$2")" -maxdepth 1 -type f ! -name "*.md" | sort)
    made_by=$(cat "${tools[@]}" | sha256sum | cut -d' ' -f1)
    if [ "$(cat "$target/.made_by" 2>/dev/null)" = "$made_by" ]; then return; fi
    if [ -e "$target" ] && [ ! -e "$target/.made_by" ]; then
        fail "--output_dir=$demo_dir: $target is none of the demo's, which makes its $1 there; choose another folder"
    fi
    echo "building the demo's $1 in $target"
    mkdir -p "$demo_dir"
    aside=$(mktemp -d "$demo_dir/.$1.XXXXXX")
    chmod 755 "$aside"
    "$python" "$2" --out "$aside" | sed "s#$aside#$target#"
    echo "$made_by" > "$aside/.made_by"
    if [ -e "$target/.made_by" ] && [ "$(cat "$target/.made_by")" != "$made_by" ]; then
        earlier=$target.$(date +%Y%m%d_%H%M%S)
        mv -T "$target" "$earlier" 2>/dev/null && echo "the demo's $1 of another version is kept in $earlier"
    fi
    mv -T "$aside" "$target" 2>/dev/null || rm -rf "$aside"
    [ -e "$target/.made_by" ] || fail "$target cannot be made"
}

# Opens the log: anew, or at its end where a run is resumed. Fails, and leaves it as it is, where another run writes in
# the folder. The log stays locked as long as anything writes to it: also after the launcher, but not the trainer, was
# killed. The log of an earlier run is kept under another name where a run begins anew.
open_log() {
    local log=$1
    if [ -L "$log" ]; then fail "--output_dir=$output_dir: $(basename "$log") is a link; remove it"; fi
    { mkdir -p "$output_dir" && : >> "$log"; } 2>/dev/null || fail "--output_dir=$output_dir: cannot be written"
    exec {log_lock}>> "$log"
    if is_locked "$log_lock"; then in_use "another start writes $(basename "$log")"; fi
    if [ -r "$output_dir/.lock" ]; then  # of library/training/state/run_lock.py; the file stays when a run has ended
        if is_locked -s "$output_dir/.lock" true; then
            in_use "another run writes there ($(tr -d '{}"' < "$output_dir/.lock"))"
        fi
    fi
    if [ -z "$resume" ] && [ -s "$log" ]; then
        cp -p "$log" "${log%.log}.until_$(date -r "$log" +%Y%m%d_%H%M%S).log" || fail "--output_dir=$output_dir: is full"
        : > "$log"
    fi
}

in_use() { fail "--output_dir=$output_dir: $1. Wait for it, end it, or choose another folder."; }

# is_locked ARGUMENTS_OF_FLOCK: whether another process has the lock. On a file system without locks none has.
is_locked() {
    local status=0
    flock -n -E 75 "$@" 2>/dev/null || status=$?
    [ "$status" = 75 ]
}

# run_logged LOG FOLDER COMMAND: runs a command in a folder; its output goes to the open log and to the screen. Ends
# with its status. The command has a process group of its own and gets SIGTERM, Ctrl-C and SIGHUP from here, so that each
# comes once: the trainer saves at the first one and ends at once at a second one. The log has what it says then, too.
run_logged() {
    local log=$1 folder=$2 logger child name status=0
    shift 2
    exec 3> >(trap "" INT TERM HUP; exec tee -a "$log")
    logger=$!
    set -m  # a background command then has its own process group, and does not ignore Ctrl-C
    (trap - INT TERM HUP; cd "$folder"; exec "$@") >&3 2>&1 3>&- {log_lock}>&- &
    child=$!
    set +m
    exec 3>&-
    for name in TERM INT HUP; do
        # shellcheck disable=SC2064
        trap "kill -$name $child 2>/dev/null || true" "$name"
    done
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do status=0; wait "$child" || status=$?; done  # a signal ends `wait`, too
    trap - INT TERM HUP
    wait "$logger" || true
    return "$status"
}

# Trains and, in the demo, judges. Ends with the trainer's exit status: that of the first process that failed.
launch() {
    local command folder=$caller status=0
    resolve "$@"
    python=$(bash test/setup_env.sh | tail -n 1)
    # The card that DEVICE_ID names is the one that trains, unless the user has chosen the visible ones.
    if [ "$nnodes" = 1 ] && [ "$nproc_per_node" = 1 ] && [ -n "${ASCEND_DEVICE_ID:-}" ]; then
        export ASCEND_RT_VISIBLE_DEVICES=${ASCEND_RT_VISIBLE_DEVICES:-$ASCEND_DEVICE_ID}
    fi
    export NNODES=$nnodes
    # shellcheck source=test/env_npu.sh
    source test/env_npu.sh
    open_log "$log_stem.log"
    if [ "$demo" = 1 ]; then
        # The demo's layers are too small to share: on a busy machine OpenMP's threads wait for each other, many times
        # as long as they compute (docs/measurements/demo.md).
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
        build_demo
    fi
    export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
    export WORKER_LOG=$log_stem  # the script writes nothing under the logs' names (library/training/written_names.py)
    LAUNCHER_COMMAND=$(printf "%q " bash "$0" "$@")  # what the script shows, with --resume=auto, when it was stopped
    export LAUNCHER_COMMAND
    command=("$python")
    if [ "$by_torchrun" = 1 ]; then
        folder=$root  # for the module; the script runs in the user's
        # The launcher needs no device: torch_npu, which torch loads by itself, would take seconds and memory of it. The
        # processes that train load it.
        command=(
            env "WORKER_DEVICE_AUTOLOAD=${TORCH_DEVICE_BACKEND_AUTOLOAD:-1}" TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$python"
            -m library.processes.launch --nnodes="$nnodes" --nproc_per_node="$nproc_per_node" --node_rank="$node_rank"
            --master_ip="$master_ip" --master_port="$master_port" --start_timeout="$start_timeout" --log="$log_stem"
            --working_dir="$caller" --
        )
        echo "log: $log_stem.log, those of the other processes beside it: $(basename "$log_stem").rank1.log and so on"
    fi
    run_logged "$log_stem.log" "$folder" "${command[@]}" "$root/$script" "${train[@]}" || status=$?
    if [ "$status" != 0 ]; then
        if [ "$by_torchrun" = 0 ]; then
            echo "$(basename "$0"): training failed with exit status $status; log: $log_stem.log" >&2
        fi  # otherwise what failed first has been said last
        return "$status"
    fi
    if [ "$demo" = 1 ] && [ "$node_rank" = 0 ]; then judge_demo; fi
}
