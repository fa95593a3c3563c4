#!/usr/bin/env bash
# Builds every image docker-compose.yml needs where no registry answers; names come from the
# variables the compose file reads.
set -euo pipefail
cd "$(dirname "$0")"
./base.sh "${PYTHON_IMAGE:?}"
docker compose build --quiet
