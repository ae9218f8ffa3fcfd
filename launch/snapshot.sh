# shellcheck shell=bash
# To be sourced by launchers that copy the checkout: `snapshot_tree INCLUDE_UNCOMMITTED` prints the git tree to copy.
#
# Nothing is left out in silence: uncommitted changes end the launch with 2, unless they are to be included; then they
# are listed, and so are the files that git ignores, which are never copied. All of that goes to stderr.

snapshot_tree() {
  local changes ignored index
  changes=$(git status --porcelain)
  if [[ -z $changes ]]; then
    echo "Commit $(git rev-parse --short=12 HEAD)." >&2
    git rev-parse 'HEAD^{tree}'
    return
  fi
  if [[ -z $1 ]]; then
    echo "error: there are uncommitted changes, which the machines would not see: commit them, or give" \
      "--include-uncommitted." >&2
    echo "$changes" >&2
    return 2
  fi
  echo "Commit $(git rev-parse --short=12 HEAD), and these uncommitted changes:" >&2
  echo "$changes" >&2
  ignored=$(git status --porcelain --ignored | sed -n 's/^!! /   /p')
  if [[ -n $ignored ]]; then
    echo "Left out, since git ignores them:" >&2
    echo "$ignored" >&2
  fi
  # An index of its own: that of the checkout stays as it is.
  index=$(mktemp -d)
  GIT_INDEX_FILE=$index/index git read-tree HEAD &&
    GIT_INDEX_FILE=$index/index git add --all &&
    GIT_INDEX_FILE=$index/index git write-tree || return 2
  rm -rf "$index"
}
