#!/usr/bin/env bash
# Ascend's environment, to be sourced: CANN's set_env.sh from the usual places and the settings that training wants.
# What the user has set is left as it is. Where there is no CANN, says so in one line and sets nothing.

_cann_env=
for _candidate in \
    "${ASCEND_TOOLKIT_HOME:+$ASCEND_TOOLKIT_HOME/set_env.sh}" \
    "${ASCEND_TOOLKIT_HOME:+$ASCEND_TOOLKIT_HOME/../set_env.sh}" \
    /usr/local/Ascend/ascend-toolkit/set_env.sh \
    /usr/local/Ascend/cann/set_env.sh \
    /usr/local/Ascend/nnae/set_env.sh \
    "$HOME/Ascend/ascend-toolkit/set_env.sh" \
    "$HOME/Ascend/cann/set_env.sh"; do
    if [ -n "$_candidate" ] && [ -f "$_candidate" ]; then _cann_env=$_candidate; break; fi
done

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
    export HCCL_WHITELIST_DISABLE=${HCCL_WHITELIST_DISABLE:-1}
    export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-5400}             # seconds
    # With several machines it must be the address that the others reach: library/processes/launch.py finds it.
    if [ -z "${HCCL_IF_IP:-}" ] && [ "${NNODES:-1}" = 1 ]; then
        _address=$(hostname -I 2>/dev/null | cut -d' ' -f1) || _address=
        if [ -n "$_address" ]; then export HCCL_IF_IP=$_address; fi
    fi
    if [ "${NNODES:-1}" -gt 1 ]; then
        export HCCL_BUFFSIZE=${HCCL_BUFFSIZE:-50}                         # MB
        export MULTI_STREAM_MEMORY_REUSE=${MULTI_STREAM_MEMORY_REUSE:-1}
    fi
fi
unset _cann_env _candidate _shell_options _address
