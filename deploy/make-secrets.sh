#!/bin/sh
# Makes the passwords the compose file mounts, once, in a folder only its owner can enter.
set -eu
folder=${1:-deploy/secrets}
umask 077
mkdir -p "$folder"
for service in order mail; do
    [ -f "$folder/${service}_database_url" ] && continue
    password=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
    printf %s "$password" > "$folder/${service}_db_password"
    printf 'postgresql://%s_service:%s@%s-db:5432/%s_service' \
        "$service" "$password" "$service" "$service" > "$folder/${service}_database_url"
    # The containers' users are others than the files' owner.
    chmod 444 "$folder/${service}_db_password" "$folder/${service}_database_url"
done
