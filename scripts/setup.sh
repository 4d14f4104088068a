# Sourced by the other scripts: creates .venv and installs the requirement files given as arguments,
# with $PYTHON or else python3 (3.11 or newer), and with requirements.txt this project, editable.
# Does nothing if they are installed already.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
print_version='import sys
print("%d.%d" % sys.version_info[:2])
sys.exit(sys.version_info < (3, 11))'
if ! version=$("$python" -c "$print_version" 2>/dev/null); then
    found=${version:+Python $version}
    echo "error: $python: expected Python 3.11 or newer, got ${found:-one that does not run}." \
        "Install it, or name one: PYTHON=/path/to/python3.12 bash $0" >&2
    exit 1
fi
# a .venv whose creation was interrupted has no working pip and is created again
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    rm -rf .venv
    echo "creating .venv with Python $version"
    "$python" -m venv .venv
fi

project=
[[ " $* " == *" requirements.txt "* ]] && project="-e ."
requested=$(cat pyproject.toml "$@" | cksum)
stamp=.venv/.installed-$(echo "$*" | cksum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" != "$requested" ]; then
    echo "installing $* into .venv (some 2.5 GB, a few minutes the first time)"
    files=$(printf -- '-r %s ' "$@")
    .venv/bin/python -m pip install --quiet --disable-pip-version-check $files $project &
    pip=$!
    trap 'kill $pip 2>/dev/null' EXIT
    while kill -0 $pip 2>/dev/null; do
        sleep 5 & wait $!
        kill -0 $pip 2>/dev/null || break
        echo "  installing, $((SECONDS)) s, $(du -sm .venv | cut -f1) MB so far"
    done
    wait $pip
    trap - EXIT
    echo "$requested" >"$stamp"
fi
export DO_NOT_TRACK=1 TOKENIZERS_PARALLELISM=true
