#!/usr/bin/env bash
# Prints the path of CANN's set_env.sh; status 1, and nothing, where there is none.
#
# It looks where the environment says (ASCEND_HOME_PATH, ASCEND_TOOLKIT_HOME), where the installer has noted it
# (/etc/Ascend/ascend_cann_install.info), in $HOME/Ascend and in /usr/local/Ascend, in this order. CANN 8.5 and later are
# in a folder cann, earlier ones in ascend-toolkit or, the part for running alone, in nnae.
set -u
install_info=${ASCEND_INSTALL_INFO:-/etc/Ascend/ascend_cann_install.info}  # another file in tests

show_if_there() {
    local candidate
    for candidate in "$@"; do
        if [ -f "$candidate" ]; then readlink -f "$candidate"; exit 0; fi
    done
}

in_folder() {
    if [ -n "$1" ]; then show_if_there "$1"/{cann,ascend-toolkit,nnae}/set_env.sh "$1/set_env.sh"; fi
}

for home in "${ASCEND_HOME_PATH:-}" "${ASCEND_TOOLKIT_HOME:-}"; do
    if [ -n "$home" ]; then show_if_there "$home/set_env.sh" "$home/../set_env.sh"; fi
done
if [ -r "$install_info" ]; then
    while IFS== read -r name folder; do
        if [[ "$name" == *Install_Path* ]]; then in_folder "${folder%$'\r'}"; fi
    done < "$install_info"
fi
in_folder "${HOME:+$HOME/Ascend}"
in_folder "${ASCEND_DEFAULT_FOLDER-/usr/local/Ascend}"  # another folder in tests
exit 1
