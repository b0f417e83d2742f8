#!/usr/bin/env bash
# megatron-core 0.19.2: installed inside a git work tree (a .venv in a project's folder), its
# `__version__` ends with the commit of that project, which has nothing to do with Megatron.
#
# The wheel's package_info asks git in the folder where the module lies. Whoever compares
# `__version__` with "0.19.2", or writes it into a result, gets another text in every project, and a
# new one after every commit there; `importlib.metadata.version` says 0.19.2 always.
#
# Seen:   outside a work tree: 0.19.2
#         inside:              0.19.2+COMMIT, COMMIT being the work tree's HEAD
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
unset GIT_DIR GIT_WORK_TREE
export GIT_CEILING_DIRECTORIES="$place"
mkdir "$place/outside" "$place/project"
python3 -m pip install --quiet --no-deps --ignore-requires-python --target "$place/outside/lib" megatron-core==0.19.2
cp -r "$place/outside/lib" "$place/project/lib"
git -C "$place/project" init --quiet
git -C "$place/project" -c user.name=someone -c user.email=someone@example.org commit --quiet --allow-empty -m "mine"
version() { # FOLDER
    python3 -c 'import runpy, sys; print(runpy.run_path(sys.argv[1] + "/lib/megatron/core/package_info.py")["__version__"])' "$1"
}
outside=$(version "$place/outside")
inside=$(version "$place/project")
commit=$(git -C "$place/project" rev-parse --short HEAD)
echo "outside a work tree: $outside"
echo "inside: $inside (HEAD of the project: $commit)"
[ "$outside" = "0.19.2" ] && [ "$inside" = "0.19.2+$commit" ] || { echo "changed" >&2; exit 1; }
