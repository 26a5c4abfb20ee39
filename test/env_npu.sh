#!/usr/bin/env bash
# Ascend's environment, to be sourced: CANN's set_env.sh (test/find_cann.sh finds it) and the settings that training wants.
# docs/ascend.md says of each setting why.
# What the user has set is left as it is. Where there is no CANN, says so in one line and sets nothing.

_cann_env=$(bash "$(dirname "${BASH_SOURCE[0]}")/find_cann.sh") || _cann_env=

if [ -z "$_cann_env" ]; then
    echo "env_npu.sh: no CANN found, Ascend's environment is not set"
else
    _shell_options=$(set +o)
    set +eu  # CANN's script reads variables that may be unset and has commands that may fail
    # shellcheck disable=SC1090
    source "$_cann_env"
    eval "$_shell_options"
    export ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0}  # no device log on the screen
    export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3}          # errors only
    export ASCEND_GLOBAL_EVENT_ENABLE=${ASCEND_GLOBAL_EVENT_ENABLE:-0}
    export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-1}                      # operators are queued asynchronously
    export COMBINED_ENABLE=${COMBINED_ENABLE:-1}                          # non-contiguous views are combined
    # Buckets ask for blocks of many sizes; segments that grow keep the memory from falling into pieces. torch_npu refuses
    # this together with torch's own variable, under which it takes the same settings.
    if [ -z "${PYTORCH_ALLOC_CONF:-}" ]; then
        export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
    fi
    export HCCL_WHITELIST_DISABLE=${HCCL_WHITELIST_DISABLE:-1}
    export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-5400}             # seconds
    # With several machines it must be the address that the others reach: library/processes/launch.py finds it.
    if [ -z "${HCCL_IF_IP:-}" ] && [ "${NNODES:-1}" = 1 ]; then
        _address=$(hostname -I 2>/dev/null | cut -d' ' -f1) || _address=
        if [ -n "$_address" ]; then export HCCL_IF_IP=$_address; fi
    fi
fi
unset _cann_env _shell_options _address
