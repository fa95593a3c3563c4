#!/bin/sh
# Applies each service's migrations to an empty database and compares the tables with the models.
# Both need their whole environment to start; only the database is used.
set -eu
export APP_ENV=test KAFKA_BOOTSTRAP_SERVERS=unused:9092
export AUTH_ISSUER=unused AUTH_AUDIENCE=unused AUTH_JWKS=unused
export SMTP_HOST=unused MAIL_FROM=unused@example.com MAIL_ONLY_TO=unused@example.com SHOP_NAME=unused SHOP_URL=http://unused.example
for service in order mail; do
    if [ "$service" = order ]; then DATABASE_URL=$ORDER_DATABASE_URL; else DATABASE_URL=$MAIL_DATABASE_URL; fi
    export DATABASE_URL
    ".venv/$service/bin/$service-service" migrate
    ".venv/$service/bin/$service-service" migrate --check
done
